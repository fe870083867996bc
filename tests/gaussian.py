"""Gaussian data: the diffusion problem whose every answer is known in closed form.

For data N(μ, s²) the best denoiser is linear in x_t, so that the probability flow, the
reverse diffusion's transitions and the moments of x_t can all be written down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.spec import DiffusionSpec

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, deviation²) at noise levels given as ᾱ; 1 is clean data.

    ᾱ is a number, or an array that broadcasts with x.
    """

    mean: float = 0.3
    deviation: float = 0.5

    def moments(self, alpha: Any) -> tuple[Any, Any]:
        """Mean and standard deviation of x at ᾱ."""
        signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
        return signal * self.mean, np.hypot(signal * self.deviation, sigma)

    def denoise(self, x: Float64, alpha: Any, prediction: str) -> Float64:
        """What a perfect model would predict."""
        signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
        mean, deviation = self.moments(alpha)
        x0 = self.mean + signal * self.deviation**2 / deviation**2 * (x - mean)
        epsilon = (x - signal * x0) / sigma
        kinds = {"x0": x0, "epsilon": epsilon, "v": signal * epsilon - sigma * x0}
        return np.asarray(kinds[prediction])

    def flow(self, x: Float64, start: Any, end: Any) -> Float64:
        """Where the probability flow takes x from one ᾱ to another."""
        mean, deviation = self.moments(start)
        target = self.moments(end)
        return np.asarray(target[0] + target[1] * (x - mean) / deviation)

    def transition(
        self, x: float, start: float, end: float, eta: float
    ) -> tuple[float, float]:
        """Mean and variance of the reverse diffusion at ᾱ = end that starts at x.

        Its noise is η times that of the time-reversed forward process, and its drift
        such that the marginals stay the same (Song et al. 2021, Score-based SDEs,
        eq. 6 and 13; η = 0 is the probability flow). The score's part in the drift,
        and so the logarithm of what it adds to the slope, grows with η².
        """
        mean, deviation = self.moments(start)
        target = self.moments(end)
        slope = (
            target[1]
            / deviation
            * (math.sqrt(start / end) * target[1] / deviation) ** (eta**2)
        )
        variance = target[1] ** 2 - slope**2 * deviation**2
        return target[0] + slope * (x - mean), variance


@dataclass(frozen=True)
class ScheduledGaussian:
    """Data N(mean, deviation²) under the schedule of ``spec``, by timestep."""

    spec: DiffusionSpec
    mean: float = 0.3
    deviation: float = 0.5

    @property
    def data(self) -> Gaussian:
        return Gaussian(self.mean, self.deviation)

    def alpha(self, t: float | None) -> float:
        """ᾱ at a timestep; None is clean data."""
        if t is None:
            return 1.0
        schedule = noise_schedule(self.spec.schedule)
        if float(t).is_integer():
            return float(schedule.alphas_cumprod[int(t)])
        return float(schedule.alphas_at(np.array(t)))

    def moments(self, t: float) -> tuple[float, float]:
        """Mean and standard deviation of x_t."""
        return self.data.moments(self.alpha(t))

    def denoise(self, x: Float64, t: float) -> Float64:
        """What a perfect model would predict, in the spec's prediction type."""
        return self.data.denoise(x, self.alpha(t), self.spec.prediction_type)

    def flow(self, x: Float64, start: float, end: float | None) -> Float64:
        """Where the probability flow takes x_t; None is clean data."""
        return self.data.flow(x, self.alpha(start), self.alpha(end))
