"""The parity report as one HTML page: no script, no font, nothing to load."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from . import words
from .findings import ParityReport, Trajectory, summary
from .html import document, items, note, png, section, table
from .pictures import ShownPictures
from .plot import error_plot

_FAILURES_SHOWN = 8


def parity_page(report: ParityReport, pictures: Sequence[ShownPictures]) -> str:
    """The whole page, as text.

    Args:
        report: What it says.
        pictures: One for each trajectory.
    """
    several = len(report.trajectories) > 1
    checks = summary(report)
    parts = [_verdict(report)]
    parts.append(section("Verdicts", _verdicts(report)))
    for one, shown in zip(report.trajectories, pictures, strict=True):
        after = f": {one.name}" if several else ""
        parts.append(section(f"Pictures{after}", _pictures(report, one, shown)))
        if one.per_step:
            drawn = f"{error_plot(report, one)}\n{_steps_note(one)}"
            parts.append(section(f"Error against step{after}", drawn))
        if one.identity:
            parts.append(section(f"Identity{after}", _identity(one)))
    spread = table(words.DISTRIBUTION_HEAD, words.distribution_rows(checks))
    parts.append(
        section("Distribution of the errors", f"{spread}\n{note(words.DISTRIBUTION)}")
    )
    if report.not_checked:
        parts.append(section("Not compared", items(report.not_checked)))
    parts.append(
        section("What ran where", table([], report.subject.items(), kind="facts"))
    )
    parts += [_all_rows(one, several) for one in report.trajectories if one.per_step]
    title = f"{words.word(report)}: {report.title}"
    return document(title, "\n".join(parts))


def _verdict(report: ParityReport) -> str:
    text = f"<p>{escape(words.verdict_sentence(report))}</p>"
    failures = list(report.failures)
    if failures:
        rest = len(failures) - _FAILURES_SHOWN
        shown = failures[:_FAILURES_SHOWN]
        shown += [f"and {rest} more, in parity.json"] if rest > 0 else []
        text += "\n" + items(shown)
    return (
        f'<header class="{words.word(report).lower()}">\n'
        f'<p class="word">{words.word(report)}</p>\n'
        f"<div>\n<h1>{escape(report.title)}</h1>\n{text}\n</div>\n</header>"
    )


def _verdicts(report: ParityReport) -> str:
    rows = words.verdict_rows(report)
    shown = table(words.VERDICT_HEAD, rows, verdicts=True)
    more = ""
    if len(report.checks) > len(summary(report)):
        more = (
            " Of single table rows, the worst of each kind is shown; all "
            f"{len(report.checks)} comparisons with their verdicts are in parity.json."
        )
    said = f"{shown}\n{note(words.METHOD + more)}"
    if report.identity_drop is not None:
        said += f"\n{note(words.identity_drop_note(report.identity_drop))}"
    return said


def _pictures(
    report: ParityReport, trajectory: Trajectory, pictures: ShownPictures
) -> str:
    factor = pictures.amplification
    groups = (
        ("reference", report.reference_name, pictures.reference),
        ("engine", report.engine_name, pictures.engine),
        ("difference", f"× {factor:,}", pictures.difference),
    )
    names = [escape(name) for name in pictures.names]
    head = "<td></td>" + "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for label, detail, files in groups:
        cells = "".join(
            f"<td>{png(data, f'generated: {label}, {name}')}</td>"
            for name, data in zip(pictures.names, files, strict=True)
        )
        rows.append(
            f'<tr><th scope="row">{escape(label)}<br><small>{escape(detail)}</small>'
            f"</th>{cells}</tr>\n"
        )
    shown = len(pictures.names)
    scaled = (
        f"Differences are shown {factor:,} times as large as they are before rounding."
    )
    if not pictures.differ:
        scaled = "The two sides are equal to the last bit."
    more = f" The first {shown} of {pictures.total}." if shown < pictures.total else ""
    said = (
        f"Generated pictures, every one of them. {words.grey_levels(trajectory)} "
        f"{scaled}{more}"
    )
    return (
        '<div class="wide" tabindex="0"><table class="pictures">'
        f"<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{''.join(rows)}</tbody></table></div>\n{note(said)}"
    )


def _steps_note(trajectory: Trajectory) -> str:
    against = trajectory.steps_against
    return "" if against == "reference" else note(f"Rows are compared with {against}.")


def _identity(trajectory: Trajectory) -> str:
    similarity = trajectory.identity
    if similarity is None or not similarity.reference:
        return note("No similarity was measured.")
    rows = words.identity_rows(similarity)
    shown = table(words.IDENTITY_HEAD, rows)
    return f"{shown}\n{note(words.identity_note(similarity))}"


def _all_rows(trajectory: Trajectory, several: bool) -> str:
    head, rows = words.step_table(trajectory)
    after = f": {escape(trajectory.name)}" if several else ""
    return (
        f"<details>\n<summary>All {len(rows)} table rows in numbers{after}</summary>\n"
        f"{table(head, rows)}\n</details>"
    )
