"""A page of HTML and its small pieces; everything that comes in is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from .style import STYLE


def document(title: str, body: str, style: str = "") -> str:
    """A page that stands alone: no script, no font, nothing to load.

    Args:
        title: As plain text.
        body: HTML already.
        style: What is added to the style of all reports.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def png(data: bytes, alt: str, kind: str = "") -> str:
    """A picture inside the page."""
    shown = f' class="{kind}"' if kind else ""
    return (
        f'<img{shown} alt="{escape(alt)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    )


def items(lines: Sequence[str]) -> str:
    """A list."""
    return "<ul>" + "".join(f"<li>{escape(one)}</li>" for one in lines) + "</ul>"


def section(title: str, body: str) -> str:
    """A section with a heading; ``body`` is HTML already."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def note(text: str) -> str:
    """Small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    kind: str = "numbers",
    verdicts: bool = False,
) -> str:
    """A table whose first column names the rows.

    Args:
        head: Names of the columns; empty for no head.
        rows: Cells, as plain text.
        kind: The table's class.
        verdicts: Whether the last cell of a row is a verdict, to be coloured.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(_row(cells, verdicts) for cells in rows)
    head_html = f"<thead><tr>{top}</tr></thead>\n" if head else ""
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}">\n{head_html}'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _row(cells: Sequence[str], verdicts: bool) -> str:
    name, *rest = cells
    shown = [f"<td>{escape(cell)}</td>" for cell in rest]
    if verdicts and rest:
        word = escape(rest[-1])
        shown[-1] = f'<td><span class="mark {word.lower()}">{word}</span></td>'
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(shown)}</tr>\n'
