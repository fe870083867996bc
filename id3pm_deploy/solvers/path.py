"""The noise levels that a trajectory visits: all that a solver's formulas need."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..schedule import Float64


@dataclass(frozen=True)
class NoisePath:
    """Noise levels, noisiest first.

    Attributes:
        timesteps: [N] float64, what the UNet is told at each level.
        alphas: [N + 1] float64, ᾱ at each level, and last where the trajectory ends:
            1 is clean data.
    """

    timesteps: Float64
    alphas: Float64

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def signal(self) -> Float64:
        """[N + 1], √ᾱ."""
        return np.sqrt(self.alphas)

    @cached_property
    def sigma(self) -> Float64:
        """[N + 1], √(1-ᾱ)."""
        return np.sqrt(1 - self.alphas)

    @cached_property
    def lambdas(self) -> Float64:
        """[N + 1], half log-SNR log(√ᾱ/√(1-ᾱ)); infinite for clean data."""
        with np.errstate(divide="ignore"):
            found: Float64 = np.log(self.signal) - np.log(self.sigma)
        return found

    @property
    def ends_clean(self) -> bool:
        """Whether the trajectory ends at clean data, where λ is infinite."""
        return bool(self.alphas[-1] == 1.0)
