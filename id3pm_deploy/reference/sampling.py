"""The trajectory oracle: diffusers' own schedulers around the reference network.

Nothing here shares code with the solver tables, which are held against it. The
starting point and the noise of every step come in as arrays, so that both sides see
the same numbers; the timesteps come in too, since diffusers spaces some of them
differently.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import (
    DPMSolverMultistepScheduler,
)
from torch import Tensor

from ..errors import InputError
from ..spec import DiffusionSpec
from .unet import IdentityUNet

_BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""From noisy images [B, C, H, W] and timesteps [B] to the model's output."""


def guided_denoiser(
    network: IdentityUNet, identity: Tensor, guidance: float, *, guide_variance: bool
) -> Denoiser:
    """Classifier-free guidance, null + s·(id - null) (Ho & Salimans 2022, eq. 6 with
    s = 1 + w).

    Args:
        network: The reference network.
        identity: [B, D], normalised identity vectors.
        guidance: Guidance scale s; 1 means none.
        guide_variance: Whether learned variance channels are guided as well, or taken
            from the conditional branch.
    """

    def denoise(x: Tensor, timesteps: Tensor) -> Tensor:
        out: Tensor = network(x, timesteps, identity)
        if guidance == 1.0:
            return out
        null = network(x, timesteps, torch.zeros_like(identity))
        mixed: Tensor = null + guidance * (out - null)
        if guide_variance or not network.spec.learned_variance:
            return mixed
        channels = network.spec.image_channels
        return torch.cat([mixed[:, :channels], out[:, channels:]], dim=1)

    return denoise


def make_scheduler(
    spec: DiffusionSpec,
    solver: str,
    *,
    clip: float = 1.0,
    variance: str | None = None,
    prediction_type: str | None = None,
) -> Any:
    """diffusers' scheduler for one of our solvers, on the model's noise schedule.

    Args:
        spec: Facts of the model.
        solver: ``ddpm``, ``ddim`` or ``dpmpp-2m``.
        clip: Bound of the predicted x0; 0 switches clipping off. The multistep
            scheduler has no such clip.
        variance: ``learned``, ``fixed_small`` or ``fixed_large``, for ``ddpm``.
        prediction_type: In diffusers' words; None takes the model's.

    Raises:
        InputError: diffusers has no scheduler that computes this solver.
    """
    common: dict[str, Any] = {
        "num_train_timesteps": spec.schedule.timesteps,
        "beta_schedule": _BETA_SCHEDULES[spec.schedule.name],
        "prediction_type": prediction_type or _PREDICTIONS[spec.prediction_type],
    }
    if spec.schedule.name == "linear":
        scale = 1000 / spec.schedule.timesteps
        common |= {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    clipping = {"clip_sample": clip > 0, "clip_sample_range": clip or 1.0}
    scheduler: Any
    if solver == "ddpm":
        kind = "learned_range" if variance == "learned" else variance or "fixed_small"
        scheduler = DDPMScheduler(variance_type=kind, **clipping, **common)
    elif solver == "ddim":
        scheduler = DDIMScheduler(set_alpha_to_one=True, **clipping, **common)
    elif solver == "dpmpp-2m":
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", solver_order=2, **common
        )
    else:
        raise InputError(f"diffusers has no oracle for the solver {solver!r}")
    # diffusers multiplies ᾱ up in float32, where 1 - ᾱ at t = 0 has lost four digits:
    # that alone is an error of 6e-4 in an image. Its own β, multiplied in float64.
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return scheduler


@contextlib.contextmanager
def _replayed(noise: Tensor) -> Iterator[None]:
    """DDPMScheduler draws its own noise; hand it ours instead."""

    def replay(*args: Any, **kwargs: Any) -> Tensor:
        return noise

    with mock.patch.object(scheduling_ddpm, "randn_tensor", replay):
        yield


def _ddim_step(
    scheduler: Any,
    out: Tensor,
    times: Sequence[int],
    index: int,
    x: Tensor,
    **rest: Any,
) -> Tensor:
    """One DDIMScheduler step between two given timesteps.

    The scheduler takes t - T // N for the next timestep, which holds for even
    spacings only; T and N are set so that it arrives where we want.
    """
    t = times[index]
    following = times[index + 1] if index + 1 < len(times) else -1
    scheduler.register_to_config(num_train_timesteps=t - following)
    scheduler.num_inference_steps = 1
    previous: Tensor = scheduler.step(
        out, t, x, use_clipped_model_output=True, **rest
    ).prev_sample
    return previous


@torch.inference_mode()
def reference_trajectory(
    spec: DiffusionSpec,
    denoise: Denoiser,
    x_t: Tensor,
    times: Sequence[int],
    noise: Callable[[int], Tensor],
    *,
    solver: str,
    clip: float = 1.0,
    eta: float = 0.0,
    variance: str | None = None,
) -> Iterator[Tensor]:
    """Run diffusers' scheduler over given timesteps; yields x after every step.

    Args:
        spec: Facts of the model.
        denoise: The model with guidance applied.
        x_t: [B, C, H, W] float32, unit variance.
        times: Training timesteps, noisiest first.
        noise: The noise [B, C, H, W] of step j.
        solver: ``ddpm``, ``ddim`` or ``dpmpp-2m``.
        clip: Bound of the predicted x0; 0 switches clipping off.
        eta: DDIM's η.
        variance: DDPM's variance.
    """
    own_clip = solver == "dpmpp-2m" and clip > 0
    scheduler = make_scheduler(
        spec,
        solver,
        clip=clip,
        variance=variance,
        prediction_type="sample" if own_clip else None,
    )
    alphas = scheduler.alphas_cumprod
    if solver != "ddim":
        with warnings.catch_warnings():
            # It hands a tensor to np.array, which NumPy 2 deprecates.
            warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
            scheduler.set_timesteps(timesteps=list(times))
    channels = spec.model.image_channels
    x = x_t
    for index, t in enumerate(times):
        out = denoise(x, torch.full((len(x),), float(t)))
        if own_clip:
            out = _x0_from_prediction(
                out[:, :channels], x, alphas[t], spec.prediction_type
            ).clamp(-clip, clip)
        elif solver != "ddpm" or variance != "learned":
            out = out[:, :channels]
        if solver == "ddim":
            drawn = noise(index) if eta else None
            x = _ddim_step(
                scheduler, out, times, index, x, eta=eta, variance_noise=drawn
            )
        elif solver == "ddpm":
            with _replayed(noise(index)):
                x = scheduler.step(out, t, x).prev_sample
        else:
            x = scheduler.step(out, t, x).prev_sample
        yield x


def _x0_from_prediction(out: Tensor, x: Tensor, alpha: Tensor, kind: str) -> Tensor:
    if kind == "x0":
        return out
    if kind == "epsilon":
        return (x - (1 - alpha).sqrt() * out) / alpha.sqrt()
    return alpha.sqrt() * x - (1 - alpha).sqrt() * out
