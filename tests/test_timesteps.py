"""Which timesteps a table visits, against diffusers and guided-diffusion."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import (
    DPMSolverMultistepScheduler,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from models import tiny_spec

from id3pm_deploy.errors import InputError
from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.solvers import (
    SOLVERS,
    SPACINGS,
    SolverSettings,
    Spacing,
    first_timestep,
    solver_table,
    spaced_timesteps,
)
from id3pm_deploy.spec import ScheduleSpec


@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100, 250, 500, 1000, 27, 47, 61])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_linspace_is_guided_diffusions_respacing(schedule: Any, steps: int) -> None:
    """By way of diffusers' linspace, on the sections guided-diffusion can take."""
    oracle = DDPMScheduler(timestep_spacing="linspace")
    oracle.set_timesteps(steps)
    ours = spaced_timesteps(
        noise_schedule(ScheduleSpec(schedule)), "linspace", steps, -100.0
    )
    assert ours.tolist() == oracle.timesteps.tolist()


def guided_diffusion_timesteps(count: int, total: int = 1000) -> list[int]:
    """`space_timesteps(total, [count])` restated: strides added up, then rounded."""
    stride = 1.0 if count == 1 else (total - 1) / (count - 1)
    taken, at = [], 0.0
    for _ in range(count):
        taken.append(round(at))
        at += stride
    return taken[::-1]


@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100, 250, 500, 1000])
def test_linspace_is_strides_added_up(steps: int) -> None:
    schedule = noise_schedule(ScheduleSpec("cosine"))
    ours = spaced_timesteps(schedule, "linspace", steps, -100.0)
    assert ours.tolist() == guided_diffusion_timesteps(steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_leading_and_trailing_are_diffusers(spacing: Spacing) -> None:
    schedule = noise_schedule(ScheduleSpec("cosine"))
    oracle = DDPMScheduler(timestep_spacing=spacing)
    # 16 puts every other trailing timestep on a half before it is rounded.
    for steps in (1, 2, 3, 5, 8, 10, 16, 20, 25, 32, 40, 50, 100, 250, 500, 999, 1000):
        oracle.set_timesteps(steps)
        ours = spaced_timesteps(schedule, spacing, steps, -100.0)
        assert ours.tolist() == oracle.timesteps.tolist(), steps


# diffusers hands a tensor to a NumPy function.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_multistep_timesteps_are_diffusers() -> None:
    schedule = noise_schedule(ScheduleSpec("cosine"))
    oracle = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="linspace",
        lambda_min_clipped=-5.1,
    )
    for steps in (1, 2, 5, 8, 10, 13, 20, 25, 27, 50, 100, 199):
        oracle.set_timesteps(steps)
        ours = spaced_timesteps(schedule, "linspace_open", steps, -5.1)
        assert ours.tolist() == oracle.timesteps.tolist(), steps


# diffusers hands a tensor to a NumPy function.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_euler_and_heun_timesteps_are_diffusers(solver: str, spacing: Spacing) -> None:
    """With linspace they lie between the training timesteps."""
    oracles: dict[str, Any] = {
        "euler": EulerDiscreteScheduler,
        "heun": HeunDiscreteScheduler,
    }
    oracle = oracles[solver](timestep_spacing=spacing)
    spec = tiny_spec(schedule="linear")
    # One step of linspace is t = 0 in diffusers, where there is nothing to do.
    for steps in (*([1] if spacing != "linspace" else []), 3, 5, 8, 10, 13, 16, 50):
        oracle.set_timesteps(steps)
        table = solver_table(spec, SolverSettings(solver, steps, spacing=spacing))
        assert table.timesteps.tolist() == oracle.timesteps.tolist(), steps
        between = (table.timesteps % 1 != 0).any()
        assert between == (spacing == "linspace" and steps != 10)
    only = solver_table(spec, SolverSettings(solver, 1, spacing="linspace"))
    assert only.timesteps.tolist() == [999]


# diffusers hands a tensor to a NumPy function.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("solver", ["unipc-2", "unipc-3"])
def test_unipc_timesteps_are_diffusers(solver: str) -> None:
    """From t = T - 1, since that scheduler has no lambda_min_clipped."""
    oracle = UniPCMultistepScheduler()
    spec = tiny_spec(schedule="linear")
    for steps in (1, 2, 5, 8, 10, 13, 20, 25, 27, 50, 100, 199):
        oracle.set_timesteps(steps)
        table = solver_table(spec, SolverSettings(solver, steps))
        assert table.timesteps.tolist() == oracle.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_what_all_spacings_have_in_common(spacing: Spacing) -> None:
    schedule = noise_schedule(ScheduleSpec("linear"))
    for steps in (1, 2, 7, 40, 999):
        times = spaced_timesteps(schedule, spacing, steps, -100.0)
        assert times.dtype == np.int64
        assert len(times) == steps
        assert (np.diff(times) < 0).all()
        assert times[-1] >= 0
        assert times[0] == (
            999 if spacing != "leading" else (steps - 1) * (1000 // steps)
        )


def test_few_step_solvers_start_at_995_on_cosine() -> None:
    schedule = noise_schedule(ScheduleSpec("cosine"))
    assert first_timestep(schedule, -5.1) == 995
    assert schedule.lambdas[995] >= -5.1 > schedule.lambdas[996]
    assert first_timestep(schedule, -100.0) == 999
    for solver in SOLVERS:
        table = solver_table(tiny_spec(schedule="cosine"), SolverSettings(solver, 25))
        assert table.timesteps[0] == (999 if solver == "ddpm" else 995)
    # The linear schedule never gets there.
    assert first_timestep(noise_schedule(ScheduleSpec("linear")), -5.1) == 999


@pytest.mark.parametrize("steps", [0, -1, 997, 10**9])
def test_steps_out_of_range(steps: int) -> None:
    with pytest.raises(InputError, match="number of steps must be from 1 to 996"):
        solver_table(tiny_spec(schedule="cosine"), SolverSettings("ddim", steps))


def test_timesteps_that_coincide() -> None:
    schedule = noise_schedule(ScheduleSpec("cosine", 20))
    last = first_timestep(schedule, -100.0)
    assert len(spaced_timesteps(schedule, "linspace", last + 1, -100.0)) == last + 1
    with pytest.raises(InputError, match="do not fit the spacing 'linspace_open'"):
        spaced_timesteps(schedule, "linspace_open", last + 1, -100.0)


@pytest.mark.parametrize("lambda_min", [math.inf, -math.inf, math.nan])
def test_a_lambda_min_that_is_no_number(lambda_min: float) -> None:
    with pytest.raises(InputError, match="must be a finite number"):
        SolverSettings("ddim", 10, lambda_min=lambda_min)


def test_a_lambda_min_that_leaves_nothing() -> None:
    settings = SolverSettings("ddim", 10, lambda_min=50.0)
    with pytest.raises(InputError, match="no timestep has a half log-SNR"):
        solver_table(tiny_spec(), settings)
