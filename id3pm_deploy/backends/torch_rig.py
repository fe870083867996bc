"""The step module on a CUDA device, for trajectories that are replayed.

PyTorch's own allocator, streams and graphs are used, so that other work of the same
process shares the device's memory with it. On the device ``cpu`` everything but
streams, events, pinned memory and capture is the same code, which is how it is tested
where there is no GPU; capturing is refused there, and table rows are queued one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..body_form import FLOAT32, BodyForm
from ..enlarging import low_res_from_pixels
from ..errors import EngineError, first_line
from ..reference.unet import IdentityUNet
from ..solvers import STATE_SLOTS, STEP_WIDTH
from .base import Float32, StepShapes
from .rig import CONSTANTS, SLOTS, Launchable, Rig
from .torch_body import (
    compile_mode,
    compiled,
    exact_float32,
    many_shapes,
    no_device,
    out_of_memory,
    step_on,
    torch_device,
    torch_errors,
    torch_info,
)

_GREY = 256
_CUDA: Any = torch.cuda
"""Some of it has no annotations."""


class TorchRig(Rig):
    """A rig over the PyTorch step module.

    Args:
        network: The reference network, in float32. It is moved to the device if the
            body is float32, too, and copied in another form otherwise.
        shapes: Sizes of the model.
        form: The precision of the body.
        device: ``cuda``, ``cuda:1``, or ``cpu`` for tests.
        compile_with: A mode of torch.compile, see :data:`.torch_body.COMPILE_MODES`;
            empty runs the module as it is.
        channels_last: Layout; see :func:`.torch_body.step_on`.
        benchmark: See :func:`.torch_body.exact_float32`.

    Raises:
        EngineError: PyTorch knows no such device.
    """

    def __init__(
        self,
        network: IdentityUNet,
        shapes: StepShapes,
        form: BodyForm = FLOAT32,
        device: str = "cuda",
        *,
        compile_with: bool | str = "",
        channels_last: bool | None = None,
        benchmark: bool = False,
    ) -> None:
        self._mode = compile_mode(compile_with)
        self._device = torch_device(device)
        info = torch_info(form, self._device, self._mode)
        super().__init__(info, shapes, STEP_WIDTH)
        self._on_gpu = self._pinned = self._device.type == "cuda"
        self._made_of = (network, form, channels_last)
        self._benchmark = benchmark
        self._module: Any = None
        self._queue: Any = None
        self._uploads: Any = None
        self._pool: Any = None
        self._held: _Samples | None = None
        self._by_rows: dict[int, _Rows] = {}
        self._now: _Rows | None = None
        self._unread: list[tuple[Any, Tensor]] = []
        self._read: list[Float32] = []
        self._graphs: list[_Graph] = []

    # The device

    def open(self) -> None:
        """Put the weights on the device and make its queues."""
        if self._on_gpu:
            self._find_gpu()
        try:
            network, form, channels_last = self._made_of
            module = step_on(network, form, self._device, channels_last)
            self._module = compiled(module, self._mode)
            if self._on_gpu:
                self._queue = _CUDA.Stream(self._device)
                self._uploads = _CUDA.Stream(self._device)
                # The weights came on the device's default stream.
                _CUDA.synchronize(self._device)
        except BaseException:
            self.close()
            raise

    def _find_gpu(self) -> None:
        """Name the GPU, or say why there is none."""
        name = str(self._device)
        try:
            count = _CUDA.device_count()
            index: int | None = self._device.index  # None is the current one
            if not _CUDA.is_available() or (index or 0) >= count:
                raise no_device(name, f"the driver shows {count} GPUs")
            index = _CUDA.current_device() if index is None else index
            self._device = torch.device("cuda", index)
            label = f"{_CUDA.get_device_name(index)} ({self._device})"
        except (RuntimeError, AssertionError) as error:
            raise no_device(name, first_line(error)) from error
        self.info = dataclasses.replace(self.info, device=label)

    def close(self) -> None:
        """Release weights, buffers and captured graphs."""
        with contextlib.suppress(EngineError):  # of a device that has failed
            self.drain()
        for graph in self._graphs:
            graph.close()
        self._forget()
        self._module = self._queue = self._uploads = self._pool = None
        self._graphs, self._read = [], []
        if self._on_gpu and _CUDA.is_initialized():
            with contextlib.suppress(RuntimeError):
                _CUDA.empty_cache()

    def _forget(self) -> None:
        self._held = self._now = None
        self._by_rows, self._unread = {}, []

    # Sizes

    def size(self, samples: int, unet_rows: int, rows: int) -> bool:
        """Make room; see :meth:`.rig.Rig.size`. Buffers of each R are kept while B and
        ``rows`` stay, so guidance that comes and goes moves nothing."""
        if self._module is None:
            raise EngineError("the engine was closed, or never entered")
        held, moved = self._held, False
        if held is None or held.samples != samples or held.rows < rows:
            self.drain()
            self._collect()
            moved = held is not None
            kept = held if held is not None and held.samples == samples else None
            self._forget()
            with torch_errors("the buffers of a batch"):
                self._held = held = _Samples(self, samples, rows, kept)
        if unet_rows in self._by_rows:
            self._now = self._by_rows[unet_rows]
            return moved
        self.drain()
        with torch_errors("the buffers of a batch"):
            made = _Rows(self, samples, unet_rows, held.rows)
        self._warm_up(held, made)
        self._by_rows[unet_rows] = self._now = made
        return moved

    def _warm_up(self, held: _Samples, rows: _Rows) -> None:
        """Run the step with what is in the buffers, and drop what it makes. Compiles
        it, too, and has the libraries choose and load their kernels."""
        with many_shapes(self._mode), self._on_queue("a step's first run"):
            self._module(*held.inputs(rows))
        self.drain()

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A zeroed tensor on the device; its address is multiple of 512 there."""
        with self._on_queue("the buffers of a batch", grad_free=False):
            return torch.zeros(shape, dtype=dtype, device=self._device)

    def host_zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A zeroed tensor of the host that the device copies from and to by itself."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self._pinned)

    # What is uploaded

    def put(self, name: str, array: npt.NDArray[Any]) -> None:
        """Upload one of CONSTANTS in queue order."""
        if name not in CONSTANTS:
            raise EngineError(f"there is no constant input {name!r}")
        held, now = self._sizes()
        target: Tensor = getattr(held if name in ("state", "low_res") else now, name)
        assert target.shape == array.shape
        with self._on_queue("an upload"):
            target.copy_(self._on_host(array), non_blocking=True)

    def _on_host(self, array: npt.NDArray[Any]) -> Tensor:
        """A copy that outlives the caller's; pinned memory is given back to PyTorch,
        which uses it again only when the device has read it."""
        copy = torch.from_numpy(np.array(array))
        return copy.pin_memory() if self._pinned else copy

    def stage(self, slot: int, steps: Float32, noise: Sequence[Float32] | None) -> None:
        """Upload table rows beside what the device is doing."""
        held, _ = self._sizes()
        place = held.slots[slot]
        if place.done is not None:
            with torch_errors("a table row", self._mode):
                place.done.synchronize()
            place.done = None
        count = len(steps)
        np.copyto(place.host_steps[:count].numpy(), steps)
        if noise is not None:
            place.make_noise(self)
            for k, drawn in enumerate(noise):
                np.copyto(place.host_noise[k].numpy(), drawn)
        with torch_errors("an upload"), _on_stream(self._uploads):
            place.steps[:count].copy_(place.host_steps[:count], non_blocking=True)
            if noise is not None:
                place.noise[:count].copy_(place.host_noise[:count], non_blocking=True)
            if self._queue is not None:
                place.done = self._uploads.record_event()
                self._queue.wait_event(place.done)

    # What is queued

    def feed(self, slot: int, k: int, stochastic: bool) -> None:
        """Copy staged row k to where the step looks for it."""
        held, _ = self._sizes()
        place = held.slots[slot]
        with self._on_queue("a table row"):
            held.step.copy_(place.steps[k])
            if stochastic:
                held.noise.copy_(place.noise[k])

    def step(self) -> None:
        """Run the step and keep its outputs at their constant addresses."""
        held, now = self._sizes()
        with self._on_queue("a table row"):
            out = self._module(*held.inputs(now))
            held.state.copy_(out.state)
            held.x0.copy_(out.x0)
            now.finite.copy_(out.finite)

    def log(self, slot: int, k: int) -> None:
        """Keep ``finite`` of a row."""
        _, now = self._sizes()
        with self._on_queue("a table row"):
            now.logs[slot][k].copy_(now.finite)

    def finish(self, slot: int, n: int) -> None:
        """Download the slot's log; the host does not wait."""
        held, now = self._sizes()
        with self._on_queue("a download"):
            log = torch.empty(n, len(now.finite), pin_memory=self._pinned)
            log.copy_(now.logs[slot][:n], non_blocking=True)
            event = None if self._queue is None else self._queue.record_event()
        held.slots[slot].done = event
        self._unread.append((event, log))

    def capture(self, queue: Callable[[], None]) -> Launchable:
        """Capture what ``queue`` queues, without doing it.

        Graphs of one rig share a pool of memory: they run one after the other, and
        what they leave for each other lies in buffers outside it.
        """
        if not self._on_gpu:
            raise EngineError(
                "nothing can be captured", why=f"{self._device} is no CUDA device"
            )
        self.drain()
        if self._pool is None:
            self._pool = _CUDA.graph_pool_handle()
        found = _Graph(self._queue, self._device)
        try:
            # PyTorch leaves the stream current when the end of a capture fails.
            with _no_collection(), _CUDA.stream(self._queue):
                found.capture(queue, self._pool)
        except BaseException:
            self._pool = None  # whatever state it is in, nobody needs it
            raise
        self._graphs = [one for one in self._graphs if not one.closed]
        self._graphs.append(found)
        return found

    # What is read

    def fetch(self, name: str) -> Float32:
        """A copy of ``state``, ``x0`` or ``low_res``; waits."""
        held, _ = self._sizes()
        source: Tensor = getattr(held, name)
        with self._on_queue("a download"):
            host = torch.empty(source.shape, pin_memory=self._pinned)
            host.copy_(source, non_blocking=True)
        self.drain()
        copy: Float32 = host.numpy().copy()
        return copy

    def finite(self) -> list[Float32]:
        """The logs since the last call; waits."""
        self._collect()
        found, self._read = self._read, []
        return found

    def _collect(self) -> None:
        """Take the downloaded logs over."""
        for event, log in self._unread:
            if event is not None:
                with torch_errors("a table row", self._mode):
                    event.synchronize()
            self._read.append(log.numpy().copy())
        self._unread = []

    def low_res_from(self, other: Rig, first: int) -> bool:
        """Take another rig's pictures on the same device; see :meth:`.rig.Rig`."""
        if not isinstance(other, TorchRig) or other._device != self._device:
            return False
        held, source = self._held, other._held
        if held is None or source is None or held.low_res is None:
            return False
        if self._queue is not None:
            self._queue.wait_stream(other._queue)
        with self._on_queue("the second stage's pictures"):
            pictures = source.state[0][first : first + held.samples]
            held.low_res.copy_(low_res_from(pictures))
        if self._queue is not None:
            # Nothing of the other's may write there before it was read.
            other._queue.wait_stream(self._queue)
        return True

    def drain(self) -> None:
        """Wait until all that was queued is done."""
        if self._queue is None:
            return
        with torch_errors("what was queued", self._mode):
            self._uploads.synchronize()
            self._queue.synchronize()

    def _sizes(self) -> tuple[_Samples, _Rows]:
        if self._held is None or self._now is None:
            raise EngineError("no trajectory was begun")
        return self._held, self._now

    @contextlib.contextmanager
    def _on_queue(self, doing: str, grad_free: bool = True) -> Iterator[None]:
        """What is in here goes on the rig's queue, without TF32."""
        with (
            torch_errors(doing, self._mode),
            torch.inference_mode(grad_free),
            exact_float32(self._benchmark),
            _on_stream(self._queue),
        ):
            yield

    def uploads_wait(self) -> None:
        """What is uploaded from now on waits for what is queued by now."""
        if self._queue is not None:
            self._uploads.wait_stream(self._queue)


