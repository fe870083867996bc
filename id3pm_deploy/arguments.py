"""What callers of the library may leave out or say in several ways."""

from __future__ import annotations

import numpy as np

from .errors import InputError
from .generate import Conditions
from .guidance import GuidanceSettings
from .images import Pixels
from .presets import preset_called
from .solvers import SolverSettings
from .spec import DiffusionSpec

Guidance = float | GuidanceSettings
Solver = str | SolverSettings


def way_of(
    spec: DiffusionSpec,
    preset: str | None,
    solver: Solver | None,
    steps: int | None,
    guidance: Guidance | None,
) -> tuple[SolverSettings, GuidanceSettings]:
    """Solver and guidance of a stage: what is given, and for the rest the preset.

    Args:
        spec: Of the stage's model.
        preset: Its name; None: the defaults, which are ``balanced``.
        solver: Name, or settings, which have steps of their own.
        steps: Of ``solver``.
        guidance: Scale, for the preset's schedule, or settings.

    Raises:
        InputError: There is no such preset, or steps are given twice.
    """
    own = preset_called(preset or "balanced").of(spec)
    if isinstance(solver, SolverSettings):
        if steps is not None and steps != solver.steps:
            raise InputError(
                "steps are given twice",
                why=f"{steps}, and {solver.steps} in the solver",
            )
    else:
        many = own.steps if steps is None else steps
        solver = SolverSettings(solver or own.solver, many)
    if not isinstance(guidance, GuidanceSettings):
        scale = own.guidance if guidance is None else float(guidance)
        interval = own.guidance_interval
        guidance = GuidanceSettings(scale, own.guidance_schedule, interval=interval)
    return solver, guidance


def count_with(spec: DiffusionSpec, low_res: Pixels | None, count: int) -> int:
    """How many pictures of each identity: one where pictures are given.

    Raises:
        InputError: Pictures are missing, not wanted, or of another size.
    """
    size = spec.model.low_res_size
    if size is None and low_res is None:
        return count
    if size is None or low_res is None:
        raise InputError(
            "low_res is for super-resolution models, which cannot do without",
            why="this model is none" if size is None else "it was not given",
        )
    pixels = np.asarray(low_res)
    if pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3) or not len(pixels):
        raise InputError(
            f"low_res must be [n, {size}, {size}, 3]", why=f"it is {pixels.shape}"
        )
    if pixels.dtype != np.uint8:
        raise InputError("low_res must be uint8", why=f"it is {pixels.dtype}")
    return 1


def one_each(wanted: Conditions, low_res: Pixels | None) -> Conditions:
    """Conditions of as many pictures as are given."""
    if low_res is None or len(wanted.ids) == len(low_res):
        return wanted
    if len(wanted.ids) != 1:
        raise InputError(
            f"there must be one identity for all {len(low_res)} pictures, or one each",
            why=f"there are {len(wanted.ids)}",
        )
    return wanted.repeated(len(low_res))
