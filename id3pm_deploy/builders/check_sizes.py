"""At which sizes a fresh graph is held against PyTorch: what a model's cost allows."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..reference.unet import IdentityUNet
from ..spec import DiffusionSpec

Size = tuple[int, int]
"""(B, R)."""

TRACED: Size = (2, 3)
_SIZES: tuple[Size, ...] = ((1, 2), (2, 3), (1, 1), (3, 6), (5, 5))
_ONE_ROW: Size = (1, 1)
_BUDGET = 1.2e12
"""Floating-point operations for all sizes: half a minute of two cores, twice."""
_MOST = 2e12
"""For the one size that every model gets."""
LARGE = 1e11
"""Operations of a UNet row from which on half precision is too slow on a CPU."""


def row_flops(spec: DiffusionSpec) -> float:
    """Floating-point operations of one UNet row; takes no memory for weights."""
    model = spec.model
    pictures = 1 if model.low_res_size is None else 2
    size = (1, pictures * model.image_channels, model.image_size, model.image_size)
    with torch.device("meta"):
        network = IdentityUNet(model, spec.condition_dim).eval().to("meta")
        x, identity = torch.empty(size), torch.empty(1, spec.condition_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, torch.empty(1), identity)
    return float(counter.get_total_flops())


def checked_sizes(flops: float) -> tuple[Size, ...]:
    """The sizes to check; a small model gets all of them, a large one at least one
    that was not traced: guided, unless two rows are too many.

    Args:
        flops: Of one UNet row.
    """
    chosen, rows = list(_SIZES[:1]), _SIZES[0][1]
    if rows * flops > _MOST:
        return (_ONE_ROW,)
    for size in _SIZES[1:]:
        rows += size[1]
        if rows * flops > _BUDGET:
            break
        chosen.append(size)
    return tuple(chosen)
