"""TensorRT plans run over stand-ins for the library and the driver.

A plan of theirs is computed by ONNX Runtime, when somebody waits. So these tests say
something of our code's order, addresses and errors, and nothing of a GPU.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engine_contract import EngineContract, Make
from fakes.cuda_driver import FakeDriver, Status
from fakes.tensorrt_runtime import fake_plan, make_library
from models import random_identity

from id3pm_deploy.backends.base import Engine, StepShapes, step_shapes
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.backends.tensorrt import PlanSource, TensorRtRig
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.enlarging import low_res_from_pixels
from id3pm_deploy.errors import DeviceMemoryError, EngineError
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.images import to_uint8
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.spec import DiffusionSpec

Float32 = npt.NDArray[np.float32]

PROFILES = (((1, 2, 4), (1, 4, 8)), ((2, 2, 2), (4, 4, 4)))
GUIDED = GuidanceSettings(2.0)
MOVED = GuidanceSettings(3.0, interval=(200, 800), rescale=0.5)
VARIANTS = ("10.3", "11.4", "rtx")


class Stand:
    """A plan of a bundle's graph, a driver and a library."""

    def __init__(self, bundle: Path, variant: str = "10.3", **plan: Any) -> None:
        opened = open_bundle(bundle)
        graph = opened.graph("step", "float32")
        assert graph is not None
        self.spec: DiffusionSpec = opened.manifest.diffusion
        self.shapes: StepShapes = step_shapes(self.spec)
        self.graph = opened.read(graph.file)
        self.plan = fake_plan(self.graph, *plan.pop("profiles", PROFILES), **plan)
        self.driver = FakeDriver()
        self.library = make_library(self.driver, variant)
        self.cache: Path | None = None

    def rig(self, shapes: StepShapes | None = None) -> TensorRtRig:
        library = self.library
        source = PlanSource(
            read=lambda: self.plan,
            flavour=library.__name__,
            version="?",
            precision="float32",
            cache=self.cache,
            library=library,
            driver=self.driver,
        )
        return TensorRtRig(source, shapes or self.shapes)

    def engine(self, rows: int = 3) -> ReplayEngine:
        return ReplayEngine(self.rig(), rows)

    def job(
        self,
        solver: str = "ddpm",
        guidance: GuidanceSettings = GUIDED,
        count: int = 2,
        seed: int = 3,
    ) -> SampleJob:
        table = solver_table(self.spec, SolverSettings(solver, 8))
        vectors = random_identity(count, self.spec)
        return SampleJob(vectors, table, guidance, SeededNoise(seed))

    def reference(self, job: SampleJob) -> Float32:
        with OnnxRuntimeEngine(self.graph, self.shapes, "float32", 1) as engine:
            return images(engine, job)

    def is_clean(self) -> bool:
        made = self.library.made
        return not (self.driver.alive() or made.contexts or made.engines)


def error_of(call: Callable[..., object], *arguments: Any) -> EngineError:
    """What a call raises, without the traceback, which keeps objects alive.

    ``pytest.raises`` would: what it gives refers to this frame and stands in it, until
    the garbage collector comes.
    """
    try:
        call(*arguments)
    except EngineError as error:
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    pytest.fail("nothing was raised")


def images(engine: Engine, job: SampleJob) -> Float32:
    found = run_trajectory(engine, job, range(len(job.identity)))
    assert not found.failed.any()
    return found.images


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [-1, 1, 3, 0])
@pytest.mark.parametrize("guidance", [GUIDED, MOVED], ids=["guided", "moved"])
def test_trajectories_are_those_of_onnx_runtime(
    tiny_bundle: Path, variant: str, rows: int, guidance: GuidanceSettings
) -> None:
    stand = Stand(tiny_bundle, variant)
    job = stand.job(guidance=guidance)
    with stand.engine(rows) as engine:
        assert images(engine, job).tobytes() == stand.reference(job).tobytes()
        assert engine.info.device == "NVIDIA Fake"
        assert engine.info.version == f"{stand.library.__name__} " + (
            stand.library.__version__
        )
        captured = "cuGraphInstantiate" in stand.driver.names()
        assert captured == (rows >= 0), engine.replay_note
    assert stand.is_clean()


