"""Whose pictures both sides make."""

from __future__ import annotations

import numpy as np

from ..errors import InputError
from ..generate import Conditions
from ..noise import batch_normals
from ..spec import DiffusionSpec


def random_conditions(spec: DiffusionSpec, count: int, seed: int) -> Conditions:
    """Random identity vectors, nobody's: unit norm times √D, as FR models' often are.

    Raises:
        InputError: ``count`` is below 1.
    """
    if count < 1:
        raise InputError("the count must be at least 1", why=f"it is {count}")
    vectors = batch_normals(seed, range(count), 1, 0, (spec.identity.dim,))
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled = vectors / norms * np.sqrt(spec.identity.dim)
    return Conditions(scaled.astype(np.float32), ("random",) * count)
