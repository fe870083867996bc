"""Solvers as tables: one row of coefficients for each UNet call.

A table is a pure function of the noise schedule and the settings, computed in float64
and cast once. The step graph (see ``reference/step.py``) executes a row as

    pred   = what the UNet says of c_in·x_t at timestep t, after guidance
    x0     = clamp(c_x·x_t + c_p·pred, -clip, clip)
    n      = noise·exp(½·((v+1)/2·max_log + (1-(v+1)/2)·min_log))
    state' = A · [state_0, ..., state_{K-1}, x0, n]

with state_0 = x_t. All formulas are in the variance-preserving form
x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from . import defaults
from .errors import InputError
from .schedule import Float64, NoiseSchedule, noise_schedule
from .spec import DiffusionSpec

STATE_SLOTS = 4
"""K: state slots of an exported step graph."""

_HEAD = ("t", "c_in", "c_x", "c_p", "clip", "min_log", "max_log")
STEP_HEAD = len(_HEAD)
STEP_WIDTH = STEP_HEAD + STATE_SLOTS * (STATE_SLOTS + 2)
"""S: numbers in a table row."""

X0_COLUMN = STATE_SLOTS
NOISE_COLUMN = STATE_SLOTS + 1

NO_CLIP = 1e6
"""Clip value that clamps nothing a sane model predicts, and stays finite in FP32."""

Spacing = Literal["linspace", "linspace_open", "leading", "trailing"]


@dataclass(frozen=True)
class SolverSettings:
    """What a table is made of beside the noise schedule; kept in run records.

    Attributes:
        solver: ``ddpm``, ``ddim`` or ``dpmpp-2m``.
        steps: Number of solver steps, as diffusers counts them.
        spacing: How timesteps are spread: ``linspace`` takes N points from the first
            to 0; ``linspace_open`` N + 1 such points without the last; ``leading``
            and ``trailing`` as in Lin et al. 2024, table 2. None: the solver's own.
        lambda_min: Start no noisier than this half log-SNR; None: the solver's own.
        clip: Bound of the predicted x0; 0 switches clipping off.
        eta: DDIM's η (Song et al. 2021, eq. 16): 0 deterministic, 1 as noisy as DDPM.
        variance: ``learned`` where the model has it, else ``fixed_small`` (β̃) or
            ``fixed_large`` (β); None: learned if the model has it, else fixed_small.
    """

    solver: str = defaults.SOLVER
    steps: int = defaults.STEPS
    spacing: Spacing | None = None
    lambda_min: float | None = None
    clip: float = 1.0
    eta: float = 0.0
    variance: Literal["learned", "fixed_small", "fixed_large"] | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(
                f"there is no solver {self.solver!r}",
                fix=f"use one of {', '.join(SOLVERS)}",
            )
        if self.spacing not in (None, *SPACINGS):
            raise InputError(
                f"there is no timestep spacing {self.spacing!r}",
                fix=f"use one of {', '.join(SPACINGS)}",
            )
        if self.lambda_min is not None and not math.isfinite(self.lambda_min):
            raise InputError(
                "lambda_min must be a finite number", why=f"it is {self.lambda_min}"
            )
        if not math.isfinite(self.clip) or self.clip < 0:
            raise InputError("clip must be 0 or above", why=f"it is {self.clip}")
        if not 0.0 <= self.eta <= 1.0:
            raise InputError("eta must be in [0, 1]", why=f"it is {self.eta}")
        if self.eta and self.solver != "ddim":
            raise InputError(f"eta is a setting of ddim, not of {self.solver}")
        if self.variance is not None and self.solver != "ddpm":
            raise InputError(f"variance is a setting of ddpm, not of {self.solver}")


@dataclass(frozen=True)
class SolverTable:
    """A trajectory as data.

    Attributes:
        rows: [N, S] float32, what the step graph takes.
        timesteps: [N] float64, training timesteps, first executed first.
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
class _Solver:
    rows: Callable[
        [DiffusionSpec, NoiseSchedule, npt.NDArray[np.int64], SolverSettings], Float64
    ]
    spacing: Spacing
    lambda_min: float


def _linspace(last: int, steps: int) -> Float64:
    if steps == 1:
        return np.array([float(last)])
    # Counted from 0 upwards, as diffusers does: halves then round as they do there.
    return np.linspace(0, last, steps, dtype=np.float64)[::-1]


def _linspace_open(last: int, steps: int) -> Float64:
    return _linspace(last, steps + 1)[:-1]


