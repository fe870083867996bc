"""Sizes of a step graph's arrays, which follow from the model."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import DiffusionSpec

STEP_INPUTS = ("state", "noise", "identity", "row", "mix", "step", "low_res")
"""All that a step graph may have, in its order; ``StepShapes.inputs`` has a model's."""
STEP_OUTPUTS = ("state_next", "x0", "finite")


@dataclass(frozen=True)
class StepShapes:
    """Sizes that follow from the model: pictures [C, H, W], conditions [D].

    A condition is an identity vector with the attributes' columns behind it; an
    ``identity_dim`` of 0 is a model without either. ``low_res_size`` is the side of the
    small pictures of a super-resolution model, None for all others.
    """

    channels: int
    size: int
    identity_dim: int
    low_res_size: int | None = None

    @property
    def picture(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.size, self.size)

    @property
    def low_res(self) -> tuple[int, int, int] | None:
        """(C, h, w) of the small pictures; None where the model takes none."""
        if self.low_res_size is None:
            return None
        return (self.channels, self.low_res_size, self.low_res_size)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the step graph's inputs, in its order."""
        has = {"identity": self.identity_dim > 0, "low_res": self.low_res is not None}
        return tuple(name for name in STEP_INPUTS if has.get(name, True))


def step_shapes(spec: DiffusionSpec) -> StepShapes:
    """The shapes of the step graph of ``spec``."""
    model = spec.model
    return StepShapes(
        model.image_channels, model.image_size, spec.condition_dim, model.low_res_size
    )
