"""The training loss against closed forms and torch's own distributions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from test_training import SMALL, MeanColour
from torch import Tensor

from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.training.draws import draw_noise, draw_timesteps
from id3pm_deploy.training.losses import DiffusionLoss, Network, _picture_cost
from id3pm_deploy.training.start import diffusion_spec

KINDS = ["epsilon", "v", "x0"]
CONDITION = torch.zeros(6, 8)


def loss_of(kind: Any, *, variance: bool = False, gamma: float = 0.0) -> DiffusionLoss:
    config = dataclasses.replace(SMALL, prediction_type=kind, learned_variance=variance)
    return DiffusionLoss(diffusion_spec(config, MeanColour()), min_snr_gamma=gamma)


def pictures(seed: int = 0) -> Tensor:
    grey = np.random.default_rng(seed).integers(0, 256, (6, 3, 4, 4))
    return torch.from_numpy(grey.astype(np.float32) / 127.5 - 1.0)


def batch(*times: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    noise = draw_noise(0, 0, range(6), (3, 4, 4))
    return pictures(), CONDITION, torch.tensor(times), noise


def levels(loss: DiffusionLoss, t: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1-ᾱ) in float64."""
    alphas = torch.tensor(noise_schedule(loss.spec.schedule).alphas_cumprod)[t.long()]
    alphas = alphas.view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def predicts(loss: DiffusionLoss, clean: Tensor, channels: Tensor | None) -> Network:
    """A network that believes ``clean`` to be the picture."""

    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        signal, sigma = levels(loss, t)
        noise = (x - signal * clean) / sigma
        v = signal * noise - sigma * clean
        out = {"epsilon": noise, "v": v, "x0": clean}[loss.spec.prediction_type]
        parts = [out.float()] if channels is None else [out.float(), channels]
        return torch.cat(parts, dim=1)

    return network


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_answer_has_no_loss(kind: str) -> None:
    loss = loss_of(kind)
    given = batch(0, 1, 300, 500, 800, 900)
    right = predicts(loss, given[0], None)
    assert loss(right, *given).total < 1e-9
    wrong = loss(lambda *args: right(*args) + 1, *given)
    assert wrong.total == pytest.approx(1.0, rel=1e-3)
    assert wrong.simple == wrong.total
    assert wrong.variational == 0


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_the_picture(kind: str) -> None:
    # Hang et al. 2023: in all three, min(SNR, γ)·|x0 - prediction|².
    loss = loss_of(kind, gamma=5.0)
    given = batch(100, 200, 300, 500, 800, 900)
    guess = pictures(1)
    signal, sigma = levels(loss, given[2])
    snr = (signal / sigma).square()
    wanted = snr.clamp(max=5.0) * (given[0] - guess).square()
    assert (snr > 5).any()
    assert (snr < 5).any()
    found = loss(predicts(loss, guess, None), *given).total
    assert found.item() == pytest.approx(wanted.mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_variational_part_is_the_divergence_of_two_gaussians(kind: str) -> None:
    loss = loss_of(kind, variance=True)
    given = batch(1, 2, 40, 300, 700, 990)
    x0, _, t, noise = given
    guess = (x0 + 0.1 * torch.randn(x0.shape, generator=torch.manual_seed(0))).float()
    v = torch.linspace(-1.2, 1.2, x0.numel()).view(x0.shape)
    found = loss(predicts(loss, guess, v), *given)

    schedule = noise_schedule(loss.spec.schedule)
    alphas = torch.tensor(schedule.alphas_cumprod)
    here, before = (a.view(-1, 1, 1, 1) for a in (alphas[t], alphas[t - 1]))
    beta = torch.tensor(schedule.betas)[t].view(-1, 1, 1, 1)
    x = here.sqrt() * x0 + (1 - here).sqrt() * noise

    def mean(clean: Tensor) -> Tensor:  # Ho et al. 2020, eq. 7
        pull = before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * x
        return pull / (1 - here)

    small = beta * (1 - before) / (1 - here)
    share = (v.double() + 1) / 2
    spread = torch.exp(0.5 * (share * beta.log() + (1 - share) * small.log()))
    true = torch.distributions.Normal(mean(x0.double()), small.sqrt())
    model = torch.distributions.Normal(mean(guess.double()), spread)
    nats = torch.distributions.kl_divergence(true, model).mean()
    assert found.variational.item() == pytest.approx(nats.item() / math.log(2), 2e-3)
    total = found.simple + 0.001 * 1000 * found.variational
    assert found.total.item() == pytest.approx(total.item())


def test_the_last_step_is_paid_in_grey_levels() -> None:
    every = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, spread in [(0.0, 0.3), (-0.99, 0.01), (1.0, 0.004), (0.4, 3.0)]:
        log_variance = torch.tensor(2 * math.log(spread), dtype=torch.float64)
        cost = _picture_cost(every, torch.tensor(mean), log_variance)
        assert torch.exp(-cost).sum().item() == pytest.approx(1.0, abs=1e-6)
    loss = loss_of("v", variance=True)
    given = batch(0, 0, 0, 0, 0, 0)
    v = torch.ones_like(given[0])
    cost = loss(predicts(loss, given[0], v), *given).variational
    beta = noise_schedule(loss.spec.schedule).betas[0]
    dark = _picture_cost(given[0], given[0], torch.tensor(math.log(beta))).mean()
    assert cost.item() == pytest.approx(dark.item() / math.log(2), rel=1e-3)
    assert cost > 0.1


def test_the_variance_learns_and_leaves_the_prediction_alone() -> None:
    loss = loss_of("v", variance=True)
    given = batch(0, 5, 40, 300, 700, 990)
    out = torch.zeros(6, 6, 4, 4, requires_grad=True)
    loss(lambda *_: out, *given).variational.backward()  # type: ignore[no-untyped-call]
    assert out.grad is not None
    assert (out.grad[:, :3] == 0).all()
    # A prediction of zeros is far off, and it is the late timesteps that show it.
    assert (out.grad[:3, 3:].mean(dim=(1, 2, 3)) < 0).all()


def test_extremes_stay_finite() -> None:
    loss = loss_of("epsilon", variance=True)
    given = batch(0, 0, 1, 998, 999, 999)
    for value in (-30.0, 30.0):
        out = torch.full((6, 6, 4, 4), value, requires_grad=True)
        found = loss(lambda *_, made=out: made, *given)
        found.total.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(found.total)
        assert out.grad is not None
        assert torch.isfinite(out.grad).all()


def test_draws_do_not_depend_on_how_a_batch_is_shared() -> None:
    whole = draw_timesteps(3, 7, range(16), 16, 1000)
    noise = draw_noise(3, 7, range(16), (3, 4, 4))
    for rank in (0, 1, 2):
        mine = slice(rank, None, 3)
        part = draw_timesteps(3, 7, range(16)[mine], 16, 1000)
        assert torch.equal(whole[mine], part)
        assert torch.equal(noise[mine], draw_noise(3, 7, range(16)[mine], (3, 4, 4)))
    assert not torch.equal(noise, draw_noise(3, 8, range(16), (3, 4, 4)))
    assert not torch.equal(noise, draw_noise(4, 7, range(16), (3, 4, 4)))
    # One timestep in each sixteenth of the schedule, and all of them in the long run.
    assert sorted((whole * 16 // 1000).tolist()) == list(range(16))
    many = torch.cat([draw_timesteps(0, k, range(16), 16, 50) for k in range(200)])
    assert torch.bincount(many, minlength=50).min() > 0
    pooled = draw_noise(0, 0, range(64), (3, 16, 16))
    assert pooled.mean().abs() < 0.02
    assert pooled.std() == pytest.approx(1.0, abs=0.02)
