"""An evaluation as a report: JSON, Markdown, a page, and a sheet of pictures."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path

from ..images import Pixels, contact_sheet, encode_png
from ..report.html import document, items, note, png, section, table
from ..report.markdown import escaped, markdown_table
from ..report.save import ReportFiles, ReportPaths, sheet_name, write_report
from . import words
from .plot import STYLE, figure_rows, interval_plot, spread_plot
from .result import Evaluation
from .run import Shown

EVALUATION = "evaluation"
PEOPLE_SHOWN = 10
"""The first ones, on the sheet; the figures are over all."""
_COLUMNS = 9


def save_evaluation(
    folder: Path,
    found: Evaluation,
    shown: Shown,
    *,
    photos: bool = False,
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
    return write_report(
        folder,
        ReportFiles(
            EVALUATION,
            found.to_json(),
            evaluation_markdown(found, sheet_name(EVALUATION), said),
            evaluation_page(found, sheet, said),
            sheet,
        ),
    )


def _of_each(shown: Shown) -> int:
    """Pictures of a person and model on the sheet."""
    return max(min(shown.count, _COLUMNS // len(shown.pictures)), 1)


def picture_sheet(title: str, shown: Shown, *, photos: bool) -> bytes:
    """The first people's first pictures by each model, a row a person; PNG, marked."""
    rows = min(len(shown.photos), PEOPLE_SHOWN)
    each = _of_each(shown)
    pictures: list[Pixels] = []
    for person in range(rows):
        pictures += [shown.photos[person]] if photos else []
        first = person * shown.count
        for made in shown.pictures.values():
            pictures += list(made[first : first + each])
    heads = ["photo"] if photos else []
    for name in shown.pictures:
        heads += [name, *[""] * (each - 1)]
    sheet = contact_sheet(
        pictures,
        columns=len(heads),
        row_labels=[f"person {person + 1}" for person in range(rows)],
        column_labels=heads,
        title=f"{title} (generated pictures)",
    )
    return encode_png(sheet, replace(shown.mark, sample=None, composite=photos))


def sheet_note(shown: Shown, *, photos: bool) -> str:
    """What the sheet shows."""
    rows, each = min(len(shown.photos), PEOPLE_SHOWN), _of_each(shown)
    said = f"Generated pictures: the first {each} of each of the first {rows} people. "
    if not photos:
        return said + words.PHOTOS_LEFT_OUT
    return said + "The first column is a photo of each, reduced to the model's size."


def evaluation_page(found: Evaluation, sheet: bytes, sheet_says: str) -> str:
    """The whole page, as text; nothing is loaded from elsewhere."""
    head = words.figure_head(found)
    parts = [
        f"<header>\n<div>\n<h1>{escape(found.title)}</h1>\n"
        f"<p>{escape(words.summary(found))}</p>\n</div>\n</header>"
    ]
    for judge in found.judges:
        body = table(head, words.identity_rows(found, judge))
        body += f"\n{note(words.INTERVALS)}\n"
        title = f"Identity, judged by {judge}"
        body += interval_plot(figure_rows(found, judge), found.models, title)
        parts.append(section(title, body))
    if changes := words.change_rows(found):
        body = f"{table(('', 'change of similarity'), changes)}\n{note(words.CHANGES)}"
        parts.append(section("Against the first model", body))
    parts.append(
        section("Pictures and diversity", table(head, words.picture_rows(found)))
    )
    parts += [section(one.title, spread_plot(found, one)) for one in found.spreads]
    shown = png(sheet, "generated pictures, a row for each person", "sheet")
    parts.append(section("Sheet", f"{shown}\n{note(sheet_says)}"))
    if found.notes:
        parts.append(section("To be known", items(found.notes)))
    meanings = table(words.MEANING_HEAD, words.meaning_rows(found), kind="facts")
    parts.append(section("What the figures are", meanings))
    parts.append(
        section("What ran where", table([], found.facts.items(), kind="facts"))
    )
    return document(found.title, "\n".join(parts), STYLE)


def evaluation_markdown(found: Evaluation, sheet: str, sheet_says: str) -> str:
    """The whole file, as text.

    Args:
        found: What it says.
        sheet: Name of the sheet beside it.
        sheet_says: What that shows.
    """
    head = words.figure_head(found)
    parts = [f"# {escaped(found.title)}", escaped(words.summary(found))]
    for judge in found.judges:
        parts.append(f"## Identity, judged by {escaped(judge)}")
        parts.append(markdown_table(head, words.identity_rows(found, judge)))
        parts.append(escaped(words.INTERVALS))
    if changes := words.change_rows(found):
        parts.append("## Against the first model")
        parts.append(markdown_table(("", "change of similarity"), changes))
        parts.append(escaped(words.CHANGES))
    parts.append("## Pictures and diversity")
    parts.append(markdown_table(head, words.picture_rows(found)))
    parts += ["## Sheet", f"![Generated pictures]({sheet})", escaped(sheet_says)]
    if found.notes:
        parts.append("## To be known")
        parts.append("\n".join(f"- {escaped(one)}" for one in found.notes))
    parts.append("## What the figures are")
    parts.append(markdown_table(words.MEANING_HEAD, words.meaning_rows(found)))
    parts += ["## What ran where", markdown_table(("", ""), found.facts.items())]
    return "\n\n".join(parts) + "\n"
