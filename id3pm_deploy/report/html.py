"""Small pieces of HTML; everything that comes in is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


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
