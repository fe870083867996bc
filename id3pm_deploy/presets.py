"""Named settings of both stages: ``fast``, ``balanced`` and ``reference``.

``benchmarks/README.md`` has what they do to the pictures of the shipped checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from . import defaults
from .errors import InputError

if TYPE_CHECKING:
    from .spec import DiffusionSpec


@dataclass(frozen=True)
class StagePreset:
    """Solver, steps and guidance of one stage, named as the options of ``sample`` are.

    ``guidance_interval`` has the lowest and the highest timestep; None: all.
    """

    solver: str
    steps: int
    guidance: float
    guidance_schedule: str = "constant"
    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Preset:
    """What a name stands for; ``super_resolution`` is of a model that enlarges, alone
    or as a second stage."""

    base: StagePreset
    super_resolution: StagePreset

    def of(self, spec: DiffusionSpec) -> StagePreset:
        """The model's part, fitted to it: no more steps than it has timesteps, and
        guidance scale 1 where there is nothing to guide to."""
        enlarges = spec.model.low_res_size is not None
        own = self.super_resolution if enlarges else self.base
        return replace(
            own,
            steps=min(own.steps, spec.schedule.timesteps),
            guidance=own.guidance if spec.condition_dim else 1.0,
        )

    def __str__(self) -> str:
        first, second = self.base, self.super_resolution
        scale, large_scale = first.guidance, second.guidance
        text = f"{first.steps} steps of {first.solver} at guidance {scale:g}"
        if asdict(first) == asdict(replace(second, guidance=scale)):
            return f"{text}, {large_scale:g} to enlarge"
        large = f"{second.steps} of {second.solver} at {large_scale:g}"
        return f"{text}, {large} to enlarge"


def _preset(steps: int) -> Preset:
    """Ancestral steps in both stages, at the guidance of the defaults."""
    return Preset(
        StagePreset("ddpm", steps, defaults.GUIDANCE),
        StagePreset("ddpm", steps, defaults.SR_GUIDANCE),
    )


PRESETS = {
    "fast": _preset(20),
    "balanced": Preset(
        StagePreset(defaults.SOLVER, defaults.STEPS, defaults.GUIDANCE),
        StagePreset(defaults.SR_SOLVER, defaults.SR_STEPS, defaults.SR_GUIDANCE),
    ),
    "reference": _preset(250),
}
"""``balanced`` is the defaults; ``reference`` takes guided-diffusion's 250 steps."""


def preset_called(name: str) -> Preset:
    """The preset ``name``.

    Raises:
        InputError: There is none.
    """
    if name not in PRESETS:
        raise InputError(
            f"there is no preset {name!r}", fix=f"use one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]
