"""Condition annealing: identities that are noisy at first and clear at the end.

CADS (Sadat et al. 2024, section 3.1) trades some of the likeness for diversity. The
network sees another vector in each table row; the engine notices nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Annealing:
    """How identities are annealed; kept in run records.

    With time u, from 1 at the noisiest timestep of the model to 0, noise n and a
    vector y of length r·√D:

        γ(u) = 1 for u ≤ clear, 0 for u ≥ noisy, linear in between
        y'   = √γ·y + scale·r·√(1 - γ)·n
        y''  = y' with the mean and the standard deviation of y
        seen = rescale·y'' + (1 - rescale)·y'

    Unlike in the paper, the noise is measured in the vector's own size, r, so that a
    scale means the same however a checkpoint normalises its vectors.

    Attributes:
        scale: From 0 (off) to 10.
        clear: τ1; later than that, the identity is undisturbed.
        noisy: τ2; before, it is noise alone.
        rescale: ψ, from 0 to 1.

    Raises:
        InputError: A value is out of range.
    """

    scale: float = 0.25
    clear: float = 0.6
    noisy: float = 0.9
    rescale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.scale <= 10.0 or not 0.0 <= self.rescale <= 1.0:
            raise InputError(
                "annealing takes a scale from 0 to 10 and a rescale from 0 to 1",
                why=f"they are {self.scale} and {self.rescale}",
            )
        if not 0.0 <= self.clear <= self.noisy <= 1.0:
            raise InputError(
                "annealing ends at a time from 0 to 1, and begins no later than that",
                why=f"the identity is clear below {self.clear}, noise above "
                f"{self.noisy}",
            )

    def share(self, times: Float64) -> Float64:
        """γ at the times u [N]: how much of the identity is there."""
        if self.clear == self.noisy:
            return np.where(times <= self.clear, 1.0, 0.0)
        between = (self.noisy - times) / (self.noisy - self.clear)
        clipped: Float64 = np.clip(between, 0.0, 1.0)
        return clipped


@dataclass(frozen=True)
class Annealer:
    """Moves the conditions of samples (``SampleJob.anneal``).

    Attributes:
        settings: How.
        noise: Gives what is drawn for a table row and samples, [B, D].
        dim: D, the leading columns, which hold the identity; attributes behind them
            stay.
        last: The noisiest timestep of the model.
    """

    settings: Annealing
    noise: Callable[[int, Sequence[int], int], Float32]
    dim: int
    last: int

    def __call__(
        self, conditions: Float32, timesteps: Float64, numbers: Sequence[int]
    ) -> Float32:
        """What each table row sees: [N, B, columns] float32.

        Args:
            conditions: [B, columns]; what has no identity stays so.
            timesteps: [N], first executed first.
            numbers: The samples' numbers.
        """
        seen = np.repeat(conditions[None], len(timesteps), axis=0)
        clear = conditions[:, : self.dim].astype(np.float64)
        whose = np.flatnonzero(clear.any(axis=1)).tolist()
        shares = self.settings.share(timesteps / self.last)
        if not self.settings.scale or not whose:
            return seen
        for j in np.flatnonzero(shares < 1):
            drawn = self.noise(int(j), [numbers[i] for i in whose], self.dim)
            moved = self._moved(clear[whose], float(shares[j]), drawn)
            seen[j, whose, : self.dim] = moved
        return seen

    def _moved(self, clear: Float64, share: float, drawn: Float32) -> Float64:
        own = self.settings
        size = np.sqrt((clear**2).mean(axis=1, keepdims=True))
        noisy = np.sqrt(share) * clear + own.scale * size * np.sqrt(1 - share) * drawn
        there = np.maximum(noisy.std(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        spread = clear.std(axis=1, keepdims=True) / there
        centre = clear.mean(axis=1, keepdims=True)
        rescaled = (noisy - noisy.mean(axis=1, keepdims=True)) * spread + centre
        mixed: Float64 = own.rescale * rescaled + (1 - own.rescale) * noisy
        return mixed
