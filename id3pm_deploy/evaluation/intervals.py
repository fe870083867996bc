"""How sure a figure is: intervals by resampling people.

Pictures of one person are not independent of each other, so people are drawn, each with
all that belongs to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ..benchmark.rounds import Interval
from ..errors import InputError

Float64 = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

RESAMPLES = 1000
_LEVEL = 0.95
_GROUPS = 10


def bootstrap(
    statistics: Callable[[Indices], Mapping[str, float]],
    owner: Indices,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Figures with their 95 % percentile bootstrap intervals over people (Efron 1979).

    Args:
        statistics: Figures of the rows with these numbers, which may come several
            times; NaN for a figure that these rows do not give.
        owner: [n], the person that each row belongs to.
        seed: Of the resampling: the same rows give the same intervals.
        resamples: How often to draw.

    Raises:
        InputError: There are fewer than two people.
    """
    rows = _rows_of(owner)
    centre = statistics(np.arange(len(owner)))
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in centre}
    for _ in range(resamples):
        chosen = rng.integers(0, len(rows), len(rows))
        found = statistics(np.concatenate([rows[i] for i in chosen]))
        for name, values in drawn.items():
            values.append(found[name])
    return {
        name: Interval(value, *_percentiles(drawn[name], _LEVEL))
        for name, value in centre.items()
    }


def upper_bound(differences: npt.ArrayLike, *, seed: int = 0) -> float:
    """The upper 95 % bound (one-sided, bootstrap percentile) of a mean.

    Args:
        differences: [n], one a pair of samples.
        seed: Of the resampling.

    Raises:
        InputError: There are fewer than two.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        raise InputError("a bound needs at least two pairs")
    rng = np.random.default_rng(seed)
    means = [
        values[rng.integers(0, len(values), len(values))].mean()
        for _ in range(10 * RESAMPLES)
    ]
    return float(np.percentile(means, 100 * _LEVEL))


def jackknife(
    statistic: Callable[[Indices], float], owner: Indices, *, seed: int = 0
) -> Interval:
    """A figure and its interval of 1.96 standard errors, by leaving out a group of
    people at a time (Efron & Tibshirani 1993, section 11.5 and problem 11.14).

    For what a bootstrap would bias, because rows that come twice change it.

    Raises:
        InputError: There are fewer than two people.
    """
    rows = _rows_of(owner)
    order = np.random.default_rng(seed).permutation(len(rows))
    groups = np.array_split(order, min(_GROUPS, len(rows)))
    kept = []
    for left_out in groups:
        stay = [rows[i] for i in order if i not in left_out]
        kept.append(statistic(np.concatenate(stay)))
    spread = np.asarray(kept) - np.mean(kept)
    count = len(groups)
    error = float(np.sqrt((count - 1) / count * (spread**2).sum()))
    centre = statistic(np.arange(len(owner)))
    return Interval(centre, centre - 1.96 * error, centre + 1.96 * error)


def _rows_of(owner: Indices) -> list[Indices]:
    """The rows of each person."""
    rows = [np.flatnonzero(owner == person) for person in np.unique(owner)]
    if len(rows) < 2:
        raise InputError(
            "an interval needs at least two people", why=f"there are {len(rows)}"
        )
    return rows


def _percentiles(values: Sequence[float], level: float) -> tuple[float, float]:
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return float("nan"), float("nan")
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)
