"""The trajectory oracle: diffusers' own schedulers around the reference network.

Nothing here shares code with the solver tables, which are held against it. The
starting point and the noise of every step come in as arrays, so that both sides see
the same numbers; the timesteps come in too, since diffusers spaces some of them
differently.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import (
    DPMSolverMultistepScheduler,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from ..errors import InputError
from ..spec import DiffusionSpec
from .unet import IdentityUNet

_BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}

_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {"set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpmpp-2m-sde": (
        DPMSolverMultistepScheduler,
        {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc-2": (UniPCMultistepScheduler, {"solver_order": 2}),
    "unipc-3": (UniPCMultistepScheduler, {"solver_order": 3}),
}
_CLIPPING = ("ddpm", "ddim", "heun")
"""Solvers whose scheduler clamps x0; for the others that is done beforehand."""

Denoiser = Callable[[Tensor, Tensor, int], Tensor]
"""From noisy images [B, C, H, W], timesteps [B] and the number of the table row to the
model's output."""

Noise = Callable[[int], Tensor]
"""The noise [B, C, H, W] of a table row."""

_Step = Callable[[int, Tensor, Tensor], Tensor]
"""From a table row's number, the model's output and x to the next x."""


def guided_denoiser(
    network: IdentityUNet,
    identity: Tensor,
    guidance: float | Sequence[float],
    *,
    guide_variance: bool,
    rescale: float | Sequence[float] = 0.0,
) -> Denoiser:
    """Classifier-free guidance, null + s·(id - null) (Ho & Salimans 2022, eq. 6 with
    s = 1 + w), with guidance rescale (Lin et al. 2024, eq. 14 to 16).

    Args:
        network: The reference network.
        identity: [B, D], normalised identity vectors.
        guidance: Guidance scale s, or one for each table row; 1 means none.
        guide_variance: Whether learned variance channels are guided as well, or taken
            from the conditional branch.
        rescale: φ, or one for each table row; not used where the scale is 1.
    """
    channels = network.spec.image_channels

    def denoise(x: Tensor, timesteps: Tensor, row: int) -> Tensor:
        out: Tensor = network(x, timesteps, identity)
        scale, phi = _of_row(guidance, row), _of_row(rescale, row)
        if scale == 1.0:
            return out
        null = network(x, timesteps, torch.zeros_like(identity))
        mixed: Tensor = null + scale * (out - null)
        prediction = _rescaled(mixed[:, :channels], out[:, :channels], phi)
        variance = (mixed if guide_variance else out)[:, channels:]
        return torch.cat([prediction, variance], dim=1)

    return denoise


def _of_row(value: float | Sequence[float], row: int) -> float:
    return float(value if isinstance(value, float | int) else value[row])


def _rescaled(mixed: Tensor, conditional: Tensor, phi: float) -> Tensor:
    if not phi:
        return mixed
    spread = [x.std(dim=(1, 2, 3), keepdim=True) for x in (conditional, mixed)]
    return phi * (mixed * spread[0] / spread[1]) + (1 - phi) * mixed


def make_scheduler(
    spec: DiffusionSpec,
    solver: str,
    *,
    clip: float = 1.0,
    variance: str | None = None,
    final_order: str | None = None,
    prediction_type: str | None = None,
) -> Any:
    """diffusers' scheduler for one of our solvers, on the model's noise schedule.

    Args:
        spec: Facts of the model.
        solver: One of ``defaults.SOLVERS``.
        clip: Bound of the predicted x0; 0 switches clipping off. Only the schedulers
            of ``ddpm``, ``ddim`` and ``heun`` have such a clip.
        variance: ``learned``, ``fixed_small`` or ``fixed_large``, for ``ddpm``.
        final_order: ``lower`` or ``full``, for ``unipc-3``.
        prediction_type: In diffusers' words; None takes the model's.

    Raises:
        InputError: diffusers has no scheduler that computes this solver.
    """
    if solver not in _SCHEDULERS:
        raise InputError(f"diffusers has no oracle for the solver {solver!r}")
    made, own = _SCHEDULERS[solver]
    settings: dict[str, Any] = {
        **own,
        "num_train_timesteps": spec.schedule.timesteps,
        "beta_schedule": _BETA_SCHEDULES[spec.schedule.name],
        "prediction_type": prediction_type or _PREDICTIONS[spec.prediction_type],
    }
    if spec.schedule.name == "linear":
        scale = 1000 / spec.schedule.timesteps
        settings |= {"beta_start": 1e-4 * scale, "beta_end": 0.02 * scale}
    if solver in _CLIPPING:
        settings |= {"clip_sample": clip > 0, "clip_sample_range": clip or 1.0}
    if solver == "ddpm":
        kind = "learned_range" if variance == "learned" else variance or "fixed_small"
        settings["variance_type"] = kind
    if made is UniPCMultistepScheduler:
        settings["lower_order_final"] = final_order != "full"
    with _numpy_warnings():
        scheduler = made(**settings)
    # diffusers multiplies ᾱ up in float32, where 1 - ᾱ at t = 0 has lost four digits:
    # that alone is an error of 6e-4 in an image. Its own β, multiplied in float64.
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    return scheduler


