"""The seam between the sampler and whatever runs the step graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..guidance import GuidanceTable
from ..solvers import RESCALE_COLUMN, STATE_SLOTS, STEP_WIDTH
from ..spec import DiffusionSpec

Float32 = npt.NDArray[np.float32]

STEP_INPUTS = ("state", "noise", "identity", "row", "mix", "step", "low_res")
"""All that a step graph may have, in its order; ``StepShapes.inputs`` has a model's."""
STEP_OUTPUTS = ("state_next", "x0", "finite")


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself in records and reports.

    ``precision`` is a label for people: ONNX Runtime's CPU provider runs a float16
    graph in float32, which is then called "float16 weights".
    """

    backend: str
    version: str
    precision: str
    device: str


@dataclass(frozen=True)
class StepShapes:
    """Sizes that follow from the model: pictures [C, H, W], identity vectors [D].

    An ``identity_dim`` of 0 is a model without identity; ``low_res_size`` is the side
    of the small pictures of a super-resolution model, None for all others.
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
        model.image_channels, model.image_size, spec.identity.dim, model.low_res_size
    )


class Engine(ABC):
    """Runs table rows on buffers of its own, whose addresses stay the same.

    Use it as a context manager. ``begin`` sets x_T and the guidance table, ``guide``
    changes that table, ``run_row`` executes one table row, the getters copy results
    out.

    Args:
        info: What the engine says of itself.
        shapes: Sizes of the model.
        step_width: Numbers in a table row that its graph takes; fewer than STEP_WIDTH
            in a graph that was exported before the last of them came.
    """

    def __init__(
        self, info: EngineInfo, shapes: StepShapes, step_width: int = STEP_WIDTH
    ) -> None:
        self.info = info
        self.shapes = shapes
        self.step_width = step_width
        self._bad: npt.NDArray[np.bool_] | None = None
        self._row: npt.NDArray[np.int32] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release everything; the engine cannot be used afterwards."""

    @abstractmethod
    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        """Make buffers for these sizes and fill the constant ones."""

    @abstractmethod
    def _guide(self, guidance: GuidanceTable) -> None:
        """Replace row, identity and mix; R may be another one. Keep the rest."""

    @abstractmethod
    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        """Execute one table row; return ``finite`` [R]."""

    @abstractmethod
    def state(self) -> Float32:
        """A copy of the state, [K, B, C, H, W]."""

    @abstractmethod
    def load_state(self, state: Float32) -> None:
        """Put a state [K, B, C, H, W] of a begun trajectory in place."""

    @abstractmethod
    def preview(self) -> Float32:
        """A copy of the last row's predicted x0, [B, C, H, W]."""

    def begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None = None
    ) -> None:
        """Start a trajectory.

        Args:
            x_t: [B, C, H, W] float32, the starting point; the other slots are zeroed.
            guidance: UNet rows and how they mix.
            low_res: [B, C, h, w] float32 in [-1, 1], what a super-resolution model
                enlarges; None for all other models.

        Raises:
            EngineError: A shape or dtype does not fit the model, or small pictures
                are missing or not wanted.
        """
        check_array(x_t, (guidance.samples, *self.shapes.picture), "x_T")
        self._check_low_res(guidance.samples, low_res)
        self._check_guidance(guidance)
        self._bad = np.zeros(guidance.samples, dtype=np.bool_)
        self._row = guidance.row
        self._begin(x_t, guidance, low_res)

    def guide(self, guidance: GuidanceTable) -> None:
        """Use another guidance table from the next table row on; the state is kept.

        Args:
            guidance: Of as many samples as the trajectory was begun with; it may have
                more or fewer UNet rows than the one before.

        Raises:
            EngineError: ``begin`` was not called, or a shape or dtype does not fit.
        """
        if self._bad is None:
            raise EngineError("guidance was changed before a trajectory was begun")
        if guidance.samples != len(self._bad):
            raise EngineError(
                "guidance cannot change the number of samples of a trajectory",
                why=f"it has {len(self._bad)}, the guidance {guidance.samples}",
            )
        self._check_guidance(guidance)
        self._row = guidance.row
        self._guide(guidance)

    def _check_low_res(self, samples: int, low_res: Float32 | None) -> None:
        wanted = self.shapes.low_res
        if wanted is None and low_res is not None:
            raise EngineError(
                "this model takes no small pictures",
                why="it is not a super-resolution model",
            )
        if wanted is not None and low_res is None:
            raise EngineError(
                "a super-resolution model needs the small pictures it enlarges",
                why=f"it takes one of {wanted[1]}x{wanted[2]} for each sample",
            )
        if wanted is not None and low_res is not None:
            check_array(low_res, (samples, *wanted), "low_res")

    def _check_guidance(self, guidance: GuidanceTable) -> None:
        samples, rows = guidance.samples, guidance.unet_rows
        check_array(guidance.identity, (rows, self.shapes.identity_dim), "identity")
        check_array(guidance.mix, (2, samples, rows), "mix")
        check_array(guidance.row, (rows,), "row", np.int32)
        if rows and not 0 <= guidance.row.min() <= guidance.row.max() < samples:
            raise EngineError(f"row must name samples from 0 to {samples - 1}")

    def run_row(self, step: Float32, noise: Float32 | None) -> None:
        """Execute one table row for every sample.

        Args:
            step: [B, S] float32, each sample's table row.
            noise: [B, C, H, W] float32, or None where the row uses none.

        Raises:
            EngineError: ``begin`` was not called, a shape or dtype does not fit, or the
                row needs more than the graph was exported with.
        """
        if self._bad is None or self._row is None:
            raise EngineError("a table row was run before a trajectory was begun")
        count = len(self._bad)
        check_array(step, (count, STEP_WIDTH), "step")
        if noise is not None:
            check_array(noise, (count, *self.shapes.picture), "noise")
        finite = self._run(self._known_columns(step), noise)
        self._bad[self._row[finite < 0.5]] = True

    def _known_columns(self, step: Float32) -> Float32:
        """The columns of table rows that the graph has: [B, step_width]."""
        if step[:, self.step_width :].any():
            raise EngineError(
                "the graph was exported before guidance rescale existed",
                why=f"it takes {self.step_width} numbers in a table row, rescale is "
                f"number {RESCALE_COLUMN + 1}",
                fix="export the checkpoint again, or switch rescale off",
            )
        return np.ascontiguousarray(step[:, : self.step_width])

    def failed_samples(self) -> npt.NDArray[np.bool_]:
        """[B], True where a UNet row of the sample was ever NaN or infinite."""
        if self._bad is None:
            raise EngineError("no trajectory was begun")
        failed: npt.NDArray[np.bool_] = self._bad.copy()
        return failed


def check_array(
    array: npt.NDArray[Any], shape: tuple[int, ...], name: str, dtype: type = np.float32
) -> None:
    """Raise :class:`EngineError` unless ``array`` has this shape and dtype."""
    if array.shape != shape or array.dtype != dtype:
        raise EngineError(
            f"{name} must be {np.dtype(dtype)} of shape {shape}",
            why=f"it is {array.dtype} of shape {array.shape}",
        )


def empty_state(samples: int, shapes: StepShapes) -> Float32:
    """A zeroed state, [K, B, C, H, W]."""
    return np.zeros((STATE_SLOTS, samples, *shapes.picture), dtype=np.float32)
