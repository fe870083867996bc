"""Error against table row, as an SVG drawing to be put into a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..compare import Comparison, format_error
from ..svg import line, text
from .findings import ParityReport, StepComparison, Trajectory, badness

_WIDTH, _HEIGHT = 860, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 130, 30, 62
_BAND = 34
"""Height of the bands for what a logarithm cannot show: infinity, and zero."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_X_LABELS = 10
_Y_LABELS = 9
CURVES = {
    "state": ("state", "after the row, along each side's own trajectory"),
    "single": ("one step", "one row alone, started from the reference's state"),
    "oracle": ("diffusers", "against diffusers' own scheduler"),
    "x0": ("x0", "the preview of the picture, held to no tolerance"),
}
"""What is drawn: its name in a :class:`StepComparison`, and its name and meaning for
people."""


@dataclass(frozen=True)
class _Axes:
    """Where things go. Decades ``low`` to ``high`` fill the space between the bands."""

    low: int
    high: int
    rows: int
    zero: bool
    infinite: bool

    @property
    def top(self) -> float:
        return _TOP + (_BAND if self.infinite else 0)

    @property
    def bottom(self) -> float:
        return _HEIGHT - _BOTTOM - (_BAND if self.zero else 0)

    def x(self, index: int) -> float:
        room = _WIDTH - _LEFT - _RIGHT - 24
        return _LEFT + 12 + room * (index / (self.rows - 1) if self.rows > 1 else 0.5)

    def y(self, value: float) -> float:
        if not math.isfinite(value):
            return _TOP + _BAND / 2
        if value <= 0:
            return _HEIGHT - _BOTTOM - _BAND / 2
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.bottom - share * (self.bottom - self.top)


def error_plot(report: ParityReport, trajectory: Trajectory) -> str:
    """A figure: the error of each table row on a log axis, with the tolerances.

    Each row is one ``<circle>`` a curve, whose title holds its figures. Zero and
    infinity, which have no logarithm, stand in bands of their own.
    """
    steps = trajectory.per_step
    curves = _curves(steps)
    limits = _limits(report, curves)
    values = [value for curve in curves.values() for value in curve]
    axes = _axes(len(steps), values, [*limits.values()])
    parts = [_y_axis(axes), _x_axis(axes, steps)]
    for name, values in curves.items():
        points = [(axes.x(i), axes.y(value)) for i, value in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        for step, value, (x, y) in zip(steps, values, points, strict=True):
            said = f"{CURVES[name][0]}, table row {step.table_row}, "
            said += f"t = {step.timestep:g}: "
            said += format_error(value)
            parts.append(
                f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{_radius(axes)}">'
                f"<title>{escape(said)}</title></circle>"
            )
    parts.append(_limit_lines(axes, limits))
    keys = "; ".join(
        f'<span class="key {name}">{escape(CURVES[name][0])}</span>: '
        f"{escape(CURVES[name][1])}"
        for name in curves
    )
    drawing = "\n".join(parts)
    return (
        '<figure>\n<div class="wide"><svg class="plot" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Error against table row, on a logarithmic axis">\n'
        f"{drawing}\n</svg></div>\n<figcaption>{keys}. Dashed in red: tolerance."
        "</figcaption>\n</figure>"
    )


def _radius(axes: _Axes) -> float:
    return 3.2 if axes.rows <= 60 else 1.8


def _curves(steps: Sequence[StepComparison]) -> dict[str, list[float]]:
    """Errors by row; a curve that not every row has is left out."""
    curves = {}
    for name in CURVES:
        found: list[Comparison | None] = [getattr(step, name) for step in steps]
        if all(one is not None for one in found):
            curves[name] = [badness(one) for one in found]
    return curves


def _limits(report: ParityReport, curves: Mapping[str, object]) -> dict[str, float]:
    """Tolerances by what they bound; those of equal size share a line."""
    wanted = {
        "trajectory": report.tolerances.trajectory if "state" in curves else 0.0,
        "one step": report.tolerances.step if "single" in curves else 0.0,
        "diffusers": report.oracle_tolerance if "oracle" in curves else 0.0,
    }
    limits: dict[float, str] = {}
    for name, value in wanted.items():
        if value > 0:
            limits[value] = f"{limits[value]}, {name}" if value in limits else name
    return {name: value for value, name in limits.items()}


def _axes(rows: int, values: Sequence[float], limits: Sequence[float]) -> _Axes:
    shown = [v for v in (*values, *limits) if v > 0 and math.isfinite(v)] or [1.0]
    low = math.floor(math.log10(min(shown)))
    high = max(math.ceil(math.log10(max(shown))), low + 1)
    return _Axes(
        low=low,
        high=high,
        rows=rows,
        zero=any(v == 0 for v in values),
        infinite=not all(map(math.isfinite, values)),
    )


def _y_axis(axes: _Axes) -> str:
    step = -(-(axes.high - axes.low) // _Y_LABELS)
    marks = [
        (axes.y(10.0**power), "10" + str(power).translate(_SUPERSCRIPTS))
        for power in range(axes.low, axes.high + 1, step)
    ]
    marks += [(axes.y(0.0), "0")] if axes.zero else []
    marks += [(axes.y(math.inf), "not finite")] if axes.infinite else []
    parts = []
    for y, name in marks:
        parts.append(line("grid", _LEFT, y, _WIDTH - _RIGHT, y))
        parts.append(text(_LEFT - 8, y + 4, name, "end"))
    middle = (axes.top + axes.bottom) / 2
    parts.append(
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" '
        'text-anchor="middle">error, max|a − b| / max|b|</text>'
    )
    return "\n".join(parts)


def _x_axis(axes: _Axes, steps: Sequence[StepComparison]) -> str:
    floor = _HEIGHT - _BOTTOM
    parts = [line("axis", _LEFT, floor, _WIDTH - _RIGHT, floor)]
    every = -(-axes.rows // _X_LABELS)
    for index in range(0, axes.rows, every):
        x, step = axes.x(index), steps[index]
        parts.append(line("axis", x, floor, x, floor + 4))
        parts.append(text(x, floor + 18, str(step.table_row), "middle"))
        parts.append(text(x, floor + 33, f"t={round(step.timestep, 1):g}", "middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(text(middle, _HEIGHT - 8, "table row, and its timestep t", "middle"))
    return "\n".join(parts)


def _limit_lines(axes: _Axes, limits: Mapping[str, float]) -> str:
    """Each tolerance across the plot, named in the right margin.

    The first is named above its line and the second below, so that close ones do not
    run into each other.
    """
    parts = []
    for (name, limit), shift in zip(limits.items(), (-18, 14, 14), strict=False):
        y, x = axes.y(limit), _WIDTH - _RIGHT
        parts.append(line("limit", _LEFT, y, _WIDTH, y))
        words = f"at most {format_error(limit)}"
        parts.append(text(x + 6, y + shift, name, "start", "limit-name"))
        parts.append(text(x + 6, y + shift + 13, words, "start", "limit-name"))
    return "\n".join(parts)
