"""How much pictures differ: within an identity, and from photos as a whole."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..benchmark.rounds import Interval
from ..errors import InputError
from .intervals import Indices, bootstrap, jackknife

Float64 = npt.NDArray[np.float64]

_SPLITS = 20


def cosine_distances(ones: Float64, others: Float64) -> Float64:
    """1 - cosine of each row of [n, F] with each of [m, F], as [n, m]."""
    units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (ones, others)]
    return np.asarray(np.clip(1 - units[0] @ units[1].T, 0, 2))


def mean_within(distances: Float64, own: Indices) -> Float64:
    """The mean distance between two pictures of each person, [people].

    Args:
        distances: [n, n], symmetric; NaN where it is not known.
        own: [n], 0 to people - 1.

    Returns:
        NaN for a person with fewer than two pictures that can be compared.
    """
    means = []
    for person in range(int(own.max()) + 1):
        rows = np.flatnonzero(own == person)
        pairs = distances[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]
        pairs = pairs[~np.isnan(pairs)]
        means.append(pairs.mean() if len(pairs) else np.nan)
    return np.array(means)


def mean_with_interval(values: Float64) -> Interval | None:
    """The mean of what is known of one value a person, and its 95 % interval; None
    where fewer than two are known."""
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return None
    found = bootstrap(
        lambda rows: {"mean": float(known[rows].mean())}, np.arange(len(known))
    )
    return found["mean"]


def diversity(distances: Float64, own: Indices) -> Interval | None:
    """Mean pairwise distance within an identity, with an interval over people."""
    return mean_with_interval(mean_within(distances, own))


def between(distances: Float64) -> Interval | None:
    """Mean pairwise distance between pictures of different people, one of each: what
    diversity would be if a person's pictures had nothing in common."""
    others = distances.copy()
    np.fill_diagonal(others, np.nan)
    known = ~np.isnan(others).all(axis=1)
    return mean_with_interval(np.nanmean(others[known], axis=1))


def frechet_distance(ones: Float64, others: Float64) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), of Gaussians fitted to two sets of
    features (Dowson & Landau 1982, eq. 16; FID of Heusel et al. 2017, eq. 6).

    With A = centred features / √(n - 1), C = AᵀA, and tr (C1 C2)^½ is the sum of the
    singular values of A1 A2ᵀ, which is small and exact where there are fewer pictures
    than features.

    Args:
        ones: [n, F], n at least 2.
        others: [m, F], m at least 2.
    """
    means, centred = [], []
    for features in (ones, others):
        mean = features.mean(axis=0)
        means.append(mean)
        centred.append((features - mean) / np.sqrt(len(features) - 1))
    gap = float(((means[0] - means[1]) ** 2).sum())
    traces = sum(float((one**2).sum()) for one in centred)
    product = centred[0] @ centred[1].T
    shared = float(np.linalg.svd(product, compute_uv=False).sum())
    return max(0.0, gap + traces - 2 * shared)


def fid_like(pictures: Float64, photos: Float64) -> Interval:
    """The Fréchet distance of some people's pictures from other people's photos, and
    its interval by leaving out groups of people.

    People are split into halves, many times; the mean over the splits is taken. It is
    no FID: another network, and far fewer pictures than FID is meant for, with which
    the distance grows. Photos in place of the pictures give what is to be compared
    with, of as many.

    Args:
        pictures: [m, F], features of one picture a person.
        photos: [m, F], of each person's photo.

    Raises:
        InputError: There are fewer than eight people.
    """
    people = len(photos)
    if people < 8:
        raise InputError(
            "a Fréchet distance needs at least eight people", why=f"there are {people}"
        )
    rng = np.random.default_rng(0)
    splits = [rng.permutation(people) < people // 2 for _ in range(_SPLITS)]

    def distance(rows: Indices) -> float:
        halves = [(rows[one[rows]], rows[~one[rows]]) for one in splits]
        return float(
            np.mean([frechet_distance(pictures[a], photos[b]) for a, b in halves])
        )

    return jackknife(distance, np.arange(people))
