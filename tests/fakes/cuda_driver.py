"""A stand-in for ``cuda.bindings.driver`` that computes, records, and forbids.

Device memory is host memory behind addresses of its own. Work that is queued on a
stream is done when somebody waits for it, no earlier, so that a result that is read too
soon is not there. Captured work is kept and done at each launch. What CUDA forbids in a
capture spoils it, as on a GPU. Kernels are not compiled: what one of the package's does
is done here by its name.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

Work = Callable[[], None]

_FIRST_ADDRESS = 0x7F0000000000


class Status(enum.IntEnum):
    """Statuses that are used, with CUDA's numbers."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = Status.CUDA_SUCCESS


@dataclass
class Queue:
    """Work of a stream; ``done`` of it is done."""

    work: list[Work] = field(default_factory=list)
    done: int = 0


@dataclass
class Capture:
    """What is being captured on a stream."""

    stream: int
    work: list[Work] = field(default_factory=list)
    spoilt: bool = False


class FakeDriver:
    """See the module.

    Attributes:
        log: Names of all calls, in order, with their arguments.
        failures: A call's name to the status that it is to return from now on.
        free: Bytes of device memory that are left.
    """

    CUresult = Status
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DEFAULT=0, CU_EVENT_DISABLE_TIMING=2)

    def __init__(self, free: int = 1 << 30) -> None:
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        self.failures: dict[str, Status] = {}
        self.free = free
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.streams: dict[int, Queue] = {}
        self.events: dict[int, tuple[int, int] | None] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.modules: dict[int, bytes] = {}
        self.functions: dict[int, Callable[..., Work]] = {}
        self.contexts = 0
        self.current: list[int] = []
        self._capture: Capture | None = None
        self._next = 1000
        self._address = _FIRST_ADDRESS

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not (name.startswith("cu") and name[2:3].isupper()):
            return found

        def logged(*arguments: Any) -> Any:
            self.log.append((name, arguments))
            if name in self.failures:
                return (self.failures[name],)
            return found(*arguments)

        return logged

    def names(self) -> list[str]:
        """Names of the calls so far."""
        return [name for name, _ in self.log]

    def alive(self) -> dict[str, int]:
        """How much of each kind has not been released."""
        kinds = {
            "device": self.device,
            "host": self.host,
            "streams": self.streams,
            "events": self.events,
            "graphs": self.graphs,
            "executables": self.executables,
            "modules": self.modules,
        }
        found = {name: len(kind) for name, kind in kinds.items() if kind}
        if self.contexts or self.current:
            found["contexts"] = self.contexts + len(self.current)
        return found

    # memory

    def read(self, address: int, size: int) -> bytes:
        """Device memory as it is now."""
        raw, offset = self._place(address, size)
        return bytes(raw[offset : offset + size])

    def _place(self, address: int, size: int) -> tuple[Any, int]:
        for base, raw in self.device.items():
            if base <= address and address + size <= base + len(raw):
                return raw, address - base
        raise AssertionError(f"no device memory at {address:#x}")

    def _write(self, address: int, data: bytes) -> None:
        raw, offset = self._place(address, len(data))
        raw[offset : offset + len(data)] = data

    def _host_part(self, address: int, size: int) -> Any:
        for base, raw in self.host.items():
            if base <= address and address + size <= base + len(raw):
                return (ctypes.c_ubyte * size).from_address(address)
        raise AssertionError("a copy from or to memory that is not page-locked")

    # queues

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _queue(self, stream: int, work: Work) -> tuple[Status]:
        if stream not in self.streams:
            return (Status.CUDA_ERROR_INVALID_HANDLE,)
        if self._capture is not None and self._capture.stream == stream:
            self._capture.work.append(work)
        else:
            self.streams[stream].work.append(work)
        return (OK,)

    def _do(self, stream: int, until: int | None = None) -> None:
        queue = self.streams[stream]
        end = len(queue.work) if until is None else until
        while queue.done < end:
            queue.done += 1
            queue.work[queue.done - 1]()

    def _forbidden(self) -> bool:
        if self._capture is None:
            return False
        self._capture.spoilt = True
        return True

    # the driver's functions

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return (OK, 0) if index == 0 else (Status.CUDA_ERROR_INVALID_VALUE, 0)

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:
        return OK, b"NVIDIA Fake".ljust(length, b"\0")

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        self.contexts += 1
        return OK, 77

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        self.contexts -= 1
        return (OK,)

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        self.current.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return OK, self.current.pop()

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        return (OK,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.free, 1 << 34

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        if self._forbidden():
            return Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0
        if size > self.free:
            return Status.CUDA_ERROR_OUT_OF_MEMORY, 0
        self.free -= size
        address = self._address
        self._address += -(-size // 512) * 512
        self.device[address] = bytearray(b"\xa5" * size)  # never zeros by luck
        return OK, address

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        for stream in self.streams:  # CUDA waits as well
            self._do(stream)
        self.free += len(self.device.pop(address))
        return (OK,)

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        raw = (ctypes.c_ubyte * size)()
        self.host[ctypes.addressof(raw)] = raw
        return OK, ctypes.addressof(raw)

    def cuMemFreeHost(self, address: int) -> tuple[Any, ...]:
        del self.host[address]
        return (OK,)

    def cuMemsetD8(self, address: int, value: int, size: int) -> tuple[Any, ...]:
        if self._forbidden():
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self._write(address, bytes([value]) * size)
        return (OK,)

    def cuMemsetD8Async(
        self, address: int, value: int, size: int, stream: int
    ) -> tuple[Any, ...]:
        return self._queue(stream, lambda: self._write(address, bytes([value]) * size))

    def cuMemcpyHtoDAsync(
        self, target: int, source: int, size: int, stream: int
    ) -> tuple[Any, ...]:
        part = self._host_part(source, size)
        return self._queue(stream, lambda: self._write(target, bytes(part)))

    def cuMemcpyDtoHAsync(
        self, target: int, source: int, size: int, stream: int
    ) -> tuple[Any, ...]:
        part = self._host_part(target, size)

        def work() -> None:
            part[:] = self.read(source, size)

        return self._queue(stream, work)

    def cuMemcpyDtoDAsync(
        self, target: int, source: int, size: int, stream: int
    ) -> tuple[Any, ...]:
        return self._queue(stream, lambda: self._write(target, self.read(source, size)))

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        handle = self._handle()
        self.streams[handle] = Queue()
        return OK, handle

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        self._do(stream)
        del self.streams[stream]
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        if self._forbidden():
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        if stream:
            self._do(stream)
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        handle = self._handle()
        self.events[handle] = None
        return OK, handle

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:
        del self.events[event]
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:
        status = self._queue(stream, lambda: None)
        self.events[event] = stream, len(self.streams[stream].work)
        return status

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:
        if self._forbidden():
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self._reach(event)
        return (OK,)

    def _reach(self, event: int) -> None:
        mark = self.events[event]
        if mark is not None:
            self._do(*mark)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any, ...]:
        mark = self.events[event]
        return self._queue(stream, lambda: self._do(*mark) if mark else None)

    def cuEventElapsedTime(self, first: int, last: int) -> tuple[Any, ...]:
        one, other = self.events[first], self.events[last]
        if one is None or other is None:
            return Status.CUDA_ERROR_INVALID_HANDLE, 0.0
        return OK, float(other[1] - one[1])

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        if self._capture is not None or mode != 1:
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        self._capture = Capture(stream)
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        capture, self._capture = self._capture, None
        if capture is None or capture.stream != stream:
            return Status.CUDA_ERROR_INVALID_VALUE, 0
        if capture.spoilt:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 0
        handle = self._handle()
        self.graphs[handle] = capture.work
        return OK, handle

    def cuGraphGetNodes(self, graph: int) -> tuple[Any, ...]:
        return OK, None, len(self.graphs[graph])

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:
        handle = self._handle()
        self.executables[handle] = list(self.graphs[graph])
        return OK, handle

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:
        del self.graphs[graph]
        return (OK,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:
        del self.executables[executable]
        return (OK,)

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:
        if self._forbidden():
            return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        work = list(self.executables[executable])

        def run() -> None:
            for one in work:
                one()

        return self._queue(stream, run)

    def cuModuleLoadData(self, image: int) -> tuple[Any, ...]:
        text = ctypes.string_at(image)
        handle = self._handle()
        self.modules[handle] = text
        return OK, handle

    def cuModuleUnload(self, module: int) -> tuple[Any, ...]:
        del self.modules[module]
        return (OK,)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:
        if b".entry %s(" % name not in self.modules[module]:
            return Status.CUDA_ERROR_NOT_FOUND, 0
        handle = self._handle()
        self.functions[handle] = getattr(self, f"_{name.decode()}")
        return OK, handle

    def cuLaunchKernel(self, function: int, *shape: Any) -> tuple[Any, ...]:
        *sizes, _shared, stream, places, _extra = shape
        threads = int(np.prod(sizes))
        kind = ctypes.POINTER(ctypes.c_void_p)
        listed = ctypes.cast(places, kind)
        work = self.functions[function](listed, threads)  # it takes the values now
        return self._queue(stream, work)

    def _low_res_from_pictures(self, listed: Any, threads: int) -> Work:
        numbers = (
            ctypes.c_uint64.from_address(listed[i]).value  # all three have eight bytes
            for i in range(3)
        )
        source, target, count = numbers
        assert count <= threads < count + 256

        def work() -> None:
            x = np.frombuffer(self.read(source, 4 * count), np.float32)
            level = np.rint((np.clip(x, -1, 1).astype(np.float64) + 1.0) * 127.5)
            found = level.astype(np.float32) / np.float32(127.5) - np.float32(1)
            self._write(target, found.tobytes())

        return work

    def cuGetErrorName(self, status: Status) -> tuple[Any, ...]:
        return OK, status.name.encode()

    def cuGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return OK, status.name.lower().replace("_", " ").encode()
