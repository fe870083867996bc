"""The order of every solver, measured in float64 through the product's StepModule.

Gaussian data, whose probability flow and reverse diffusion are known in closed form, on
a grid that is even in λ and ends before clean data: at σ = 0 the last step is of
infinite length in λ and of first order in every solver, whatever is done before. The
tables come from the functions that ``solver_table`` calls, before they are rounded to
float32.

The stochastic solvers are judged by the mean and the variance they give from a fixed
starting point. Every row is linear in the state, x0 and noise, so both are computed
exactly, by probing the rows with unit vectors; for Gaussian data they are all there is
to the weak error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gaussian import Gaussian
from models import Float64, run_table, step_states, tiny_spec

from id3pm_deploy.solvers import (
    SOLVERS,
    STATE_SLOTS,
    STEP_HEAD,
    STEP_WIDTH,
    X0_COLUMN,
    NoisePath,
    SolverSettings,
    SolverTable,
    matrices,
)

PROBLEM = Gaussian()
GRIDS = (64, 128, 256, 512, 1024)
FIRST_LAMBDA, LAST_LAMBDA = -3.0, 2.0
PREDICTION = "v"
STARTS = np.linspace(-2.0, 2.0, 6).reshape(3, 1, 2)

DETERMINISTIC: list[tuple[dict[str, Any], int]] = [
    ({"solver": "ddim"}, 1),
    ({"solver": "euler"}, 1),
    ({"solver": "heun"}, 2),
    ({"solver": "dpmpp-2m"}, 2),
    # UniPC-p is of order p + 1: p is that of its predictor, and the corrector adds one
    # (Zhao et al. 2023, sec. 3). Starting with lower orders costs UniPC-3 a term of
    # third order, but a small one, as x0 hardly moves while there is noise only.
    ({"solver": "unipc-2"}, 3),
    ({"solver": "unipc-3"}, 4),
]

STOCHASTIC: list[tuple[dict[str, Any], float, int]] = [
    ({"solver": "ddpm", "variance": "fixed_small"}, 1.0, 1),
    ({"solver": "ddpm", "variance": "fixed_large"}, 1.0, 1),
    ({"solver": "ddim", "eta": 1.0}, 1.0, 1),
    ({"solver": "ddim", "eta": 0.4}, 0.4, 1),
    ({"solver": "dpmpp-2m-sde"}, 1.0, 2),
]


def even_path(steps: int) -> NoisePath:
    """Even in λ; the "timesteps" are the numbers of the levels."""
    lambdas = np.linspace(FIRST_LAMBDA, LAST_LAMBDA, steps + 1)
    return NoisePath(np.arange(float(steps)), 1 / (1 + np.exp(-2 * lambdas)))


ENDS = (float(even_path(1).alphas[0]), float(even_path(1).alphas[-1]))


def rows_on(path: NoisePath, settings: dict[str, Any]) -> Float64:
    """[N, S] float64."""
    chosen = SolverSettings(**settings, steps=len(path), clip=0.0)
    spec = tiny_spec(prediction_type=PREDICTION)
    return SOLVERS[chosen.solver].rows(spec, path, chosen)


def denoiser(paths: list[NoisePath]) -> Any:
    """The best denoiser of samples that follow a path each."""

    def denoise(x: Float64, levels: Float64) -> Float64:
        numbers = levels.astype(int)
        alphas = [path.alphas[i] for path, i in zip(paths, numbers, strict=True)]
        return PROBLEM.denoise(x, np.reshape(alphas, (-1, 1, 1, 1)), PREDICTION)

    return denoise


def flow_errors(trajectories: list[tuple[NoisePath, Float64]]) -> list[float]:
    """Largest error of each path and its rows against the probability flow.

    All share one batch, which StepModule allows; those that are through hold their
    state until the last one is.
    """
    count = len(trajectories)
    steps = np.zeros((max(len(rows) for _, rows in trajectories), count, STEP_WIDTH))
    steps[:, :, STEP_HEAD] = 1.0
    for b, (_, rows) in enumerate(trajectories):
        steps[: len(rows), b] = rows
    state = np.zeros((STATE_SLOTS, count, *STARTS.shape))
    state[0] = STARTS
    for after in step_states(
        steps, denoiser([path for path, _ in trajectories]), state
    ):
        state = after
    errors = np.abs(state[0] - PROBLEM.flow(STARTS, *ENDS))
    return [float(one.max()) for one in errors]


@pytest.fixture(scope="module")
def measured() -> dict[str, Float64]:
    """Errors of every deterministic solver over GRIDS."""
    paths = [even_path(steps) for steps in GRIDS]
    errors = flow_errors(
        [(path, rows_on(path, case)) for case, _ in DETERMINISTIC for path in paths]
    )
    names = [case["solver"] for case, _ in DETERMINISTIC]
    return dict(zip(names, np.reshape(errors, (len(names), -1)), strict=True))


def slopes(errors: Float64) -> Float64:
    return np.asarray(np.log2(errors[:-1] / errors[1:]))


@pytest.mark.parametrize(("settings", "order"), DETERMINISTIC)
def test_order_of_convergence(
    measured: dict[str, Float64], settings: dict[str, Any], order: int
) -> None:
    errors = measured[settings["solver"]]
    found = slopes(errors)
    assert len(found) == 4
    assert np.abs(found - order).max() < 0.2, found
    assert errors[0] < 0.02


def test_a_higher_order_is_a_smaller_error_for_the_same_calls(
    measured: dict[str, Float64],
) -> None:
    """Heun with half the steps, since each of them is two calls."""
    errors = [
        measured[name][0 if name == "heun" else 1]
        for name in ("ddim", "heun", "dpmpp-2m", "unipc-2", "unipc-3")
    ]
    assert (np.diff(errors) < 0).all(), errors


def test_a_wrong_coefficient_would_be_seen() -> None:
    """One thousandth more of x0 in each row, and the order is gone."""
    trajectories = []
    for steps in GRIDS[:3]:
        path = even_path(steps)
        rows = rows_on(path, {"solver": "dpmpp-2m"})
        matrices(rows)[:, 0, X0_COLUMN] *= 1.001
        trajectories.append((path, rows))
    found = slopes(np.array(flow_errors(trajectories)))
    assert np.abs(found - 2).min() > 0.2, found


def linear_maps(rows: Float64, path: NoisePath) -> tuple[Float64, Float64, Float64]:
    """What each row does to the state: offset [N, K], matrix [N, K, K], noise [N, K].

    The samples of a batch are probes: the zero state, the unit states and unit noise.
    """
    probes = STATE_SLOTS + 2
    size = len(rows) * probes
    state = np.zeros((STATE_SLOTS, len(rows), probes, 3, 1, 1))
    for slot in range(STATE_SLOTS):
        state[slot, :, 1 + slot] = 1.0
    noise = np.zeros((len(rows), probes, 3, 1, 1))
    noise[:, -1] = 1.0
    (after,) = step_states(
        np.repeat(rows, probes, axis=0)[None],
        denoiser([path] * size),
        state.reshape(STATE_SLOTS, size, 3, 1, 1),
        noise.reshape(size, 3, 1, 1),
    )
    found = after.reshape(STATE_SLOTS, len(rows), probes, 3)[..., 0].transpose(1, 2, 0)
    offset = found[:, 0]
    return (
        offset,
        (found[:, 1:-1] - offset[:, None]).transpose(0, 2, 1),
        found[:, -1] - offset,
    )


def moments_from(rows: Float64, path: NoisePath, x: float) -> tuple[float, float]:
    """Mean and variance of slot 0 after the last row, from x at the first level."""
    mean, covariance = np.zeros(STATE_SLOTS), np.zeros((STATE_SLOTS, STATE_SLOTS))
    mean[0] = x
    for part in np.array_split(rows, -(-len(rows) // 32)):
        for offset, matrix, gain in zip(*linear_maps(part, path), strict=True):
            mean = matrix @ mean + offset
            covariance = matrix @ covariance @ matrix.T + np.outer(gain, gain)
    return float(mean[0]), float(covariance[0, 0])


@pytest.mark.parametrize(("settings", "eta", "order"), STOCHASTIC)
def test_weak_order(settings: dict[str, Any], eta: float, order: int) -> None:
    centre, deviation = PROBLEM.moments(ENDS[0])
    start = float(centre + 1.5 * deviation)
    exact = PROBLEM.transition(start, *ENDS, eta)
    errors = []
    for steps in GRIDS:
        path = even_path(steps)
        found = moments_from(rows_on(path, settings), path, start)
        errors.append(np.abs(np.subtract(found, exact)))
    means, variances = np.transpose(errors)
    assert np.abs(slopes(variances) - order).max() < 0.2, variances
    assert variances[0] < 0.03
    if eta == 1.0:
        # Along the time-reversed forward process E[x0 | x_t] is a martingale, which
        # all of these solvers keep, so that the mean is exact at any number of steps.
        assert max(means) < 1e-12
    else:
        assert np.abs(slopes(means) - order).max() < 0.2, means


def test_the_exact_transition_is_consistent() -> None:
    """In two steps as in one, and without noise it is the flow."""
    ends = (0.01, 0.3, 0.9)
    for eta in (0.0, 0.4, 1.0):
        mean, variance = PROBLEM.transition(1.7, ends[0], ends[1], eta)
        later, own = PROBLEM.transition(mean, ends[1], ends[2], eta)
        slope = PROBLEM.transition(mean + 1, ends[1], ends[2], eta)[0] - later
        direct = PROBLEM.transition(1.7, ends[0], ends[2], eta)
        assert (later, own + slope**2 * variance) == pytest.approx(direct, rel=1e-12)
    mean, variance = PROBLEM.transition(1.7, 0.01, 0.9, 0.0)
    assert mean == pytest.approx(float(PROBLEM.flow(np.array(1.7), 0.01, 0.9)))
    assert variance == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("settings", [row[0] for row in [*DETERMINISTIC, *STOCHASTIC]])
def test_the_numpy_executor_is_the_step_module(settings: dict[str, Any]) -> None:
    """The stand-in of the other tests does what the product's module does."""
    path = even_path(7)
    rows = rows_on(path, settings).astype(np.float32)
    noise = np.random.default_rng(4).normal(size=(1, *STARTS.shape))
    table = SolverTable(
        rows,
        rows[:, 0].astype(np.float64),
        1.0,
        np.ones(len(rows), np.bool_),
        SolverSettings(**settings, steps=7),
    )
    state = np.zeros((STATE_SLOTS, *noise.shape))
    state[0] = STARTS
    denoise = denoiser([path])
    ours = run_table(
        table, lambda x, t: denoise(x, np.array([t])), STARTS[None], lambda _: noise
    )
    theirs = step_states(rows.astype(np.float64)[:, None], denoise, state, noise)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other[0], rtol=1e-12, atol=1e-14)