@contextlib.contextmanager
def _numpy_warnings() -> Iterator[None]:
    """Some schedulers hand a tensor to np.array, which NumPy 2 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
        yield


def _set_timesteps(scheduler: Any, times: Sequence[float]) -> None:
    with _numpy_warnings():
        scheduler.set_timesteps(timesteps=list(times))


def _set_levels(scheduler: Any, times: Sequence[float]) -> None:
    """The scheduler's own σ̂ of every table row and of the end, in float64 again."""
    levels = [_noise_to_signal(scheduler, t) for t in times]
    scheduler.sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)


def _ddpm_steps(
    scheduler: Any, times: Sequence[float], noise: Noise, eta: float
) -> _Step:
    _set_timesteps(scheduler, [int(t) for t in times])

    def step(index: int, out: Tensor, x: Tensor) -> Tensor:
        def replay(*args: Any, **kwargs: Any) -> Tensor:
            return noise(index)

        # It takes no injected noise; hand it ours instead of what it draws.
        with mock.patch.object(scheduling_ddpm, "randn_tensor", replay):
            made: Tensor = scheduler.step(out, int(times[index]), x).prev_sample
        return made

    return step


def _ddim_steps(
    scheduler: Any, times: Sequence[float], noise: Noise, eta: float
) -> _Step:
    """The scheduler takes t - T // N for the next timestep, which holds for even
    spacings only; T and N are set so that it arrives where we want."""

    def step(index: int, out: Tensor, x: Tensor) -> Tensor:
        t = int(times[index])
        following = int(times[index + 1]) if index + 1 < len(times) else -1
        scheduler.register_to_config(num_train_timesteps=t - following)
        scheduler.num_inference_steps = 1
        made: Tensor = scheduler.step(
            out,
            t,
            x,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=noise(index) if eta else None,
        ).prev_sample
        return made

    return step


def _scaled_steps(
    scheduler: Any, times: Sequence[float], noise: Noise, eta: float
) -> _Step:
    """Euler and Heun work on x/√ᾱ = x·√(1 + σ̂²), with σ̂ = √((1-ᾱ)/ᾱ)."""
    two_rows = isinstance(scheduler, HeunDiscreteScheduler)
    _set_timesteps(scheduler, [times[0], *times[1 :: 2 if two_rows else 1]])
    _set_levels(scheduler, times)
    scheduler.set_begin_index(0)
    scales = (1 + scheduler.sigmas**2).sqrt()

    def step(index: int, out: Tensor, x: Tensor) -> Tensor:
        t = scheduler.timesteps[index]
        inner = x * scales[index]
        scheduler.scale_model_input(inner, t)
        made: Tensor = scheduler.step(out, t, inner).prev_sample / scales[index + 1]
        return made

    return step


def _dpm_steps(
    scheduler: Any, times: Sequence[float], noise: Noise, eta: float
) -> _Step:
    _set_timesteps(scheduler, [int(t) for t in times])
    _set_levels(scheduler, times)
    stochastic = scheduler.config.algorithm_type.startswith("sde")

    def step(index: int, out: Tensor, x: Tensor) -> Tensor:
        drawn = noise(index) if stochastic else None
        t = int(times[index])
        made: Tensor = scheduler.step(out, t, x, variance_noise=drawn).prev_sample
        return made

    return step


