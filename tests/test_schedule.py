"""Noise schedules against diffusers' and against their definitions."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from id3pm_deploy.errors import CheckpointError
from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.spec import ScheduleSpec

Name = Literal["linear", "cosine"]


def of_diffusers(name: str, timesteps: int) -> Any:
    if name == "cosine":
        return DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
    scale = 1000 / timesteps
    return DDPMScheduler(timesteps, beta_start=1e-4 * scale, beta_end=0.02 * scale)


@pytest.mark.parametrize("timesteps", [1000, 250, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_equals_diffusers(name: Name, timesteps: int) -> None:
    ours = noise_schedule(ScheduleSpec(name, timesteps))
    theirs = of_diffusers(name, timesteps)
    assert ours.timesteps == len(theirs.betas) == timesteps
    # Float32: 1 - β keeps four digits at β = 0.999, and up to 4000 are multiplied.
    np.testing.assert_allclose(ours.betas, theirs.betas.numpy(), rtol=2e-6)
    np.testing.assert_allclose(
        ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5
    )
    product = np.cumprod(1 - theirs.betas.double().numpy())
    np.testing.assert_allclose(ours.alphas_cumprod, product, rtol=2e-5)


def test_known_values() -> None:
    cosine = noise_schedule(ScheduleSpec("cosine"))
    assert cosine.alphas_cumprod[999] == pytest.approx(2.43e-9, rel=2e-3)
    assert cosine.betas[999] == 0.999
    linear = noise_schedule(ScheduleSpec("linear"))
    assert linear.betas[0] == pytest.approx(1e-4, rel=1e-12)
    assert linear.betas[999] == pytest.approx(0.02, rel=1e-12)
    assert linear.alphas_cumprod[0] == pytest.approx(1 - 1e-4, rel=1e-15)


def test_the_cosine_follows_its_formula_below_the_cap() -> None:
    def f(t: float) -> float:
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    ours = noise_schedule(ScheduleSpec("cosine")).alphas_cumprod
    for t in (0, 1, 250, 500, 900, 998):
        assert ours[t] == pytest.approx(f(t + 1) / f(0), rel=1e-9)


@pytest.mark.parametrize("timesteps", [2, 10, 1000, 100_000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_signal_falls_and_lambda_with_it(name: Name, timesteps: int) -> None:
    ours = noise_schedule(ScheduleSpec(name, timesteps))
    for array in (ours.betas, ours.alphas_cumprod, ours.lambdas):
        assert array.dtype == np.float64
        assert array.shape == (timesteps,)
        assert np.isfinite(array).all()
    assert (ours.betas > 0).all()
    assert (ours.betas <= 0.999).all()
    assert (np.diff(ours.alphas_cumprod) < 0).all()
    assert (np.diff(ours.lambdas) < 0).all()


def test_lambda_is_the_log_ratio_of_signal_to_noise() -> None:
    ours = noise_schedule(ScheduleSpec("cosine"))
    signal = np.sqrt(ours.alphas_cumprod)
    sigma = np.sqrt(1 - ours.alphas_cumprod)
    np.testing.assert_allclose(ours.lambdas, np.log(signal / sigma), rtol=1e-9)


# diffusers hands a tensor to a NumPy function.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_between_two_timesteps_it_is_diffusers(name: Name) -> None:
    ours = noise_schedule(ScheduleSpec(name))
    times = np.array([995.0, 993.25, 500.5, 12.125, 0.5, 0.0])
    betas = {"linear": {"beta_start": 1e-4, "beta_end": 0.02}, "cosine": {}}[name]
    oracle = EulerDiscreteScheduler(
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[name], **betas
    )
    oracle.alphas_cumprod = torch.tensor(ours.alphas_cumprod)
    oracle.set_timesteps(timesteps=times.tolist())
    sigmas = oracle.sigmas[:-1].double().numpy()
    np.testing.assert_allclose(ours.alphas_at(times), 1 / (1 + sigmas**2), rtol=3e-7)
    # At a timestep it is that timestep's, to the last bit.
    whole = np.arange(1000.0)
    assert (ours.alphas_at(whole) == ours.alphas_cumprod).all()
    assert ours.alphas_at(np.array([[1.5, 2.0]])).shape == (1, 2)


def test_nobody_can_change_a_shared_schedule() -> None:
    ours = noise_schedule(ScheduleSpec("linear"))
    assert noise_schedule(ScheduleSpec("linear")) is ours
    for array in (ours.betas, ours.alphas_cumprod):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.5


@pytest.mark.parametrize("timesteps", [-1, 0, 1, 100_001])
def test_timesteps_out_of_range(timesteps: int) -> None:
    with pytest.raises(CheckpointError, match="from 2 to 100000"):
        ScheduleSpec("cosine", timesteps)
