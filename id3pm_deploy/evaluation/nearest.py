"""How near pictures come to training pictures: whether a model remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..benchmark.rounds import Interval
from ..images import Pixels
from .diversity import cosine_distances
from .features import PictureFeatures
from .intervals import Indices, bootstrap

Float64 = npt.NDArray[np.float64]

CLOSE = 0.05
"""Share of photos that come closest to a training picture; the distance that bounds
them is what ``nearest_close`` is counted by."""


@dataclass(frozen=True)
class Nearest:
    """The nearest training picture of each of n pictures: its number and how far it is
    (1 - cosine of perceptual features, the smaller one of the picture and its mirror
    image)."""

    index: Indices
    distance: Float64


def mirror_images(pictures: Sequence[Pixels]) -> list[Pixels]:
    """Each picture as a mirror shows it."""
    return [np.ascontiguousarray(one[:, ::-1]) for one in pictures]


def nearest_training(
    pictures: Sequence[Pixels], training: Float64, features: PictureFeatures
) -> Nearest:
    """Find the training picture that each picture is nearest to.

    Args:
        pictures: [H, W, 3] uint8 each.
        training: [t, F], features of training pictures of the same size.
        features: What made them.
    """
    found = [
        cosine_distances(features(some), training)
        for some in (pictures, mirror_images(pictures))
    ]
    closer = np.minimum(*found)
    index = closer.argmin(axis=1)
    return Nearest(index, closer[np.arange(len(closer)), index])


def nearest_figures(
    pictures: Float64, own: Indices, photos: Float64
) -> dict[str, Interval]:
    """What distances to the nearest training picture say, with intervals over people.

    ``nearest_training`` is the mean distance of the pictures; ``nearest_close`` the
    share of them that are nearer than 95 % of the photos are, which is 0.05 for a model
    that comes no nearer to its training pictures than photos of other people do.

    Args:
        pictures: [n], their distances.
        own: [n], the person of each.
        photos: [m], distances of the people's photos, which were not trained on.
    """

    def of(rows: Indices) -> dict[str, float]:
        limit = np.quantile(photos[own[rows]], CLOSE)
        return {
            "nearest_training": float(pictures[rows].mean()),
            "nearest_close": float((pictures[rows] < limit).mean()),
        }

    return bootstrap(of, own)
