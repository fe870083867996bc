"""Drawings of an evaluation, as SVG to be put into a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ..benchmark.rounds import Interval
from ..svg import line, text
from .result import IDENTITY_METRICS, Evaluation, Spread, known
from .similarity import Float64

STYLE = """
svg .m0, .key.m0 { --c: var(--state); } svg .m1, .key.m1 { --c: var(--x0); }
svg .m2, .key.m2 { --c: var(--single); } svg .m3, .key.m3 { --c: var(--oracle); }
svg .chance, .key.chance { --c: var(--faint); }
svg .ceiling, .key.ceiling { --c: var(--pass); }
svg line.bar { stroke: var(--c); stroke-width: 2; } svg circle.dot { fill: var(--c); }
svg line.tick { stroke: var(--c); stroke-width: 3; }
svg polyline.spread { stroke: var(--c); } .key { color: var(--c); }
svg polyline.chance { stroke-dasharray: 5 3; } svg text.name { fill: var(--ink); }
img.sheet { max-width: 100%; height: auto; }
"""
"""Of a page with these drawings and a sheet."""
_COLOURS = 4
_WIDTH, _LEFT, _RIGHT, _TOP = 860, 190, 30, 14
_LINE, _GAP, _FLOOR = 15, 14, 36
_SPREAD_HEIGHT, _BINS = 230, 40
_MARKS, _STEPS = 6, (0.02, 0.05, 0.1, 0.2, 0.5, 1)


@dataclass(frozen=True)
class PlotRow:
    """A line of :func:`interval_plot`: values of each series, and what bounds them."""

    title: str
    values: Sequence[Interval | None]
    chance: float | None = None
    ceiling: Interval | None = None


def figure_rows(found: Evaluation, judge: str) -> list[PlotRow]:
    """The figures of each model, by one FR model."""
    rows = []
    for key, metric in IDENTITY_METRICS.items():
        ours = [found.find(key, model, judge) for model in found.models]
        first = ours[0]
        if first is not None:
            values = [None if one is None else known(one.value) for one in ours]
            row = PlotRow(metric.title, values, first.chance, known(first.ceiling))
            rows.append(row)
    return rows


def interval_plot(rows: Sequence[PlotRow], series: Sequence[str], label: str) -> str:
    """Each value of each series as a dot on its interval, between the marks of chance
    and ceiling.

    Args:
        rows: With a value for each series.
        series: What they are called.
        label: What the drawing shows, for those who do not see it.
    """
    axis = _Axis(min(0.0, math.floor(min(map(_lowest, rows)) * 10) / 10), 1.0)
    parts, y = [], float(_TOP)
    for row in rows:
        bottom = y + _LINE * len(row.values)
        middle = (y + bottom) / 2 + 4
        parts.append(text(_LEFT - 12, middle, row.title, "end", "name"))
        parts += _ends(row, axis, y, bottom)
        for index, value in enumerate(row.values):
            said = f"{series[index]}, {row.title}"
            parts.append(_dot(value, index, axis, y, said))
            y += _LINE
        y += _GAP
    parts[:0] = axis.drawn(y)
    keyed = [(_class(index), name) for index, name in enumerate(series)]
    return _figure(parts, y + _FLOOR, keyed, label)


def spread_plot(found: Evaluation, spread: Spread) -> str:
    """How values are spread, one outline a series, each of the same area."""
    shown = {name: values for name, values in spread.series.items() if len(values)}
    ends = [f(values) for values in shown.values() for f in (np.min, np.max)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    axis = _Axis(math.floor(low * 10) / 10, math.floor(high * 10 + 1) / 10)
    edges = np.linspace(axis.low, axis.high, _BINS + 1)
    floor = _TOP + float(_SPREAD_HEIGHT)
    heights = {n: np.histogram(v, edges)[0] / len(v) for n, v in shown.items()}
    most = max((float(h.max()) for h in heights.values()), default=1.0)
    parts = axis.drawn(floor)
    keyed = []
    for name, height in heights.items():
        kind = _kind(name, found.models)
        keyed.append((kind, f"{name} ({len(shown[name])})"))
        parts.append(_outline(kind, axis, edges, floor, height / most))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(text(middle, floor + _FLOOR - 2, spread.across, "middle"))
    return _figure(parts, floor + _FLOOR + 6, keyed, spread.title)


class _Axis:
    """Values across the drawing."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def drawn(self, floor: float) -> list[str]:
        """Grid and numbers."""
        parts = []
        span = self.high - self.low
        step = next((one for one in _STEPS if span <= _MARKS * one), span)
        last = math.floor(self.high / step + 1e-9)
        for number in range(math.ceil(self.low / step - 1e-9), last + 1):
            value = number * step
            x = self.x(value)
            parts.append(line("grid", x, _TOP, x, floor))
            parts.append(text(x, floor + 16, f"{value:.2g}", "middle"))
        return parts


