"""A benchmark as an SVG drawing: a bar for each column, and pictures a second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..svg import line, text
from .result import interval
from .table import number

_WIDTH, _LEFT, _RIGHT, _BAR = 960, 350, 210, 26
_TOP, _GAP, _PANEL = 58, 64, 260
_COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b91c1c", "#0f766e")
_STYLE = (
    "text{font:13px sans-serif;fill:#222}.title{font-size:15px;font-weight:600}"
    ".faint{fill:#777}.grid{stroke:#ddd}.axis{stroke:#555}"
    ".ours{fill:#0b6e99}.base{fill:#9aa5ad}.mark{stroke:#222;stroke-width:1.5}"
)


def plot(found: Mapping[str, Any]) -> str:
    """The drawing: latency of a trajectory at the first batch size, and throughput over
    batch sizes. Columns that were not timed stand there with their status."""
    batch = str(found["settings"]["batch_sizes"][0])
    bars, bottom = _bars(found, batch)
    lines, height = _throughput(found, bottom + _GAP)
    drawing = "\n".join([*bars, *lines])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'width="{_WIDTH}" height="{height:.0f}" role="img" '
        f'aria-label="Latency and throughput of each column">\n<style>{_STYLE}</style>'
        f'\n<rect width="100%" height="100%" fill="#fff"/>\n{drawing}\n</svg>\n'
    )


def _bars(found: Mapping[str, Any], batch: str) -> tuple[list[str], float]:
    """Bars of a trajectory's median, with its interval."""
    known = {
        name: value
        for name, column in found["columns"].items()
        if (value := _median_ms(column, batch)) is not None
    }
    most = max((one["high"] for one in known.values()), default=1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    title = f"A trajectory of {found['model']['table_rows']} table rows, batch size "
    parts = [text(16, 26, f"{title}{batch}: ms, median", "start", "title")]
    y = float(_TOP)
    for name, column in found["columns"].items():
        parts.append(text(_LEFT - 10, y + 14, _cut(column["title"], 50), "end"))
        if name in known:
            parts += _bar(known[name], y, scale, ours=column["ours"])
        else:
            why = column["reason"] or column["status"]
            parts.append(text(_LEFT + 4, y + 14, _cut(why, 78), "start", "faint"))
        y += _BAR
    parts.append(line("axis", _LEFT, _TOP - 6, _LEFT, y))
    return parts, y


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _median_ms(column: Mapping[str, Any], batch: str) -> Any:
    values = column["batches"].get(batch, {})
    return values["trajectory_ms"]["p50"] if "trajectory_ms" in values else None


def _bar(
    value: Mapping[str, float], y: float, scale: float, *, ours: bool
) -> list[str]:
    wide, low, high = (value[k] * scale for k in ("value", "low", "high"))
    words = f"{number(value['value'])} ({number(value['low'])} to "
    words += f"{number(value['high'])})"
    kind = "ours" if ours else "base"
    return [
        f'<rect class="{kind}" x="{_LEFT}" y="{y:.1f}" width="{wide:.1f}" '
        'height="18"/>',
        line("mark", _LEFT + low, y + 9, _LEFT + high, y + 9),
        text(_LEFT + max(wide, high) + 8, y + 14, words, "start"),
    ]


def _throughput(found: Mapping[str, Any], top: float) -> tuple[list[str], float]:
    """Pictures a second over batch sizes, a line a column; nothing for one size."""
    sizes = [str(size) for size in sorted(found["settings"]["batch_sizes"])]
    series = {
        name: points
        for name, column in found["columns"].items()
        if (points := _points(column, sizes))
    }
    if len(sizes) < 2 or not series:
        return [], top - _GAP + 24
    bottom = top + _PANEL
    most = max(point.high for points in series.values() for point in points.values())
    step = _nice(most / 5)
    ceiling = step * math.ceil(most / step)
    parts = [text(16, top - 26, "Pictures a second, by batch size", "start", "title")]
    for i in range(round(ceiling / step) + 1):
        y = bottom - _PANEL * i * step / ceiling
        parts.append(line("grid", 70, y, _WIDTH - _RIGHT - 30, y))
        parts.append(text(62, y + 4, f"{i * step:g}", "end"))
    across = {size: _across(i, len(sizes)) for i, size in enumerate(sizes)}
    parts += [text(x, bottom + 20, f"B = {s}", "middle") for s, x in across.items()]
    for index, (name, points) in enumerate(series.items()):
        parts += _series(found, name, points, across, index, (top, bottom, ceiling))
    keys = top + 18 * len(series)
    return parts, max(bottom + 40, keys + 20)


def _points(column: Mapping[str, Any], sizes: Sequence[str]) -> dict[str, Any]:
    return {
        size: found
        for size in sizes
        if (
            found := interval(
                column["batches"].get(size, {}).get("pictures_per_second")
            )
        )
    }


def _across(index: int, count: int) -> float:
    return 100 + (_WIDTH - _RIGHT - 160) * index / (count - 1)


def _series(
    found: Mapping[str, Any],
    name: str,
    points: Mapping[str, Any],
    across: Mapping[str, float],
    index: int,
    panel: tuple[float, float, float],
) -> list[str]:
    """One line, its points with their figures as titles, and its key."""
    top, bottom, ceiling = panel
    colour = _COLOURS[index % len(_COLOURS)]
    dash = "" if index < len(_COLOURS) else ' stroke-dasharray="5 3"'
    places = [
        (across[size], bottom - _PANEL * point.value / ceiling)
        for size, point in points.items()
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{colour}" '
        f'stroke-width="2"{dash}/>'
    ]
    for (x, y), (size, point) in zip(places, points.items(), strict=True):
        said = f"{name}, B = {size}: {number(point.value)}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(said)}</title></circle>"
        )
    x, y = _WIDTH - _RIGHT - 14, top + 18 * index + 6
    parts.append(
        f'<line x1="{x}" y1="{y}" x2="{x + 20}" y2="{y}" stroke="{colour}" '
        f'stroke-width="2"{dash}/>'
    )
    parts.append(text(x + 26, y + 4, name, "start"))
    return parts


def _nice(value: float) -> float:
    """A round number of at least ``value``."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= value)
