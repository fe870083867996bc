"""Noise addressed by (seed, sample, stage, draw): the same for any batch or backend.

Philox 4x64-10 (Salmon et al. 2011) is counter-based: a key and a counter give bits
with no state in between. NumPy guarantees its raw bits across versions, not its
normals, so the conversion (Box & Muller 1958) is our own: float64, then one cast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError

Float32 = npt.NDArray[np.float32]
BASE_STAGE, SUPER_RESOLUTION_STAGE = 0, 1
"""Stages of a chain, so that its two models never see the same noise."""
CONDITION_STAGES = 2
"""Added to a stage: the noise of conditions that move."""
_VARIATIONS = 4
"""Stages of a variation of all of these, which follow each other."""
_MAX_WORD = 1 << 64


def raw_bits(
    seed: int, sample: int, stage: int, draw: int, count: int
) -> npt.NDArray[np.uint64]:
    """``count`` raw 64-bit words of one address.

    Raises:
        InputError: A part of the address is negative or beyond 64 bits.
    """
    for name, value in (
        ("seed", seed),
        ("sample", sample),
        ("stage", stage),
        ("draw", draw),
    ):
        if not 0 <= value < _MAX_WORD:
            raise InputError(
                f"the {name} must be from 0 to 2**64 - 1", why=f"it is {value}"
            )
    key = np.array([seed, sample], dtype=np.uint64)
    counter = np.array([0, draw, stage, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def normals(
    seed: int, sample: int, stage: int, draw: int, shape: Sequence[int]
) -> Float32:
    """Standard normals of ``shape`` for one address, float32.

    Draw 0 is x_T; draw j + 1 belongs to table row j.

    Raises:
        InputError: A part of the address is negative or beyond 64 bits.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = raw_bits(seed, sample, stage, draw, 2 * pairs) >> np.uint64(11)
    uniforms = (bits.astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniforms[:pairs]))
    angle = 2.0 * np.pi * uniforms[pairs:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:count].astype(np.float32).reshape(shape)


def batch_normals(
    seed: int, samples: Sequence[int], stage: int, draw: int, shape: Sequence[int]
) -> Float32:
    """:func:`normals` of several samples, stacked: [len(samples), *shape]."""
    return np.stack([normals(seed, i, stage, draw, shape) for i in samples])


@dataclass(frozen=True)
class NoiseAddress:
    """Whose noise a picture takes, and how much of it is exchanged for other noise.

    Attributes:
        sample: Number of the sample.
        variation: 0 is that sample's noise, 1 is fresh noise; see
            :func:`varied_normals`.
        variant: Which fresh noise.

    Raises:
        InputError: A number is negative or the variation not from 0 to 1.
    """

    sample: int
    variation: float = 0.0
    variant: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.variation <= 1.0:
            raise InputError(
                "a variation's strength must be from 0 to 1",
                why=f"it is {self.variation}",
            )
        if not 0 <= self.variant < 1 << 32 or not 0 <= self.sample < 1 << 63:
            raise InputError(
                "numbers of samples and variations must not be negative or enormous",
                why=f"they are {self.sample} and {self.variant}",
            )


def varied_normals(
    seed: int, address: NoiseAddress, stage: int, draw: int, shape: Sequence[int]
) -> Float32:
    """:func:`normals` of the address's sample, turned towards fresh ones:

        cos(θ)·own + sin(θ)·fresh, θ = variation·π/2

    which is standard normal whatever θ is, and in so many dimensions all but the great
    circle of a spherical interpolation.
    """
    own = normals(seed, address.sample, stage, draw, shape)
    if not address.variation:
        return own
    apart = stage + _VARIATIONS * (1 + address.variant)
    fresh = normals(seed, address.sample, apart, draw, shape)
    angle = address.variation * math.pi / 2
    turned = math.cos(angle) * own.astype(np.float64) + math.sin(angle) * fresh
    return turned.astype(np.float32)
