"""What a device has to do so that trajectories can be replayed on it.

A :class:`Rig` has one queue. All that is called here is put on it and done in that
order; the host waits only where a method says so. ``replay.ReplayEngine`` decides what
is queued, captured and replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from .base import EngineInfo, Float32, StepShapes

SLOTS = 2
"""Staging slots: one is filled while the other is worked on."""

CONSTANTS = ("state", "identity", "row", "mix", "low_res")
"""What ``put`` takes, each in the shape that the step graph has it."""


class Launchable(Protocol):
    """A captured piece of a trajectory."""

    nodes: int
    """Nodes of the graph; 0 where that is not known."""
    bytes: int
    """Device memory it took; 0 where that is not known."""

    def launch(self) -> None:
        """Queue the whole of it; the host does not wait."""

    def close(self) -> None:
        """Release it; may be called twice, and after the rig was closed."""


class Rig(ABC):
    """Buffers at constant addresses on a device, and one queue of work over them.

    Args:
        info: What the engine says of itself.
        shapes: Sizes of the model.
        step_width: Numbers in a table row that its step takes.
    """

    def __init__(self, info: EngineInfo, shapes: StepShapes, step_width: int) -> None:
        self.info = info
        self.shapes = shapes
        self.step_width = step_width

    @abstractmethod
    def open(self) -> None:
        """Take the device; nothing touches it before. Released again if it fails."""

    @abstractmethod
    def close(self) -> None:
        """Release everything, whatever state it is in; may be called twice, and
        without ``open``."""

    @abstractmethod
    def size(self, samples: int, unet_rows: int, rows: int) -> bool:
        """Make room for B samples, R UNet rows and SLOTS staging slots of ``rows``.

        Same sizes again: nothing happens. Sizes that are new: the host waits, the
        buffers are made, and the step is enqueued once for real, over inputs that are
        valid, and waited for. While B stays, state, x0 and low_res stay as they are,
        also through that enqueue. Staging for noise may be left until some is staged.

        Returns whether a buffer of earlier sizes moved or went, which makes all that
        was captured before void. (Buffers that serve smaller sizes with their first
        part never move; a rig may as well keep those of each size.)

        Raises:
            DeviceMemoryError: The memory is not enough; the rig must be sized anew.
        """

    @abstractmethod
    def put(self, name: str, array: npt.NDArray[Any]) -> None:
        """Upload one of CONSTANTS, whole; ``array`` may change right afterwards."""

    @abstractmethod
    def stage(self, slot: int, steps: Float32, noise: Sequence[Float32] | None) -> None:
        """Upload table rows to a staging slot; the arrays may change right afterwards.

        The host waits only where the slot's last use is not done.

        Args:
            slot: From 0 to SLOTS - 1.
            steps: [n, B, step_width].
            noise: n times [B, C, H, W]; None where the rows use none.
        """

    @abstractmethod
    def feed(self, slot: int, k: int, stochastic: bool) -> None:
        """Queue copies of staged row k into the step's inputs: its table row, and its
        noise where ``stochastic``. Otherwise the noise has the coefficient 0 and is
        left as it is, or zero; it must be finite. Device to device; may be captured.
        """

    @abstractmethod
    def step(self) -> None:
        """Queue the step, and the copy of state' to state; may be captured. What it
        does follows from the sizes alone, so that a captured one fits every row."""

    @abstractmethod
    def log(self, slot: int, k: int) -> None:
        """Queue a copy of ``finite`` to row k of the slot's log; may be captured."""

    def queue_row(self, slot: int, k: int, stochastic: bool) -> None:
        """Queue the whole of staged row k; may be captured."""
        self.feed(slot, k, stochastic)
        self.step()
        self.log(slot, k)

    @abstractmethod
    def finish(self, slot: int, n: int) -> None:
        """Queue the download of the first n rows of the slot's log and mark the end of
        the slot's use. The host does not wait."""

    @abstractmethod
    def capture(self, queue: Callable[[], None]) -> Launchable:
        """Capture what ``queue`` queues, without doing it.

        Raises:
            EngineError: It cannot be captured; the rig can be used as before. What
                ``queue`` itself raises is passed on, the capture ended.
        """

    @abstractmethod
    def fetch(self, name: str) -> Float32:
        """A copy of ``state`` [K, B, C, H, W], ``x0`` [B, C, H, W] or ``low_res``
        [B, C, h, w]; waits."""

    @abstractmethod
    def finite(self) -> list[Float32]:
        """The logs [n, R] of all slots that were finished since the last call, in
        order; waits. A log that is there when its slot is staged again is kept aside.
        Nothing was ever finished: an empty list."""

    @abstractmethod
    def low_res_from(self, other: Rig, first: int) -> bool:
        """Fill low_res with the pictures of another rig, on the device.

        Samples ``first`` to ``first + B - 1`` of its state's slot 0 become, bit for
        bit, what the host would make of them: clipped to [-1, 1], in float64
        level = rint((x + 1)·127.5), half to even, then in float32 level/127.5 - 1.
        After all that the other rig has queued, before what this one will.

        Returns False, and does nothing, where that cannot be done.
        """

    @abstractmethod
    def pictures(self, failed: Sequence[int]) -> Any:
        """A copy of the state's slot 0, [B, C, H, W] float32, where it lies; waits.

        It is another's from then on, and good after the rig is closed: an object with
        ``__dlpack__`` and ``__dlpack_device__``. Those of ``failed`` are all zeros.
        """

    @abstractmethod
    def drain(self) -> None:
        """Wait until all that was queued is done.

        Raises:
            EngineError: Something failed on the device.
        """
