"""Free and peak memory of the GPU that builds, with libraries that are made up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from id3pm_deploy.builders import device_memory
from id3pm_deploy.builders.device_memory import (
    Device,
    PeakMemory,
    find_device,
    free_bytes,
)
from id3pm_deploy.doctor.cuda_driver import DriverError

GIB = 1 << 30
HANDLE, CONTEXT, BOARD = 7, 4242, 99


class Library:
    """Calls by name; what is not defined is no function of it."""

    def __init__(self, **fails: int) -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(type(self), f"_{name}")

        def call(*arguments: Any) -> int:
            status = self.fails.get(name, 0)
            if not status:
                function(self, *arguments)
            return status

        return call


class Cuda(Library):
    """``libcuda`` of a machine with one GPU."""

    devices, integrated, active, free = 1, 0, 1, 5 * GIB
    pushed = 0
    retained = 0

    def _cuInit(self, flags: Any) -> None: ...

    def _cuDriverGetVersion(self, where: Any) -> None:
        where._obj.value = 13000

    def _cuDeviceGetCount(self, where: Any) -> None:
        where._obj.value = self.devices

    def _cuDeviceGet(self, where: Any, index: Any) -> None:
        where._obj.value = HANDLE + index.value

    def _cuDeviceGetName(self, text: Any, size: Any, device: Any) -> None:
        text.value = b"NVIDIA Fake"

    def _cuDeviceTotalMem_v2(self, where: Any, device: Any) -> None:
        where._obj.value = 8 * GIB

    def _cuDeviceGetAttribute(self, where: Any, number: Any, device: Any) -> None:
        values = {16: 82, 18: self.integrated, 75: 8, 76: 6}
        where._obj.value = values[number.value]

    def _cuGetErrorName(self, status: Any, where: Any) -> None: ...

    def _cuDeviceGetPCIBusId(self, text: Any, size: Any, device: Any) -> None:
        assert device.value == HANDLE
        text.value = b"0000:65:00.0"

    def _cuDevicePrimaryCtxGetState(self, device: Any, flags: Any, on: Any) -> None:
        assert device.value == HANDLE
        on._obj.value = self.active

    def _cuDevicePrimaryCtxRetain(self, where: Any, device: Any) -> None:
        where._obj.value = CONTEXT
        self.retained += 1

    def _cuDevicePrimaryCtxRelease_v2(self, device: Any) -> None:
        self.retained -= 1

    def _cuCtxPushCurrent_v2(self, context: Any) -> None:
        assert context.value == CONTEXT
        self.pushed += 1

    def _cuCtxPopCurrent_v2(self, where: Any) -> None:
        self.pushed -= 1

    def _cuMemGetInfo_v2(self, free: Any, total: Any) -> None:
        assert self.pushed == self.retained == 1
        free._obj.value, total._obj.value = self.free, 8 * GIB


class Nvml(Library):
    """``libnvidia-ml`` of the same machine."""

    free = 6 * GIB
    opened = 0

    def _nvmlInit_v2(self) -> None:
        self.opened += 1

    def _nvmlDeviceGetHandleByPciBusId_v2(self, text: Any, where: Any) -> None:
        assert text.value == b"0000:65:00.0"
        where._obj.value = BOARD

    def _nvmlDeviceGetMemoryInfo(self, handle: Any, where: Any) -> None:
        assert handle.value == BOARD
        memory = where._obj
        memory.total, memory.free, memory.used = 8 * GIB, self.free, 2 * GIB


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 8000000 kB\nMemAvailable:    3145728 kB\n")
    return path


def libraries(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    """What of the driver's libraries the loader finds."""

    def load(kind: str) -> Any:
        if kind not in found:
            raise FileNotFoundError(kind)
        return found[kind]

    monkeypatch.setattr(device_memory, "load_library", load)


def test_what_the_gpu_is() -> None:
    assert Device(Cuda()).facts == {
        "name": "NVIDIA Fake",
        "compute_capability": "8.6",
        "multiprocessors": 82,
        "cuda": "13.0",
    }


def test_free_memory_in_tensorrts_own_context() -> None:
    cuda, nvml = Cuda(), Nvml()
    assert Device(cuda, nvml).free_bytes() == 5 * GIB
    assert (cuda.pushed, cuda.retained) == (0, 0)


