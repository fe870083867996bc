"""Contact sheets that show what a control does: each is a grid of shots.

``ids`` are whose pictures are made: ids of an identity file, or ``unconditional``.
``noises`` are the numbers of the samples whose noise the pictures take.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..errors import InputError
from .shots import UNCONDITIONAL, Grid, Shot

Ids = Sequence[str]
Noises = Sequence[int]
T = TypeVar("T")
_ONE: Noises = (0,)


def guidance_sweep(ids: Ids, scales: Sequence[float], noises: Noises = _ONE) -> Grid:
    """A row for each guidance scale, a column for each person and noise."""
    return _rows_of(
        "guidance scale",
        scales,
        [(f"guidance {scale:g}", scale) for scale in scales],
        ids,
        noises,
        lambda who, noise, scale: Shot(who, scale=scale, noise=noise),
    )


def annealed(ids: Ids, scales: Sequence[float], noises: Noises = _ONE) -> Grid:
    """A row for each scale of condition annealing, a column for each person and
    noise."""
    return _rows_of(
        "condition annealing",
        scales,
        [(f"annealing {scale:g}" if scale else "none", scale) for scale in scales],
        ids,
        noises,
        lambda who, noise, scale: Shot(who, annealing=scale, noise=noise),
    )


def same_noise(ids: Ids, noises: Noises = _ONE) -> Grid:
    """A row for each noise, a column for each person."""
    return _rows_of(
        "each row has one noise",
        noises,
        [(f"noise {noise}", noise) for noise in noises],
        ids,
        _ONE,
        lambda who, _, noise: Shot(who, noise=noise),
    )


def interpolation(ids: Ids, steps: int, noises: Noises = _ONE) -> Grid:
    """A row for each two people who follow each other and each noise, with ``steps``
    pictures from the one to the other."""
    return _ways(
        "spherical interpolation",
        _pairs(ids),
        _evenly(steps),
        noises,
        lambda pair, at, noise: Shot(pair[0], towards=pair[1], at=at, noise=noise),
    )


def blends(ids: Ids, steps: int, noises: Noises = _ONE) -> Grid:
    """As :func:`interpolation`, with blended predictions in place of a vector between
    the two."""
    return _ways(
        "blend of two predictions",
        _pairs(ids),
        _evenly(steps),
        noises,
        lambda pair, share, noise: Shot(
            pair[0], blend={pair[1]: share} if share else {}, noise=noise
        ),
    )


def negatives(
    ids: Ids, others: Ids, shares: Sequence[float], noises: Noises = _ONE
) -> Grid:
    """A row for each person, each of the ``others`` and each noise, a column for each
    share that the other has in what guidance leads away from."""
    ways = {
        f"{_who(ids, who)} not {_other(others, other)}": (who, other)
        for who in ids
        for other in others
    }
    return _ways(
        "negative identity",
        ways,
        shares,
        noises,
        lambda two, share, noise: Shot(
            two[0], negative={two[1]: share} if share else {}, noise=noise
        ),
    )


def along(
    ids: Ids, names: Sequence[str], strengths: Sequence[float], noises: Noises = _ONE
) -> Grid:
    """A row for each direction, person and noise, a column for each strength."""
    ways = {f"{name}, {_who(ids, who)}": (who, name) for name in names for who in ids}
    return _ways(
        "directions in identity space",
        ways,
        strengths,
        noises,
        lambda way, strength, noise: Shot(
            way[0], directions={way[1]: strength} if strength else {}, noise=noise
        ),
    )


def attribute_values(
    ids: Ids, values: Sequence[Mapping[str, Any]], noises: Noises = _ONE
) -> Grid:
    """A row for each person and noise, a column for each set of attributes."""
    shots = [
        Shot(who, attributes=dict(stated), noise=noise)
        for who, noise, stated in itertools.product(ids, noises, values)
    ]
    labels = [
        ", ".join(f"{name}={value}" for name, value in stated.items()) or "none"
        for stated in values
    ]
    rows = _people_and_noises(ids, noises)
    return Grid(tuple(shots), "attributes", tuple(rows), tuple(labels))


def variations(
    ids: Ids, strengths: Sequence[float], count: int, noises: Noises = _ONE
) -> Grid:
    """A row for each person, noise and strength, with ``count`` variations of the
    picture."""
    _at_least_one("variation", range(count), strengths)
    shots = [
        Shot(who, noise=noise, variation=strength, variant=variant)
        for who, noise, strength, variant in itertools.product(
            ids, noises, strengths, range(count)
        )
    ]
    rows = [
        f"{one}\nvariation {strength:g}"
        for one in _people_and_noises(ids, noises)
        for strength in strengths
    ]
    heads = tuple(str(variant + 1) for variant in range(count))
    return Grid(tuple(shots), "variations of one picture", tuple(rows), heads)


def unconditional(noises: Noises) -> Grid:
    """Pictures of nobody in particular."""
    return Grid(tuple(Shot(noise=noise) for noise in noises), "unconditional")


def _rows_of(
    title: str,
    values: Sequence[Any],
    rows: Sequence[tuple[str, T]],
    ids: Ids,
    noises: Noises,
    shot: Callable[[str, int, T], Shot],
) -> Grid:
    """A row for each value, a column for each person and noise."""
    _at_least_one(title, values, ids, noises)
    columns = list(itertools.product(ids, noises))
    shots = [shot(who, noise, value) for _, value in rows for who, noise in columns]
    labels = tuple(label for label, _ in rows)
    return Grid(tuple(shots), title, labels, tuple(_people_and_noises(ids, noises)))


def _ways(
    title: str,
    ways: Mapping[str, T],
    values: Sequence[float],
    noises: Noises,
    shot: Callable[[T, float, int], Shot],
) -> Grid:
    """A row for each way and noise, a column for each value."""
    _at_least_one(title, ways, values, noises)
    shots = [
        shot(way, value, noise)
        for way, noise, value in itertools.product(ways.values(), noises, values)
    ]
    rows = [_with_noise(name, noise, noises) for name in ways for noise in noises]
    heads = tuple(f"{value:.3g}" for value in values)
    return Grid(tuple(shots), title, tuple(rows), heads)


def _pairs(ids: Ids) -> dict[str, tuple[str, str]]:
    if len(ids) < 2:
        raise InputError(
            "it takes two people to go from one to the other",
            why=f"there is {len(ids)}",
            fix="give an identity file of several people",
        )
    return {
        f"person {i + 1} to {i + 2}": pair
        for i, pair in enumerate(itertools.pairwise(ids))
    }


def _evenly(steps: int) -> list[float]:
    if steps < 2:
        raise InputError("there must be at least 2 steps", why=f"there are {steps}")
    return [i / (steps - 1) for i in range(steps)]


def _at_least_one(title: str, *several: Any) -> None:
    if not all(len(one) for one in several):
        raise InputError(f"{title}: there is nothing to show")


def _who(ids: Ids, who: str) -> str:
    """Ids say nothing to people, so a person is called by the place in the file."""
    return "anybody" if who == UNCONDITIONAL else f"person {ids.index(who) + 1}"


def _other(others: Ids, other: str) -> str:
    return f"other {others.index(other) + 1}"


def _with_noise(name: str, noise: int, noises: Noises) -> str:
    return name if len(noises) == 1 else f"{name}, noise {noise}"


def _people_and_noises(ids: Ids, noises: Noises) -> list[str]:
    return [
        _with_noise(_who(ids, who), noise, noises) for who in ids for noise in noises
    ]
