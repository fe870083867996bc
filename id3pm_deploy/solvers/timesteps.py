"""Where on the noise schedule the steps of a solver lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..schedule import Float64, NoiseSchedule

Spacing = Literal["linspace", "linspace_open", "leading", "trailing"]


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


def spaced_points(
    schedule: NoiseSchedule, spacing: Spacing, steps: int, lambda_min: float
) -> Float64:
    """[steps] points of the training time, noisiest first, as the spacing has them.

    The points of ``linspace`` and ``linspace_open`` may lie between two timesteps.

    Raises:
        InputError: ``steps`` is below 1 or above what the schedule holds.
    """
    last = first_timestep(schedule, lambda_min)
    if not 1 <= steps <= last + 1:
        raise InputError(
            f"the number of steps must be from 1 to {last + 1}",
            why=f"it is {steps}, and the timesteps run from {last} to 0",
        )
    return SPACINGS[spacing](last, steps)


def spaced_timesteps(
    schedule: NoiseSchedule, spacing: Spacing, steps: int, lambda_min: float
) -> npt.NDArray[np.int64]:
    """[steps] training timesteps, noisiest first, no two the same.

    Raises:
        InputError: ``steps`` is below 1 or above what the schedule holds.
    """
    exact = spaced_points(schedule, spacing, steps, lambda_min)
    points = np.rint(exact).astype(np.int64)
    last = first_timestep(schedule, lambda_min)
    if len(set(points.tolist())) != steps or points[0] > last or points[-1] < 0:
        raise InputError(
            f"{steps} steps do not fit the spacing {spacing!r}",
            why="two of its timesteps coincide",
            fix="use fewer steps or the spacing linspace",
        )
    return points