def test_nothing_is_touched_before_entry(tiny_bundle: Path) -> None:
    stand = Stand(tiny_bundle)
    engine = stand.engine()
    assert stand.driver.log == []
    engine.close()
    assert stand.driver.log == []


def test_capture_and_contexts_for_a_new_key_alone(tiny_bundle: Path) -> None:
    stand = Stand(tiny_bundle)
    with stand.engine() as engine:
        images(engine, stand.job())
        before = stand.library.made.count, stand.driver.names().count("cuMemAlloc")
        captured = stand.driver.names().count("cuStreamBeginCapture")
        for job in (stand.job(seed=4), stand.job(guidance=GuidanceSettings(5.0))):
            assert images(engine, job).tobytes() == stand.reference(job).tobytes()
        after = stand.library.made.count, stand.driver.names().count("cuMemAlloc")
        assert after == before
        assert stand.driver.names().count("cuStreamBeginCapture") == captured


def test_sizes_come_and_go(tiny_bundle: Path) -> None:
    """Smaller batches use the first part of the buffers; larger ones move them."""
    stand = Stand(tiny_bundle)
    with stand.engine() as engine:
        for count in (2, 1, 4, 1, 2, 4):
            for solver in ("ddpm", "dpmpp-2m"):
                job = stand.job(solver, MOVED, count)
                assert images(engine, job).tobytes() == stand.reference(job).tobytes()
    assert stand.is_clean()


def test_a_preview_survives_another_number_of_unet_rows(tiny_bundle: Path) -> None:
    """The step that is run once for new sizes leaves x0 as it was."""
    stand = Stand(tiny_bundle)
    job = stand.job(guidance=MOVED)
    with stand.engine(1) as engine, stand.engine(-1) as plain:
        seen: list[list[Float32]] = [[], []]
        for one, kept in zip((engine, plain), seen, strict=True):

            def keep(_: int, of: Engine = one, to: list[Float32] = kept) -> None:
                to.append(of.preview())

            run_trajectory(one, job, range(2), keep)
        for one, other in zip(*seen, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_profile_of_just_these_sizes_comes_first(tiny_bundle: Path) -> None:
    stand = Stand(tiny_bundle)
    with stand.engine(-1) as engine:
        images(engine, stand.job())
        contexts = list(stand.library.made.contexts)
        assert {context._profile for context in contexts} == {1}  # the smaller one
        del contexts
    stand = Stand(tiny_bundle, profiles=(PROFILES[0], ((3, 3, 3), (6, 6, 6))))
    with stand.engine(-1) as engine:
        images(engine, stand.job(count=3))
        assert {c._profile for c in stand.library.made.contexts} == {1}


def test_sizes_of_no_profile_are_named(tiny_bundle: Path) -> None:
    stand = Stand(tiny_bundle)
    with stand.engine() as engine:
        error = error_of(images, engine, stand.job(count=5))
        assert "5 samples and 10 UNet rows" in error.what
        assert "B 1-4 (best 2), R 1-8 (best 4)" in error.why
        assert "build-engine" in error.fix
        assert "dynamic_samples=[1, 5, 5]" in error.fix
        images(engine, stand.job())
    assert stand.is_clean()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"identity_dim": 0}, "the model takes no identity"),
        ({"low_res_size": 4}, "no input for small pictures"),
        ({"size": 8}, "should be an "),
        ({"identity_dim": 7}, "'identity' should be an input of FLOAT"),
    ],
)
def test_a_plan_of_another_model_is_refused(
    tiny_bundle: Path, change: dict[str, int], why: str
) -> None:
    stand = Stand(tiny_bundle)
    shapes = StepShapes(**(vars(stand.shapes) | change))
    with pytest.raises(EngineError, match="not the model's") as caught:
        stand.rig(shapes).open()
    assert why in caught.value.why
    assert stand.is_clean()


