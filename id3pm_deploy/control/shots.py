"""What one picture is made of, apart from what a whole run shares.

A shot names people by their ids and holds no vector, so a run's record keeps it whole
and the run can be repeated by whoever has the identity file.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..noise import NoiseAddress
from ..recipes import dataclass_from_mapping

UNCONDITIONAL = "unconditional"
"""In place of an id: a picture of nobody in particular."""


@dataclass(frozen=True)
class Shot:
    """One picture.

    Attributes:
        identity: Whom it shows: an id of the identity file.
        towards: Another id.
        at: How far the identity lies on the great circle from the one to the other,
            0 to 1.
        directions: Strengths by the names of directions that the identity is moved
            in, in standard deviations of the people they were found in.
        attributes: The model's attributes by name; the others are not stated.
        blend: Shares by ids whose predictions are mixed into the own one's, which has
            the rest.
        negative: Shares by ids that guidance leads away from, as it does from the null
            identity, which has the rest.
        scale: Guidance scale, in place of the run's.
        annealing: Scale of annealing, in place of the run's.
        noise: Number of the sample whose noise it takes.
        variation: How much of that is exchanged for fresh noise, 0 to 1.
        variant: Which fresh noise.

    Raises:
        InputError: A value is out of range or contradicts another.
    """

    identity: str = UNCONDITIONAL
    towards: str | None = None
    at: float = 0.0
    directions: dict[str, float] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    blend: dict[str, float] = field(default_factory=dict)
    negative: dict[str, float] = field(default_factory=dict)
    scale: float | None = None
    annealing: float | None = None
    noise: int = 0
    variation: float = 0.0
    variant: int = 0

    def __post_init__(self) -> None:
        _ = self.address
        if not 0.0 <= self.at <= 1.0 or (self.at > 0 and self.towards is None):
            raise InputError(
                "an identity lies from 0 to 1 on the way to another one",
                why=f"it is to lie at {self.at}, towards {self.towards!r}",
            )
        for name, shares in (("blend", self.blend), ("negative", self.negative)):
            _check_shares(name, shares)
        for name, strength in self.directions.items():
            if not _is_number(strength) or not abs(strength) <= 1000:
                raise InputError(
                    f"the strength of direction {name!r} must be from -1000 to 1000",
                    why=f"it is {strength!r}",
                )
        if self.blend and self.annealing:
            raise InputError(
                "a blend cannot be annealed",
                why="annealing moves one identity",
                fix="leave out one of the two",
            )
        nobody = self.identity == UNCONDITIONAL
        if nobody and (self.at or self.directions or self.blend):
            raise InputError(
                "an unconditional picture has no identity to be moved or blended",
                fix="name an identity, or leave out what would change it",
            )

    @property
    def address(self) -> NoiseAddress:
        """Whose noise it takes."""
        return NoiseAddress(self.noise, self.variation, self.variant)

    @property
    def ids(self) -> frozenset[str]:
        """Everybody whose vector it needs."""
        named = {self.identity, *self.blend, *self.negative}
        named |= {self.towards} if self.towards is not None else set()
        return frozenset(named - {UNCONDITIONAL})

    def to_json(self) -> dict[str, Any]:
        """What is not at its default, but the identity and the attributes, which a
        record has for every picture."""
        plain = dataclasses.asdict(Shot(self.identity, attributes=self.attributes))
        return {k: v for k, v in dataclasses.asdict(self).items() if v != plain[k]}


def _is_number(value: object) -> bool:
    """JSON may have anything there."""
    return isinstance(value, int | float)


def _check_shares(name: str, shares: Mapping[str, float]) -> None:
    numbers = list(shares.values())
    good = all(_is_number(share) and 0 <= share <= 1 for share in numbers)
    if not good or sum(numbers) > 1 + 1e-9 or UNCONDITIONAL in shares:
        raise InputError(
            f"the shares of a {name} must be from 0 to 1, of people, and add up to no "
            "more than 1",
            why=f"they are {', '.join(map(str, shares.values()))}",
        )


def shot_from_json(identity: str, attributes: Mapping[str, Any], values: Any) -> Shot:
    """A shot from a record, which has identity and attributes beside it.

    Raises:
        InputError: Something in it is not understood.
    """
    if not isinstance(values, Mapping):
        raise InputError("a shot of the run record is no table")
    whole = {**values, "identity": identity, "attributes": dict(attributes)}
    return dataclass_from_mapping(Shot, whole, "a shot of the run record")


@dataclass(frozen=True)
class Grid:
    """Shots, row after row, and how they stand on a contact sheet.

    Attributes:
        shots: Those of equal scale and annealing best follow each other, as batches
            are made of such.
        title: Above everything.
        rows: Labels; none on a sheet that is not a grid.
        columns: Labels; as many rows and columns as there are shots.
    """

    shots: tuple[Shot, ...]
    title: str = ""
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.shots:
            raise InputError("there must be a picture to make")
        places = len(self.rows) * len(self.columns)
        if places not in (0, len(self.shots)):
            raise InputError(
                f"{len(self.rows)} rows and {len(self.columns)} columns do not hold "
                f"{len(self.shots)} pictures"
            )

    def to_json(self) -> dict[str, Any]:
        """What a record keeps of it beside the shots."""
        return {"title": self.title, "rows": self.rows, "columns": self.columns}


def grid_of(shots: Grid | Sequence[Shot]) -> Grid:
    """The shots as a grid."""
    return shots if isinstance(shots, Grid) else Grid(tuple(shots))


def alike(shots: Sequence[Shot]) -> Iterator[tuple[int, tuple[Shot, ...]]]:
    """Shots that may share a batch, each with the number of its first one: neighbours
    of equal guidance scale and annealing."""
    first = 0
    for _, some in itertools.groupby(shots, lambda one: (one.scale, one.annealing)):
        group = tuple(some)
        yield first, group
        first += len(group)