def _leading(last: int, steps: int) -> Float64:
    return np.arange(steps - 1.0, -1.0, -1.0) * float((last + 1) // steps)


def _trailing(last: int, steps: int) -> Float64:
    # Rounded before the 1 is taken off: halves go to the even number.
    ends: Float64 = np.rint(last + 1 - np.arange(steps) * ((last + 1) / steps))
    return ends - 1


SPACINGS: dict[str, Callable[[int, int], Float64]] = {
    "linspace": _linspace,
    "linspace_open": _linspace_open,
    "leading": _leading,
    "trailing": _trailing,
}


def first_timestep(schedule: NoiseSchedule, lambda_min: float) -> int:
    """The noisiest timestep whose half log-SNR is at least ``lambda_min``.

    Raises:
        InputError: Every timestep is noisier than that.
    """
    allowed = np.flatnonzero(schedule.lambdas >= lambda_min)
    if not len(allowed):
        raise InputError(
            f"no timestep has a half log-SNR of {lambda_min} or more",
            why=f"the schedule spans {schedule.lambdas[-1]:.2f} to "
            f"{schedule.lambdas[0]:.2f}",
            fix="lower lambda_min",
        )
    return int(allowed[-1])


def spaced_timesteps(
    schedule: NoiseSchedule, spacing: Spacing, steps: int, lambda_min: float
) -> npt.NDArray[np.int64]:
    """[steps] training timesteps, noisiest first, no two the same.

    Raises:
        InputError: ``steps`` is below 1 or above what the schedule holds.
    """
    last = first_timestep(schedule, lambda_min)
    if not 1 <= steps <= last + 1:
        raise InputError(
            f"the number of steps must be from 1 to {last + 1}",
            why=f"it is {steps}, and the timesteps run from {last} to 0",
        )
    points = np.rint(SPACINGS[spacing](last, steps)).astype(np.int64)
    if len(np.unique(points)) != steps or points[0] > last or points[-1] < 0:
        raise InputError(
            f"{steps} steps do not fit the spacing {spacing!r}",
            why="two of its timesteps coincide",
            fix="use fewer steps or the spacing linspace",
        )
    return points


def _empty_rows(count: int) -> Float64:
    rows = np.zeros((count, STEP_WIDTH))
    rows[:, 1] = 1.0
    return rows


def _matrix(rows: Float64) -> Float64:
    """View of A: [N, K, K + 2]."""
    return rows[:, STEP_HEAD:].reshape(len(rows), STATE_SLOTS, STATE_SLOTS + 2)


def _prediction_rows(
    spec: DiffusionSpec, alphas: Float64, times: Float64, settings: SolverSettings
) -> Float64:
    """Columns t, c_in, c_x, c_p and clip; the rest zero.

    ε: x0 = (x - √(1-ᾱ)·ε)/√ᾱ (Ho et al. 2020, eq. 15); v: x0 = √ᾱ·x - √(1-ᾱ)·v
    (Salimans & Ho 2022, app. D).
    """
    rows = _empty_rows(len(times))
    signal, sigma = np.sqrt(alphas), np.sqrt(1 - alphas)
    c_x, c_p = {
        "epsilon": (1 / signal, -sigma / signal),
        "v": (signal, -sigma),
        "x0": (np.zeros_like(signal), np.ones_like(signal)),
    }[spec.prediction_type]
    rows[:, 0], rows[:, 2], rows[:, 3] = times, c_x, c_p
    rows[:, 4] = settings.clip or NO_CLIP
    return rows


def _ddpm_rows(
    spec: DiffusionSpec,
    schedule: NoiseSchedule,
    times: npt.NDArray[np.int64],
    settings: SolverSettings,
) -> Float64:
    """Ancestral sampling: Ho et al. 2020, eq. 6 and 7, on respaced β (Nichol & Dhariwal
    2021, sec. 4); learned variance: their eq. 15."""
    alphas = schedule.alphas_cumprod[times]
    previous = np.append(alphas[1:], 1.0)
    betas = 1 - alphas / previous
    rows = _prediction_rows(spec, alphas, times.astype(np.float64), settings)
    matrix = _matrix(rows)
    matrix[:, 0, X0_COLUMN] = betas * np.sqrt(previous) / (1 - alphas)
    matrix[:, 0, 0] = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas)
    variance = betas * (1 - previous) / (1 - alphas)
    if settings.variance == "learned":
        # The last step's β̃ is 0; the one before stands in for its logarithm.
        clipped = variance.copy()
        clipped[-1] = clipped[-2] if len(clipped) > 1 else betas[-1]
        rows[:, 5], rows[:, 6] = np.log(clipped), np.log(betas)
        scale = np.ones_like(betas)
    else:
        scale = np.sqrt(betas if settings.variance == "fixed_large" else variance)
    scale[-1] = 0.0
    matrix[:, 0, NOISE_COLUMN] = scale
    return rows


