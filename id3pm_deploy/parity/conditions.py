"""Whose pictures both sides make, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from ..attributes import Attributes, encode_attributes
from ..backends.base import Float32, step_shapes
from ..enlarging import low_res_from_pixels
from ..errors import InputError
from ..generate import Conditions
from ..noise import batch_normals
from ..spec import AttributeSpec, DiffusionSpec

_PICTURES_STAGE, _ATTRIBUTES_STAGE = 2, 4
"""Noise stages of random small pictures and of random attributes."""


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
    none for a model without identity. Attributes are stated, at random.

    Raises:
        InputError: ``count`` is below 1.
    """
    if count < 1:
        raise InputError("the count must be at least 1", why=f"it is {count}")
    vectors = batch_normals(seed, range(count), 1, 0, (spec.identity.dim,))
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled = vectors / norms * np.sqrt(spec.identity.dim)
    rows = _random_attributes(spec.attributes, count, seed)
    columns = encode_attributes(spec.attributes, rows)
    whole = np.concatenate([scaled.astype(np.float32), columns], axis=1)
    return Conditions(whole, ("random",) * count, rows)


def _random_attributes(
    specs: Sequence[AttributeSpec], count: int, seed: int
) -> tuple[Attributes, ...]:
    """A value of every attribute for ``count`` pictures."""
    drawn = batch_normals(seed, range(count), _ATTRIBUTES_STAGE, 0, (len(specs),))
    shares = (np.tanh(drawn.astype(np.float64)) + 1) / 2
    return tuple(
        {
            spec.name: _value_at(spec, share)
            for spec, share in zip(specs, row, strict=True)
        }
        for row in shares.tolist()
    )


def _value_at(spec: AttributeSpec, share: float) -> float | str:
    """The value of an attribute at a share of its range, from 0 to 1."""
    if spec.kind == "categorical":
        return spec.categories[min(int(share * spec.columns), spec.columns - 1)]
    low, high = cast(float, spec.low), cast(float, spec.high)
    return min(low + share * (high - low), high)
