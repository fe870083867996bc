"""ONNX Runtime on a GPU: the same code on CPU arrays, and over a stand-in for it."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity

from id3pm_deploy.backends import ort_device
from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.ort_device import OnnxDeviceEngine
from id3pm_deploy.backends.ort_providers import (
    CPU,
    CUDA,
    TENSORRT,
    Target,
    check_available,
    check_in_use,
    providers,
    target_of,
)
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.errors import EngineError, InputError
from id3pm_deploy.guidance import GuidanceSettings, guidance_table
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table

Float32 = npt.NDArray[np.float32]
MOVED = GuidanceSettings(4.0, "cosine", interval=(150, 900), rescale=0.7)
ON_CPU = Target(CPU, "cpu")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")


def graph_of(bundle: Path) -> tuple[bytes, Any]:
    opened = open_bundle(bundle)
    graph = opened.graph("step", "float32")
    assert graph is not None
    return opened.read(graph.file), opened.manifest.diffusion


@pytest.fixture
def engine(tiny_bundle: Path) -> Iterator[OnnxDeviceEngine]:
    data, spec = graph_of(tiny_bundle)
    with OnnxDeviceEngine(data, step_shapes(spec), "float32", ON_CPU) as made:
        assert isinstance(made, OnnxDeviceEngine)
        yield made


def pictures(engine: Engine, spec: Any, solver: str, samples: list[int]) -> Float32:
    table = solver_table(spec, SolverSettings(solver, 5))
    job = SampleJob(random_identity(3, spec), table, MOVED, SeededNoise(11))
    found = run_trajectory(engine, job, samples)
    assert not found.failed.any()
    return found.images


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m"])
def test_pictures_are_those_of_the_cpu_engine(
    engine: OnnxDeviceEngine, tiny_bundle: Path, solver: str
) -> None:
    spec = open_bundle(tiny_bundle).manifest.diffusion
    with open_engine(open_model(tiny_bundle), threads=0) as plain:
        for samples in ([0, 1, 2], [1]):
            wanted = pictures(plain, spec, solver, samples)
            found = pictures(engine, spec, solver, samples)
            np.testing.assert_array_equal(found, wanted)


def test_arrays_keep_their_addresses(
    engine: OnnxDeviceEngine, tiny_bundle: Path
) -> None:
    """Also while guidance switches between 2 and 4 UNet rows; each pair of addresses
    has a graph number of its own."""
    spec = open_bundle(tiny_bundle).manifest.diffusion
    pictures(engine, spec, "ddpm", [0, 1])
    held, by_rows = engine._buffers(), dict(engine._by_rows)
    assert sorted(by_rows) == [2, 4]
    before = [one.data_ptr() for one in (*held.states, *held.values.values())]
    numbers = [number for rows in by_rows.values() for number in rows.numbers]
    assert len(set(numbers)) == 4
    pictures(engine, spec, "dpmpp-2m", [0, 1])
    held = engine._buffers()
    assert [one.data_ptr() for one in (*held.states, *held.values.values())] == before
    assert engine._by_rows == by_rows
    pictures(engine, spec, "ddpm", [0])
    assert not set(numbers) & {n for r in engine._by_rows.values() for n in r.numbers}


def test_no_noise_is_zero_noise(engine: OnnxDeviceEngine, tiny_bundle: Path) -> None:
    spec = open_bundle(tiny_bundle).manifest.diffusion
    table = solver_table(spec, SolverSettings("ddpm", 4))
    x_t = SeededNoise(3).start([0], engine.shapes.picture)
    guidance = guidance_table(random_identity(1, spec), 1.0)
    ends = []
    for noise in (np.zeros_like(x_t), x_t, None):
        engine.begin(x_t, guidance)
        engine.run_row(table.rows[:1], noise)
        ends.append(engine.state())
    np.testing.assert_array_equal(ends[2], ends[0])
    assert np.abs(ends[1] - ends[0]).max() > 0.01


def test_states_and_places_can_be_changed(
    engine: OnnxDeviceEngine, tiny_bundle: Path
) -> None:
    spec = open_bundle(tiny_bundle).manifest.diffusion
    rows = solver_table(spec, SolverSettings("dpmpp-2m", 4)).rows
    steps = [np.repeat(row[None], 2, axis=0) for row in rows]
    x_t = SeededNoise(3).start([0, 1], engine.shapes.picture)
    engine.begin(x_t, guidance_table(random_identity(2, spec), 2.0))
    engine.run_row(steps[0], None)
    kept, preview = engine.state(), engine.preview()
    engine.run_row(steps[1], None)
    expected = engine.state()
    engine.load_state(kept)
    engine.run_row(steps[1], None)
    np.testing.assert_array_equal(engine.state(), expected)
    np.testing.assert_array_equal(kept[1], preview)
    engine.replace([1], x_t[:1])
    changed = engine.state()
    np.testing.assert_array_equal(changed[:, 0], expected[:, 0])
    np.testing.assert_array_equal(changed[0, 1], x_t[0])
    assert not changed[1:, 1].any()


# What is asked of ONNX Runtime


def test_the_cuda_provider_is_asked_for_exact_arithmetic() -> None:
    asked = providers(Target(CUDA, "cuda", 1), "float32", graphs=True)
    assert [name for name, _ in asked] == [CUDA, CPU]
    options = asked[0][1]
    assert options["device_id"] == "1"
    assert options["use_tf32"] == "0"
    assert options["enable_cuda_graph"] == "1"
    without = providers(Target(CUDA), "float16", graphs=False)
    assert without[0][1]["enable_cuda_graph"] == "0"


def test_the_tensorrt_provider_keeps_its_engines_to_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = providers(Target(TENSORRT), "float16", graphs=True)
    assert [name for name, _ in asked] == [TENSORRT, CUDA, CPU]
    options = asked[0][1]
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "0"
    assert options["trt_cuda_graph_enable"] == "1"
    assert "enable_cuda_graph" not in asked[1][1], "one of them captures"
    folder = Path(options["trt_engine_cache_path"])
    assert folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"
    other = providers(Target(TENSORRT), "float32", graphs=False)[0][1]
    assert other["trt_engine_cache_path"] != str(folder)
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    folder.chmod(0o777)
    with pytest.raises(EngineError, match="cannot be kept") as error:
        providers(Target(TENSORRT), "float16", graphs=True)
    assert "others may write" in error.value.why


def test_devices_of_a_backend() -> None:
    for device, number in (("cpu", 0), ("cuda", 0), ("cuda:3", 3)):
        assert target_of("onnxruntime-cuda", device) == Target(CUDA, "cuda", number)
    assert target_of("onnxruntime-tensorrt", "cuda").provider == TENSORRT
    for device in ("cuda:", "cuda:x", "mps", "cuda:-1", "cpu:1"):
        with pytest.raises(InputError, match="has no device"):
            target_of("onnxruntime-cuda", device)


# What ONNX Runtime does not say


class FakeSession:
    """Stands for a session of the CUDA provider: its options, and its refusals."""

    def __init__(self, real: Any, options: dict[str, str], runtime: FakeRuntime):
        self.real, self.options, self.runtime = real, options, runtime
        if runtime.refuse == "session" and options.get("enable_cuda_graph") == "1":
            raise RuntimeError("all compute graph nodes have not been partitioned")

    def get_providers(self) -> list[str]:
        return [*self.runtime.used, CPU]

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        if options is None:  # the engine for CPUs
            self.real.run_with_iobinding(binding)
            return
        number = options.get_run_config_entry("gpu_graph_id")
        self.runtime.numbers.append(number)
        if self.runtime.refuse == "run" and number != "-1":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.real.run_with_iobinding(binding, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class FakeRuntime:
    """Stands for onnxruntime-gpu, whose arrays lie on the CPU."""

    def __init__(self) -> None:
        import onnxruntime

        self.real = onnxruntime
        self.refuse = ""
        self.used = [CUDA]
        self.asked: list[list[Any]] = []
        self.numbers: list[str] = []

    @staticmethod
    def get_available_providers() -> list[str]:
        return [TENSORRT, CUDA, CPU]

    def InferenceSession(
        self, source: Any, options: Any, providers: Any, enable_fallback: int
    ) -> FakeSession:
        assert enable_fallback == 0
        self.asked.append(providers)
        real = self.real.InferenceSession(source, options, providers=[CPU])
        return FakeSession(real, providers[0][1], self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    from id3pm_deploy.backends import onnxruntime as backend

    fake = FakeRuntime()
    for module in (backend, ort_device):
        monkeypatch.setattr(module, "require", lambda name, extra: fake)
    return fake


ON_FAKE = Target(CUDA, "cpu")


@pytest.mark.parametrize("refuse", ["", "session", "run"])
def test_graphs_or_the_reason_why_not(
    runtime: FakeRuntime,
    tiny_bundle: Path,
    caplog: pytest.LogCaptureFixture,
    refuse: str,
) -> None:
    data, spec = graph_of(tiny_bundle)
    shapes = step_shapes(spec)
    with open_engine(open_model(tiny_bundle)) as plain:
        expected = pictures(plain, spec, "ddpm", [0, 1])
    runtime.refuse = refuse
    with OnnxDeviceEngine(data, shapes, "float32", ON_FAKE) as engine:
        assert engine.info.backend == "onnxruntime-cuda"
        np.testing.assert_array_equal(pictures(engine, spec, "ddpm", [0, 1]), expected)
        note = engine.replay_note
    of_cuda = [asked[0][1] for asked in runtime.asked if asked[0][0] == CUDA]
    used = [options["enable_cuda_graph"] for options in of_cuda]
    if not refuse:
        assert used == ["1"]
        assert "-1" not in runtime.numbers
        assert note == "the provider's graphs"
        assert not caplog.records
        return
    assert used == ["1", "0"]
    assert runtime.numbers[-1] == "-1"
    assert note.startswith("no graphs; ")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "without CUDA graphs" in caplog.text


def test_graphs_that_nobody_wants(runtime: FakeRuntime, tiny_bundle: Path) -> None:
    data, spec = graph_of(tiny_bundle)
    shapes = step_shapes(spec)
    with OnnxDeviceEngine(data, shapes, "float32", ON_FAKE, graphs=False) as engine:
        pictures(engine, spec, "ddpm", [0])
        assert engine.replay_note == "no graphs"
    assert set(runtime.numbers) == {"-1"}


def test_a_silent_fall_back_is_an_error(
    runtime: FakeRuntime, tiny_bundle: Path
) -> None:
    data, spec = graph_of(tiny_bundle)
    runtime.used = []
    with pytest.raises(EngineError, match="could not start CUDAExecutionProvider"):
        OnnxDeviceEngine(data, step_shapes(spec), "float32", ON_FAKE)
    session = SimpleNamespace(get_providers=lambda: [CUDA, CPU])
    check_in_use(session, Target(CUDA))
    with pytest.raises(EngineError, match="could not start Tensorrt"):
        check_in_use(session, Target(TENSORRT))


def test_the_package_for_cpus_is_named(tiny_bundle: Path) -> None:
    there = SimpleNamespace(
        get_available_providers=lambda: [CPU], __version__="1.2", extra=None
    )
    with pytest.raises(EngineError) as error:
        check_available(there, Target(CUDA))
    assert "id3pm-deploy[cuda]" in error.value.fix
    assert CPU in error.value.why


# Opening


def test_backends_and_devices_that_do_not_fit(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    bundle, checkpoint = open_model(tiny_bundle), open_model(tiny_checkpoint)
    with pytest.raises(InputError, match="takes no --device cuda"):
        open_engine(bundle, "onnxruntime", device="cuda")
    with pytest.raises(InputError, match="takes no --device cuda:1") as error:
        open_engine(bundle, "tensorrt", device="cuda:1")
    assert "CUDA_VISIBLE_DEVICES" in error.value.fix
    with pytest.raises(InputError, match="--compile is a setting of the torch"):
        open_engine(bundle, "onnxruntime-cuda", compiled=True)
    with pytest.raises(EngineError, match="no engine for the onnxruntime-tensorrt"):
        open_engine(checkpoint, "onnxruntime-tensorrt")
    with pytest.raises(InputError, match="no way to compile"):
        open_engine(checkpoint, "torch", compiled="reduce-overhead")
