"""CUDA's driver API through cuda-python, for engines on a GPU that need no torch.

The only file that calls CUDA to run something; ``doctor`` and the builder ask the
driver for facts by themselves. The TensorRT backend runs on it; it has been run against
a stand-in for the driver only. Names and arguments are those of ``cuda-bindings`` 12.8
to 13.5 (``tests/cuda_names.py``). Memory, streams, events, graphs and kernels are those
of a device's primary context, which PyTorch and ONNX Runtime use as well, so that
tensors of one are good for the other. Nothing touches CUDA before ``Cuda`` is entered,
what was made through it and not closed is released when it is left, the latest first,
and each call's status is looked at. Sizes are in bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import DeviceMemoryError, EngineError
from ..optional import require
from .device_buffers import ALIGNMENT, Buffer, HostBuffer, Release

_EXTRA = "cuda"
_BLOCK = 256
"""Threads of a block."""
_LONGEST_NAME = 256


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


class Kernel:
    """A function of a module of PTX; ``handle`` is CUDA's."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class Graph:
    """Captured work, ready to be launched again and again.

    Attributes:
        nodes: How many operations it holds.
        bytes: Memory of the device that it took, at a grain of the driver's.
    """

    def __init__(self, cuda: Cuda, handle: Any, nodes: int, size: int) -> None:
        self._cuda, self._handle = cuda, handle
        self.nodes, self.bytes = nodes, size
        self._release = cuda.hold("cuGraphExecDestroy", handle)

    def launch(self, stream: Stream) -> None:
        """Queue all of it on a stream."""
        if self._handle is None:
            raise ValueError("the graph was closed")
        self._cuda.refuse_in_capture("launching a graph")
        self._cuda.call("cuGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Release it; nothing happens if that was done before."""
        self._handle = None
        self._release()


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

    def run(self, kernel: Kernel, threads: int, *arguments: Any) -> None:
        """Queue a kernel of one dimension.

        Args:
            kernel: Which.
            threads: How many it needs; rounded up to whole blocks.
            arguments: What it takes, as ctypes values.
        """
        places = [ctypes.addressof(argument) for argument in arguments]
        listed = (ctypes.c_void_p * len(places))(*places)
        blocks = -(-threads // _BLOCK)
        shape = (blocks, 1, 1, _BLOCK, 1, 1, 0, self.handle)
        self._cuda.call(
            "cuLaunchKernel", kernel.handle, *shape, ctypes.addressof(listed), 0
        )

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
            free = cuda.free_memory()
            handle = cuda.call("cuGraphInstantiate", template, 0)
            return Graph(cuda, handle, nodes, max(0, free - cuda.free_memory()))
        finally:
            cuda.call("cuGraphDestroy", template)


class Cuda:
    """A device's primary context, current in the thread that uses it until exit.

    One thread at a time may use it; another may take over when that one is done.

    Args:
        device: Which GPU, counted as the driver counts those that are visible.
        driver: ``cuda.bindings.driver`` or what stands in for it; None imports it on
            entry.

    Attributes:
        driver: The module.
        name: The GPU's, once it is entered.
    """

    def __init__(self, device: int = 0, driver: Any = None) -> None:
        self.driver = driver
        self.name = ""
        self._held: dict[object, tuple[str, Any]] = {}
        self._context = contextlib.ExitStack()
        self._index = device
        self._primary: Any = None
        self._thread = 0
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
            stack.callback(self._leave, threading.get_ident())
            name = self.call("cuDeviceGetName", _LONGEST_NAME, device)
            self.name = bytes(name).split(b"\0")[0].decode(errors="replace")
            self._primary, self._thread = context, threading.get_ident()
            self._context = stack.pop_all()
        return self

    def _leave(self, entered_by: int) -> None:
        self._primary = None
        if threading.get_ident() == entered_by:
            self.call("cuCtxPopCurrent")

    def __exit__(self, *_: object) -> None:
        with self._context as stack:
            for function, handle in self._held.values():
                stack.callback(self.call, function, handle)
            self._held = {}

    def hold(self, function: str, handle: Any) -> Release:
        """Have ``function`` called for ``handle`` by what is returned, or at exit.

        Args:
            function: Of the driver API, releases ``handle``.
            handle: CUDA's.
        """
        key = object()
        self._held[key] = function, handle

        def release() -> None:
            if self._held.pop(key, None) is not None:
                self.call(function, handle)

        return release

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver API.

        Returns:
            What it gives beside its status: None, one value, or a tuple of several.

        Raises:
            DeviceMemoryError: The GPU's memory is not enough.
            EngineError: It failed; its name and CUDA's are in the error.
        """
        if self._primary is not None and self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            self.call("cuCtxSetCurrent", self._primary)
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
        close = self.hold("cuMemFree", handle)
        address = int(handle)
        assert address % ALIGNMENT == 0, "cuMemAlloc aligns to 256 bytes"
        # On the default queue, for which the streams made here do not wait.
        self.call("cuMemsetD8", handle, 0, max(size, 1))
        self.call("cuStreamSynchronize", 0)
        return Buffer(address, size, close)

    def lasting_buffer(self, size: int) -> Buffer:
        """Memory that stays when this is left; ``close`` releases it, in any thread.

        It is not cleared, and keeps the device's primary context alive.

        Raises:
            DeviceMemoryError: There is not enough.
        """
        self.refuse_in_capture("allocating memory")
        driver, device = self.driver, self.call("cuDeviceGet", self._index)
        context = self.call("cuDevicePrimaryCtxRetain", device)
        try:
            handle = self.call("cuMemAlloc", max(size, 1))
        except BaseException:
            self.call("cuDevicePrimaryCtxRelease", device)
            raise

        def close() -> None:
            # What fails here cannot be told to anybody.
            driver.cuCtxPushCurrent(context)
            driver.cuMemFree(handle)
            driver.cuCtxPopCurrent()
            driver.cuDevicePrimaryCtxRelease(device)

        return Buffer(int(handle), size, close)

    def host_buffer(self, size: int) -> HostBuffer:
        """Page-locked memory of the host, which is not cleared."""
        self.refuse_in_capture("allocating memory")
        handle = self.call("cuMemHostAlloc", max(size, 1), 0)
        close = self.hold("cuMemFreeHost", handle)
        return HostBuffer(int(handle), size, close)

    def stream(self) -> Stream:
        """A queue that does not wait for the default one."""
        flag = self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = self.call("cuStreamCreate", int(flag))
        self.hold("cuStreamDestroy", handle)
        return Stream(self, handle)

    def event(self, *, timing: bool = False) -> Event:
        """A mark; with ``timing`` it notes when it was reached."""
        flags = self.driver.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        handle = self.call("cuEventCreate", int(flag))
        self.hold("cuEventDestroy", handle)
        return Event(self, handle)

    def kernel(self, ptx: str, name: str) -> Kernel:
        """A function of a module, which the driver compiles for its GPU.

        Raises:
            EngineError: The driver is too old for the PTX, or there is no such name.
        """
        self.refuse_in_capture("loading a module")
        text = ctypes.create_string_buffer(ptx.encode())  # ends with a zero byte
        module = self.call("cuModuleLoadData", ctypes.addressof(text))
        self.hold("cuModuleUnload", module)
        return Kernel(self.call("cuModuleGetFunction", module, name.encode()))

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody uses."""
        free: int = self.call("cuMemGetInfo")[0]
        return free
