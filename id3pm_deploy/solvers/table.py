"""From settings to a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..schedule import Float64, NoiseSchedule, noise_schedule
from ..spec import DiffusionSpec
from .ddim import ddim_rows
from .ddpm import ddpm_rows
from .dpmpp import dpmpp_2m_rows, dpmpp_2m_sde_rows
from .heun import heun_rows
from .layout import NOISE_COLUMN, matrices
from .path import NoisePath
from .settings import SolverSettings
from .timesteps import Spacing, spaced_points, spaced_timesteps
from .unipc import unipc_2_rows, unipc_3_rows

MOST_GAIN = 1000.0
"""Largest number in A: from there on the resolution of a float16 UNet, 5e-4, becomes
an error of half the range of a pixel."""


@dataclass(frozen=True)
class SolverTable:
    """A trajectory as data.

    Attributes:
        rows: [N, S] float32, what the step graph takes.
        timesteps: [N] float64, training timesteps, first executed first, one for each
            table row; whole numbers but for ``euler`` and ``heun``.
        x_scale: Standard deviation of x_T.
        stochastic: [N] bool, whether a row uses its noise.
        settings: What it was made from, with every default filled in.
    """

    rows: npt.NDArray[np.float32]
    timesteps: Float64
    x_scale: float
    stochastic: npt.NDArray[np.bool_]
    settings: SolverSettings

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Solver:
    """A solver's formulas and what it starts from.

    Attributes:
        rows: From noise levels to table rows, [N, S] float64.
        spacing: Its own timestep spacing.
        lambda_min: Its own least half log-SNR.
        state_slots: How many of the K slots it uses.
        whole: Whether it visits training timesteps only; else points between them.
    """

    rows: Callable[[DiffusionSpec, NoisePath, SolverSettings], Float64]
    spacing: Spacing
    lambda_min: float
    state_slots: int
    whole: bool = True


SOLVERS: dict[str, Solver] = {
    "ddpm": Solver(ddpm_rows, "linspace", -100.0, 1),
    "ddim": Solver(ddim_rows, "linspace", -5.1, 1),
    "euler": Solver(ddim_rows, "linspace", -5.1, 1, whole=False),
    "heun": Solver(heun_rows, "linspace", -5.1, 2, whole=False),
    "dpmpp-2m": Solver(dpmpp_2m_rows, "linspace_open", -5.1, 2),
    "dpmpp-2m-sde": Solver(dpmpp_2m_sde_rows, "linspace_open", -5.1, 2),
    "unipc-2": Solver(unipc_2_rows, "linspace_open", -5.1, 3),
    "unipc-3": Solver(unipc_3_rows, "linspace_open", -5.1, 4),
}


def solver_table(spec: DiffusionSpec, settings: SolverSettings) -> SolverTable:
    """Make the table of ``settings`` for the model that ``spec`` describes.

    Raises:
        InputError: Steps out of range or too few for the solver, or learned variance
            asked of a model that has none.
    """
    solver = SOLVERS[settings.solver]
    settings = _with_defaults(spec, settings, solver)
    path = _noise_path(noise_schedule(spec.schedule), settings, whole=solver.whole)
    rows = solver.rows(spec, path, settings)
    cast = _as_float32(rows, settings)
    stochastic = np.any(matrices(rows)[:, :, NOISE_COLUMN] != 0, axis=1)
    timesteps = rows[:, 0].copy()
    for array in (cast, timesteps, stochastic):
        array.setflags(write=False)
    return SolverTable(cast, timesteps, 1.0, stochastic, settings)


def _as_float32(rows: Float64, settings: SolverSettings) -> npt.NDArray[np.float32]:
    """The rows as the step graph takes them, if they are fit to be run."""
    with np.errstate(over="ignore"):
        cast = rows.astype(np.float32)
    name = f"the table of {settings.solver} with {settings.steps} steps"
    if not np.isfinite(cast).all():
        raise InputError(
            f"{name} is not finite",
            why="it holds a number beyond float32: the clip, or a timestep that "
            "leaves no signal",
            fix="lower the clip or raise lambda_min",
        )
    gain = np.abs(matrices(rows)).max()
    if gain > MOST_GAIN:
        raise InputError(
            f"{name} is too coarse",
            why=f"one of its steps multiplies the errors of the UNet by {gain:.0f}",
            fix="take more steps, the spacing linspace_open, or raise lambda_min",
        )
    return cast


def _noise_path(
    schedule: NoiseSchedule, settings: SolverSettings, *, whole: bool
) -> NoisePath:
    """The levels of a trajectory from noise to clean data."""
    assert settings.spacing is not None
    assert settings.lambda_min is not None
    spaced = spaced_timesteps if whole else spaced_points
    points = spaced(schedule, settings.spacing, settings.steps, settings.lambda_min)
    # What the UNet is told is float32, and its noise level belongs to that.
    times = points.astype(np.float32).astype(np.float64)
    return NoisePath(times, np.append(schedule.alphas_at(times), 1.0))


def _with_defaults(
    spec: DiffusionSpec, settings: SolverSettings, solver: Solver
) -> SolverSettings:
    variance, final_order = settings.variance, settings.final_order
    if settings.solver == "ddpm":
        learned = spec.model.learned_variance
        variance = variance or ("learned" if learned else "fixed_small")
        if variance == "learned" and not learned:
            raise InputError(
                "this model has no learned variance",
                fix="use the variance fixed_small or fixed_large",
            )
    if settings.solver == "unipc-3":
        final_order = final_order or "lower"
    lambda_min = settings.lambda_min
    return dataclasses.replace(
        settings,
        spacing=settings.spacing or solver.spacing,
        lambda_min=solver.lambda_min if lambda_min is None else lambda_min,
        variance=variance,
        final_order=final_order,
    )
