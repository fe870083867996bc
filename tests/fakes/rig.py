"""A rig on the host: lazy, strict, and with a memory of what it was asked.

Nothing that is queued is done before the host waits, so that a wait which is missing,
or one too many, shows. What a stream capture forbids raises. Buffers that are given up
are filled with NaN, so that a graph over them cannot go unnoticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from id3pm_deploy.backends.base import EngineInfo, StepShapes, empty_state
from id3pm_deploy.backends.rig import CONSTANTS, SLOTS, Rig
from id3pm_deploy.body_form import FLOAT32
from id3pm_deploy.errors import DeviceMemoryError, EngineError
from id3pm_deploy.reference.step import step_module
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.solvers import STEP_WIDTH

Float32 = npt.NDArray[np.float32]
Step = Callable[[dict[str, Float32]], tuple[Float32, Float32, Float32]]
"""Inputs of a step graph by name to state', x0 and finite."""


def torch_step(network: IdentityUNet) -> Step:
    """The reference's step module over NumPy arrays."""
    module: nn.Module = step_module(network, FLOAT32)

    @torch.inference_mode()
    def run(inputs: dict[str, Float32]) -> tuple[Float32, Float32, Float32]:
        given: dict[str, Any] = {"identity": None}
        given |= {name: torch.from_numpy(value) for name, value in inputs.items()}
        out = module(**given)
        return out.state.numpy(), out.x0.numpy(), out.finite.numpy()

    return run


class FakeGraph:
    """Operations over the buffers as they were when it was captured."""

    def __init__(self, rig: FakeRig, work: list[Callable[[], None]]) -> None:
        self._rig, self._work = rig, work
        self.nodes, self.bytes = len(work), rig.graph_bytes
        self.closed = False
        rig.live_graphs += 1

    def launch(self) -> None:
        assert not self.closed, "a graph is launched that was released"
        self._rig.note("launch", self.nodes)
        self._rig.queue(self._work)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._rig.live_graphs -= 1