def test_what_is_no_plan_is_refused_with_what_was_said(tiny_bundle: Path) -> None:
    stand = Stand(tiny_bundle)
    stand.plan = b"no plan"
    with pytest.raises(EngineError, match="cannot load the plan") as caught:
        stand.rig().open()
    assert "magicTag" in caught.value.why
    assert "build-engine" in caught.value.fix
    assert stand.is_clean()


@pytest.mark.parametrize(
    "failing",
    [
        *("cuStreamCreate", "cuEventCreate", "cuMemAlloc", "cuMemHostAlloc"),
        *("cuMemcpyHtoDAsync", "cuMemcpyDtoDAsync", "cuMemcpyDtoHAsync"),
        *("cuStreamSynchronize", "cuEventRecord", "cuStreamWaitEvent"),
        "cuGraphLaunch",
    ],
)
@pytest.mark.parametrize("when", [0, 1], ids=["at once", "later"])
def test_all_is_released_after_an_error(
    tiny_bundle: Path, failing: str, when: int
) -> None:
    stand = Stand(tiny_bundle)

    def use() -> None:
        with stand.engine() as engine:
            if when:
                images(engine, stand.job(count=1))
            stand.driver.failures[failing] = Status.CUDA_ERROR_INVALID_VALUE
            images(engine, stand.job())

    if not when:
        stand.driver.failures[failing] = Status.CUDA_ERROR_INVALID_VALUE
    if (failing, when) in (("cuStreamCreate", 1),):
        pytest.skip("no stream is made then")
    with pytest.raises(EngineError, match=failing):
        use()
    stand.driver.failures.clear()
    assert stand.is_clean()


@pytest.mark.parametrize("where", ["execute", "compute"])
def test_what_tensorrt_says_later_is_an_error(tiny_bundle: Path, where: str) -> None:
    stand = Stand(tiny_bundle)
    with stand.engine(-1) as engine:
        good = images(engine, stand.job())
        stand.library.fail_at = where
        error = error_of(images, engine, stand.job())
        assert "TensorRT failed" in error.what
        assert "Error Code 1" in error.why
        stand.library.fail_at = ""
        assert images(engine, stand.job()).tobytes() == good.tobytes()
    assert stand.is_clean()


def test_too_little_memory_is_called_that_and_can_be_tried_again(
    tiny_bundle: Path,
) -> None:
    stand = Stand(tiny_bundle)
    with stand.engine() as engine:
        images(engine, stand.job(count=1))
        stand.driver.free, kept = 0, stand.driver.free
        with pytest.raises(DeviceMemoryError):
            images(engine, stand.job(count=4))
        stand.driver.free += kept
        job = stand.job(count=4)
        assert images(engine, job).tobytes() == stand.reference(job).tobytes()
    assert stand.is_clean()


