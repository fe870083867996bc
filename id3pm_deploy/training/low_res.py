"""What a second stage is trained on: pictures reduced to the size of the first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_LEVELS = 127.5


def reduce_pictures(pictures: Tensor, size: int) -> Tensor:
    """Pictures [N, C, H, W] in [-1, 1] averaged over areas to [N, C, size, size].

    They come out on the grid of 8-bit grey levels, as a first stage's pictures are
    handed to a second one (``enlarging.py``).
    """
    small = F.interpolate(pictures, (size, size), mode="area")
    return ((small + 1) * _LEVELS).round().clamp(0, 2 * _LEVELS) / _LEVELS - 1
