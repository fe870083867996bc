"""What an evaluation's page, Markdown and command line say: all say the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..benchmark.rounds import Interval
from .result import (
    IDENTITY_METRICS,
    METRICS,
    PICTURE_METRICS,
    Evaluation,
    Figure,
    known,
)

Rows = list[tuple[str, ...]]

MEANING_HEAD = ("figure", "what it is", "chance", "ceiling")
INTERVALS = (
    "In brackets: 95 % bootstrap intervals over people. Chance and ceiling are those "
    "of the first model's pictures. ↑: more is better, ↓: less is."
)
CHANGES = (
    "How much more alike to their people's photos a model's pictures are than the "
    "first model's, mean over pairs of the same noise; no face is a cosine of 0."
)
PHOTOS_LEFT_OUT = "The photos are left out; --show-photos puts them beside."


def summary(found: Evaluation) -> str:
    """The outcome in two sentences."""
    model, judge = found.models[0], found.judges[0]
    said = f"{found.pictures} pictures of {found.people} people"
    rank1 = found.find("rank1", model, judge)
    value = rank1 and known(rank1.value)
    if rank1 is None or value is None or rank1.ceiling is None:
        return f"{said}."
    return (
        f"{said}. To {judge}, {value.value:.0%} of those by {model} look most "
        f"like their own person's photo; by chance {rank1.chance or 0:.1%} would, and "
        f"of the photos at the model's resolution {rank1.ceiling.value:.0%} do."
    )


def figure_head(found: Evaluation) -> tuple[str, ...]:
    """Of the tables of :func:`identity_rows` and :func:`picture_rows`."""
    return ("", *found.models, "chance", "ceiling")


def identity_rows(found: Evaluation, judge: str) -> Rows:
    """Whose faces they are to one FR model, models side by side."""
    return [_row(found, key, judge) for key in IDENTITY_METRICS]


def picture_rows(found: Evaluation) -> Rows:
    """What needs no FR model; what was not measured is left out."""
    keys = [key for key in PICTURE_METRICS if found.find(key, found.models[0], "")]
    return [_row(found, key, "") for key in keys]


def change_rows(found: Evaluation) -> Rows:
    """Models behind the first against it, to each judge; none for a single model."""
    return [
        (f"{one.model}, to {one.judge}", estimate(one.value, 4, sign=True))
        for one in found.changes
    ]


def meaning_rows(found: Evaluation) -> Rows:
    """What each figure is that was measured."""
    there = {figure.key for figure in found.figures}
    return [
        (f"{one.title} {one.arrow}".strip(), one.meaning, one.chance, one.ceiling)
        for key, one in METRICS.items()
        if key in there
    ]


def _row(found: Evaluation, key: str, judge: str) -> tuple[str, ...]:
    metric = METRICS[key]
    figures = [found.find(key, model, judge) for model in found.models]
    first = figures[0] or Figure(key, "", judge, None, None, None)
    chance = "" if first.chance is None else f"{first.chance:.{metric.digits}f}"
    return (
        f"{metric.title} {metric.arrow}".strip(),
        *(
            estimate(None if one is None else one.value, metric.digits)
            for one in figures
        ),
        "" if chance == "nan" else chance,
        estimate(first.ceiling, metric.digits),
    )


def estimate(value: Interval | None, digits: int, *, sign: bool = False) -> str:
    """A figure with its interval; empty where there is none."""
    found = known(value)
    if found is None:
        return ""
    shown = f"{found.value:+.{digits}f}" if sign else f"{found.value:.{digits}f}"
    return f"{shown} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def aligned(lines: Iterable[Sequence[str]]) -> list[str]:
    """Cells of a table padded to columns, for a terminal."""
    cells = [*lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
