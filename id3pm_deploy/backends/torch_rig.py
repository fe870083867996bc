"""The step module on a CUDA device, for trajectories that are replayed.

PyTorch's own allocator, streams and graphs are used, so that other work of the same
process shares the device's memory with it. On the device ``cpu`` everything but
streams, events, pinned memory and capture is the same code, which is how it is tested
where there is no GPU; capturing is refused there, and table rows are queued one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from ..solvers import STEP_WIDTH
from .base import Float32, StepShapes
from .rig import CONSTANTS, Launchable, Rig
from .torch_body import (
    compile_mode,
    compiled,
    exact_float32,
    many_shapes,
    no_device,
    step_on,
    torch_device,
    torch_errors,
    torch_info,
)
from .torch_buffers import RowBuffers, SampleBuffers
from .torch_graph import TorchGraph, no_collection, on_stream

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
        self._held: SampleBuffers | None = None
        self._by_rows: dict[int, RowBuffers] = {}
        self._now: RowBuffers | None = None
        self._unread: list[tuple[Any, Tensor]] = []
        self._read: list[Float32] = []
        self._graphs: list[TorchGraph] = []

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
                self._held = held = SampleBuffers(self, samples, rows, kept)
        if unet_rows in self._by_rows:
            self._now = self._by_rows[unet_rows]
            return moved
        self.drain()
        with torch_errors("the buffers of a batch"):
            made = RowBuffers(self, samples, unet_rows, held.rows)
        self._warm_up(held, made)
        self._by_rows[unet_rows] = self._now = made
        return moved

    def _warm_up(self, held: SampleBuffers, rows: RowBuffers) -> None:
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
        found = TorchGraph(_CUDA, self._queue, self._device)
        try:
            # PyTorch leaves the stream current when the end of a capture fails.
            with no_collection(), _CUDA.stream(self._queue):
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

    def pictures(self, failed: Sequence[int]) -> Tensor:
        """See :class:`Rig`; a tensor."""
        held, _ = self._sizes()
        with self._on_queue("a copy"):
            copy = held.state[0].clone()
            copy[list(failed)] = 0.0
        self.drain()
        if copy.is_cuda:
            # Its memory is this queue's, and may be used again once others are done.
            copy.record_stream(torch.cuda.current_stream(copy.device))
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

    def _sizes(self) -> tuple[SampleBuffers, RowBuffers]:
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
    return on_stream(_CUDA, stream)


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
