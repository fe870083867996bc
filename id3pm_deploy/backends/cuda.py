"""CUDA's driver API through cuda-python, for engines on a GPU that need no torch.

The only file that calls CUDA to run something; ``doctor`` and the builder ask the
driver for facts by themselves. No engine uses it yet, and it has been run against a
stand-in for the driver only. Memory, streams, events and graphs are those of a device's
primary context, which PyTorch and ONNX Runtime use as well, so that tensors of one are
good for the other. Nothing touches CUDA before ``Cuda`` is entered, everything made
through it is released when it is left, the latest first, and each call's status is
looked at. Sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DeviceMemoryError, EngineError
from ..optional import require

ALIGNMENT = 256
"""Of every buffer's address, as TensorRT wants it."""

_EXTRA = "cuda"


class Buffer:
    """Memory on the device at a constant address.

    Attributes:
        address: Where it begins, a multiple of ALIGNMENT.
        size: Its length.
    """

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size

    def at(self, offset: int, size: int) -> int:
        """The address of ``size`` bytes from ``offset`` on, which lie inside."""
        if min(offset, size) < 0 or offset + size > self.size:
            raise ValueError(f"{size} bytes from {offset} are not in {self.size}")
        return self.address + offset


class HostBuffer(Buffer):
    """Page-locked memory of the host, which the device copies to and from by itself."""

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The beginning of the buffer as an array; good as long as the buffer is.

        Args:
            shape: Its shape.
            dtype: Its type.
        """
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self.at(0, size)
        raw = (ctypes.c_ubyte * self.size).from_address(self.address)
        return np.frombuffer(memoryview(raw), np.uint8, size).view(kind).reshape(shape)


class Event:
    """A mark in a stream's queue; ``handle`` is CUDA's."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda, self.handle = cuda, handle

    def synchronize(self) -> None:
        """Wait until the work before the mark is done."""
        self._cuda.refuse_in_capture("waiting for an event")
        self._cuda.call("cuEventSynchronize", self.handle)

    def milliseconds_since(self, earlier: Event) -> float:
        """Time on the device between two marks that have been reached."""
        found: float = self._cuda.call(
            "cuEventElapsedTime", earlier.handle, self.handle
        )
        return found


