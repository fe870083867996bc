"""TensorRT and TensorRT-RTX plans on a GPU, without torch: the rig under a replay.

It has been run against stand-ins for TensorRT and the driver only, never on a GPU.
What it asks of both is documented, and held by name against releases of TensorRT 10.3
to 11.4, TensorRT-RTX 1.7 and cuda-bindings 12.8 to 13.5.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..optional import require
from ..solvers import STEP_WIDTH
from .base import STEP_OUTPUTS, EngineInfo, Float32, StepShapes, check_array
from .cuda import Cuda, Graph, Stream
from .device_array import CUDA, DeviceArray
from .device_buffers import Buffer
from .device_memory_pool import HostPool, Pool, Uploads, float32_bytes
from .low_res import LowResKernel
from .rig import CONSTANTS, Launchable, Rig
from .tensorrt_context import ContextMaker, ReadyContext, RuntimeCache
from .tensorrt_plan import Heard, Plan, choose_profile, load_plan, tensor_shapes
from .tensorrt_staging import Staging

_LOG = logging.getLogger("id3pm_deploy")

_MOST_SPARE = 4
"""Contexts that are kept and belong to no graph."""

Sizes = tuple[int, ...]
"""B, R, and table rows of a slot."""


@dataclass(frozen=True)
class PlanSource:
    """Where a plan comes from and what runs it.

    Attributes:
        read: Returns the plan's bytes; called when the rig is opened.
        flavour: The Python module, ``tensorrt`` or ``tensorrt_rtx``.
        version: Of the library, as far as it is known before that is imported.
        precision: A label for people.
        cache: Where TensorRT-RTX may keep what it compiles; None for nowhere.
        library: What stands in for the module; None imports it.
        driver: What stands in for ``cuda.bindings.driver``; None imports it.
    """

    read: Callable[[], bytes]
    flavour: str
    version: str
    precision: str
    cache: Path | None = None
    library: Any = None
    driver: Any = None


def _clear_frames(error: BaseException | None) -> None:
    """Have the traceback of an error keep none of TensorRT's objects alive: they have
    to go before the GPU's context does."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_globals.get("__package__") == __package__:
                with contextlib.suppress(RuntimeError):  # it still runs
                    frame.clear()
        error = error.__cause__ or error.__context__


class _Captured:
    """A graph and the context that nobody else may use while it lives."""

    def __init__(self, rig: TensorRtRig, graph: Graph, context: ReadyContext) -> None:
        self._rig, self._graph = rig, graph
        self._context: ReadyContext | None = context
        self.nodes, self.bytes = graph.nodes, graph.bytes

    def launch(self) -> None:
        self._graph.launch(self._rig.stream)

    def close(self) -> None:
        if self._context is not None and self._rig.is_open:
            with contextlib.suppress(EngineError):
                self._rig.stream.synchronize()  # the graph may still run
            self._graph.close()
        self._context = None


class _Open:
    """All that a rig has while it is open."""

    def __init__(self, cuda: Cuda, plan: Plan, maker: ContextMaker) -> None:
        self.cuda, self.plan, self.maker = cuda, plan, maker
        self.stream = cuda.stream()
        self.pool = Pool(cuda)
        self.staging = Staging(cuda, self.stream, self.pool)
        self.uploads = Uploads(cuda, self.stream)
        self.host = HostPool(cuda)
        self.marks = cuda.event(), cuda.event()
        self.kernel: LowResKernel | None = None


