"""Exponential moving averages of the weights: what a CHECKPOINT is made of."""

from __future__ import annotations

import torch
from torch import nn


class Ema:
    """Exponential moving average of a network's parameters, in float32.

    Args:
        network: What is averaged; the average starts there.
        decay: Its decay, from 0 to below 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {
            name: tensor.detach().clone()
            for name, tensor in network.state_dict().items()
        }

    def decay_at(self, step: int) -> float:
        """The decay with warm-up, so that early weights do not linger."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards ``network``, as it is after ``step`` steps."""
        current = network.state_dict()
        names = list(self.tensors)
        torch._foreach_lerp_(
            [self.tensors[name] for name in names],
            [current[name] for name in names],
            1.0 - self.decay_at(step),
        )