class Graph:
    """Captured work, ready to be launched again and again.

    Attributes:
        nodes: How many operations it holds.
    """

    def __init__(self, cuda: Cuda, handle: Any, nodes: int) -> None:
        self._cuda, self._handle, self.nodes = cuda, handle, nodes

    def launch(self, stream: Stream) -> None:
        """Queue all of it on a stream."""
        if self._handle is None:
            raise ValueError("the graph was closed")
        self._cuda.refuse_in_capture("launching a graph")
        self._cuda.call("cuGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Release it; nothing happens if that was done before."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._cuda.call("cuGraphExecDestroy", handle)


class Stream:
    """A queue of work that is not the default one, so that it can be captured."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda, self.handle = cuda, handle

    @property
    def address(self) -> int:
        """The handle as a number, which is what TensorRT and PyTorch take."""
        return int(self.handle)

    def upload(
        self, target: Buffer, source: HostBuffer, size: int, offset: int = 0
    ) -> None:
        """Copy the first ``size`` bytes of ``source`` to ``target`` from ``offset``."""
        to, of = target.at(offset, size), source.at(0, size)
        self._cuda.call("cuMemcpyHtoDAsync", to, of, size, self.handle)

    def download(
        self, target: HostBuffer, source: Buffer, size: int, offset: int = 0
    ) -> None:
        """Copy ``size`` bytes of ``source`` from ``offset`` to the start of ``target``;
        they are there after :meth:`synchronize`."""
        to, of = target.at(0, size), source.at(offset, size)
        self._cuda.call("cuMemcpyDtoHAsync", to, of, size, self.handle)

    def copy(
        self,
        target: Buffer,
        source: Buffer,
        size: int,
        target_offset: int = 0,
        source_offset: int = 0,
    ) -> None:
        """Copy on the device."""
        to, of = target.at(target_offset, size), source.at(source_offset, size)
        self._cuda.call("cuMemcpyDtoDAsync", to, of, size, self.handle)

    def clear(self, target: Buffer) -> None:
        """Fill a buffer with zeros."""
        self._cuda.call("cuMemsetD8Async", target.address, 0, target.size, self.handle)

    def record(self, event: Event) -> None:
        """Mark this place in the queue."""
        self._cuda.call("cuEventRecord", event.handle, self.handle)

    def wait(self, event: Event) -> None:
        """Have what is queued from now on wait for the mark; the host does not."""
        self._cuda.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Have the host wait until all that is queued is done."""
        self._cuda.refuse_in_capture("waiting for a stream")
        self._cuda.call("cuStreamSynchronize", self.handle)

    def capture(self, queue: Callable[[], object]) -> Graph:
        """What ``queue`` puts on this stream, as a graph; it is not run.

        The capture is this thread's alone: other threads may go on using CUDA.

        Args:
            queue: Queues work on this stream. It may neither allocate nor wait.

        Raises:
            EngineError: Something in it cannot be captured.
        """
        cuda = self._cuda
        cuda.refuse_in_capture("a capture")
        mode = cuda.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        cuda.call("cuStreamBeginCapture", self.handle, mode)
        try:
            with cuda.capturing():
                queue()
        except BaseException:
            # The capture has to end; what it holds is of no use.
            with contextlib.suppress(EngineError):
                cuda.call(
                    "cuGraphDestroy", cuda.call("cuStreamEndCapture", self.handle)
                )
            raise
        template = cuda.call("cuStreamEndCapture", self.handle)
        try:
            nodes = int(cuda.call("cuGraphGetNodes", template)[1])
            graph = Graph(cuda, cuda.call("cuGraphInstantiate", template, 0), nodes)
        finally:
            cuda.call("cuGraphDestroy", template)
        cuda.releases.callback(graph.close)
        return graph


class Cuda:
    """A device's primary context, current in this thread from entry to exit.

    Args:
        device: Which GPU, counted as the driver counts those that are visible.
        driver: ``cuda.bindings.driver`` or what stands in for it; None imports it on
            entry.

    Attributes:
        driver: The module.
        releases: What is to be done on the way out, the latest first.
    """

    def __init__(self, device: int = 0, driver: Any = None) -> None:
        self.driver = driver
        self.releases = contextlib.ExitStack()
        self._index = device
        self._capturing = False

    def __enter__(self) -> Cuda:
        if self.driver is None:
            self.driver = require("cuda.bindings.driver", extra=_EXTRA)
        with contextlib.ExitStack() as stack:
            try:
                self.call("cuInit", 0)
            except RuntimeError as error:  # cuda-python finds no driver's library
                raise EngineError(
                    "there is no NVIDIA driver to run on",
                    why=str(error),
                    fix="run `id3pm-deploy doctor`; it says what is missing",
                ) from error
            device = self.call("cuDeviceGet", self._index)
            context = self.call("cuDevicePrimaryCtxRetain", device)
            stack.callback(self.call, "cuDevicePrimaryCtxRelease", device)
            self.call("cuCtxPushCurrent", context)
            stack.callback(self.call, "cuCtxPopCurrent")
            self.releases = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.releases.close()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver API.

        Returns:
            What it gives beside its status: None, one value, or a tuple of several.

        Raises:
            DeviceMemoryError: The GPU's memory is not enough.
            EngineError: It failed; its name and CUDA's are in the error.
        """
        status, *found = getattr(self.driver, name)(*arguments)
        if int(status) != 0:
            raise self._error(name, status)
        if not found:
            return None
        return found[0] if len(found) == 1 else tuple(found)

    def _error(self, name: str, status: Any) -> EngineError:
        parts = []
        for ask in ("cuGetErrorName", "cuGetErrorString"):
            failed, text = getattr(self.driver, ask)(status)
            if int(failed) == 0 and text:
                parts.append(text.decode() if isinstance(text, bytes) else str(text))
        why = ": ".join(parts) or f"status {int(status)}"
        if int(status) == int(self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY):
            return DeviceMemoryError(
                f"the GPU has too little free memory ({name})",
                why=why,
                fix="make fewer pictures at once (--batch-size), or close other "
                "programs that use the GPU",
            )
        return EngineError(
            f"CUDA's {name} failed",
            why=why,
            fix="run `id3pm-deploy doctor`; if the GPU hangs, restart the program",
        )

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Refuse meanwhile what would break a capture."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def refuse_in_capture(self, what: str) -> None:
        """Raise AssertionError, for a bug of ours, if a capture is going on."""
        assert not self._capturing, f"{what} inside a capture"

    def buffer(self, size: int) -> Buffer:
        """Memory on the device, zeroed.

        Raises:
            DeviceMemoryError: There is not enough.
        """
        self.refuse_in_capture("allocating memory")
        handle = self.call("cuMemAlloc", max(size, 1))
        self.releases.callback(self.call, "cuMemFree", handle)
        address = int(handle)
        assert address % ALIGNMENT == 0, "cuMemAlloc aligns to 256 bytes"
        self.call("cuMemsetD8", handle, 0, max(size, 1))
        return Buffer(address, size)

    def host_buffer(self, size: int) -> HostBuffer:
        """Page-locked memory of the host, which is not cleared."""
        self.refuse_in_capture("allocating memory")
        handle = self.call("cuMemHostAlloc", max(size, 1), 0)
        self.releases.callback(self.call, "cuMemFreeHost", handle)
        return HostBuffer(int(handle), size)

    def stream(self) -> Stream:
        """A queue that does not wait for the default one."""
        flag = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = self.call("cuStreamCreate", int(flag))
        self.releases.callback(self.call, "cuStreamDestroy", handle)
        return Stream(self, handle)

    def event(self, *, timing: bool = False) -> Event:
        """A mark; with ``timing`` it notes when it was reached."""
        flags = self.driver.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        handle = self.call("cuEventCreate", int(flag))
        self.releases.callback(self.call, "cuEventDestroy", handle)
        return Event(self, handle)

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody uses."""
        free: int = self.call("cuMemGetInfo")[0]
        return free