class TensorRtRig(Rig):
    """Buffers and contexts of a plan on one GPU.

    Args:
        source: The plan.
        shapes: Sizes of the model.
        device: Which GPU, counted as the driver does.
    """

    def __init__(self, source: PlanSource, shapes: StepShapes, device: int = 0) -> None:
        version = f"{source.flavour} {source.version}"
        info = EngineInfo("tensorrt", version, source.precision, f"CUDA {device}")
        super().__init__(info, shapes, STEP_WIDTH)
        self._source, self._device = source, device
        self._heard = Heard()
        self._cache = RuntimeCache(source.cache)
        self._exit = contextlib.ExitStack()
        self._now: _Open | None = None
        self._forget()

    def _forget(self) -> None:
        self.sizes: Sizes = (0, 0, 0)
        self._known: set[Sizes] = set()
        self._noisy = False
        self._spare: OrderedDict[Sizes, ReadyContext] = OrderedDict()
        self._captured_with: ReadyContext | None = None

    @property
    def is_open(self) -> bool:
        """Whether it has a device."""
        return self._now is not None

    @property
    def _have(self) -> _Open:
        if self._now is None:
            raise EngineError("the engine is closed")
        return self._now

    @property
    def stream(self) -> Stream:
        """The queue that works."""
        return self._have.stream

    def open(self) -> None:
        """Take the GPU and load the plan.

        Raises:
            EngineError: There is no driver, or the plan cannot be loaded or is none of
                this model's.
            MissingPackageError: TensorRT or cuda-python is not installed.
        """
        if self._now is not None:
            return
        source = self._source
        with contextlib.ExitStack() as stack:
            cuda = stack.enter_context(Cuda(self._device, source.driver))
            library = source.library
            if library is None:
                extra = "rtx" if source.flavour == "tensorrt_rtx" else "tensorrt"
                library = require(source.flavour, extra=extra)
            stack.callback(self._drop)
            plan = load_plan(library, source.read(), self.shapes, self._heard)
            with self._heard.told("TensorRT cannot prepare the plan"):
                maker = ContextMaker(library, plan, self._heard, self._cache)
            self._now = _Open(cuda, plan, maker)
            version = f"{source.flavour} {library.__version__}"
            self.info = EngineInfo("tensorrt", version, source.precision, cuda.name)
            self.step_width = plan.step_width
            self._exit = stack.pop_all()

    def _drop(self) -> None:
        """Let TensorRT's objects go, while the GPU's context is current."""
        try:
            if self._now is not None:
                with contextlib.suppress(EngineError):
                    self._now.staging.settle()
                self._cache.save()
        finally:
            self._now = None
            self._forget()
            _clear_frames(sys.exc_info()[1])

    def close(self) -> None:
        """Release everything; see :class:`Rig`."""
        self._exit.close()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """What failed on the GPU in the meantime shows here."""
        with self._heard.told("TensorRT failed on the GPU"):
            yield
        self._heard.check("TensorRT failed on the GPU")

    def size(self, samples: int, unet_rows: int, rows: int) -> bool:
        """See :class:`Rig`; a profile of the plan has to hold the sizes."""
        have, wanted = self._have, (samples, unet_rows, rows)
        if wanted in self._known:
            self.sizes = wanted
            return False
        profile = choose_profile(have.plan, samples, unet_rows)
        self.drain()
        sizes = self._sizes_of(wanted)
        sizes["scratch"] = have.maker.scratch_size(profile)
        try:
            moved = have.pool.room(sizes)
        except BaseException:
            self._void()
            raise
        if moved:
            self._void()
        self.sizes = wanted
        self._clear_inputs()
        if (samples, unet_rows) not in {one[:2] for one in self._known}:
            self._keep(self._ready())
        self._known.add(wanted)
        return moved

    def _void(self) -> None:
        """Addresses have changed: no context and no graph is good any more."""
        self._spare.clear()
        self._known.clear()
        self.sizes = (0, 0, 0)

    def _sizes_of(self, wanted: Sizes) -> dict[str, int]:
        samples, unet_rows, rows = wanted
        shapes = tensor_shapes(self.shapes, samples, unet_rows, self.step_width)
        sizes = {name: float32_bytes(*shape) for name, shape in shapes.items()}
        sizes["x0 kept"] = sizes["x0"]
        staging = self._have.staging
        sizes |= staging.sizes(samples, rows, self.step_width, unet_rows)
        if self._noisy:
            sizes |= staging.noise_sizes(rows, (samples, *self.shapes.picture))
        return sizes

    def _clear_inputs(self) -> None:
        """What is left in them may be of other sizes: rows of samples not there."""
        for name in ("row", "mix", "step"):
            self.stream.clear(self._have.pool[name])

    def _shape(self, name: str) -> tuple[int, ...]:
        samples, unet_rows, _ = self.sizes
        known = tensor_shapes(self.shapes, samples, unet_rows, self.step_width)
        return known[name]

    def _bytes(self, name: str) -> int:
        return float32_bytes(*self._shape(name))

    def _ready(self) -> ReadyContext:
        """A context for the current sizes that has run once, x0 kept as it is."""
        have, (samples, unet_rows, _) = self._have, self.sizes
        profile = choose_profile(have.plan, samples, unet_rows)
        shapes = tensor_shapes(self.shapes, samples, unet_rows, self.step_width)
        addresses = {name: have.pool.address(name) for name in shapes}
        inputs = {k: v for k, v in shapes.items() if k not in STEP_OUTPUTS}
        stream = have.stream
        context = have.maker.make(
            profile,
            inputs,
            addresses,
            have.pool["scratch"],
            stream.address,
        )
        size = self._bytes("x0")
        stream.copy(have.pool["x0 kept"], have.pool["x0"], size)
        context.enqueue(stream.address)
        stream.copy(have.pool["x0"], have.pool["x0 kept"], size)
        with self._waiting():
            stream.synchronize()
        return context

    def _take(self) -> ReadyContext:
        found = self._spare.pop(self.sizes[:2], None)
        return found if found is not None else self._ready()

    def _keep(self, context: ReadyContext) -> None:
        self._spare[self.sizes[:2]] = context
        while len(self._spare) > _MOST_SPARE:
            self._spare.popitem(last=False)

    def put(self, name: str, array: npt.NDArray[Any]) -> None:
        """See :class:`Rig`."""
        assert name in CONSTANTS
        check_array(
            array, self._shape(name), name, np.int32 if name == "row" else np.float32
        )
        with self._waiting():
            self._have.uploads.put(name, self._have.pool[name], array)

    def stage(self, slot: int, steps: Float32, noise: Sequence[Float32] | None) -> None:
        """See :class:`Rig`."""
        have, (samples, _, rows) = self._have, self.sizes
        check_array(steps, (len(steps), samples, self.step_width), "step")
        assert len(steps) <= rows
        if noise is not None and not self._noisy:
            picture = (samples, *self.shapes.picture)
            have.pool.room(have.staging.noise_sizes(rows, picture))
            self._noisy = True
        with self._waiting():
            have.staging.stage(slot, steps, noise)

    def feed(self, slot: int, k: int, stochastic: bool) -> None:
        """See :class:`Rig`."""
        pool, stream = self._have.pool, self.stream
        row, noise = self._bytes("step"), self._bytes("noise")
        stream.copy(pool["step"], pool[f"steps {slot}"], row, 0, k * row)
        if stochastic:
            stream.copy(pool["noise"], pool[f"noise {slot}"], noise, 0, k * noise)

    def step(self) -> None:
        """See :class:`Rig`."""
        context, pool = self._captured_with, self._have.pool
        if context is None:
            context = self._take()
            self._keep(context)
        context.enqueue(self.stream.address)
        self.stream.copy(pool["state"], pool["state_next"], self._bytes("state"))

    def log(self, slot: int, k: int) -> None:
        """See :class:`Rig`."""
        pool, size = self._have.pool, self._bytes("finite")
        self.stream.copy(pool[f"log {slot}"], pool["finite"], size, k * size)

    def finish(self, slot: int, n: int) -> None:
        """See :class:`Rig`."""
        self._have.staging.finish(slot, n, self.sizes[1])

    def capture(self, queue: Callable[[], None]) -> Launchable:
        """See :class:`Rig`. The step is run for real once in a context that then
        belongs to the graph alone."""
        if self._have.plan.streams_weights:
            raise EngineError(
                "a plan whose weights are streamed cannot be captured",
                why="the GPU has too little memory for all of them",
                fix="use a GPU with more memory, or a smaller model",
            )
        context = self._take()
        context.check_capturable(self.stream.address)
        self._captured_with = context
        try:
            with self._heard.told("the plan cannot be captured"):
                graph = self.stream.capture(queue)
        finally:
            self._captured_with = None
        return _Captured(self, graph, context)

    def fetch(self, name: str) -> Float32:
        """See :class:`Rig`."""
        have, size = self._have, self._bytes(name)
        host = have.host.room("fetch", size)
        have.stream.download(host, have.pool[name], size)
        with self._waiting():
            have.stream.synchronize()
        copy: Float32 = host.array(self._shape(name), np.float32).copy()
        return copy

    def pictures(self, failed: Sequence[int]) -> DeviceArray:
        """See :class:`Rig`."""
        have, shape = self._have, self._shape("x0")
        size = self._bytes("x0")
        copy = have.cuda.lasting_buffer(size)
        array = DeviceArray(copy.address, shape, (CUDA, self._device), copy.close)
        have.stream.copy(copy, have.pool["state"], size)
        each = size // shape[0]
        for sample in failed:
            have.stream.clear(Buffer(copy.at(sample * each, each), each))
        with self._waiting():
            have.stream.synchronize()
        return array

    def finite(self) -> list[Float32]:
        """See :class:`Rig`."""
        self.drain()
        return self._have.staging.logs()

    def drain(self) -> None:
        """See :class:`Rig`."""
        with self._waiting():
            self._have.staging.settle()

    def low_res_from(self, other: Rig, first: int) -> bool:
        """See :class:`Rig`; the other rig has to be one of this kind on this GPU."""
        have = self._have
        if not isinstance(other, TensorRtRig) or other._device != self._device:
            return False
        if have.kernel is None:
            try:
                have.kernel = LowResKernel(have.cuda)
            except EngineError as error:  # the host can do it as well
                _LOG.warning("pictures are handed on by the host: %s", error.why)
                return False
        theirs = other._have
        size, of_one = self._bytes("low_res"), float32_bytes(*other.shapes.picture)
        source = theirs.pool["state"].at(first * of_one, size)
        after_them, after_us = have.marks
        theirs.stream.record(after_them)
        have.stream.wait(after_them)
        have.kernel.queue(
            have.stream, source, have.pool["low_res"].at(0, size), size // 4
        )
        have.stream.record(after_us)
        theirs.stream.wait(after_us)
        return True
