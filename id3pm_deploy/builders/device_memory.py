"""The GPU that builds: what it is, its free memory, and the most that a build takes.

Asked through the driver's own libraries, as ``doctor.cuda_driver`` does, in the process
that builds. No context is made here: until TensorRT has one, NVML answers. All sizes
are in bytes. None stands for what cannot be known, for want of a GPU above all.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..doctor.cuda_driver import DriverError, cuda_facts, load_library

SECONDS_BETWEEN_SAMPLES = 0.05

_MEMINFO = Path("/proc/meminfo")
_BUS_ID_BYTES = 32


class _NvmlMemory(ctypes.Structure):
    """``nvmlMemory_t``."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Device:
    """The first GPU that this process sees, which is the one TensorRT builds on.

    Args:
        cuda: ``libcuda``.
        nvml: ``libnvidia-ml``, where there is one.
        meminfo: The kernel's account of the host's memory.

    Raises:
        DriverError: The driver refuses, or shows no GPU.
    """

    def __init__(self, cuda: Any, nvml: Any = None, meminfo: Path = _MEMINFO) -> None:
        facts = cuda_facts(cuda)
        if not facts["devices"]:
            raise DriverError("the driver shows no GPU")
        first = facts["devices"][0]
        self._cuda, self._nvml, self._meminfo = cuda, nvml, meminfo
        self._device = ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(self._device), ctypes.c_int(0))
        self.integrated: bool = first["integrated"]
        self._handle: ctypes.c_void_p | None = None
        with contextlib.suppress(AttributeError):  # a library without the function
            self._handle = self._on_the_board()
        self.facts: dict[str, Any] = {
            "name": first["name"],
            "compute_capability": first["compute_capability"],
            "multiprocessors": first["multiprocessors"],
            "cuda": facts["cuda"],
        }

    def free_bytes(self) -> int | None:
        """Memory that a build could have now.

        An integrated GPU, as a Jetson's, shares the host's: what counts is what the
        kernel could give without swapping.
        """
        if self.integrated:
            return self._host()
        free = self._context()
        return self._board() if free is None else free

    def reader(self) -> Callable[[], int | None]:
        """One way to ask for free memory, so that two answers can be compared.

        NVML is asked first: it counts the memory of a context, too, which TensorRT
        makes before it parses anything.
        """
        if self.integrated:
            return self._host
        return self._context if self._board() is None else self._board

    def _host(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in self._meminfo.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return None

    def _context(self) -> int | None:
        """``cuMemGetInfo``, if somebody has made the device's primary context."""
        cuda, device = self._cuda, self._device
        flags, active = ctypes.c_uint(), ctypes.c_int()
        state = ctypes.byref(flags), ctypes.byref(active)
        if cuda.cuDevicePrimaryCtxGetState(device, *state) or not active.value:
            return None
        context = ctypes.c_void_p()
        if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            return None
        try:
            return self._in_context(context)
        finally:
            cuda.cuDevicePrimaryCtxRelease_v2(device)

    def _in_context(self, context: ctypes.c_void_p) -> int | None:
        cuda = self._cuda
        if cuda.cuCtxPushCurrent_v2(context):
            return None
        free, total, popped = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
        status = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(popped))
        return None if status else free.value

    def _board(self) -> int | None:
        """NVML's answer for the GPU with the same place on the PCI bus."""
        if self._handle is None:
            return None
        memory = _NvmlMemory()
        refused = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory))
        return None if refused else int(memory.free)

    def _on_the_board(self) -> ctypes.c_void_p | None:
        """NVML's handle. NVML stays open: the process ends with the build."""
        nvml, handle = self._nvml, ctypes.c_void_p()
        if nvml is None or nvml.nvmlInit_v2():
            return None
        name = ctypes.create_string_buffer(_BUS_ID_BYTES)
        size = ctypes.c_int(_BUS_ID_BYTES)
        refused = self._cuda.cuDeviceGetPCIBusId(
            name, size, self._device
        ) or nvml.nvmlDeviceGetHandleByPciBusId_v2(name, ctypes.byref(handle))
        return None if refused else handle


def find_device() -> Device | None:
    """The GPU that builds, or None where there is none that works."""
    try:
        cuda = load_library("cuda")
    except OSError:
        return None
    nvml = None
    with contextlib.suppress(OSError):
        nvml = load_library("nvml")
    try:
        return Device(cuda, nvml)
    except (DriverError, AttributeError):  # a library without one of its functions
        return None


def free_bytes() -> int | None:
    """Memory that a build could have on this machine's GPU; None without one."""
    device = find_device()
    return device.free_bytes() if device is not None else None


class PeakMemory:
    """Samples a GPU's free memory in a thread while the block runs.

    Attributes:
        bytes: Most memory taken since the block began; None if it is not known. It
            counts what other programs take meanwhile and, on an integrated GPU, what
            the build takes as host memory.
    """

    def __init__(
        self, device: Device | None, interval: float = SECONDS_BETWEEN_SAMPLES
    ) -> None:
        self._read = device.reader() if device is not None else None
        self._interval = interval
        self._first: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._read is not None:
            self._sample()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._read is not None:
            self._stop.set()
            self._thread.join()
            self._sample()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        free = self._read() if self._read is not None else None
        if free is None:
            return
        if self._first is None:
            self._first = free
        self.bytes = max(self.bytes or 0, self._first - free)
