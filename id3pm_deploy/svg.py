"""Lines and words of an SVG drawing; what the plots share."""

from __future__ import annotations

from html import escape


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the class ``kind``."""
    return (
        f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" '
        f'x2="{x2:.1f}" y2="{y2:.1f}"/>'
    )


def text(x: float, y: float, words: str, anchor: str, kind: str = "") -> str:
    """Words at a place; ``anchor`` is ``start``, ``middle`` or ``end``."""
    style = f' class="{kind}"' if kind else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>'
        f"{escape(words)}</text>"
    )
