"""What an evaluation found, and what its figures mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..benchmark.rounds import Interval
from .figures import FARS, far_name
from .nearest import CLOSE
from .similarity import Float64

FORMAT, FORMAT_VERSION = "id3pm-evaluation", 1


@dataclass(frozen=True)
class Metric:
    """A figure's name for people, what it is, and how it is read.

    Attributes:
        title: Short.
        meaning: A sentence.
        chance: What its chance column holds.
        ceiling: What its ceiling column holds.
        higher: Whether more is better; None where neither is.
        digits: Behind the point.
    """

    title: str
    meaning: str
    chance: str
    ceiling: str
    higher: bool | None = True
    digits: int = 3

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: "↑", False: "↓", None: ""}[self.higher]


_REDUCED = "the photos at the model's resolution"

IDENTITY_METRICS = {
    "similarity": Metric(
        "similarity",
        "cosine of picture and own photo; both with their mirror image, the photos' "
        "mean subtracted; over pictures with a face",
        "other people's photos",
        _REDUCED,
    ),
    "angular_distance": Metric(
        "angular distance",
        "the angle of that cosine, as a share of half a turn",
        "other people's photos",
        _REDUCED,
        higher=False,
    ),
    "auc": Metric(
        "verification AUC",
        "chance that a picture is more alike to its own person's photo than another "
        "picture to another person's",
        "0.5",
        _REDUCED,
    ),
    "accuracy": Metric(
        "verification accuracy",
        "balanced, at thresholds chosen on other people (ten folds)",
        "0.5",
        _REDUCED,
    ),
    **{
        far_name(far): Metric(
            f"TAR at FAR {far:g}",
            f"share of pictures accepted as their person where {far:g} of those of "
            "others are; empty below that many pairs",
            "the FAR",
            _REDUCED,
        )
        for far in FARS
    },
    "rank1": Metric(
        "rank-1",
        "share of pictures whose most alike photo, of all people's, is their own",
        "1 / people",
        _REDUCED,
    ),
}
"""Judged by an FR model; the other metrics by none."""

PICTURE_METRICS = {
    "detected": Metric(
        "face found",
        "share of pictures in which the detector finds a face",
        "noise",
        _REDUCED,
    ),
    "perceptual_diversity": Metric(
        "perceptual diversity",
        "mean distance (1 - cosine of perceptual features) between two pictures of a "
        "person",
        "0: all alike",
        "photos of different people at the model's resolution",
    ),
    "pose_diversity": Metric(
        "pose diversity, °",
        "mean angle between the heads of two pictures of a person",
        "0: all alike",
        "photos of different people at the model's resolution",
        digits=1,
    ),
    "fid_like": Metric(
        "FID-like",
        "Fréchet distance of perceptual features of half the people's first pictures "
        "from the other half's photos; no FID: another network and few pictures",
        "noise",
        _REDUCED,
        higher=False,
        digits=1,
    ),
    "nearest_training": Metric(
        "nearest training picture",
        "mean distance (1 - cosine of perceptual features) to the nearest of the "
        "training pictures and their mirror images",
        "noise",
        _REDUCED,
        higher=None,
    ),
    "nearest_close": Metric(
        "remembered",
        f"share of pictures nearer to a training picture than {1 - CLOSE:.0%} of the "
        f"photos are; well above {CLOSE:g} means that the model remembers",
        "noise",
        "",
        higher=None,
    ),
}
METRICS = IDENTITY_METRICS | PICTURE_METRICS


@dataclass(frozen=True)
class Figure:
    """One figure of one model.

    Attributes:
        key: In :data:`METRICS`.
        model: Whose pictures.
        judge: The FR model that judged; empty for what needs none.
        value: With its 95 % interval over people; None where there is too little.
        chance: The same of pictures that have nothing to do with their person.
        ceiling: The same of real photos.
    """

    key: str
    model: str
    judge: str
    value: Interval | None
    chance: float | None
    ceiling: Interval | None

    def to_json(self) -> dict[str, float | None]:
        """Flat keys that begin with the figure's own."""
        found: dict[str, float | None] = flat(self.key, self.value)
        found[f"{self.key}_chance"] = (
            None if self.chance is None else _known(self.chance)
        )
        return found | flat(f"{self.key}_ceiling", self.ceiling)


@dataclass(frozen=True)
class Change:
    """How much more alike to their people a model's pictures are than the first
    model's, picture by picture; one without a face counts as a cosine of 0."""

    model: str
    judge: str
    value: Interval


@dataclass(frozen=True)
class Spread:
    """Values behind a figure, to be drawn: what they are of, and the values."""

    title: str
    across: str
    series: Mapping[str, Float64]


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found; all files of a report say this.

    Attributes:
        title: What was evaluated.
        models: Names of the models; the others are compared with the first.
        judges: Names of the FR models that judged.
        people: How many.
        pictures: How many of each model.
        figures: All of them.
        changes: Of the models behind the first.
        spreads: What is drawn beside the figures.
        facts: What ran where, for people.
        settings: The same for scripts.
        notes: What a reader has to know; a sentence each.
    """

    title: str
    models: tuple[str, ...]
    judges: tuple[str, ...]
    people: int
    pictures: int
    figures: tuple[Figure, ...]
    changes: tuple[Change, ...] = ()
    spreads: tuple[Spread, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, model: str, judge: str) -> Iterator[Figure]:
        """The figures of one model by one judge."""
        return (f for f in self.figures if (f.model, f.judge) == (model, judge))

    def find(self, key: str, model: str, judge: str) -> Figure | None:
        """One figure; None where it was not measured."""
        return next((f for f in self.of(model, judge) if f.key == key), None)

    def to_json(self) -> dict[str, Any]:
        """The first model's figures by the first judge under keys of their own, such as
        ``rank1``, with ``_low``, ``_high``, ``_chance`` and ``_ceiling``; then every
        figure as one record. Keys are always the same, None where there is nothing."""
        found: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "people": self.people,
            "pictures": self.pictures,
            "models": list(self.models),
            "judges": list(self.judges),
        }
        for key in METRICS:
            judge = self.judges[0] if key in IDENTITY_METRICS else ""
            nothing = Figure(key, "", "", None, None, None)
            found |= (self.find(key, self.models[0], judge) or nothing).to_json()
        found["figures"] = [_record(figure) for figure in self.figures]
        found["changes"] = [
            {"model": c.model, "judge": c.judge, **flat("similarity_change", c.value)}
            for c in self.changes
        ]
        return found | {
            "settings": dict(self.settings),
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }


def _record(figure: Figure) -> dict[str, Any]:
    values = {
        key.replace(figure.key, "value", 1): value
        for key, value in figure.to_json().items()
    }
    return {
        "figure": figure.key,
        "model": figure.model,
        "judge": figure.judge or None,
        **values,
    }


def known(found: Interval | None) -> Interval | None:
    """An interval, or None where its value is not a number."""
    return None if found is None or not math.isfinite(found.value) else found


def _known(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def flat(key: str, found: Interval | None) -> dict[str, float | None]:
    """An interval under flat keys: ``key``, ``key_low`` and ``key_high``."""
    there = known(found)
    if there is None:
        return dict.fromkeys((key, f"{key}_low", f"{key}_high"))
    numbers = (there.value, there.low, there.high)
    names = (key, f"{key}_low", f"{key}_high")
    return dict(zip(names, map(_known, numbers), strict=True))
