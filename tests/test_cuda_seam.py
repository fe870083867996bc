"""CUDA's driver API through our seam, on a driver that computes and forbids."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes.cuda_driver import FakeDriver, Status

from id3pm_deploy.backends.cuda import Cuda, Stream
from id3pm_deploy.backends.device_buffers import ALIGNMENT, Buffer
from id3pm_deploy.errors import DeviceMemoryError, EngineError


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


def numbers(
    size: int, start: int = 0
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.arange(start, start + size, dtype=np.float32)


def test_nothing_touches_cuda_before_entry_and_all_is_released(
    driver: FakeDriver,
) -> None:
    cuda = Cuda(driver=driver)
    assert driver.log == []
    with cuda:
        stream, event = cuda.stream(), cuda.event()
        device, host = cuda.buffer(64), cuda.host_buffer(64)
        graph = stream.capture(lambda: stream.upload(device, host, 64))
        stream.record(event)
        assert graph.nodes == 1
        assert set(driver.alive()) == {
            *("device", "host", "streams", "events", "executables", "contexts")
        }
    assert driver.alive() == {}
    assert driver.names()[-2:] == ["cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]


@pytest.mark.parametrize(
    "failing", ["cuMemAlloc", "cuStreamCreate", "cuCtxPushCurrent"]
)
def test_after_an_error_all_is_released(driver: FakeDriver, failing: str) -> None:
    driver.failures[failing] = Status.CUDA_ERROR_INVALID_VALUE

    def use() -> None:
        with Cuda(driver=driver) as cuda:
            cuda.host_buffer(8)
            cuda.event()
            cuda.buffer(8)
            cuda.stream()

    with pytest.raises(EngineError, match=f"CUDA's {failing} failed") as caught:
        use()
    assert "CUDA_ERROR_INVALID_VALUE" in caught.value.why
    assert driver.alive() == {}


def test_numbers_go_there_and_back(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        stream = cuda.stream()
        up, down = cuda.host_buffer(40), cuda.host_buffer(40)
        first, second = cuda.buffer(40), cuda.buffer(80)
        up.array((10,), np.float32)[:] = numbers(10)
        down.array((10,), np.float32)[:] = -1
        stream.upload(first, up, 40)
        stream.copy(second, first, 20, target_offset=40, source_offset=8)
        stream.download(down, second, 40, offset=40)
        assert (down.array((10,), np.float32) == -1).all(), "nobody has waited yet"
        stream.synchronize()
        expected = np.concatenate([numbers(5, 2), np.zeros(5, np.float32)])
        np.testing.assert_array_equal(down.array((2, 5), np.float32).ravel(), expected)
        assert first.address % ALIGNMENT == second.address % ALIGNMENT == 0
        stream.clear(first)
        stream.synchronize()
        assert driver.read(first.address, 40) == bytes(40)


def test_fresh_memory_is_zero(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        assert driver.read(cuda.buffer(16).address, 16) == bytes(16)
        assert cuda.buffer(0).size == 0


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (9, 8), (-1, 4), (0, -1)])
def test_bytes_outside_a_buffer_are_refused(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="are not in 16"):
        Buffer(ALIGNMENT, 16).at(offset, size)


def test_a_graph_does_the_same_work_at_each_launch(driver: FakeDriver) -> None:
    """Addresses are fixed when it is captured; what lies there is not."""
    with Cuda(driver=driver) as cuda:
        stream = cuda.stream()
        host, device, seen = cuda.host_buffer(4), cuda.buffer(4), cuda.buffer(4)

        def work() -> None:
            stream.upload(device, host, 4)
            stream.copy(seen, device, 4)

        graph = stream.capture(work)
        stream.synchronize()
        assert driver.read(seen.address, 4) == bytes(4), "a capture runs nothing"
        assert graph.nodes == 2
        for value in (1.0, 2.0):
            host.array((1,), np.float32)[0] = value
            graph.launch(stream)
            stream.synchronize()
            found = np.frombuffer(driver.read(seen.address, 4), np.float32)
            assert found[0] == value
        graph.close()
        graph.close()
        with pytest.raises(ValueError, match="was closed"):
            graph.launch(stream)
    assert driver.alive() == {}


def _allocates(cuda: Cuda, stream: Stream) -> None:
    cuda.buffer(8)


def _waits(cuda: Cuda, stream: Stream) -> None:
    stream.synchronize()


def _waits_for_a_mark(cuda: Cuda, stream: Stream) -> None:
    cuda.event().synchronize()


def _captures(cuda: Cuda, stream: Stream) -> None:
    stream.capture(lambda: None)


@pytest.mark.parametrize(
    "work", [_allocates, _waits, _waits_for_a_mark, _captures], ids=lambda w: w.__name__
)
def test_what_a_capture_forbids_is_refused_before_cuda_sees_it(
    driver: FakeDriver, work: Callable[[Cuda, Stream], None]
) -> None:
    with Cuda(driver=driver) as cuda:
        stream, device = cuda.stream(), cuda.buffer(8)
        with pytest.raises(AssertionError, match="inside a capture"):
            stream.capture(lambda: work(cuda, stream))
        # The stream is usable again, and a capture as well.
        graph = stream.capture(lambda: stream.clear(device))
        graph.launch(stream)
        stream.synchronize()
    assert driver.alive() == {}


def test_a_capture_that_somebody_else_spoilt_is_an_error(driver: FakeDriver) -> None:
    """Another library in it may allocate; CUDA tells of it at the end."""
    with Cuda(driver=driver) as cuda:
        stream = cuda.stream()
        with pytest.raises(EngineError, match="cuStreamEndCapture") as caught:
            stream.capture(lambda: driver.cuMemAlloc(8))
        assert "INVALIDATED" in caught.value.why
        stream.synchronize()
    assert driver.alive() == {}


def test_captures_are_this_threads_alone(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        stream = cuda.stream()
        stream.capture(lambda: None)
        modes = [a[1] for n, a in driver.log if n == "cuStreamBeginCapture"]
        assert modes == [driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL]


def test_one_stream_waits_for_another(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        first, second, mark = cuda.stream(), cuda.stream(), cuda.event()
        host, device, seen = cuda.host_buffer(4), cuda.buffer(4), cuda.buffer(4)
        host.array((1,), np.float32)[0] = 3.0
        first.upload(device, host, 4)
        first.record(mark)
        second.wait(mark)
        second.copy(seen, device, 4)
        second.synchronize()
        assert np.frombuffer(driver.read(seen.address, 4), np.float32)[0] == 3.0
        mark.synchronize()


def test_too_little_memory_is_called_that(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        assert cuda.free_memory() == driver.free
        with pytest.raises(DeviceMemoryError, match="too little free memory") as caught:
            cuda.buffer(driver.free + 1)
        assert "--batch-size" in caught.value.fix
        assert "CUDA_ERROR_OUT_OF_MEMORY" in caught.value.why
    assert driver.alive() == {}


def test_what_is_closed_is_released_once(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        free, buffer = cuda.free_memory(), cuda.buffer(64)
        buffer.close()
        buffer.close()
        assert cuda.free_memory() == free
        host = cuda.host_buffer(64)
        host.close()
        assert set(driver.alive()) == {"contexts"}
    assert driver.names().count("cuMemFree") == 1


def test_another_thread_takes_over(driver: FakeDriver) -> None:
    with Cuda(driver=driver) as cuda:
        assert cuda.name == "NVIDIA Fake"
        threads = [threading.Thread(target=cuda.buffer, args=(8,)) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
        cuda.free_memory()
    assert driver.names().count("cuCtxSetCurrent") >= 2
    assert driver.names()[-4] == "cuMemFree"
    assert driver.alive() == {}


def test_every_name_is_in_cuda_python(driver: FakeDriver) -> None:
    real: Any = pytest.importorskip("cuda.bindings.driver")

    with Cuda(driver=driver) as cuda:
        stream, mark = cuda.stream(), cuda.event(timing=True)
        device, host = cuda.buffer(8), cuda.host_buffer(8)
        graph = stream.capture(lambda: stream.clear(device))
        graph.launch(stream)
        stream.upload(device, host, 8)
        stream.download(host, device, 8)
        stream.copy(device, device, 4, 4)
        stream.record(mark)
        stream.wait(mark)
        stream.synchronize()
        mark.synchronize()
        assert mark.milliseconds_since(mark) == 0
        kernel = cuda.kernel(".entry low_res_from_pictures(", "low_res_from_pictures")
        count = ctypes.c_size_t(1)
        stream.run(kernel, 1, *(ctypes.c_void_p(device.address),) * 2, count)
        thread = threading.Thread(target=cuda.free_memory)
        thread.start()
        thread.join()
    called = {n for n in dir(FakeDriver) if n.startswith("cu") and n[2].isupper()}
    assert called - set(driver.names()) == {"cuGetErrorName", "cuGetErrorString"}
    for name in called:
        assert callable(getattr(real, name)), name
    for number in Status:
        assert getattr(real.CUresult, number.name) == number
    assert real.CUresult.CUDA_ERROR_OUT_OF_MEMORY == Status.CUDA_ERROR_OUT_OF_MEMORY
    assert real.CUstream_flags.CU_STREAM_NON_BLOCKING == 1
    assert real.CUevent_flags.CU_EVENT_DISABLE_TIMING == 2
    mode = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert mode == driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


def test_without_a_driver_the_error_says_so() -> None:
    real: Any = pytest.importorskip("cuda.bindings.driver")

    try:
        real.cuInit(0)
    except RuntimeError:
        pass
    else:
        pytest.skip("there is a driver here")
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught, Cuda():
        pass
    assert "doctor" in caught.value.fix