def _lowest(row: PlotRow) -> float:
    lows = [one.low for one in row.values if one is not None]
    chance = 0.0 if row.chance is None or math.isnan(row.chance) else row.chance
    return min([chance, *lows])


def _ends(row: PlotRow, axis: _Axis, top: float, bottom: float) -> list[str]:
    """Marks of chance and ceiling across the lines of all series; none where there is
    nothing between them."""
    if all(one is None for one in row.values):
        return []
    ceiling = None if row.ceiling is None else row.ceiling.value
    return [
        line(f"tick {name}", axis.x(value), top, axis.x(value), bottom)
        for name, value in (("chance", row.chance), ("ceiling", ceiling))
        if value is not None and math.isfinite(value)
    ]


def _dot(value: Interval | None, index: int, axis: _Axis, top: float, said: str) -> str:
    y = top + _LINE / 2
    if value is None:
        return text(_LEFT + 4, y + 4, "not measured", "start")
    kind = _class(index)
    return line(f"bar {kind}", axis.x(value.low), y, axis.x(value.high), y) + (
        f'<circle class="dot {kind}" cx="{axis.x(value.value):.1f}" cy="{y:.1f}" r="4">'
        f"<title>{escape(f'{said}: {value.text(3)}')}</title></circle>"
    )


def _outline(
    kind: str, axis: _Axis, edges: Float64, floor: float, height: Float64
) -> str:
    across = [axis.x(edge) for edge in edges.tolist() for _ in (0, 1)]
    up = [0.0, *(h for one in height.tolist() for h in (one, one)), 0.0]
    tall = _SPREAD_HEIGHT - 8
    points = " ".join(
        f"{x:.1f},{floor - tall * share:.1f}"
        for x, share in zip(across, up, strict=True)
    )
    return f'<polyline class="spread {kind}" points="{points}"/>'


def _class(index: int) -> str:
    return f"m{index % _COLOURS}"


def _kind(series: str, models: Sequence[str]) -> str:
    """A model's own colour; the ceiling's for photos, chance's for other people's."""
    ours = [
        i for i, name in enumerate(models) if series in (name, f"{name}, own photo")
    ]
    if ours:
        return _class(ours[0])
    return "chance" if series.startswith("other people") else "ceiling"


def _figure(
    parts: Sequence[str], height: float, keyed: Sequence[tuple[str, str]], label: str
) -> str:
    keys = list(keyed)
    ends = ("chance", "ceiling")
    keys += [(e, e) for e in ends if any(f"tick {e}" in part for part in parts)]
    said = "; ".join(
        f'<span class="key {kind}">{escape(name)}</span>' for kind, name in keys
    )
    drawing = "\n".join(parts)
    return (
        '<figure>\n<div class="wide"><svg class="plot" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"\n{drawing}\n</svg></div>\n<figcaption>{said}</figcaption>\n</figure>"
    )