def _on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """``stream`` is the current one in here; None where there are none."""
    return contextlib.nullcontext() if stream is None else _CUDA.stream(stream)


class _Slot:
    """One staging place: table rows and their noise, on the host and on the device."""

    def __init__(self, rig: TorchRig, samples: int, rows: int) -> None:
        self.steps = rig.zeros(rows, samples, STEP_WIDTH)
        self.host_steps = rig.host_zeros(rows, samples, STEP_WIDTH)
        self.picture = (rows, samples, *rig.shapes.picture)
        self.done: Any = None
        self.noise: Any = None
        self.host_noise: Any = None

    def make_noise(self, rig: TorchRig) -> None:
        """Memory for noise, which deterministic solvers never need."""
        if self.noise is None:
            self.noise = rig.zeros(*self.picture)
            rig.uploads_wait()  # for the zeros
            self.host_noise = rig.host_zeros(*self.picture)


class _Samples:
    """Buffers of B samples, whatever guides them."""

    def __init__(
        self, rig: TorchRig, samples: int, rows: int, kept: _Samples | None
    ) -> None:
        shapes, self.samples, self.rows = rig.shapes, samples, rows
        picture = (samples, *shapes.picture)
        small = shapes.low_res
        if kept is None:
            self.state = rig.zeros(STATE_SLOTS, *picture)
            self.x0 = rig.zeros(*picture)
            self.low_res = None if small is None else rig.zeros(samples, *small)
        else:
            self.state, self.x0, self.low_res = kept.state, kept.x0, kept.low_res
        self.noise = rig.zeros(*picture)
        self.step = rig.zeros(samples, STEP_WIDTH)
        self.slots = [_Slot(rig, samples, rows) for _ in range(SLOTS)]

    def inputs(self, rows: _Rows) -> tuple[Tensor, ...]:
        """The step module's, in its order."""
        constant = (rows.identity, rows.row, rows.mix)
        given = (self.state, self.noise, *constant, self.step)
        return given if self.low_res is None else (*given, self.low_res)


