"""Whose pictures both sides make, and of what."""

from __future__ import annotations

import numpy as np

from ..backends.base import Float32, step_shapes
from ..enlarging import low_res_from_pixels
from ..errors import InputError
from ..generate import Conditions
from ..noise import batch_normals
from ..spec import DiffusionSpec

_PICTURES_STAGE = 2
"""Noise stage of random small pictures."""


def random_low_res(spec: DiffusionSpec, count: int, seed: int) -> Float32 | None:
    """Random pictures for a super-resolution model to enlarge, [count, C, h, w] float32
    of 8 bits; None for all other models."""
    shape = step_shapes(spec).low_res
    if shape is None:
        return None
    drawn = batch_normals(seed, range(count), _PICTURES_STAGE, 0, shape)
    levels = np.rint((np.tanh(drawn.astype(np.float64)) + 1) * 127.5)
    return low_res_from_pixels(levels.astype(np.uint8).transpose(0, 2, 3, 1))


def random_conditions(spec: DiffusionSpec, count: int, seed: int) -> Conditions:
    """Random identity vectors, nobody's: unit norm times √D, as FR models' often are;
    [count, 0] for a model without identity.

    Raises:
        InputError: ``count`` is below 1.
    """
    if count < 1:
        raise InputError("the count must be at least 1", why=f"it is {count}")
    vectors = batch_normals(seed, range(count), 1, 0, (spec.identity.dim,))
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled = vectors / norms * np.sqrt(spec.identity.dim)
    return Conditions(scaled.astype(np.float32), ("random",) * count)
