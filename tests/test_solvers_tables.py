"""What tables look like, what settings they take, and which are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from gaussian import ScheduledGaussian
from models import run_table, tiny_spec

from id3pm_deploy import defaults
from id3pm_deploy.errors import InputError
from id3pm_deploy.solvers import (
    CARRY_COLUMN,
    LATER_COLUMNS,
    NOISE_COLUMN,
    RESCALE_COLUMN,
    SOLVERS,
    SPACINGS,
    STATE_SLOTS,
    STEP_WIDTH,
    STEP_WIDTHS,
    SolverSettings,
    SolverTable,
    matrices,
    solver_table,
)

PREDICTIONS = ["epsilon", "v", "x0"]
X_T = np.linspace(-2.0, 2.0, 5).reshape(1, 1, 5)

TABLES: list[dict[str, Any]] = [
    {"solver": "ddpm", "variance": "fixed_small"},
    {"solver": "ddpm", "variance": "fixed_large"},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "ddim", "eta": 0.4},
    {"solver": "ddim"},
    {"solver": "dpmpp-2m"},
    {"solver": "ddpm", "variance": "learned"},
    {"solver": "euler"},
    {"solver": "heun"},
    {"solver": "dpmpp-2m-sde"},
    {"solver": "unipc-2"},
    {"solver": "unipc-3"},
    {"solver": "unipc-3", "final_order": "full"},
]


@pytest.mark.parametrize("settings", TABLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_form_of_a_table(
    schedule: str, prediction: str, settings: dict[str, Any]
) -> None:
    spec = tiny_spec(
        schedule=schedule, prediction_type=prediction, learned_variance=True
    )
    for steps in (1, 3, 10, 250) if settings["solver"] == "heun" else (1, 2, 10, 250):
        table = solver_table(spec, SolverSettings(**settings, steps=steps))
        rows = 2 * steps - 1 if settings["solver"] == "heun" else steps
        assert (STEP_WIDTH, CARRY_COLUMN, RESCALE_COLUMN) == (33, 32, 31)
        assert STEP_WIDTHS == (31, 32, 33)
        assert list(LATER_COLUMNS) == [31, 32]
        assert table.rows.shape == (len(table), STEP_WIDTH) == (rows, 33)
        assert table.rows.dtype == np.float32
        assert np.isfinite(table.rows).all()
        assert table.timesteps.shape == table.stochastic.shape == (rows,)
        assert (table.rows[:, 0] == table.timesteps).all()
        assert (table.rows[:, 1] == 1).all()
        assert (table.rows[:, 4] == 1).all()
        assert (table.rows[:, RESCALE_COLUMN:] == 0).all()
        assert table.x_scale == 1.0
        check_timesteps(table, steps)
        noisy = settings["solver"] in ("ddpm", "dpmpp-2m-sde")
        check_noise(table, bool(settings.get("eta") or noisy))


def check_timesteps(table: SolverTable, steps: int) -> None:
    """Falling, one for each step; a step of Heun ends where the next one begins."""
    times = table.timesteps
    if table.settings.solver == "heun":
        assert (times[1::2] == times[2::2]).all()
        times = times[::2]
    assert len(times) == steps
    assert (np.diff(times) < 0).all()


def check_noise(table: SolverTable, stochastic: bool) -> None:
    """Every row but the last uses noise, or none does."""
    matrix = matrices(table.rows.astype(np.float64))
    assert (matrix[-1, :, NOISE_COLUMN] == 0).all()
    used = (matrix[:, :, NOISE_COLUMN] != 0).any(axis=1)
    assert (table.stochastic == used).all()
    assert (used[:-1] == stochastic).all()


def slots_used(table: SolverTable) -> set[int]:
    """State slots whose value on entry to a row has a part in the final picture."""
    needed, used = {0}, {0}
    for matrix in matrices(table.rows.astype(np.float64))[::-1]:
        read = matrix[sorted(needed), :STATE_SLOTS].any(axis=0)
        # A row's x0 comes from slot 0, whatever A says.
        needed = {0, *np.flatnonzero(read).tolist()}
        used |= needed
    return used


@pytest.mark.parametrize("settings", TABLES)
def test_state_slots_are_as_many_as_declared(settings: dict[str, Any]) -> None:
    spec = tiny_spec(schedule="cosine", learned_variance=True)
    declared = SOLVERS[settings["solver"]].state_slots
    assert declared <= STATE_SLOTS
    for steps in (6, 20):
        table = solver_table(spec, SolverSettings(**settings, steps=steps))
        assert slots_used(table) == set(range(declared))
    # Nor is anything written that no solver row would read.
    written = matrices(table.rows.astype(np.float64)).any(axis=(0, 2))
    assert np.flatnonzero(written).tolist() == list(range(declared))


def test_state_slots_by_name() -> None:
    assert {name: solver.state_slots for name, solver in SOLVERS.items()} == {
        "ddpm": 1,
        "ddim": 1,
        "euler": 1,
        "heun": 2,
        "dpmpp-2m": 2,
        "dpmpp-2m-sde": 2,
        "unipc-2": 3,
        "unipc-3": 4,
    }


def test_the_names_that_commands_show_are_all_there_are() -> None:
    assert tuple(SOLVERS) == defaults.SOLVERS
    assert tuple(SPACINGS) == defaults.SPACINGS


def test_a_table_cannot_be_changed() -> None:
    table = solver_table(tiny_spec(), SolverSettings())
    arrays: list[Any] = [table.rows, table.timesteps, table.stochastic]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.x_scale = 2.0  # type: ignore[misc]


def test_defaults_are_filled_in() -> None:
    spec = tiny_spec()
    plain = solver_table(spec, SolverSettings("ddpm")).settings
    assert plain == SolverSettings(
        "ddpm", spacing="linspace", lambda_min=-100.0, variance="fixed_small"
    )
    multistep = solver_table(spec, SolverSettings("dpmpp-2m")).settings
    assert (multistep.spacing, multistep.lambda_min) == ("linspace_open", -5.1)
    learned = solver_table(tiny_spec(learned_variance=True), SolverSettings("ddpm"))
    assert learned.settings.variance == "learned"
    again = solver_table(spec, multistep)
    assert again.settings == multistep
    unipc = solver_table(spec, SolverSettings("unipc-3")).settings
    assert (unipc.spacing, unipc.final_order) == ("linspace_open", "lower")
    assert solver_table(spec, SolverSettings("unipc-2")).settings.final_order is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "karras"}, "there is no solver 'karras'"),
        ({"solver": ""}, "there is no solver ''"),
        ({"spacing": "even"}, "there is no timestep spacing 'even'"),
        ({"clip": -1.0}, "clip must be"),
        ({"clip": math.nan}, "clip must be"),
        ({"clip": math.inf}, "clip must be"),
        ({"solver": "ddim", "eta": 1.5}, "eta must be"),
        ({"solver": "ddim", "eta": -0.1}, "eta must be"),
        ({"solver": "ddim", "eta": math.nan}, "eta must be"),
        ({"solver": "ddpm", "eta": 0.5}, "eta is a setting of ddim"),
        (
            {"solver": "ddim", "variance": "fixed_small"},
            "variance is a setting of ddpm",
        ),
        ({"solver": "ddpm", "variance": "large"}, "there is no variance 'large'"),
        ({"solver": "euler", "eta": 0.5}, "eta is a setting of ddim, not of euler"),
        (
            {"solver": "dpmpp-2m-sde", "variance": "learned"},
            "variance is a setting of ddpm, not of dpmpp-2m-sde",
        ),
        (
            {"solver": "unipc-2", "final_order": "full"},
            "final_order is a setting of unipc-3, not of unipc-2",
        ),
        ({"solver": "unipc-3", "final_order": "2"}, "there is no final order '2'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SolverSettings(**settings)


def test_learned_variance_of_a_model_without() -> None:
    with pytest.raises(InputError, match="no learned variance"):
        solver_table(tiny_spec(), SolverSettings("ddpm", variance="learned"))


def test_numbers_beyond_float32_are_refused() -> None:
    with pytest.raises(InputError, match="is not finite"):
        solver_table(tiny_spec(), SolverSettings("ddim", 10, clip=1e39))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_very_few_steps_work_or_are_refused(
    schedule: str, solver: str, steps: int
) -> None:
    """Coarse, but within what clipped data can be."""
    problem = ScheduledGaussian(tiny_spec(schedule=schedule))
    noise = np.random.default_rng(steps).normal(size=(5, *X_T.shape))
    for spacing in SPACINGS:
        settings = SolverSettings(
            solver,
            steps,
            spacing=spacing,  # type: ignore[arg-type]
            lambda_min=-5.1,
        )
        if (solver, steps, spacing) == ("heun", 2, "linspace"):
            with pytest.raises(InputError, match="heun with 2 steps is too coarse"):
                solver_table(problem.spec, settings)
            continue
        table = solver_table(problem.spec, settings)
        final = run_table(table, problem.denoise, X_T, noise.__getitem__)
        assert np.abs(final[-1]).max() <= 1.0


def test_too_coarse_a_table_says_what_to_do() -> None:
    with pytest.raises(InputError) as caught:
        solver_table(tiny_spec(schedule="cosine"), SolverSettings("heun", 2))
    message = str(caught.value)
    assert "multiplies the errors of the UNet by 12" in message
    assert "linspace_open" in message
    better = SolverSettings("heun", 2, spacing="linspace_open")
    assert len(solver_table(tiny_spec(schedule="cosine"), better)) == 3


def test_euler_is_ddim_where_the_timesteps_are_the_same() -> None:
    spec = tiny_spec(schedule="cosine")
    tables = {
        (name, spacing): solver_table(spec, SolverSettings(name, 8, spacing=spacing))
        for name in ("euler", "ddim")
        for spacing in ("trailing", "linspace")
    }
    trailing = [tables[name, "trailing"] for name in ("euler", "ddim")]
    assert (trailing[0].rows == trailing[1].rows).all()
    euler, ddim = (tables[name, "linspace"] for name in ("euler", "ddim"))
    assert (np.rint(euler.timesteps) == ddim.timesteps).all()
    assert (euler.timesteps != ddim.timesteps).sum() == 6
