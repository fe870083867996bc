"""The parity report as one HTML page: no script, no font, nothing to load."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from .compare import QUANTILES, Comparison, format_error
from .report_plot import error_plot

if TYPE_CHECKING:
    from .report import ParityReport, StepComparison

_FAILURES_SHOWN = 8
_METHOD = (
    "Error is max|a − b| / max|b|, over every value of every sample, a the engine's "
    "and b the reference's."
)


@dataclass(frozen=True)
class ShownPictures:
    """PNG files' bytes for the page, one of each list per sample shown."""

    names: Sequence[str]
    reference: Sequence[bytes]
    engine: Sequence[bytes]
    difference: Sequence[bytes]
    amplification: int
    differ: bool
    total: int


def parity_page(report: ParityReport, pictures: ShownPictures) -> str:
    """The whole page, as text."""
    sections = [
        _verdict(report),
        _section("Pictures", _pictures(pictures)),
        _section("Error against step", error_plot(report)) if report.per_step else "",
        _section("Numbers", _numbers(report)),
        _section("Identity", _identity(report)) if report.identity else "",
        _section("What ran where", _subject(report)),
        _all_rows(report.per_step),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_word(report)}: {escape(report.title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _word(report: ParityReport) -> str:
    return "PASS" if report.passed else "FAIL"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "numbers"
) -> str:
    """A table whose first column names the rows; cells are escaped here."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for name, *cells in rows
    )
    head_html = f"<thead><tr>{top}</tr></thead>\n" if head else ""
    return (
        f'<div class="wide"><table class="{kind}">\n{head_html}'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _verdict(report: ParityReport) -> str:
    tolerances, worst = report.tolerances, report.worst_step
    limits = f"{format_error(tolerances.trajectory)} along a trajectory"
    if any(step.single for step in report.per_step):
        limits = f"{format_error(tolerances.step)} for one step and {limits}"
    if report.passed:
        largest = max(report.final.max_rel, worst.state.max_rel if worst else 0)
        over = f"over {len(report.per_step)} table rows " if worst else ""
        text = (
            f"<p>Engine and reference agree. The largest error {over}is "
            f"<strong>{format_error(largest)}</strong>; the tolerance is {limits}.</p>"
        )
    else:
        rest = len(report.failures) - _FAILURES_SHOWN
        items = [*report.failures[:_FAILURES_SHOWN]]
        items += [f"and {rest} more, in parity.json"] if rest > 0 else []
        text = (
            "<p>Engine and reference do not agree within the tolerance of "
            f"{limits}.</p>\n<ul>"
            + "".join(f"<li>{escape(item)}</li>" for item in items)
            + "</ul>"
        )
    return (
        f'<header class="{_word(report).lower()}">\n'
        f'<p class="word">{_word(report)}</p>\n<div><h1>{escape(report.title)}</h1>\n'
        f"{text}</div>\n</header>"
    )


def _pictures(pictures: ShownPictures) -> str:
    factor = pictures.amplification
    groups = (
        ("reference", pictures.reference),
        ("engine", pictures.engine),
        (f"|difference| × {factor}", pictures.difference),
    )
    names = [escape(name) for name in pictures.names]
    head = "<td></td>" + "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for label, files in groups:
        cells = "".join(
            f'<td><img alt="{escape(label)}, {name}" src="data:image/png;base64,'
            f'{base64.b64encode(data).decode()}"></td>'
            for name, data in zip(names, files, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>\n')
    shown = len(pictures.names)
    scaled = f"differences are shown {factor} times as large as they are"
    if not pictures.differ:
        scaled = "here the two sides do not differ by a single one"
    note = f" The first {shown} of {pictures.total}." if shown < pictures.total else ""
    return (
        f'<div class="wide"><table class="pictures"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
        f'<p class="note">Grey levels of 0 to 255; {scaled}.{note} All pictures are '
        "generated.</p>"
    )


def _comparison_cells(found: Comparison) -> list[str]:
    psnr = f"{found.psnr:.1f} dB" if math.isfinite(found.psnr) else "equal"
    if not found.finite:
        psnr = "not finite"
    return [
        format_error(found.max_rel),
        format_error(found.max_abs),
        format_error(found.mean_abs),
        format_error(found.rms),
        *(format_error(value) for value in found.quantiles),
        format_error(1 - found.cosine),
        psnr,
    ]


def _numbers(report: ParityReport) -> str:
    rows = [("Final pictures", report.final)]
    if report.final_unsaturated:
        rows.append(("Final, unsaturated pixels", report.final_unsaturated))
    if report.worst_step:
        name = f"Worst state, table row {report.worst_step.table_row}"
        rows.append((name, report.worst_step.state))
    if report.oracle:
        rows.append(("Reference against diffusers' scheduler", report.oracle))
    quantiles = [f"{share * 100:g} %" for share in QUANTILES]
    head = ["", "error", "max", "mean", "RMS", *quantiles, "1 − cosine", "PSNR"]
    table = _table(head, [(name, *_comparison_cells(found)) for name, found in rows])
    first = report.final
    return (
        f'{table}\n<p class="note">{escape(_METHOD)} Max, mean, RMS and quantiles are '
        "of |a − b|, in units of the model's range [−1, 1]. Largest difference after "
        f"rounding to grey levels: {report.uint8_max} of 255. Compared: "
        f"{escape(first.dtype_actual)} against {escape(first.dtype_expected)}, "
        f"{first.count:,} values.</p>"
    )


def _identity(report: ParityReport) -> str:
    similarity = report.identity
    if similarity is None or not similarity.reference:
        return '<p class="note">No similarity was measured.</p>'
    pairs = list(zip(similarity.reference, similarity.engine, strict=True))
    seen = [pair for pair in pairs if all(map(math.isfinite, pair))]
    rows = [(str(index), *pair) for index, pair in enumerate(pairs)]
    if seen:
        means = [sum(side) / len(seen) for side in zip(*seen, strict=True)]
        rows.insert(0, (f"mean of {len(seen)}", means[0], means[1]))
    table = _table(
        ["picture", "reference", "engine", "change"],
        [
            (
                name,
                _cosine(a),
                _cosine(b),
                f"{b - a:+.4f}" if math.isfinite(b - a) else "",
            )
            for name, a, b in rows
        ],
    )
    return (
        f'{table}\n<p class="note">Cosine between the identity asked for and that of '
        f"each picture, judged by {escape(similarity.name)}. It is shown, not held to "
        "a tolerance.</p>"
    )


def _cosine(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "no face"


def _subject(report: ParityReport) -> str:
    return _table([], report.subject.items(), kind="facts")


def _all_rows(per_step: Sequence[StepComparison]) -> str:
    if not per_step:
        return ""
    single = any(step.single for step in per_step)
    head = ["table row", "t", "state: error", "max", "mean", "1 − cosine", "x0: error"]
    rows = []
    for step in per_step:
        cells = _comparison_cells(step.state)
        row = [str(step.table_row), f"{step.timestep:g}", *cells[:3], cells[-2]]
        row.append(format_error(step.x0.max_rel))
        if single:
            row.append(format_error(step.single.max_rel) if step.single else "")
        rows.append(row)
    head += ["one step: error"] if single else []
    return (
        f"<details>\n<summary>All {len(per_step)} table rows in numbers</summary>\n"
        f"{_table(head, rows)}\n</details>"
    )


_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #23242a; --faint: #63656f;
  --line: #dcdad4; --pass: #17683c; --fail: #a92323; --state: #1f5fbf; --x0: #b35c00;
  --single: #6b3fa0; --panel: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181c; --ink: #e6e6e3;
  --faint: #a2a4ad; --line: #3a3c44; --pass: #2f8f5b; --fail: #d65656;
  --state: #7fb0ff; --x0: #f0a24e; --single: #c3a2f0; --panel: #1f2025; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { display: flex; gap: 1.25rem; align-items: flex-start; padding: 1.1rem 1.25rem;
  background: var(--panel); border: 1px solid var(--line); border-left: 6px solid;
  border-radius: 6px; }
header.pass { border-left-color: var(--pass); }
header.fail { border-left-color: var(--fail); }
.word { margin: .1rem 0 0; padding: .1rem .7rem; border-radius: 4px; color: #fff;
  font-weight: 700; letter-spacing: .04em; }
.pass .word { background: var(--pass); } .fail .word { background: var(--fail); }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; }
header p, header ul { margin: .3rem 0 0; } header ul { padding-left: 1.2rem; }
.note, figcaption { color: var(--faint); font-size: .875rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th { font-weight: 600; text-align: left; }
.numbers th, .numbers td, .facts th, .facts td { padding: .35rem .55rem;
  border-bottom: 1px solid var(--line); }
.numbers th, .numbers td { white-space: nowrap; }
.numbers thead th { color: var(--faint); font-weight: 500; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers td { font-variant-numeric: tabular-nums; }
.facts th { color: var(--faint); font-weight: 500; vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.pictures th, .pictures td { padding: .2rem .25rem; }
.pictures thead th { color: var(--faint); font-weight: 500; text-align: center; }
.pictures tbody th { padding-right: .8rem; white-space: nowrap; }
.pictures img { display: block; width: 112px; height: auto; min-width: 72px;
  image-rendering: pixelated; border-radius: 3px; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 12px; font-family: inherit; }
svg .axis { stroke: var(--faint); } svg .grid { stroke: var(--line); }
svg .limit { stroke: var(--fail); stroke-dasharray: 6 4; fill: none; }
svg text.limit-name { fill: var(--fail); font-size: 11px; }
svg polyline { fill: none; stroke-width: 1.6; }
svg polyline.x0 { stroke-dasharray: 5 3; }
svg polyline.single { stroke-dasharray: 2 3; }
svg .state { stroke: var(--state); } svg circle.state { fill: var(--state); }
svg .x0 { stroke: var(--x0); } svg circle.x0 { fill: var(--x0); }
svg .single { stroke: var(--single); } svg circle.single { fill: var(--single); }
.key { font-weight: 600; } .key.state { color: var(--state); }
.key.x0 { color: var(--x0); } .key.single { color: var(--single); }
details { margin-top: 2.4rem; } summary { cursor: pointer; font-weight: 600; }
"""
