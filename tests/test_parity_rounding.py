"""Parity leaves out what rounding alone moves, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model, tiny_spec
from torch import Tensor, nn

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.parity import rounding
from id3pm_deploy.parity.trajectory import Compared, compare_trajectory, keeps
from id3pm_deploy.sampler import SampleJob, SeededNoise
from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.spec import NO_IDENTITY
from id3pm_deploy.tolerances import CEILINGS

SPEC = tiny_spec(identity=NO_IDENTITY)
LIMITS = CEILINGS["float32"]
ALPHAS = torch.from_numpy(noise_schedule(SPEC.schedule).alphas_at(np.arange(1000.0)))


class Trained(nn.Module):
    """An ε model as training makes them: at t = 999 nearly x itself, off by ``error``;
    two of another ``rounding`` agree to 1e-6."""

    def __init__(self, rounding: bool, error: float = 0.01, bug: float = 0.0) -> None:
        super().__init__()
        self.spec, self.identity_dim = tiny_model(), 0
        self.rounding, self.error, self.bug = rounding, error, bug
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, identity: Tensor | None = None) -> Tensor:
        alpha = ALPHAS[t.long()][:, None, None, None]
        x = x.double()
        clean = torch.tanh(3 * torch.roll(x, 1, dims=3) * alpha.sqrt() - 0.2)
        made = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        made = made + self.error * torch.sin(37 * x) + self.bug
        return (made * (1 + 1e-6) if self.rounding else made).float()


def compared(steps: int, limits: Any = LIMITS, **changes: Any) -> Compared:
    table = solver_table(SPEC, SolverSettings("ddpm", steps))
    job = SampleJob(
        np.zeros((2, 0), np.float32), table, GuidanceSettings(1.0), SeededNoise(1)
    )
    nets: list[Any] = [Trained(True, **changes), Trained(False)]
    engines = [TorchEngine(net, step_shapes(SPEC)) for net in nets]
    return compare_trajectory(engines[0], engines[1], SPEC, job, limits=limits)


def test_rows_that_enlarge_rounding() -> None:
    """Only those of the cosine schedule's end, for solvers that start there."""

    def rows(steps: int, schedule: str = "cosine", **rest: Any) -> list[int]:
        spec = tiny_spec(schedule=schedule)
        table = solver_table(spec, SolverSettings(steps=steps, **rest))
        return [j for j, much in enumerate(rounding.amplifying_rows(table)) if much]

    assert rows(10) == rows(50) == rows(250) == [0]
    assert rows(10, "linear") == rows(250, "linear") == []
    assert rows(50, solver="ddim") == rows(25, solver="dpmpp-2m") == []
    assert rows(25, solver="ddim") == rows(50, solver="ddim", lambda_min=-100.0) == [0]
    v = dataclasses.replace(SPEC, prediction_type="v")
    assert not rounding.amplifying_rows(solver_table(v, SolverSettings())).any()


@pytest.mark.parametrize("steps", [10, 250])
def test_a_right_engine_passes_on_the_papers_setting(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(steps)
    assert keeps(found.trajectory, LIMITS)
    first = found.trajectory.per_step[0]
    assert first.single is not None
    assert 0.9 < first.single.count / (2 * 3 * 16 * 16) < 1
    assert (first.state, first.oracle) == (None, None)
    assert all(row.oracle is not None for row in found.trajectory.per_step[1:])
    assert "table rows 0 where x0 is not clamped" in found.not_checked[0]
    # Without that it would fail, and for that reason alone.
    monkeypatch.setattr(rounding, "MOST_GAIN", 1e9)
    strict = compared(steps, None)
    assert not keeps(strict.trajectory, LIMITS)
    worst = strict.trajectory.per_step[0].single
    assert worst is not None
    assert not worst.passes(LIMITS.step)


@pytest.mark.parametrize("bug", [1e-4, 0.01])
def test_a_wrong_engine_still_fails(bug: float) -> None:
    found = compared(10, bug=bug)
    failed = {c.part for c in found.trajectory.checks(LIMITS, 1e-4) if not c.passed}
    assert {"single", "state", "final"} <= failed


class Restless(Trained):
    """A network that answers to x in one column a hundredfold, and elsewhere calmly."""

    def forward(self, x: Tensor, t: Tensor, identity: Tensor | None = None) -> Tensor:
        wild = torch.zeros(16)
        wild[3] = 1.0
        x = x.double()
        made = 0.3 * torch.sin(x) + wild * torch.sin(150 * x) * 0.5 + self.bug
        return (made * (1 + 5e-7) if self.rounding else made).float()


def restless(make: Callable[..., nn.Module], limits: Any, **changes: Any) -> Compared:
    table = solver_table(SPEC, SolverSettings("ddim", 8))
    job = SampleJob(
        np.zeros((2, 0), np.float32), table, GuidanceSettings(1.0), SeededNoise(1)
    )
    nets: list[Any] = [make(True, **changes), make(False)]
    engines = [TorchEngine(net, step_shapes(SPEC)) for net in nets]
    return compare_trajectory(engines[0], engines[1], SPEC, job, limits=limits)


def test_what_a_restless_network_enlarges_is_left_out_and_counted() -> None:
    strict = restless(Restless, None)
    assert not keeps(strict.trajectory, LIMITS)
    found = restless(Restless, LIMITS)
    assert keeps(found.trajectory, LIMITS), found.trajectory.final.max_rel
    assert 1536 * 0.95 <= found.trajectory.final.count < 1536
    assert "rounding alone moves them" in found.not_checked[-1]
    assert all(
        row.single is not None and row.single.count == 4 * 2 * 768
        for row in found.trajectory.per_step[1:]
    ), "single table rows are judged whole"
    wrong = restless(Restless, LIMITS, bug=1e-3)
    assert not keeps(wrong.trajectory, LIMITS)


def test_not_more_than_a_few_numbers_are_left_out() -> None:
    """Where nearly all would be, all are judged."""

    class Wild(Restless):
        def forward(
            self, x: Tensor, t: Tensor, identity: Tensor | None = None
        ) -> Tensor:
            made = 0.5 * torch.sin(150 * x.double())
            return (made * (1 + 5e-7) if self.rounding else made).float()

    found = restless(Wild, LIMITS)
    assert not keeps(found.trajectory, LIMITS)
    assert found.trajectory.final.count == 2 * 768
