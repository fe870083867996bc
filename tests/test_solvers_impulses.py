"""Every coefficient of a table against diffusers, by impulses.

Without a clip, and with a model that predicts x0, a trajectory is linear in x_T, in the
x0 of each row and in the noise of each row. Sample b of a batch sets one of these to 1
and the others to 0, so that one run through a scheduler gives all it does with them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from models import Float64, run_table, tiny_spec
from torch import Tensor

from id3pm_deploy.reference import sampling
from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.solvers import (
    NOISE_COLUMN,
    SOLVERS,
    NoisePath,
    SolverSettings,
    SolverTable,
    matrices,
    solver_table,
)
from id3pm_deploy.spec import DiffusionSpec

CASES: list[dict[str, Any]] = [
    {"solver": "ddpm", "variance": "fixed_small"},
    {"solver": "ddpm", "variance": "fixed_large"},
    {"solver": "ddim", "eta": 0.5},
    {"solver": "euler"},
    {"solver": "heun"},
    {"solver": "dpmpp-2m"},
    {"solver": "dpmpp-2m-sde"},
    {"solver": "unipc-2"},
    {"solver": "unipc-3"},
    {"solver": "unipc-3", "final_order": "full"},
]
TOLERANCE = 1e-12
ROUNDED = {"euler": 5e-7, "dpmpp-2m": 5e-7, "dpmpp-2m-sde": 5e-7}
"""Of solvers whose schedulers round x to float32 at each step."""

POINTS = [("linspace", 13), ("linspace_open", 3), ("trailing", 6), ("leading", 40)]


class Impulses:
    """Batches [1 + 2N, 3, 1, 1] that set one input of a trajectory of N rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def _one(self, sample: int) -> Float64:
        batch = np.zeros((1 + 2 * self.rows, 3, 1, 1))
        batch[sample] = 1.0
        return batch

    def start(self) -> Float64:
        return self._one(0)

    def x0(self, j: int) -> Float64:
        return self._one(1 + j)

    def noise(self, j: int) -> Float64:
        """None at the last row, where a table has none and diffusers may have."""
        return self._one(1 + self.rows + j) * (j + 1 < self.rows)


def exact_table(spec: DiffusionSpec, settings: SolverSettings) -> SolverTable:
    """A table whose rows were not rounded to float32."""
    table = solver_table(spec, settings)
    times = table.timesteps
    if settings.solver == "heun":
        times = times[::2]
    alphas = noise_schedule(spec.schedule).alphas_at(times)
    path = NoisePath(times, np.append(alphas, 1.0))
    rows = SOLVERS[settings.solver].rows(spec, path, table.settings)
    assert (rows.astype(np.float32) == table.rows).all()
    return dataclasses.replace(table, rows=rows)  # type: ignore[arg-type]


def responses(table: SolverTable) -> Float64:
    """x after each row, [N, 1 + 2N], by the table."""
    impulses = Impulses(len(table))
    rows = iter(range(len(table)))
    after = run_table(
        table,
        lambda x, t: impulses.x0(next(rows)),
        impulses.start(),
        impulses.noise,
    )
    return np.stack(after)[:, :, 0, 0, 0]


def expected_responses(
    spec: DiffusionSpec, table: SolverTable, monkeypatch: pytest.MonkeyPatch
) -> Float64:
    """The same by diffusers, on our ᾱ, since its own come from β in float32."""
    alphas = noise_schedule(spec.schedule).alphas_cumprod
    own = sampling.make_scheduler

    def made(*args: Any, **rest: Any) -> Any:
        scheduler = own(*args, **rest)
        scheduler.alphas_cumprod = torch.tensor(alphas)
        return scheduler

    monkeypatch.setattr(sampling, "make_scheduler", made)
    impulses = Impulses(len(table))

    def denoise(x: Tensor, timesteps: Tensor, row: int) -> Tensor:
        return torch.from_numpy(impulses.x0(row))

    settings = table.settings
    after = sampling.reference_trajectory(
        spec,
        denoise,
        torch.from_numpy(impulses.start()),
        table.timesteps.tolist(),
        lambda j: torch.from_numpy(impulses.noise(j)),
        solver=settings.solver,
        clip=0.0,
        eta=settings.eta,
        variance=settings.variance,
        final_order=settings.final_order,
    )
    return np.stack([x.numpy() for x in after])[:, :, 0, 0, 0]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(map(str, case.values()))
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_responses_are_diffusers(
    schedule: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(schedule=schedule, prediction_type="x0")
    for spacing, steps in POINTS:
        settings = SolverSettings(
            **case,
            steps=steps,
            spacing=spacing,  # type: ignore[arg-type]
            lambda_min=-5.1,
            clip=0.0,
        )
        table = exact_table(spec, settings)
        found = responses(table)
        expected = expected_responses(spec, table, monkeypatch)
        assert found.shape == (len(table), 1 + 2 * len(table))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= ROUNDED.get(case["solver"], TOLERANCE), (spacing, steps, error)


def test_ddpm_is_the_first_order_sde_solver() -> None:
    """SDE-DPM-Solver++ of first order is no solver of its own."""
    spec = tiny_spec(schedule="cosine", prediction_type="x0")
    settings = SolverSettings(
        "ddpm", 9, variance="fixed_small", lambda_min=-5.1, clip=0.0
    )
    table = solver_table(spec, settings)
    scheduler = sampling.make_scheduler(spec, "dpmpp-2m-sde")
    scheduler.register_to_config(solver_order=1)
    scheduler.model_outputs = [None]
    sampling._set_timesteps(scheduler, table.timesteps.tolist())
    impulses = Impulses(9)
    x = torch.from_numpy(impulses.start())
    for j, found in enumerate(responses(table)):
        x = scheduler.step(
            torch.from_numpy(impulses.x0(j)),
            int(table.timesteps[j]),
            x,
            variance_noise=torch.from_numpy(impulses.noise(j)),
        ).prev_sample
        np.testing.assert_allclose(found, x[:, 0, 0, 0], atol=2e-6)
    noise = matrices(table.rows.astype(np.float64))[:-1, 0, NOISE_COLUMN]
    assert (noise > 0.005).all()
