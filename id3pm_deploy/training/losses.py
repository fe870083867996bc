"""The conditional diffusion loss: simple, weighted by min-SNR, and hybrid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..reference.step import with_enlarged
from ..schedule import Float64, noise_schedule
from ..spec import DiffusionSpec

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Predicts [N, C or 2C, H, W] from x_t [N, C, H, W], timesteps [N] and conditions."""

_HALF_LEVEL = 1 / 255
"""Half the distance of two grey levels in [-1, 1]."""
_LEAST_PROBABILITY = 1e-12


class Losses(NamedTuple):
    """What :class:`DiffusionLoss` gives, each a scalar.

    Attributes:
        total: What is minimised.
        simple: Mean squared error of the prediction, weighted.
        variational: The variational bound of a random timestep, in bits a number; 0
            without learned variance.
    """

    total: Tensor
    simple: Tensor
    variational: Tensor


class DiffusionLoss:
    """The loss of one batch, a pure function of what it is given.

    ε: Ho et al. 2020, eq. 14; v = √ᾱ·ε - √(1-ᾱ)·x0: Salimans & Ho 2022, app. D.
    Learned variance: L_simple + λ·L_vlb, whose mean takes no gradient (Nichol &
    Dhariwal 2021, eq. 15 and 16); L_vlb, a sum over T timesteps, is estimated by T
    times the term of one, in bits, as in their code.

    Args:
        spec: Facts of the model.
        min_snr_gamma: γ of min-SNR weighting (Hang et al. 2023, eq. 8); 0 for none.
        vlb_weight: λ.
        device: Where the batches are.
    """

    def __init__(
        self,
        spec: DiffusionSpec,
        *,
        min_snr_gamma: float = 0.0,
        vlb_weight: float = 0.001,
        device: str | torch.device = "cpu",
    ) -> None:
        self.spec = spec
        self.timesteps = spec.schedule.timesteps
        self.scale = vlb_weight * self.timesteps
        tables = torch.from_numpy(_tables(spec, min_snr_gamma))
        self.tables = tables.to(torch.float32).to(device)

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        condition: Tensor,
        t: Tensor,
        noise: Tensor,
        low_res: Tensor | None = None,
    ) -> Losses:
        """The loss at given timesteps and noise.

        Args:
            network: What is trained.
            x0: [N, C, H, W] in [-1, 1], of 8-bit levels.
            condition: [N, D].
            t: [N] int64.
            noise: [N, C, H, W].
            low_res: [N, C, h, w], what a second stage enlarges.
        """
        signal, sigma, weight, shift, low, high = (
            row[t].view(-1, 1, 1, 1) for row in self.tables
        )
        x = signal * x0 + sigma * noise
        targets = {"epsilon": noise, "x0": x0, "v": signal * noise - sigma * x0}
        if low_res is not None:
            x = with_enlarged(x, low_res)
        out = network(x, t.float(), condition)
        channels = x0.shape[1]
        error = out[:, :channels] - targets[self.spec.prediction_type]
        simple = (weight * error.square()).mean()
        if not self.spec.model.learned_variance:
            return Losses(simple, simple, torch.zeros_like(simple))
        share = (out[:, channels:] + 1) / 2
        log_variance = share * high + (1 - share) * low
        off = shift * error.detach()
        first = (t == 0).view(-1, 1, 1, 1)
        bound = torch.where(
            first,
            _picture_cost(x0, x0 + off, log_variance),
            _divergence(off, low, log_variance),
        )
        variational = bound.mean() / math.log(2)
        return Losses(simple + self.scale * variational, simple, variational)


def _tables(spec: DiffusionSpec, gamma: float) -> Float64:
    """[6, T]: √ᾱ, √(1-ᾱ), weight of the squared error, how far the mean of x_(t-1) is
    off for an error of 1 of the prediction, and the logarithms of β̃ and β.

    β̃ of the first timestep is 0; the second's stands in for it, as where sampling
    (``solvers/ddpm.py``).
    """
    schedule = noise_schedule(spec.schedule)
    alphas, betas = schedule.alphas_cumprod, schedule.betas
    signal, sigma = np.sqrt(alphas), np.sqrt(1 - alphas)
    previous = np.concatenate([[1.0], alphas[:-1]])
    variance = betas * (1 - previous) / (1 - alphas)
    variance[0] = variance[1]
    x0_share = np.sqrt(previous) * betas / (1 - alphas)  # Ho et al. 2020, eq. 7
    of_x0 = {"epsilon": -sigma / signal, "x0": np.ones_like(alphas), "v": -sigma}
    snr = alphas / (1 - alphas)
    capped = np.minimum(snr, gamma)
    weights = {"epsilon": capped / snr, "x0": capped, "v": capped / (snr + 1)}
    kind = spec.prediction_type
    weight = weights[kind] if gamma else np.ones_like(alphas)
    shift = x0_share * of_x0[kind]
    return np.stack([signal, sigma, weight, shift, np.log(variance), np.log(betas)])


def _divergence(off: Tensor, true_log: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of two Gaussians whose means differ by ``off``, in nats."""
    ratio = true_log - log_variance
    distance = off.square() * torch.exp(-log_variance)
    return 0.5 * (torch.exp(ratio) - 1 - ratio + distance)


def _picture_cost(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the probability of a grey level under a Gaussian whose tails belong to
    the darkest and the brightest (Ho et al. 2020, eq. 13), in nats."""
    precision = torch.exp(-0.5 * log_variance)
    above = (x0 - mean + _HALF_LEVEL) * precision
    below = (x0 - mean - _HALF_LEVEL) * precision
    inside = torch.special.ndtr(above) - torch.special.ndtr(below)
    cost = -torch.log(inside.clamp(min=_LEAST_PROBABILITY))
    cost = torch.where(x0 < -0.999, -torch.special.log_ndtr(above), cost)
    return torch.where(x0 > 0.999, -torch.special.log_ndtr(-below), cost)