class _Rows:
    """Buffers of R UNet rows of B samples."""

    def __init__(self, rig: TorchRig, samples: int, unet_rows: int, rows: int) -> None:
        self.identity = rig.zeros(unet_rows, rig.shapes.identity_dim)
        self.row = rig.zeros(unet_rows, dtype=torch.int32)
        self.mix = rig.zeros(2, samples, unet_rows)
        self.finite = rig.zeros(unet_rows)
        self.logs = [rig.zeros(rows, unet_rows) for _ in range(SLOTS)]


class _Graph:
    """A captured graph of PyTorch's."""

    def __init__(self, queue: Any, device: torch.device) -> None:
        self._queue, self._device = queue, device
        self._graph: Any = None
        self.nodes = 0
        self.bytes = 0

    @property
    def closed(self) -> bool:
        """Whether it was released."""
        return self._graph is None

    def capture(self, queue: Callable[[], None], pool: Any) -> None:
        """Fill the graph with what ``queue`` queues."""
        graph = _new_graph()
        _CUDA.empty_cache()
        before = _CUDA.memory_reserved(self._device)
        try:
            # Thread-local: other threads may go on using CUDA meanwhile.
            with _CUDA.graph(
                graph, pool, self._queue, capture_error_mode="thread_local"
            ):
                queue()
            self.nodes = _nodes(graph)
        except torch.OutOfMemoryError as error:
            raise out_of_memory("a captured graph", error) from error
        except RuntimeError as error:
            raise EngineError(
                "PyTorch cannot capture these table rows", why=first_line(error)
            ) from error
        self._graph = graph
        self.bytes = max(_CUDA.memory_reserved(self._device) - before, 0)

    def launch(self) -> None:
        """Queue the whole graph."""
        if self._graph is None:
            raise EngineError("a graph was launched after its release")
        with torch_errors("a replayed table row"), _on_stream(self._queue):
            self._graph.replay()

    def close(self) -> None:
        """Release it once the device is done with it."""
        if self._graph is not None:
            with contextlib.suppress(RuntimeError):  # of a device that has failed
                self._queue.synchronize()
                self._graph.reset()
            self._graph = None


