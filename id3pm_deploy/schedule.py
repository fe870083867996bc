"""Noise schedules in float64.

``ᾱ_t`` is the share of signal variance left at timestep t (0-based, so t = 0 is the
least noisy): x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε, Ho et al. 2020 (DDPM), eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .spec import ScheduleSpec

Float64 = npt.NDArray[np.float64]

_COSINE_OFFSET = 0.008
_MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """A schedule's arrays, each [T] float64, indexed by timestep."""

    betas: Float64
    alphas_cumprod: Float64

    @property
    def timesteps(self) -> int:
        """Number of training timesteps T."""
        return len(self.betas)

    @property
    def lambdas(self) -> Float64:
        """Half log signal-to-noise ratio λ = log(α/σ), Lu et al. 2022, sec. 2."""
        a = self.alphas_cumprod
        return 0.5 * (np.log(a) - np.log1p(-a))

    def alphas_at(self, times: Float64) -> Float64:
        """ᾱ at points of the training time that may lie between two timesteps.

        There √((1-ᾱ)/ᾱ) is interpolated linearly, as diffusers' EulerDiscreteScheduler
        and HeunDiscreteScheduler do.

        Args:
            times: Any shape, from 0 to T - 1.
        """
        a = self.alphas_cumprod
        whole = np.rint(times).astype(np.int64)
        ratio = np.interp(times, np.arange(len(a)), np.sqrt((1 - a) / a))
        return np.where(whole == times, a[whole], 1 / (1 + ratio**2))


def linear_betas(timesteps: int) -> Float64:
    """DDPM's linear β from 1e-4 to 0.02, scaled to ``timesteps`` (Ho et al., sec. 4;
    the scaling is Nichol & Dhariwal's)."""
    scale = 1000 / timesteps
    betas = np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)
    return np.minimum(betas, _MAX_BETA)


def cosine_betas(timesteps: int) -> Float64:
    """β of the cosine schedule, capped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    t = np.arange(timesteps + 1, dtype=np.float64) / timesteps
    f = np.cos((t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * np.pi / 2) ** 2
    betas: Float64 = np.minimum(1 - f[1:] / f[:-1], _MAX_BETA)
    return betas


@lru_cache(maxsize=16)
def noise_schedule(spec: ScheduleSpec) -> NoiseSchedule:
    """The arrays of the schedule that ``spec`` names."""
    make = {"linear": linear_betas, "cosine": cosine_betas}[spec.name]
    betas = make(spec.timesteps)
    alphas_cumprod = np.cumprod(1 - betas)
    for array in (betas, alphas_cumprod):
        array.setflags(write=False)
    return NoiseSchedule(betas=betas, alphas_cumprod=alphas_cumprod)