def _unipc_steps(
    scheduler: Any, times: Sequence[float], noise: Noise, eta: float
) -> _Step:
    """It takes no timesteps of ours: they are put in place.

    Without lowered final orders it divides by the infinite step to σ = 0; that step
    alone is lowered then.
    """
    with _numpy_warnings():
        scheduler.set_timesteps(len(times))
    scheduler.timesteps = torch.tensor([int(t) for t in times])
    _set_levels(scheduler, times)
    scheduler.set_begin_index(0)

    def step(index: int, out: Tensor, x: Tensor) -> Tensor:
        if index + 1 == len(times):
            scheduler.register_to_config(lower_order_final=True)
        made: Tensor = scheduler.step(out, int(times[index]), x).prev_sample
        return made

    return step


_STEPS: dict[str, Callable[[Any, Sequence[float], Noise, float], _Step]] = {
    "ddpm": _ddpm_steps,
    "ddim": _ddim_steps,
    "euler": _scaled_steps,
    "heun": _scaled_steps,
    "dpmpp-2m": _dpm_steps,
    "dpmpp-2m-sde": _dpm_steps,
    "unipc-2": _unipc_steps,
    "unipc-3": _unipc_steps,
}


@torch.inference_mode()
def reference_trajectory(
    spec: DiffusionSpec,
    denoise: Denoiser,
    x_t: Tensor,
    times: Sequence[float],
    noise: Noise,
    *,
    solver: str,
    clip: float = 1.0,
    eta: float = 0.0,
    variance: str | None = None,
    final_order: str | None = None,
) -> Generator[Tensor, Tensor | None, None]:
    """Run diffusers' scheduler over given timesteps; yields x after every table row.

    Another x that is sent back in takes its place; that is for solvers that remember
    nothing else.

    The schedulers are given float64, since some of them take differences of numbers
    that are a hundred times the result; the model is given what ``x_t`` is.

    Args:
        spec: Facts of the model.
        denoise: The model with guidance applied.
        x_t: [B, C, H, W] float32 or float64, unit variance; the type that is yielded.
        times: Training timestep of every table row, noisiest first, as
            ``SolverTable.timesteps`` has them: two rows a step for ``heun``, and
            points between two timesteps for it and ``euler``.
        noise: The noise of a table row.
        solver: One of ``defaults.SOLVERS``.
        clip: Bound of the predicted x0; 0 switches clipping off.
        eta: DDIM's η.
        variance: DDPM's variance.
        final_order: UniPC-3's final order.
    """
    own_clip = clip > 0 and solver not in _CLIPPING
    scheduler = make_scheduler(
        spec,
        solver,
        clip=clip,
        variance=variance,
        final_order=final_order,
        prediction_type="sample" if own_clip else None,
    )
    step = _STEPS[solver](scheduler, times, lambda j: noise(j).double(), eta)
    channels = spec.model.image_channels
    x = x_t.double()
    for index, t in enumerate(times):
        steps = torch.full((len(x),), float(t), device=x.device)
        out = denoise(x.to(x_t.dtype), steps, index).double()
        if variance != "learned":
            out = out[:, :channels]
        if own_clip:
            level = _noise_to_signal(scheduler, t)
            out = _x0_from_prediction(out, x, level, spec.prediction_type)
            out = out.clamp(-clip, clip)
        x = step(index, out, x)
        given = yield x.to(x_t.dtype)
        x = x if given is None else given.double()


def _noise_to_signal(scheduler: Any, t: float) -> float:
    """σ̂ = √((1-ᾱ)/ᾱ) at a timestep, or between two as diffusers interpolates it."""
    alphas = scheduler.alphas_cumprod.numpy()
    known = np.sqrt((1 - alphas) / alphas)
    return float(np.interp(t, np.arange(len(known)), known))


def _x0_from_prediction(out: Tensor, x: Tensor, level: float, kind: str) -> Tensor:
    signal = 1 / math.sqrt(1 + level**2)
    if kind == "x0":
        return out
    if kind == "epsilon":
        return x / signal - level * out
    return signal * (x - level * out)