def _ddim_rows(
    spec: DiffusionSpec,
    schedule: NoiseSchedule,
    times: npt.NDArray[np.int64],
    settings: SolverSettings,
) -> Float64:
    """DDIM(η): Song et al. 2021, eq. 12 and 16, with ε taken from the clipped x0."""
    alphas = schedule.alphas_cumprod[times]
    previous = np.append(alphas[1:], 1.0)
    rows = _prediction_rows(spec, alphas, times.astype(np.float64), settings)
    matrix = _matrix(rows)
    spread = np.sqrt((1 - previous) / (1 - alphas)) * np.sqrt(1 - alphas / previous)
    sigma = settings.eta * spread
    towards = np.sqrt(np.maximum(1 - previous - sigma**2, 0.0))
    matrix[:, 0, 0] = towards / np.sqrt(1 - alphas)
    matrix[:, 0, X0_COLUMN] = np.sqrt(previous) - towards * np.sqrt(
        alphas / (1 - alphas)
    )
    matrix[:, 0, NOISE_COLUMN] = sigma
    return rows


def _dpmpp_2m_rows(
    spec: DiffusionSpec,
    schedule: NoiseSchedule,
    times: npt.NDArray[np.int64],
    settings: SolverSettings,
) -> Float64:
    """DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), algorithm 2.

    Slot 1 keeps the previous x0. The first row and the last one, which goes to σ = 0,
    are of first order.
    """
    alphas = schedule.alphas_cumprod[times]
    signal, sigma = np.sqrt(alphas), np.sqrt(1 - alphas)
    lambdas = np.log(signal / sigma)
    rows = _prediction_rows(spec, alphas, times.astype(np.float64), settings)
    matrix = _matrix(rows)
    for j in range(len(times)):
        matrix[j, 1, X0_COLUMN] = 1.0
        if j + 1 == len(times):
            matrix[j, 0, X0_COLUMN] = 1.0
            continue
        h = lambdas[j + 1] - lambdas[j]
        gain = -signal[j + 1] * np.expm1(-h)
        matrix[j, 0, 0] = sigma[j + 1] / sigma[j]
        matrix[j, 0, X0_COLUMN] = gain
        if j > 0:
            ratio = (lambdas[j] - lambdas[j - 1]) / h
            matrix[j, 0, X0_COLUMN] = gain * (1 + 0.5 / ratio)
            matrix[j, 0, 1] = -gain * 0.5 / ratio
    return rows


SOLVERS: dict[str, _Solver] = {
    "ddpm": _Solver(_ddpm_rows, "linspace", -100.0),
    "ddim": _Solver(_ddim_rows, "linspace", -5.1),
    "dpmpp-2m": _Solver(_dpmpp_2m_rows, "linspace_open", -5.1),
}


def solver_table(spec: DiffusionSpec, settings: SolverSettings) -> SolverTable:
    """Make the table of ``settings`` for the model that ``spec`` describes.

    Raises:
        InputError: Steps out of range, or learned variance asked of a model that has
            none.
    """
    solver = SOLVERS[settings.solver]
    settings = _with_defaults(spec, settings, solver)
    schedule = noise_schedule(spec.schedule)
    assert settings.spacing is not None
    assert settings.lambda_min is not None
    times = spaced_timesteps(
        schedule, settings.spacing, settings.steps, settings.lambda_min
    )
    rows = solver.rows(spec, schedule, times, settings)
    with np.errstate(over="ignore"):
        cast = rows.astype(np.float32)
    if not np.isfinite(cast).all():
        raise InputError(
            f"the table of {settings.solver} with {settings.steps} steps is not finite",
            why="it holds a number beyond float32: the clip, or a timestep that "
            "leaves no signal",
            fix="lower the clip or raise lambda_min",
        )
    stochastic = np.any(_matrix(rows)[:, :, NOISE_COLUMN] != 0, axis=1)
    timesteps = times.astype(np.float64)
    for array in (cast, timesteps, stochastic):
        array.setflags(write=False)
    return SolverTable(cast, timesteps, 1.0, stochastic, settings)


def _with_defaults(
    spec: DiffusionSpec, settings: SolverSettings, solver: _Solver
) -> SolverSettings:
    variance = settings.variance
    if settings.solver == "ddpm":
        learned = spec.model.learned_variance
        variance = variance or ("learned" if learned else "fixed_small")
        if variance == "learned" and not learned:
            raise InputError(
                "this model has no learned variance",
                fix="use the variance fixed_small or fixed_large",
            )
    lambda_min = settings.lambda_min
    return SolverSettings(
        solver=settings.solver,
        steps=settings.steps,
        spacing=settings.spacing or solver.spacing,
        lambda_min=solver.lambda_min if lambda_min is None else lambda_min,
        clip=settings.clip,
        eta=settings.eta,
        variance=variance,
    )
