"""How far two computations of the same thing may differ; imports nothing heavy.

An error is ``max|a - b| / max|b|``. An export recipe states its tolerances, a bundle
carries them, and the command line can tighten them. Nothing loosens them past the
ceilings here: not a recipe of the user's own, and not a manifest that was edited.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import InputError, RecipeError


@dataclass(frozen=True)
class Tolerances:
    """Largest errors that pass: of one table row alone, and along a trajectory.

    Raises:
        InputError: One of them is no number of at least 0.
    """

    step: float
    trajectory: float

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("trajectory", self.trajectory)):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"the {name} tolerance has to be at least 0: {value}")

    def tightest(self, other: Tolerances) -> Tolerances:
        """The smaller one of each."""
        return Tolerances(
            min(self.step, other.step), min(self.trajectory, other.trajectory)
        )


CEILINGS = {
    "float32": Tolerances(step=1e-5, trajectory=1e-4),
    "float16": Tolerances(step=1e-2, trajectory=2e-2),
    "bfloat16": Tolerances(step=8e-2, trajectory=1.6e-1),
}
"""By the precision of the UNet's body. Those of float32 are a rule of the project,
the others were measured; export/README.md has the figures."""

ORACLE = 1e-4
"""The reference's tables against diffusers' schedulers, both in float32."""

IDENTITY_DROP = 0.005
"""How much less alike to their people an engine's pictures may be than the reference's:
the upper 95 % bound of the mean drop of the cosine, over pairs of the same noise."""
IDENTITY_SAMPLES = 256
"""Pairs that takes, at least."""


def check_ceiling(precision: str, step: float, trajectory: float) -> None:
    """Refuse a recipe that would let more pass than the project does.

    Raises:
        RecipeError: A tolerance is not above 0, or is above the ceiling.
    """
    most = CEILINGS[precision]
    for name, value, limit in (
        ("tolerance_step", step, most.step),
        ("tolerance_trajectory", trajectory, most.trajectory),
    ):
        if not 0 < value <= limit:
            raise RecipeError(
                f"{name} must be above 0 and at most {limit:g} in {precision}",
                why=f"it is {value:g}",
                fix="lower it; an export that needs more does not compute the same "
                "function",
            )


def tightened(
    known: Tolerances, step: float | None, trajectory: float | None
) -> Tolerances:
    """``known``, tightened by what the user asks for; None leaves it.

    Asking for more than ``known`` is an error and no loosening: an exit status of 0
    means that the engine keeps what its recipe promises.

    Raises:
        InputError: A number is looser than the known one, or no number of at least 0.
    """
    asked = Tolerances(
        known.step if step is None else step,
        known.trajectory if trajectory is None else trajectory,
    )
    for name, value, limit in (
        ("step", asked.step, known.step),
        ("trajectory", asked.trajectory, known.trajectory),
    ):
        if value > limit:
            raise InputError(
                f"--tolerance-{name} can only tighten the tolerance of {limit:g}",
                why=f"it is {value:g}",
                fix="leave it out; the report states every error, passed or not",
            )
    return asked