def _new_graph() -> Any:
    """A CUDAGraph that keeps what it was made from, where PyTorch can, so that its
    nodes can be counted."""
    kind = _CUDA.CUDAGraph
    if hasattr(kind, "raw_cuda_graph") and hasattr(kind, "instantiate"):
        return kind(keep_graph=True)
    return kind()


def _nodes(graph: Any) -> int:
    """Nodes of a captured graph that was not made executable yet, and makes it so; 0
    where nobody can count them."""
    if not (hasattr(graph, "raw_cuda_graph") and hasattr(graph, "instantiate")):
        return 0
    count = 0
    with contextlib.suppress(ImportError, ValueError, TypeError):
        from cuda.bindings import driver

        raw = driver.CUgraph(graph.raw_cuda_graph())
        status, _, found = driver.cuGraphGetNodes(raw, 0)
        count = int(found) if int(status) == 0 else 0
    graph.instantiate()
    return count


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected in here: what a finaliser does to the device may not be
    done while something is captured."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def low_res_from(samples: Tensor) -> Tensor:
    """What a super-resolution model is fed, from what the first one made, on its
    device: the bits that ``images.to_uint8`` and ``enlarging.low_res_from_pixels``
    give on the host. A GPU would divide by multiplying with the reciprocal, so the
    last step is looked up.

    Args:
        samples: [B, 3, H, W] float32; NaN counts as -1, which is black.

    Returns:
        The same shape.
    """
    black = torch.nan_to_num(samples, nan=-1.0)
    levels = torch.round((black.clamp(-1, 1).double() + 1) * 127.5).long()
    grey = np.arange(_GREY, dtype=np.uint8).reshape(_GREY, 1, 1, 1)
    table = torch.from_numpy(low_res_from_pixels(grey).ravel())
    return table.to(samples.device)[levels]