class FakeRig(Rig):
    """A device of NumPy arrays.

    Args:
        shapes: Sizes of the model.
        step: What a table row does.
        keeps: Keep the buffers of all sizes; otherwise only the latest stay.
        can_capture: Most nodes of a graph; 0 is a device without graphs.
        step_width: Numbers in a table row.
    """

    def __init__(
        self,
        shapes: StepShapes,
        step: Step,
        *,
        keeps: bool = True,
        can_capture: int = 10_000,
        step_width: int = STEP_WIDTH,
    ) -> None:
        super().__init__(EngineInfo("fake", "1", "float32", "host"), shapes, step_width)
        self._step, self._keeps, self.can_capture = step, keeps, can_capture
        self.graph_bytes = 0
        self.calls: list[tuple[Any, ...]] = []
        self.fail_at: tuple[str, int] | None = None
        """The name of a call and which of its kind fails, the first being 1."""
        self.kinds: Counter[str] = Counter()
        self.addresses: dict[tuple[Any, ...], set[int]] = {}
        self.opened, self.live_graphs, self.steps_done = False, 0, 0
        self._buffers: dict[tuple[Any, ...], Any] = {}
        self._now: tuple[int, int, int] | None = None
        self._warm: set[tuple[int, int]] = set()
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self._events = [0] * SLOTS
        self._unread: list[tuple[int, Float32] | None] = [None] * SLOTS
        self._aside: list[Float32] = []
        self._captured: list[Callable[[], None]] | None = None

    # What tests look at.

    def names(self) -> list[str]:
        """The kinds of calls, in order."""
        return [call[0] for call in self.calls]

    def note(self, kind: str, *rest: Any) -> None:
        """Keep a call, and fail if it is the one that shall."""
        self.calls.append((kind, *rest))
        self.kinds[kind] += 1
        if self.fail_at == (kind, self.kinds[kind]):
            raise EngineError(f"the fake device fails in {kind}")

    @property
    def buffers(self) -> int:
        """How many buffers there are."""
        return len(self._buffers)

    @property
    def waiting(self) -> int:
        """Operations that are queued and not done."""
        return len(self._queue) - self._done

    # The queue.

    def queue(self, work: Sequence[Callable[[], None]]) -> None:
        """Put work on the queue, or into the graph that is being captured."""
        (self._queue if self._captured is None else self._captured).extend(work)

    def _run_until(self, event: int) -> None:
        while self._done < event:
            work = self._queue[self._done]
            self._done += 1
            work()

    def _wait(self, kind: str) -> None:
        self._only_outside(kind)
        self._run_until(len(self._queue))

    def _only_outside(self, kind: str) -> None:
        assert self._captured is None, f"{kind} is forbidden inside a capture"
        assert self.opened, f"{kind} before the device was opened"

    # The rig.

    def open(self) -> None:
        self.note("open")
        assert not self.opened
        self.opened = True

    def close(self) -> None:
        self._release(self._buffers)
        self._buffers.clear()
        self._queue.clear()
        self._now, self._done, self.opened = None, 0, False
        self.note("close")

    @staticmethod
    def _release(buffers: dict[tuple[Any, ...], Any]) -> None:
        for array in buffers.values():
            array[...] = np.nan if array.dtype == np.float32 else 1 << 30

    def size(self, samples: int, unet_rows: int, rows: int) -> bool:
        self._only_outside("size")
        wanted = (samples, unet_rows, rows)
        if wanted == self._now:
            return False
        self.note("size", *wanted)
        moved, kept = self._room(wanted)
        self._now = wanted
        if (samples, unet_rows) not in self._warm or moved:
            self._wait("size")
            for key in ("row", "mix"):
                self._at(key)[...] = 0
            self.note("enqueue")
            state, x0, _ = self._step(self._inputs())
            assert state.shape == self._at("state").shape
            assert x0.shape == self._at("x0").shape
            self._warm.add((samples, unet_rows))
        for key, value in kept.items():
            self._at(key)[...] = value
        return moved

    def _room(self, wanted: tuple[int, int, int]) -> tuple[bool, dict[str, Float32]]:
        """Give up earlier buffers if that is this rig's way; what survives."""
        before = self._now
        if self._keeps or before is None:
            return False, {}
        self._wait("size")
        self._collect()
        kept = {}
        if before[0] == wanted[0]:
            there = [
                k for k in ("state", "x0", "low_res") if self._key(k) in self._buffers
            ]
            kept = {key: self._at(key).copy() for key in there}
        self._release(self._buffers)
        self._buffers.clear()
        self._warm.clear()
        return True, kept

    def _key(self, name: str) -> tuple[Any, ...]:
        assert self._now is not None, "the rig was never sized"
        samples, unet_rows, rows = self._now
        if name in ("identity", "row", "mix", "finite"):
            return (name, samples, unet_rows)
        if name.startswith("log"):
            return (name, samples, unet_rows, rows)
        if name.startswith("staged"):
            return (name, samples, rows)
        return (name, samples)

    def _at(self, name: str) -> Any:
        """A buffer of the present sizes; made when it is first used."""
        key = self._key(name)
        if key not in self._buffers:
            self._buffers[key] = self._made(name)
        found = self._buffers[key]
        self.addresses.setdefault(key, set()).add(found.ctypes.data)
        return found

    def _made(self, name: str) -> Any:
        assert self._captured is None or not name.startswith("staged")
        assert self._now is not None
        samples, unet_rows, rows = self._now
        picture = (samples, *self.shapes.picture)
        small = self.shapes.low_res or ()
        if name == "state":
            return empty_state(samples, self.shapes)
        if name == "row":
            return np.zeros(unet_rows, np.int32)
        shapes: dict[str, tuple[int, ...]] = {
            "noise": picture,
            "x0": picture,
            "step": (samples, self.step_width),
            "low_res": (samples, *small),
            "identity": (unet_rows, self.shapes.identity_dim),
            "mix": (2, samples, unet_rows),
            "finite": (unet_rows,),
            "log": (rows, unet_rows),
            "staged step": (rows, samples, self.step_width),
            "staged noise": (rows, *picture),
        }
        return np.zeros(shapes[name.removesuffix(" 0").removesuffix(" 1")], np.float32)

    def _inputs(self) -> dict[str, Any]:
        return {name: self._at(name) for name in self.shapes.inputs}

    def put(self, name: str, array: npt.NDArray[Any]) -> None:
        self._only_outside("put")
        self.note("put", name)
        assert name in CONSTANTS
        place = self._at(name)
        assert place.shape == array.shape
        assert place.dtype == array.dtype
        self.queue([partial(np.copyto, place, array.copy())])

    def stage(self, slot: int, steps: Float32, noise: Sequence[Float32] | None) -> None:
        self._only_outside("stage")
        waits = self._events[slot] > self._done
        self._run_until(self._events[slot])
        self.note("stage", slot, len(steps), noise is not None, waits)
        self._collect(slot)
        assert self._now is not None
        assert 1 <= len(steps) <= self._now[2]
        place = self._at(f"staged step {slot}")
        self.queue([partial(np.copyto, place[: len(steps)], steps.copy())])
        if noise is not None:
            place = self._at(f"staged noise {slot}")
            drawn = np.stack(noise)
            self.queue([partial(np.copyto, place[: len(drawn)], drawn)])

    def _collect(self, *slots: int) -> None:
        """Keep aside what was downloaded, in the order in which it was queued."""
        chosen = slots or range(SLOTS)
        there = [held for i in chosen if (held := self._unread[i]) is not None]
        self._aside += [log for _, log in sorted(there, key=lambda one: one[0])]
        for i in chosen:
            self._unread[i] = None

    def feed(self, slot: int, k: int, stochastic: bool) -> None:
        self.note("feed", slot, k, stochastic)
        staged = self._at(f"staged step {slot}")[k]
        self.queue([partial(np.copyto, self._at("step"), staged)])
        if stochastic:
            drawn = self._at(f"staged noise {slot}")[k]
            self.queue([partial(np.copyto, self._at("noise"), drawn)])

    def step(self) -> None:
        self.note("step")
        assert self._now is not None
        assert self._now[:2] in self._warm, "no real enqueue was done for these sizes"
        inputs = self._inputs()
        outputs = [self._at(name) for name in ("state", "x0", "finite")]

        def work() -> None:
            self.steps_done += 1
            for place, value in zip(outputs, self._step(inputs), strict=True):
                place[...] = value

        self.queue([work])

    def log(self, slot: int, k: int) -> None:
        self.note("log", slot, k)
        place = self._at(f"log {slot}")[k]
        self.queue([partial(np.copyto, place, self._at("finite"))])

    def finish(self, slot: int, n: int) -> None:
        self._only_outside("finish")
        self.note("finish", slot, n)
        there = self._at(f"log {slot}")[:n]
        host = np.full_like(there, np.nan)
        self.queue([partial(np.copyto, host, there)])
        self._events[slot] = len(self._queue)
        assert self._unread[slot] is None, "a log is overwritten before it was read"
        self._unread[slot] = (self._events[slot], host)

    def capture(self, queue: Callable[[], None]) -> FakeGraph:
        self._only_outside("capture")
        self.note("capture", self._now)
        self._captured = []
        try:
            queue()
            captured = self._captured
        finally:
            self._captured = None
        if len(captured) > self.can_capture:
            raise EngineError(
                "the fake device cannot capture this", why=f"{len(captured)} nodes"
            )
        return FakeGraph(self, captured)

    def fetch(self, name: str) -> Float32:
        self._wait("fetch")
        self.note("fetch", name)
        assert name in ("state", "x0", "low_res")
        copy: Float32 = self._at(name).copy()
        return copy

    def finite(self) -> list[Float32]:
        self._wait("finite")
        self.note("finite")
        self._collect()
        found, self._aside = self._aside, []
        return found

    def low_res_from(self, other: Rig, first: int) -> bool:
        self._only_outside("low_res_from")
        self.note("low_res_from", first)
        if not isinstance(other, FakeRig):
            return False
        place, event = self._at("low_res"), len(other._queue)
        pictures = other._at("state")[0, first : first + len(place)]

        def work() -> None:
            other._run_until(event)
            x = np.clip(pictures, np.float32(-1), np.float32(1)).astype(np.float64)
            levels = np.rint((x + 1.0) * 127.5).astype(np.float32)
            place[...] = levels / np.float32(127.5) - np.float32(1)

        self.queue([work])
        return True

    def pictures(self, failed: Sequence[int]) -> Float32:
        copy: Float32 = self.fetch("state")[0].copy()
        copy[list(failed)] = 0.0
        return copy

    def drain(self) -> None:
        self._wait("drain")
        self.note("drain")


def short_of_memory(rig: FakeRig) -> None:
    """Let the next sizing fail as a device does that has no room."""

    def size(samples: int, unet_rows: int, rows: int) -> bool:
        rig._release(rig._buffers)
        rig._buffers.clear()
        rig._now = None
        del rig.size
        raise DeviceMemoryError("the fake device has no memory left")

    rig.size = size  # type: ignore[method-assign]
