"""Moving guidance along whole trajectories, against a loop that shares no code."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from models import random_identity, tiny_network, tiny_spec
from torch import Tensor

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.reference.step import StepModule
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory, walk
from id3pm_deploy.solvers import SolverSettings, solver_table

SPEC = tiny_spec(schedule="cosine", prediction_type="v", learned_variance=True)
SHAPES = step_shapes(SPEC)
NETWORK = tiny_network(SPEC)
IDENTITY = random_identity(3, SPEC)
SAMPLES = [0, 1, 2]
TABLE = solver_table(SPEC, SolverSettings("ddim", 6))
TIMES = [995, 796, 597, 398, 199, 0]
NOISE = SeededNoise(5)


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with TorchEngine(NETWORK, SHAPES) as made:
        assert isinstance(made, TorchEngine)
        yield made


def alpha_bar(t: int) -> float:
    """The cosine schedule, its β cut at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for i in range(t + 1):
        product *= 1 - min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999)
    return product


def guided(x: Tensor, t: int, scale: float, phi: float) -> Tensor:
    """The network's v under guidance, as the papers have it: Ho & Salimans 2022,
    eq. 6; Lin et al. 2024, eq. 15 and 16, with torch's own standard deviation."""
    times = torch.full((len(x),), float(t))
    identity = torch.from_numpy(IDENTITY)
    conditional: Tensor = NETWORK(x, times, identity)[:, :3]
    if scale == 1:
        return conditional
    null = NETWORK(x, times, torch.zeros_like(identity))[:, :3]
    mixed: Tensor = null + scale * (conditional - null)
    wanted = conditional.std(dim=(1, 2, 3), keepdim=True)
    rescaled = mixed * wanted / mixed.std(dim=(1, 2, 3), keepdim=True)
    return phi * rescaled + (1 - phi) * mixed


@functools.cache
@torch.inference_mode()
def by_hand(scales: tuple[float, ...], phi: float) -> list[npt.NDArray[np.float32]]:
    """DDIM (Song et al. 2021, eq. 12, η = 0) with clipping; x after every step."""
    x = torch.from_numpy(NOISE.start(SAMPLES, SHAPES.picture))
    after = []
    for t, following, scale in zip(TIMES, [*TIMES[1:], -1], scales, strict=True):
        now, then = alpha_bar(t), alpha_bar(following)
        v = guided(x, t, scale, phi)
        x0 = (math.sqrt(now) * x - math.sqrt(1 - now) * v).clamp(-1, 1)
        noise = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        x = math.sqrt(then) * x0 + math.sqrt(1 - then) * noise
        after.append(x.numpy())
    return after


# Scales by hand: u is (995 - t)/995 = 0, 0.2, ... 1.
CASES: dict[str, tuple[GuidanceSettings, list[float], float]] = {
    "none": (GuidanceSettings(1.0), [1] * 6, 0),
    "constant": (GuidanceSettings(3.0), [3] * 6, 0),
    "rescaled": (GuidanceSettings(3.0, rescale=0.7), [3] * 6, 0.7),
    "fully rescaled": (GuidanceSettings(6.0, rescale=1.0), [6] * 6, 1.0),
    "interval": (GuidanceSettings(3.0, interval=(199, 600)), [1, 1, 3, 3, 3, 1], 0),
    "linear": (GuidanceSettings(3.0, "linear"), [1, 1.4, 1.8, 2.2, 2.6, 3], 0),
    "cosine": (
        GuidanceSettings(5.0, "cosine"),
        [1 + 2 * (1 - math.cos(math.pi * u / 5)) for u in range(6)],
        0,
    ),
    "listed": (GuidanceSettings(scales=(0, 2, 1, 4, 1, 0.5)), [0, 2, 1, 4, 1, 0.5], 0),
    "everything": (
        GuidanceSettings(6.0, "linear", interval=(100, 900), rescale=0.5),
        [1, 2, 3, 4, 5, 1],
        0.5,
    ),
}


def states(engine: TorchEngine, guidance: GuidanceSettings) -> list[Any]:
    job = SampleJob(IDENTITY, TABLE, guidance, NOISE)
    return [engine.state()[0] for _ in walk(engine, job, SAMPLES)]


@pytest.mark.parametrize("name", CASES)
def test_the_engine_follows_the_papers(engine: TorchEngine, name: str) -> None:
    settings, scales, phi = CASES[name]
    assert TABLE.timesteps.tolist() == TIMES
    expected = by_hand(tuple(scales), phi)
    for ours, theirs in zip(states(engine, settings), expected, strict=True):
        assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 2e-5


def test_the_cases_differ() -> None:
    """Without this, the test above could not tell one from another."""
    ends = [by_hand(tuple(scales), phi)[-1] for _, scales, phi in CASES.values()]
    for i, end in enumerate(ends):
        for other in ends[:i]:
            assert np.abs(end - other).max() > 1e-2


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp-2m"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_without_rescale_a_trajectory_keeps_every_bit(
    engine: TorchEngine,
    scale: float,
    solver: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the step as it is with no rescale in it at all."""
    table = solver_table(SPEC, SolverSettings(solver, 6))
    job = SampleJob(IDENTITY, table, GuidanceSettings(scale), NOISE)
    found = run_trajectory(engine, job, SAMPLES).images

    def untouched(prediction: Tensor, *_: Tensor) -> Tensor:
        return prediction

    monkeypatch.setattr(StepModule, "_rescaled", staticmethod(untouched))
    assert run_trajectory(engine, job, SAMPLES).images.tobytes() == found.tobytes()


def test_only_guided_rows_cost_a_second_unet_row(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = IdentityUNet.forward

    def counted(self: IdentityUNet, x: Tensor, *rest: Tensor) -> Tensor:
        rows.append(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(IdentityUNet, "forward", counted)
    states(engine, CASES["everything"][0])
    assert rows == [3, 6, 6, 6, 6, 3]
    rows.clear()
    states(engine, CASES["listed"][0])
    assert rows == [6, 6, 3, 6, 3, 6]


def test_a_bad_row_is_still_reported(engine: TorchEngine) -> None:
    """Under rescale, in guided rows and before them, and for its own sample only."""
    settings = CASES["everything"][0]
    bad = IDENTITY.copy()
    bad[1, 0] = np.nan
    good = run_trajectory(engine, SampleJob(IDENTITY, TABLE, settings, NOISE), SAMPLES)
    found = run_trajectory(engine, SampleJob(bad, TABLE, settings, NOISE), SAMPLES)
    assert good.failed.tolist() == [False, False, False]
    assert found.failed.tolist() == [False, True, False]
    assert np.isfinite(found.images).all()
    assert found.images[[0, 2]].tobytes() == good.images[[0, 2]].tobytes()
