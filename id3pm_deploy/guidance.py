"""Guidance as a table: which UNet rows there are and how they mix into samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GuidanceTable:
    """What R UNet rows see and what B samples make of them.

    Attributes:
        row: [R] int32, the sample that a UNet row denoises.
        identity: [R, D] float32, its normalised identity vector; zeros are null.
        mix: [2, B, R] float32, weights for the prediction and for learned variance.
    """

    row: npt.NDArray[np.int32]
    identity: Float32
    mix: Float32

    @property
    def samples(self) -> int:
        """B."""
        return int(self.mix.shape[1])

    @property
    def unet_rows(self) -> int:
        """R."""
        return len(self.row)


def guidance_table(
    identity: Float32, scale: float, *, guide_variance: bool = False
) -> GuidanceTable:
    """Classifier-free guidance: null + s·(id - null) (Ho & Salimans 2022, eq. 6).

    An unconditional sample, and every sample at scale 1, needs one UNet row only. It
    gets one whatever shares its batch, so that the batch cannot change its picture.

    Args:
        identity: [B, D] float32, normalised; a zero row makes an unconditional sample.
        scale: s.
        guide_variance: Guide learned variance channels too, as the ID3PM
            re-implementation does; otherwise the conditional branch's are taken, as
            GLIDE does.

    Raises:
        InputError: The scale is not a finite number from 0 to 100.
    """
    if not math.isfinite(scale) or not 0.0 <= scale <= 100.0:
        raise InputError(
            "the guidance scale must be from 0 to 100", why=f"it is {scale}"
        )
    count = len(identity)
    own = np.arange(count, dtype=np.int32)
    guided = identity.any(axis=1) & (scale != 1.0)
    null = own[guided]
    plain = np.eye(count, count + len(null), dtype=np.float32)
    mixed = plain.copy()
    mixed[null, null] = scale
    mixed[null, count + np.arange(len(null))] = 1 - scale
    return GuidanceTable(
        row=np.concatenate([own, null]),
        identity=np.concatenate([identity, np.zeros_like(identity[guided])]),
        mix=np.stack([mixed, mixed if guide_variance else plain]),
    )
