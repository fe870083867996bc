"""Arrays that are handed on by DLPack, on host memory in place of a device's."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.dlpack import from_dlpack

import id3pm_deploy
from id3pm_deploy.backends import device_array
from id3pm_deploy.backends.device_array import CUDA, HOST, DeviceArray
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine


@pytest.fixture
def memory() -> Any:
    return np.arange(24, dtype=np.float32)


@pytest.fixture
def closed() -> list[str]:
    return []


def array_over(memory: Any, closed: list[str]) -> DeviceArray:
    address = memory.ctypes.data
    return DeviceArray(address, (2, 3, 4), (HOST, 0), lambda: closed.append("closed"))


@pytest.mark.parametrize("take", [np.from_dlpack, from_dlpack])
def test_a_consumer_shares_the_memory_and_keeps_it(
    memory: Any, closed: list[str], take: Any
) -> None:
    array = array_over(memory, closed)
    taken, again = take(array), take(array)
    del array
    gc.collect()
    memory[5] = 100.0
    for one in (taken, again):
        assert tuple(one.shape) == (2, 3, 4)
        assert np.asarray(one).ravel().tolist() == memory.tolist()
        assert closed == []
    del taken
    gc.collect()
    assert closed == []
    del again, one
    gc.collect()
    assert closed == ["closed"]
    assert device_array._shared == {}


def test_what_nobody_takes_is_released(memory: Any, closed: list[str]) -> None:
    array = array_over(memory, closed)
    capsule = array.__dlpack__()
    del array
    gc.collect()
    assert closed == []
    del capsule
    gc.collect()
    assert closed == ["closed"]
    assert device_array._shared == {}


def test_it_is_handed_on_where_it_is() -> None:
    array = DeviceArray(1 << 40, (1,), (CUDA, 1), lambda: None)
    assert array.__dlpack_device__() == (2, 1)
    with pytest.raises(BufferError, match="handed on where it is"):
        array.__dlpack__(dl_device=(HOST, 0))
    with pytest.raises(BufferError, match="not copied"):
        array.__dlpack__(copy=True)
    array.__dlpack__(stream=2, max_version=(1, 0), dl_device=(CUDA, 1), copy=False)


def test_a_batch_hands_on_what_lies_on_its_device(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_device(engine: OnnxRuntimeEngine) -> DeviceArray:
        held = engine.state()[0]
        return DeviceArray(held.ctypes.data, held.shape, (HOST, 0), held.sum)

    monkeypatch.setattr(OnnxRuntimeEngine, "pictures_on_device", on_device)
    with id3pm_deploy.load(tiny_bundle, "onnxruntime") as sampler:
        (batch,) = sampler.sample(None, count=2, guidance=1.0, steps=2)
    assert isinstance(batch.on_device, DeviceArray)
    found = from_dlpack(batch).numpy()
    assert found.tobytes() == batch.images.tobytes()
    monkeypatch.undo()
    with id3pm_deploy.load(tiny_bundle, "onnxruntime") as sampler:
        (batch,) = sampler.sample(None, count=2, guidance=1.0, steps=2)
    assert batch.on_device is None
    assert np.from_dlpack(batch).tobytes() == batch.images.tobytes()