@pytest.mark.parametrize("reason", ["streamed", "is_stream_capturable"])
def test_without_graphs_the_rows_are_queued_and_the_reason_is_logged(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    streamable = 2 << 20 if reason == "streamed" else 0
    stand = Stand(tiny_bundle, "rtx", streamable=streamable)
    stand.library.capturable = bool(streamable)
    job = stand.job()
    with caplog.at_level(logging.WARNING, "id3pm_deploy"), stand.engine() as engine:
        assert images(engine, job).tobytes() == stand.reference(job).tobytes()
        assert reason in caplog.text
        assert "no graphs" in engine.replay_note
    assert "cuGraphInstantiate" not in stand.driver.names()


def test_compiled_kernels_are_kept_from_run_to_run(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    stand = Stand(tiny_bundle, "rtx")
    stand.cache = tmp_path / "cache" / "kernels.bin"
    for loaded in (False, True):
        with stand.engine() as engine:
            images(engine, stand.job())
        assert stand.library.caches.pop().loaded is loaded
    assert stand.cache.stat().st_mode & 0o077 == 0
    stand.cache.chmod(0o666)  # somebody else may have written it
    with stand.engine() as engine:
        images(engine, stand.job())
    assert not stand.library.caches.pop().loaded


def test_pictures_become_low_res_on_the_device(tiny_bundle: Path) -> None:
    """Bit for bit what the host makes of them, after the first rig's work."""
    stand = Stand(tiny_bundle)
    base, other = stand.rig(), stand.rig()
    small = StepShapes(3, 32, stand.shapes.identity_dim, stand.shapes.size)
    rng = np.random.default_rng(1)
    state = rng.normal(0, 0.8, (4, 3, *stand.shapes.picture)).astype(np.float32)
    edges = (np.arange(256, dtype=np.float32) + 0.5) / np.float32(127.5) - 1
    state[0, 1].ravel()[:256] = edges[: state[0, 1].size]
    base.open()
    other.open()
    try:
        base.size(3, 3, 1)
        other.size(2, 2, 1)
        other.shapes = small
        other._have.pool.room({"low_res": 4 * 2 * stand.shapes.picture[1] ** 2 * 3})
        base.put("state", state)
        assert other.low_res_from(base, 1)
        base.put("state", np.zeros_like(state))  # waits for the kernel
        found = other.fetch("low_res")
        expected = low_res_from_pixels(to_uint8(state[0, 1:]))
        assert found.tobytes() == expected.tobytes()
        assert not base.low_res_from(_NotOurs(), 0)  # type: ignore[arg-type]
    finally:
        other.shapes = stand.shapes
        base.close()
        other.close()
    assert stand.is_clean()


def test_pictures_are_handed_out_where_they_lie(tiny_bundle: Path) -> None:
    """A copy that outlives the engine, with zeros where a sample failed."""
    stand = Stand(tiny_bundle)
    with stand.engine(3) as engine:
        job = stand.job()
        run_trajectory(engine, job, range(2))
        expected = engine.state()[0]
        array = engine.pictures_on_device()
        engine._bad = np.array([True, False])
        second = engine.pictures_on_device()
    assert expected.std() > 0.1
    assert array.__dlpack_device__() == (2, 0)
    assert array.shape == expected.shape
    assert not stand.is_clean(), "the memory is still there"
    found = stand.driver.read(array.address, expected.nbytes)
    assert found == expected.tobytes()
    expected[0] = 0.0
    assert stand.driver.read(second.address, expected.nbytes) == expected.tobytes()
    capsule = array.__dlpack__()
    del array, second
    gc.collect()
    assert not stand.is_clean(), "the capsule keeps it"
    del capsule
    gc.collect()
    assert stand.is_clean()


class _NotOurs:
    """A rig of another kind."""


def test_a_real_library_without_a_driver_says_so(tiny_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    driver: Any = pytest.importorskip("cuda.bindings.driver")
    try:
        driver.cuInit(0)
    except RuntimeError:
        pass
    else:
        pytest.skip("there is a driver here")
    source = PlanSource(lambda: b"", "tensorrt_rtx", "?", "float32")
    rig = TensorRtRig(source, Stand(tiny_bundle).shapes)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        rig.open()
    rig.close()


def test_a_real_library_refuses_what_it_cannot_load(tiny_bundle: Path) -> None:
    """With the context of a stand-in, so that it gets as far as the plan."""
    library = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    stand = Stand(tiny_bundle)
    source = PlanSource(
        lambda: b"no plan" * 100,
        "tensorrt_rtx",
        "?",
        "float32",
        library=library,
        driver=stand.driver,
    )
    rig = TensorRtRig(source, stand.shapes)
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* cannot load") as caught:
        rig.open()
    assert "erialization" in caught.value.why
    assert stand.driver.alive() == {}


class TestContract(EngineContract):
    """The suite that all engines keep."""

    company = 0.0

    @pytest.fixture
    def make(self, tiny_bundle: Path) -> Make:
        return lambda: Stand(tiny_bundle).engine()