def test_without_a_context_the_management_library_is_asked() -> None:
    """And none is made: it would take memory of its own."""
    cuda, nvml = Cuda(cuDevicePrimaryCtxRetain=1), Nvml()
    cuda.active = 0
    device = Device(cuda, nvml)
    assert device.free_bytes() == device.free_bytes() == 6 * GIB
    assert nvml.opened == 1, "it takes its time"
    assert Device(cuda).free_bytes() is None


@pytest.mark.parametrize(
    "call",
    [
        "cuDevicePrimaryCtxGetState",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuMemGetInfo_v2",
    ],
)
def test_a_driver_that_does_not_tell(call: str) -> None:
    cuda = Cuda(**{call: 700})
    assert Device(cuda).free_bytes() is None
    assert Device(cuda, Nvml()).free_bytes() == 6 * GIB
    assert (cuda.pushed, cuda.retained) == (0, 0)


@pytest.mark.parametrize(
    "call",
    ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetMemoryInfo"],
)
def test_a_management_library_that_does_not_tell(call: str) -> None:
    cuda, nvml = Cuda(), Nvml(**{call: 3})
    cuda.active = 0
    assert Device(cuda, nvml).free_bytes() is None


def test_a_management_library_without_its_functions_is_none() -> None:
    cuda = Cuda()
    assert Device(cuda, object()).free_bytes() == 5 * GIB
    cuda.active = 0
    assert Device(cuda, object()).free_bytes() is None


def test_an_integrated_gpu_has_the_hosts_memory(meminfo: Path) -> None:
    cuda = Cuda()
    cuda.integrated = 1
    assert Device(cuda, Nvml(), meminfo).free_bytes() == 3 * GIB
    meminfo.write_text("MemTotal: 8000000 kB\n")
    assert Device(cuda, Nvml(), meminfo).free_bytes() is None


def test_machines_without_a_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries(monkeypatch)
    assert (find_device(), free_bytes()) == (None, None)
    libraries(monkeypatch, cuda=Cuda(cuInit=100), nvml=Nvml())
    assert find_device() is None
    empty = Cuda()
    empty.devices = 0
    libraries(monkeypatch, cuda=empty)
    assert find_device() is None
    with pytest.raises(DriverError, match="no GPU"):
        Device(empty)
    libraries(monkeypatch, cuda=object())  # a libcuda without a single function
    assert find_device() is None


def test_a_machine_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries(monkeypatch, cuda=Cuda(), nvml=Nvml())
    assert free_bytes() == 5 * GIB
    libraries(monkeypatch, cuda=Cuda())
    assert free_bytes() == 5 * GIB


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_peak_is_what_the_block_took_at_most() -> None:
    nvml = Nvml()
    with PeakMemory(Device(Cuda(), nvml), interval=0.001) as memory:
        nvml.free -= 3 * GIB
        _wait_for(lambda: memory.bytes == 3 * GIB)
        nvml.free += 2 * GIB
        time.sleep(0.02)
    assert memory.bytes == 3 * GIB
    nvml.free = 0
    time.sleep(0.02)  # nobody looks any more
    assert memory.bytes == 3 * GIB


def test_the_last_moment_counts_too() -> None:
    nvml = Nvml()
    with PeakMemory(Device(Cuda(), nvml), interval=60) as memory:
        nvml.free -= GIB
    assert memory.bytes == GIB


def test_a_peak_without_management_library_begins_with_the_context() -> None:
    cuda = Cuda()
    cuda.active = 0
    with PeakMemory(Device(cuda), interval=0.001) as memory:
        time.sleep(0.01)
        assert memory.bytes is None
        cuda.active = 1
        _wait_for(lambda: memory.bytes == 0)
        cuda.free -= 2 * GIB
        _wait_for(lambda: memory.bytes == 2 * GIB)


def test_memory_that_others_free_is_no_peak() -> None:
    nvml = Nvml()
    with PeakMemory(Device(Cuda(), nvml), interval=60) as memory:
        nvml.free += GIB
    assert memory.bytes == 0


def test_there_is_no_peak_without_a_gpu() -> None:
    with PeakMemory(None) as memory:
        pass
    assert memory.bytes is None
