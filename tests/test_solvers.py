"""Solver tables on a problem with a known answer: Gaussian data.

For data N(μ, s²) the best denoiser is linear in x_t, so the probability-flow solution
of deterministic solvers and the moments of stochastic ones are known in closed form.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from gaussian import ScheduledGaussian
from models import Float64, run_table, tiny_spec

from id3pm_deploy.solvers import (
    NOISE_COLUMN,
    SOLVERS,
    STEP_HEAD,
    SolverSettings,
    SolverTable,
    solver_table,
)
from id3pm_deploy.spec import DiffusionSpec, ScheduleSpec

PREDICTIONS = ["epsilon", "v", "x0"]
X_T = np.linspace(-2.0, 2.0, 5).reshape(1, 1, 5)


def fine_spec(schedule: str, prediction: str, **changes: Any) -> DiffusionSpec:
    """So many timesteps that their rounding does not limit the accuracy."""
    fine = ScheduleSpec(schedule, 100_000)  # type: ignore[arg-type]
    return tiny_spec(schedule=fine, prediction_type=prediction, **changes)


def flow_errors(
    problem: ScheduledGaussian, settings: SolverSettings
) -> tuple[float, float]:
    """Largest error half way along the timesteps, and at the end."""
    table = solver_table(problem.spec, settings)
    after = run_table(table, problem.denoise, X_T)
    times = table.timesteps.tolist()
    middle = len(times) // 2
    half = problem.flow(X_T, times[0], times[middle])
    end = problem.flow(X_T, times[0], None)
    return (
        float(np.abs(after[middle - 1] - half).max()),
        float(np.abs(after[-1] - end).max()),
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("dpmpp-2m", 2.0)])
def test_order_of_convergence(
    solver: str, order: float, schedule: str, prediction: str
) -> None:
    problem = ScheduledGaussian(fine_spec(schedule, prediction))
    errors = []
    for steps in (32, 64, 128):
        settings = SolverSettings(
            solver, steps, spacing="linspace_open", lambda_min=-5.1, clip=0.0
        )
        errors.append(flow_errors(problem, settings))
    middle, end = np.array(errors).T
    slopes = np.log2(middle[:-1] / middle[1:])
    assert np.abs(slopes - order).max() < 0.25, slopes
    # At the end σ reaches 0 and steps in λ stay long: no order, but it converges.
    assert (end[:-1] / end[1:] > 1.4).all(), end
    assert end[-1] < {"ddim": 0.025, "dpmpp-2m": 0.002}[solver]


@pytest.mark.parametrize(
    ("solver", "steps"), [("dpmpp-2m", 25), ("unipc-2", 25), ("unipc-3", 25)]
)
def test_second_order_beats_first_at_the_same_cost(solver: str, steps: int) -> None:
    problem = ScheduledGaussian(tiny_spec(schedule="cosine"))
    first, second = (
        flow_errors(problem, SolverSettings(name, count, clip=0.0))[1]
        for name, count in (("ddim", 25), (solver, steps))
    )
    assert second < first / 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_the_prediction(solver: str) -> None:
    problem = ScheduledGaussian(tiny_spec(schedule="cosine", prediction_type="x0"))
    table = solver_table(problem.spec, SolverSettings(solver, 1, clip=0.0))
    (found,) = run_table(table, problem.denoise, X_T)
    expected = problem.denoise(X_T, int(table.timesteps[0]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def moments_after(
    problem: ScheduledGaussian, table: SolverTable
) -> tuple[list[float], list[float]]:
    """Mean and variance after each row, exactly: every row is linear in x and noise.

    Starts from x_t as it really is distributed at the first timestep.
    """
    mean, deviation = problem.moments(int(table.timesteps[0]))
    variance = deviation**2
    means, variances = [], []
    for j in range(len(table)):
        t = int(table.timesteps[j])
        row = dataclasses.replace(table, rows=table.rows[j : j + 1])

        def after(
            x: float,
            noise: float,
            row: SolverTable = row,
            t: int = t,
        ) -> float:
            (out,) = run_table(
                row,
                lambda x, _: problem.denoise(x, t),
                np.full((1, 1, 1), x),
                lambda _: noise,
            )
            return float(out.item())

        slope = after(1.0, 0.0) - after(0.0, 0.0)
        gain = after(0.0, 1.0) - after(0.0, 0.0)
        mean = after(mean, 0.0)
        variance = slope**2 * variance + gain**2
        means.append(mean)
        variances.append(variance)
    return means, variances


STOCHASTIC: list[dict[str, Any]] = [
    {"solver": "ddpm", "variance": "fixed_small"},
    {"solver": "ddpm", "variance": "fixed_large"},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "ddim", "eta": 0.4},
]


@pytest.mark.parametrize("kind", STOCHASTIC)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_stochastic_solvers_reach_the_right_moments(
    schedule: str, kind: dict[str, Any]
) -> None:
    problem = ScheduledGaussian(tiny_spec(schedule=schedule), deviation=0.8)
    errors = []
    for steps in (50, 100, 200):
        settings = SolverSettings(
            **kind, steps=steps, clip=0.0, lambda_min=-5.1, spacing="linspace"
        )
        means, variances = moments_after(problem, solver_table(problem.spec, settings))
        errors.append((abs(means[-1] - 0.3), abs(variances[-1] - 0.64)))
    mean_errors, variance_errors = np.array(errors).T
    assert mean_errors.max() < 1e-4
    assert (variance_errors[:-1] / variance_errors[1:] > 1.6).all(), variance_errors
    assert variance_errors[-1] < 0.05 * 0.64


@pytest.mark.parametrize("steps", [3, 10, 250])
@pytest.mark.parametrize(
    ("variance", "deviation"), [("fixed_large", 1.0), ("fixed_small", 0.0)]
)
def test_ancestral_variances_are_exact_at_the_two_ends(
    variance: Any, deviation: float, steps: int
) -> None:
    """β is the reverse variance of N(0, 1) data and β̃ that of a single point, at any
    number of steps (Ho et al. 2020, sec. 3.2)."""
    problem = ScheduledGaussian(tiny_spec(schedule="linear"), deviation=deviation)
    settings = SolverSettings("ddpm", steps, variance=variance, clip=0.0)
    table = solver_table(problem.spec, settings)
    means, variances = moments_after(problem, table)
    for j in range(steps - 1):
        mean, spread = problem.moments(int(table.timesteps[j + 1]))
        assert means[j] == pytest.approx(mean, abs=2e-6)
        assert variances[j] == pytest.approx(spread**2, rel=2e-5)


def test_monte_carlo_ancestral_sampling() -> None:
    """The whole executor with real noise, learned variance at its upper end."""
    problem = ScheduledGaussian(
        tiny_spec(schedule="linear", learned_variance=True), mean=-0.2, deviation=1.0
    )
    table = solver_table(problem.spec, SolverSettings("ddpm", 20, clip=0.0))
    assert table.settings.variance == "learned"
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(20, 40_000, 1, 1))

    def denoise(x: Float64, t: float) -> Float64:
        return np.concatenate([problem.denoise(x, t), np.ones_like(x)], axis=1)

    found = run_table(
        table, denoise, rng.normal(size=(40_000, 1, 1)), lambda j: noise[j], True
    )[-2]
    mean, deviation = problem.moments(int(table.timesteps[-1]))
    assert found.mean() == pytest.approx(mean, abs=5 * deviation / 200)
    assert found.std() == pytest.approx(deviation, abs=5 * deviation / 280)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_full_eta_is_ancestral_sampling(prediction: str) -> None:
    """Song et al. 2021, sec. 4.1."""
    spec = tiny_spec(schedule="cosine", prediction_type=prediction)
    ddim = solver_table(spec, SolverSettings("ddim", 20, lambda_min=-9.0, eta=1.0))
    ddpm = solver_table(spec, SolverSettings("ddpm", 20, lambda_min=-9.0))
    assert (ddim.timesteps == ddpm.timesteps).all()
    np.testing.assert_allclose(ddim.rows, ddpm.rows, rtol=2e-6, atol=1e-7)


def test_learned_variance_spans_posterior_and_forward_variance() -> None:
    """v = -1 is fixed_small and v = 1 is fixed_large, but on the last row."""
    spec = tiny_spec(schedule="cosine", learned_variance=True)
    tables = {
        kind: solver_table(spec, SolverSettings("ddpm", 12, variance=kind)).rows
        for kind in ("learned", "fixed_small", "fixed_large")
    }
    learned = tables["learned"].astype(np.float64)
    gain = STEP_HEAD + NOISE_COLUMN
    assert (learned[:-1, gain] == 1).all()
    for column, kind in ((5, "fixed_small"), (6, "fixed_large")):
        deviation = np.exp(0.5 * learned[:-1, column])
        np.testing.assert_allclose(deviation, tables[kind][:-1, gain], rtol=1e-6)
        assert (tables[kind][:, 5:7] == 0).all()
    rest = np.delete(learned, [5, 6, gain], axis=1)
    small = np.delete(tables["fixed_small"], [5, 6, gain], axis=1)
    assert (rest == small).all()


def test_a_single_data_point_is_found_exactly() -> None:
    """For a single data point every solver is exact: x0 is constant."""
    for solver in SOLVERS:
        problem = ScheduledGaussian(tiny_spec(schedule="cosine"), deviation=0.0)
        table = solver_table(problem.spec, SolverSettings(solver, 9, lambda_min=-5.1))
        after = run_table(table, problem.denoise, X_T)
        np.testing.assert_allclose(after[-1], 0.3, atol=2e-5)


def test_the_clip_is_in_the_table() -> None:
    problem = ScheduledGaussian(tiny_spec(schedule="linear"), mean=300.0, deviation=0.0)
    for solver in SOLVERS:
        found = {
            clip: run_table(
                solver_table(problem.spec, SolverSettings(solver, 15, clip=clip)),
                problem.denoise,
                X_T,
            )[-1]
            for clip in (0.0, 1.0, 2.5)
        }
        for clip, value in found.items():
            np.testing.assert_allclose(value, clip or 300.0, rtol=2e-5)
