"""An audit as a report: JSON, Markdown, a page, and a sheet of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from ..report.html import document, items, note, png, section, table
from ..report.markdown import escaped, markdown_table
from ..report.save import ReportFiles, ReportPaths, sheet_name, write_report
from .audit import ANOTHER, ENROLLED, Acceptance, Audit
from .plot import STYLE, PlotRow, interval_plot
from .report import picture_sheet, sheet_note
from .run import Shown
from .words import Rows, aligned, estimate

AUDIT = "audit"
HEAD = (
    "",
    "threshold",
    "pictures accepted",
    "people reached",
    "chance",
    "photos accepted",
)
_TITLES = {
    ENROLLED: "against the photo that the template was made of (type I)",
    ANOTHER: "against another photo of the person (type II)",
}
_MEANING = (
    "Pictures accepted: as the person whose template they were made from, by a single "
    "cosine above the threshold; a picture without a face is not accepted. People "
    "reached: those of whom at least one picture is. Chance: pictures accepted as "
    "somebody else. Photos accepted: the enrolled photo at the model's resolution "
    "(type I), another photo of the person (type II). FAR: share of pairs of different "
    "people's photos that are accepted. In brackets: 95 % bootstrap intervals over "
    "people, with the threshold as it is."
)


def save_audit(
    folder: Path, found: Audit, shown: Shown, *, photos: bool = False
) -> ReportPaths:
    """Write the report; nothing is replaced before all is on disk.

    Args:
        folder: Made if it is not there.
        found: What it says.
        shown: Pictures for the sheet.
        photos: Whether to show the people's photos, too.

    Raises:
        OutputError: Something cannot be written.
    """
    sheet = picture_sheet(found.title, shown, photos=photos)
    said = sheet_note(shown, photos=photos)
    markdown = audit_markdown(found, said)
    page = audit_page(found, sheet, said)
    files = ReportFiles(AUDIT, found.to_json(), markdown, page, sheet)
    return write_report(folder, files)


def conclusion(found: Audit) -> str:
    """What was found, in plain words."""
    audited = found.systems[0]
    reported = found.of(audited, ENROLLED)
    if not reported:
        return (
            f"{found.people} people are too few to set a threshold for a false "
            "acceptance rate of 0.1."
        )
    strictest = reported[-1]
    shown = strictest.accepted
    return (
        f"At a false acceptance rate of {strictest.far:g}, {audited} accepts "
        f"{shown.value:.0%} ({shown.low:.0%} to {shown.high:.0%}) of the pictures as "
        "the person of the template, and "
        f"{strictest.chance:.1%} as somebody else. {_verdict(strictest)}"
    )


def _verdict(found: Acceptance) -> str:
    if found.accepted.low > found.chance and found.accepted.low > found.far:
        return (
            "Its templates can be inverted: a leaked one is to be treated as a leaked "
            "photo."
        )
    return "More than chance was not shown with this model and these people."


def rows(found: Audit, system: str, photo: str) -> Rows:
    """A line for each rate."""
    return [
        (
            f"FAR {one.far:g}",
            f"{one.threshold:.3f}",
            estimate(one.accepted, 3),
            estimate(one.reached, 3),
            f"{one.chance:.3f}",
            estimate(one.ceiling, 3),
        )
        for one in found.of(system, photo)
    ]


def other_rows(found: Audit) -> Rows:
    """What has no threshold."""
    chance = f"{1 / found.people:.3f}"
    return [
        ("face found", estimate(found.detected, 3), ""),
        *(
            (f"rank-1 of {found.people}, to {name}", estimate(value, 3), chance)
            for name, value in found.rank1.items()
        ),
    ]


def _tables(found: Audit) -> Iterator[tuple[str, str, str, Rows]]:
    for system in found.systems:
        for photo, title in _TITLES.items():
            if lines := rows(found, system, photo):
                yield system, photo, f"{system}, {title}", lines


def _plot(found: Audit, system: str, title: str) -> str:
    kinds = [photo for photo in _TITLES if found.of(system, photo)]
    by_rate: dict[float, dict[str, Acceptance]] = {}
    for photo in kinds:
        for one in found.of(system, photo):
            by_rate.setdefault(one.far, {})[photo] = one
    drawn = [
        PlotRow(
            f"FAR {far:g}",
            [there[k].accepted if k in there else None for k in kinds],
            there[ENROLLED].chance,
            there[ENROLLED].ceiling,
        )
        for far, there in by_rate.items()
    ]
    return interval_plot(drawn, [_TITLES[photo] for photo in kinds], title)


def audit_page(found: Audit, sheet: bytes, sheet_says: str) -> str:
    """The whole page, as text; nothing is loaded from elsewhere."""
    parts = [
        f"<header>\n<div>\n<h1>{escape(found.title)}</h1>\n"
        f"<p>{escape(conclusion(found))}</p>\n</div>\n</header>"
    ]
    for system, photo, title, lines in _tables(found):
        body = table(HEAD, lines)
        if photo == ENROLLED:
            body = f"{_plot(found, system, f'Accepted by {system}')}\n{body}"
        parts.append(section(title, body))
    parts.append(note(_MEANING))
    parts.append(section("Beside that", table(("", "", "chance"), other_rows(found))))
    shown = png(sheet, "generated pictures, a row for each person", "sheet")
    parts.append(section("Sheet", f"{shown}\n{note(sheet_says)}"))
    parts.append(section("What this does not show", items(found.notes)))
    facts = table([], found.facts.items(), kind="facts")
    parts.append(section("What ran where", facts))
    return document(found.title, "\n".join(parts), STYLE)


def audit_markdown(found: Audit, sheet_says: str) -> str:
    """The whole file, as text."""
    parts = [f"# {escaped(found.title)}", escaped(conclusion(found))]
    for _, _, title, lines in _tables(found):
        parts += [f"## {escaped(title)}", markdown_table(HEAD, lines)]
    parts += [escaped(_MEANING), "## Beside that"]
    parts.append(markdown_table(("", "", "chance"), other_rows(found)))
    parts += ["## Sheet", f"![Generated pictures]({sheet_name(AUDIT)})"]
    parts += [escaped(sheet_says), "## What this does not show"]
    parts.append("\n".join(f"- {escaped(one)}" for one in found.notes))
    parts += ["## What ran where", markdown_table(("", ""), found.facts.items())]
    return "\n\n".join(parts) + "\n"


def audit_lines(found: Audit) -> Iterator[str]:
    """The same for a terminal."""
    yield conclusion(found)
    for _, _, title, lines in _tables(found):
        yield ""
        yield title
        yield from aligned((HEAD, *lines))
    yield ""
    yield from aligned([("", "", "chance"), *other_rows(found)])
