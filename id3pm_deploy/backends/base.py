"""The seam between the sampler and whatever runs the step graph."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..guidance import GuidanceTable
from ..solvers import LATER_COLUMNS, STATE_SLOTS, STEP_WIDTH
from .shapes import STEP_INPUTS as STEP_INPUTS
from .shapes import STEP_OUTPUTS as STEP_OUTPUTS
from .shapes import StepShapes as StepShapes
from .shapes import step_shapes as step_shapes

if TYPE_CHECKING:
    from .rig import Rig

Float32 = npt.NDArray[np.float32]


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


class Engine(ABC):
    """Runs table rows on buffers of its own, whose addresses stay the same.

    Use it as a context manager; it belongs to one thread at a time. ``begin`` sets x_T
    and the guidance table, ``guide`` changes that table, ``run_rows`` executes table
    rows, ``replace`` puts new samples in the places of finished ones, the getters copy
    results out. ``run_rows`` may return before the device is done; getters wait.

    An error while table rows run ends the trajectory: nothing can be got out of it,
    and ``begin`` starts the next one.

    Args:
        info: What the engine says of itself.
        shapes: Sizes of the model.
        step_width: Numbers in a table row that its graph takes; fewer than STEP_WIDTH
            in a graph that was exported before the last of them came.
    """

    rows_at_once: int = 1
    """Table rows that ``run_rows`` takes in one call; known after ``begin``."""
    replay_note: str = ""
    """How table rows were replayed on a device; empty where nothing is replayed."""
    rig: Rig | None = None
    """The device's side of an engine that replays."""

    def __init__(
        self, info: EngineInfo, shapes: StepShapes, step_width: int = STEP_WIDTH
    ) -> None:
        self.info = info
        self.shapes = shapes
        self.step_width = step_width
        self._bad: npt.NDArray[np.bool_] | None = None
        self._row: npt.NDArray[np.int32] | None = None

    def __enter__(self) -> Engine:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bad = None
        self.close()

    def _open(self) -> None:  # noqa: B027 - most engines have nothing to do
        """What must wait for entry; it releases what it took if it fails."""

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
    def _run_rows(self, steps: Float32, noise: Sequence[Float32 | None]) -> None:
        """Execute table rows [n, B, step_width]; may return before they are done."""

    @abstractmethod
    def _failed(self) -> npt.NDArray[np.bool_]:
        """Put what is known into ``self._bad`` and return it; waits."""

    @abstractmethod
    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        """Put new samples in these places; their other slots are zeroed."""

    @abstractmethod
    def _drain(self) -> None:
        """Wait until all that was queued is done."""

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
        self._bad = None
        self._begin(x_t, guidance, low_res)
        self._bad = np.zeros(guidance.samples, dtype=np.bool_)
        self._row = guidance.row

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
        with self._trajectory_ends_on_error():
            self._guide(guidance)
        self._row = guidance.row

    def replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None = None
    ) -> None:
        """Put new samples in the places of others of a begun batch.

        The other slots of their state are zeroed and failures in these places are
        forgotten; all other samples go on untouched. Identities come with ``guide``.

        Args:
            samples: n different places, from 0 to B - 1.
            x_t: [n, C, H, W] float32, their starting points.
            low_res: [n, C, h, w] float32 for a super-resolution model, else None.

        Raises:
            EngineError: ``begin`` was not called, a place is not there or named twice,
                or a shape or dtype does not fit.
        """
        if self._bad is None:
            raise EngineError("samples were replaced before a trajectory was begun")
        places = list(samples)
        allowed = set(range(len(self._bad)))
        if len(set(places)) != len(places) or not allowed.issuperset(places):
            raise EngineError(
                f"places must be different numbers from 0 to {len(self._bad) - 1}",
                why=f"they are {places}",
            )
        check_array(x_t, (len(places), *self.shapes.picture), "x_T")
        self._check_low_res(len(places), low_res)
        if not places:
            return
        with self._trajectory_ends_on_error():
            bad = self._failed()
            bad[places] = False
            self._bad = bad
            self._replace(places, x_t, low_res)

    @contextlib.contextmanager
    def _trajectory_ends_on_error(self) -> Iterator[None]:
        """What was interrupted must not be taken for a result."""
        try:
            yield
        except BaseException:
            self._bad = None
            raise

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

    def run_rows(self, steps: Float32, noise: Sequence[Float32 | None]) -> None:
        """Execute table rows for every sample; may return before they are done.

        Args:
            steps: [n, B, S] float32, each sample's table rows; n from 1 to
                ``rows_at_once``.
            noise: n times [B, C, H, W] float32, or n times None where rows use none.
                The arrays are not kept.

        Raises:
            EngineError: ``begin`` was not called, a shape or dtype does not fit, or a
                row needs more than the graph was exported with.
        """
        if self._bad is None or self._row is None:
            raise EngineError("a table row was run before a trajectory was begun")
        count, rows = len(self._bad), len(steps)
        if not 1 <= rows <= self.rows_at_once:
            raise EngineError(
                f"from 1 to {self.rows_at_once} table rows can be run at once",
                why=f"there are {rows}",
            )
        check_array(steps, (rows, count, STEP_WIDTH), "step")
        none = sum(drawn is None for drawn in noise)
        if len(noise) != rows or none not in (0, rows):
            raise EngineError(
                "all table rows that are run at once must have noise, or none",
                why=f"of {rows} rows, {len(noise) - none} have",
            )
        for drawn in noise:
            if drawn is not None:
                check_array(drawn, (count, *self.shapes.picture), "noise")
        known = self._known_columns(steps)
        with self._trajectory_ends_on_error():
            self._run_rows(known, noise)

    def run_row(self, step: Float32, noise: Float32 | None) -> None:
        """Execute one table row; see :meth:`run_rows`.

        Args:
            step: [B, S] float32, each sample's table row.
            noise: [B, C, H, W] float32, or None where the row uses none.
        """
        self.run_rows(step[None], [noise])

    def drain(self) -> None:
        """Wait until all that was queued is done.

        Raises:
            EngineError: Something that was queued failed on the device.
        """
        if self._bad is not None:
            with self._trajectory_ends_on_error():
                self._drain()

    def pictures_on_device(self) -> Any:
        """The batch's pictures where they lie, for others to take over by DLPack.

        Returns a copy, [B, C, H, W] float32, with zeros where a sample failed; it
        stays good when the engine is closed. None where arrays are on the host, as
        those of :meth:`state`.

        Raises:
            EngineError: No trajectory was begun.
        """
        failed = np.flatnonzero(self.failed_samples()).tolist()
        return None if self.rig is None else self.rig.pictures(failed)

    def hand_over(self, target: Engine, first: int = 0) -> bool:
        """Give this batch's pictures to a super-resolution engine, on the device.

        They become its ``low_res`` with the 8-bit levels that ``images.to_uint8`` and
        ``enlarging.low_res_from_pixels`` give, bit for bit, without a trip through the
        host. Where that cannot be done nothing changes and the answer is False.

        Args:
            target: A begun engine of B' samples, in whose ``low_res`` they go.
            first: Samples ``first`` to ``first + B' - 1`` of this batch are given.

        Raises:
            EngineError: One of the two was not begun, or there are fewer samples.
        """
        if self._bad is None or target._bad is None:
            raise EngineError("no trajectory was begun")
        if not 0 <= first <= len(self._bad) - len(target._bad):
            raise EngineError(
                f"{len(target._bad)} pictures from the {first}. on cannot be handed on",
                why=f"the batch has {len(self._bad)}",
            )
        if self.rig is None or target.rig is None:
            return False
        if target.shapes.low_res != self.shapes.picture:
            return False
        with target._trajectory_ends_on_error():
            return target.rig.low_res_from(self.rig, first)

    def _known_columns(self, step: Float32) -> Float32:
        """The columns of table rows that the graph has: [n, B, step_width]."""
        for column in range(self.step_width, STEP_WIDTH):
            if step[..., column].any():
                name = LATER_COLUMNS[column]
                raise EngineError(
                    f"the graph was exported before {name} existed",
                    why=f"it takes {self.step_width} numbers in a table row, and this "
                    f"needs number {column + 1}",
                    fix=f"export the checkpoint again, or do without {name}",
                )
        return np.ascontiguousarray(step[..., : self.step_width])

    def failed_samples(self) -> npt.NDArray[np.bool_]:
        """[B], True where a UNet row of the sample was ever NaN or infinite; waits."""
        if self._bad is None:
            raise EngineError("no trajectory was begun")
        with self._trajectory_ends_on_error():
            failed: npt.NDArray[np.bool_] = self._failed().copy()
        return failed


class RowEngine(Engine):
    """An engine that runs one table row after the other and waits for each."""

    @abstractmethod
    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        """Execute one table row [B, step_width]; return ``finite`` [R]."""

    def _run_rows(self, steps: Float32, noise: Sequence[Float32 | None]) -> None:
        assert self._bad is not None
        assert self._row is not None
        for step, drawn in zip(steps, noise, strict=True):
            finite = self._run(step, drawn)
            self._bad[self._row[~(finite >= 0.5)]] = True

    def _failed(self) -> npt.NDArray[np.bool_]:
        assert self._bad is not None
        return self._bad

    def _drain(self) -> None:
        """Every row was waited for."""


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
