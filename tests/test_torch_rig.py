"""The rig over PyTorch, on the CPU and over a stand-in for ``torch.cuda``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fakes.torch_cuda import FakeCuda
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends import torch_body, torch_rig
from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.backends.torch_rig import TorchRig, low_res_from
from id3pm_deploy.body_form import BodyForm, Precision
from id3pm_deploy.enlarging import low_res_from_pixels
from id3pm_deploy.errors import DeviceMemoryError, EngineError, InputError
from id3pm_deploy.guidance import GuidanceSettings, guidance_table
from id3pm_deploy.images import to_uint8
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import STATE_SLOTS, STEP_WIDTH, SolverSettings, solver_table

SPEC = tiny_spec(schedule="cosine", prediction_type="v", learned_variance=True)
SHAPES = step_shapes(SPEC)
IDENTITY = random_identity(3, SPEC)
MOVED = GuidanceSettings(4.0, "cosine", interval=(150, 900), rescale=0.7)

Float32 = npt.NDArray[np.float32]


def job_of(
    settings: SolverSettings, guidance: GuidanceSettings, seed: int = 7
) -> SampleJob:
    table = solver_table(SPEC, settings)
    return SampleJob(IDENTITY, table, guidance, SeededNoise(seed))


def on_fake_gpu(rig: TorchRig) -> TorchRig:
    """The rig with the code for GPUs switched on, on tensors of the CPU."""
    rig._on_gpu = True
    return rig


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch_rig, "_CUDA", fake)
    monkeypatch.setattr(TorchRig, "_find_gpu", lambda self: None)
    return fake


@pytest.fixture(params=["cpu", "replayed"])
def rig(request: pytest.FixtureRequest) -> Iterator[TorchRig]:
    made = TorchRig(tiny_network(SPEC), SHAPES, device="cpu")
    if request.param == "replayed":
        request.getfixturevalue("cuda")
        on_fake_gpu(made)
    yield made
    made.close()


def pictures(engine: Engine, job: SampleJob) -> Float32:
    found = run_trajectory(engine, job, [0, 1, 2])
    assert not found.failed.any()
    return found.images


@pytest.mark.parametrize(
    "settings",
    [SolverSettings("ddpm", 7), SolverSettings("dpmpp-2m", 5)],
    ids=lambda s: s.solver,
)
@pytest.mark.parametrize("guidance", [GuidanceSettings(2.0), MOVED], ids=["2", "moved"])
def test_pictures_are_those_of_the_plain_engine(
    rig: TorchRig, settings: SolverSettings, guidance: GuidanceSettings
) -> None:
    """Bit for bit, also replayed, in chunks, and a second time with another seed."""
    jobs = [job_of(settings, guidance, seed) for seed in (7, 8)]
    with TorchEngine(tiny_network(SPEC), SHAPES) as plain:
        expected = [pictures(plain, job) for job in jobs]
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    with ReplayEngine(rig, replay_rows=3) as engine:
        for job, wanted in zip(jobs, expected, strict=True):
            np.testing.assert_array_equal(pictures(engine, job), wanted)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_is_the_plain_engines(
    precision: Precision, cuda: FakeCuda
) -> None:
    job = job_of(SolverSettings("ddpm", 3), GuidanceSettings(2.0))
    form = BodyForm(precision)
    with TorchEngine(tiny_network(SPEC), SHAPES, form) as plain:
        expected = pictures(plain, job)
    rig = on_fake_gpu(TorchRig(tiny_network(SPEC), SHAPES, form, "cpu"))
    with ReplayEngine(rig, 2) as engine:
        assert engine.info.precision == precision
        np.testing.assert_array_equal(pictures(engine, job), expected)


def test_a_second_trajectory_captures_nothing(cuda: FakeCuda) -> None:
    rig = on_fake_gpu(TorchRig(tiny_network(SPEC), SHAPES, device="cpu"))
    job = job_of(SolverSettings("ddpm", 6), GuidanceSettings(2.0))
    with ReplayEngine(rig, 2) as engine:
        pictures(engine, job)
        # Five rows have noise: two rows in each slot, and one row by itself.
        assert cuda.events.count("capture") == 3
        cuda.events.clear()
        other = dataclasses.replace(
            job, guidance=GuidanceSettings(3.0), noise=SeededNoise(9)
        )
        pictures(engine, other)
        assert cuda.events.count("capture") == 0
        assert cuda.events.count("replay") == 4
        assert cuda.graphs == 3
        assert rig.capture(lambda: None).bytes == 1000
    assert cuda.graphs == 0, "all were released"


def test_what_cannot_be_captured_is_run_and_said(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuse = "the driver does not want to"
    job = job_of(SolverSettings("ddpm", 4), GuidanceSettings(2.0))
    with TorchEngine(tiny_network(SPEC), SHAPES) as plain:
        expected = pictures(plain, job)
    rig = on_fake_gpu(TorchRig(tiny_network(SPEC), SHAPES, device="cpu"))
    with caplog.at_level(logging.WARNING), ReplayEngine(rig, 2) as engine:
        np.testing.assert_array_equal(pictures(engine, job), expected)
        assert "no graphs" in engine.replay_note
    assert "the driver does not want to" in caplog.text
    assert cuda.graphs == 0


def test_on_a_cpu_the_ladder_ends_without_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = TorchRig(tiny_network(SPEC), SHAPES, device="cpu")
    job = job_of(SolverSettings("ddpm", 4), GuidanceSettings(2.0))
    with caplog.at_level(logging.WARNING), ReplayEngine(rig, 2) as engine:
        pictures(engine, job)
        assert engine.replay_note.startswith("no graphs")
    assert "cpu is no CUDA device" in caplog.text


def test_waiting_inside_a_capture_is_an_error(cuda: FakeCuda) -> None:
    """Of the rig's, so that nobody waits there by mistake."""
    rig = on_fake_gpu(TorchRig(tiny_network(SPEC), SHAPES, device="cpu"))
    rig.open()
    rig.size(1, 1, 1)
    for queue in (rig.drain, lambda: rig.fetch("state")):
        with pytest.raises(EngineError, match="not permitted when capturing"):
            rig.capture(queue)  # type: ignore[arg-type]
    rig.capture(lambda: rig.queue_row(0, 0, False)).close()
    rig.close()


def test_sizes_keep_what_they_must(rig: TorchRig) -> None:
    rig.open()
    assert not rig.size(2, 2, 1)
    state = np.random.default_rng(0).normal(size=(STATE_SLOTS, 2, *SHAPES.picture))
    rig.put("state", state.astype(np.float32))
    before = rig._sizes()
    assert not rig.size(2, 4, 1)
    assert not rig.size(2, 2, 1)
    assert rig._sizes() == before, "buffers of each R are kept"
    np.testing.assert_array_equal(rig.fetch("state"), state.astype(np.float32))
    assert rig.size(2, 2, 5), "staging moved"
    np.testing.assert_array_equal(rig.fetch("state"), state.astype(np.float32))
    assert not rig.size(2, 2, 3)
    assert rig.size(3, 3, 5)
    assert rig.fetch("state").shape[1] == 3
    assert not rig.fetch("x0").any()


def test_logs_come_in_order_and_once(rig: TorchRig) -> None:
    rig.open()
    rig.size(2, 4, 2)
    table = guidance_table(np.float32([[np.nan] * 16, [1.0] * 16]), 2.0)  # type: ignore[arg-type]
    for name in ("identity", "row", "mix"):
        rig.put(name, getattr(table, name))
    steps = np.repeat(
        solver_table(SPEC, SolverSettings("ddim", 3)).rows[:, None], 2, axis=1
    )
    good = guidance_table(IDENTITY[:2], 2.0)
    for slot, (count, shown) in enumerate([(2, table), (1, good)]):
        rig.put("identity", shown.identity)
        rig.stage(slot, steps[:count], None)
        for k in range(count):
            rig.queue_row(slot, k, False)
        rig.finish(slot, count)
    logs = rig.finite()
    assert [log.shape for log in logs] == [(2, 4), (1, 4)]
    assert logs[0].tolist() == [(~np.isnan(table.identity[:, 0])).tolist()] * 2
    assert logs[1].all()
    assert rig.finite() == []


def test_staged_arrays_are_the_callers_again(rig: TorchRig) -> None:
    rig.open()
    rig.size(1, 1, 1)
    rows = solver_table(SPEC, SolverSettings("ddpm", 3)).rows
    x_t = SeededNoise(0).start([0], SHAPES.picture)
    ends = []
    for spoil in (False, True):
        state = np.zeros((STATE_SLOTS, 1, *SHAPES.picture), np.float32)
        state[0] = x_t
        step, noise = rows[:1, None].copy(), x_t.copy()
        rig.put("state", state)
        rig.put("mix", np.ones((2, 1, 1), np.float32))
        rig.stage(0, step, [noise])
        if spoil:
            for array in (state, step, noise):
                array[...] = np.nan
        rig.queue_row(0, 0, True)
        rig.finish(0, 1)
        ends.append(rig.fetch("state"))
    assert np.isfinite(ends[1]).all()
    np.testing.assert_array_equal(ends[1], ends[0])


def test_memory_for_noise_is_taken_when_there_is_some(rig: TorchRig) -> None:
    rig.open()
    rig.size(1, 1, 4)
    held, _ = rig._sizes()
    steps = np.zeros((4, 1, STEP_WIDTH), np.float32)
    rig.stage(0, steps, None)
    assert held.slots[0].noise is None
    rig.stage(0, steps, [np.zeros((1, *SHAPES.picture), np.float32)] * 4)
    made: Any = held.slots[0].noise
    assert made.shape == (4, 1, *SHAPES.picture)


def test_before_and_after_its_time(rig: TorchRig) -> None:
    with pytest.raises(EngineError, match="never entered"):
        rig.size(1, 1, 1)
    rig.open()
    with pytest.raises(EngineError, match="no trajectory was begun"):
        rig.fetch("state")
    with pytest.raises(EngineError, match="no constant input"):
        rig.put("noise", np.zeros(1, np.float32))
    rig.close()
    rig.close()
    with pytest.raises(EngineError, match="was closed"):
        rig.size(1, 1, 1)


# Grey levels for a second stage


def boundaries() -> Float32:
    """Each border between two levels, with its neighbours on both sides, and more."""
    middle = ((np.arange(257) - 0.5) / 127.5 - 1).astype(np.float32)
    level = (np.arange(256) / 127.5 - 1).astype(np.float32)
    near = [middle, level]
    for values in (middle, level):
        for direction in (-np.inf, np.inf):
            step = values
            for _ in range(3):
                step = np.nextafter(step, np.float32(direction))
                near.append(step)
    special = np.array(
        [0.0, -0.0, 1e-45, -1e-45, 1e-30, 1.5, -1.5, 3e38, -3e38], np.float32
    )
    drawn = np.random.default_rng(0).normal(0, 0.6, 4000).astype(np.float32)
    return np.concatenate([*near, special, drawn])


def test_the_second_stage_is_given_the_hosts_bits() -> None:
    values = boundaries()
    side = int(np.ceil(np.sqrt(len(values) / 3)))
    flat = np.zeros(3 * side * side, np.float32)
    flat[: len(values)] = values
    samples = flat.reshape(1, 3, side, side)
    found = low_res_from(torch.from_numpy(samples)).numpy()
    expected = low_res_from_pixels(to_uint8(samples))
    assert len(np.unique(expected)) == 256
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()


def test_what_is_not_finite_becomes_some_grey() -> None:
    samples = torch.tensor([np.nan, np.inf, -np.inf]).reshape(1, 3, 1, 1)
    assert low_res_from(samples).flatten().tolist() == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("gpu", [False, True])
def test_pictures_are_handed_over(gpu: bool, cuda: FakeCuda) -> None:
    large = tiny_spec(image_size=32, low_res_size=16, learned_variance=True)
    rigs = [
        TorchRig(tiny_network(spec), step_shapes(spec), device="cpu")
        for spec in (SPEC, large)
    ]
    for rig, samples in zip(rigs, (3, 2), strict=True):
        if gpu:
            on_fake_gpu(rig)
        rig.open()
        rig.size(samples, samples, 1)
    state = np.random.default_rng(0).normal(size=(STATE_SLOTS, 3, *SHAPES.picture))
    rigs[0].put("state", state.astype(np.float32))
    assert rigs[1].low_res_from(rigs[0], 1)
    given = np.ascontiguousarray(state[0, 1:].astype(np.float32))
    expected = low_res_from_pixels(to_uint8(given))
    assert rigs[1].fetch("low_res").tobytes() == expected.tobytes()
    assert not rigs[0].low_res_from(rigs[1], 0), "the base enlarges nothing"
    rigs[0]._device = torch.device("cuda", 1)
    assert not rigs[1].low_res_from(rigs[0], 0), "they are on two devices"


# Devices, precision, compilation


def test_a_torch_without_cuda_says_so() -> None:
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        pytest.skip("this torch has CUDA")
    for make in (TorchRig, TorchEngine):
        with pytest.raises(EngineError) as error:
            make(tiny_network(SPEC), SHAPES, device="cuda")
        assert "has no CUDA" in error.value.why
        assert "pytorch.org" in error.value.fix


@pytest.mark.parametrize(("gpus", "device"), [(0, "cuda"), (1, "cuda:1")])
def test_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str
) -> None:
    fake = FakeCuda()
    fake.gpus = gpus
    monkeypatch.setattr(torch_rig, "_CUDA", fake)
    monkeypatch.setattr(torch_rig, "torch_device", torch.device)
    rig = TorchRig(tiny_network(SPEC), SHAPES, device=device)
    with pytest.raises(EngineError, match="cannot use the device") as error:
        rig.open()
    assert f"shows {gpus} GPUs" in error.value.why
    fake.gpus = 2
    rig._find_gpu()
    assert rig.info.device.startswith("a GPU, number")


def test_precision_is_exact_while_a_row_runs_and_only_then() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def look(*_: object) -> None:
        conv, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        seen.append((conv.allow_tf32, matmul.allow_tf32, conv.benchmark))

    network = tiny_network(SPEC)
    network.register_forward_hook(look)
    rig = TorchRig(network, SHAPES, device="cpu")
    torch.set_float32_matmul_precision("high")
    try:
        rig.open()
        rig.size(1, 1, 1)
        assert seen == [(False, False, False)]
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        rig.close()


def test_memory_that_runs_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = TorchRig(tiny_network(SPEC), SHAPES, device="cpu")
    rig.open()

    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    rig._module = full
    with pytest.raises(DeviceMemoryError) as error:
        rig.size(1, 1, 1)
    assert "2 GiB" in error.value.why
    assert "smaller batch" in error.value.fix


def test_ways_to_compile() -> None:
    assert torch_body.compile_mode(False) == torch_body.compile_mode("") == ""
    assert torch_body.compile_mode(True) == "default"
    with pytest.raises(InputError, match="reduce-overhead"):
        torch_body.compile_mode("reduce-overhead")
    with torch_body.many_shapes("default"):
        import torch._dynamo.config as settings

        assert settings.recompile_limit == 64
    assert settings.recompile_limit < 64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_pictures_are_the_same_to_rounding(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    job = job_of(SolverSettings("dpmpp-2m", 3), GuidanceSettings(2.0))
    with TorchEngine(tiny_network(SPEC), SHAPES) as plain:
        expected = pictures(plain, job)
    rig = TorchRig(tiny_network(SPEC), SHAPES, device="cpu", compile_with=True)
    assert "compiled (default)" in rig.info.version
    with ReplayEngine(rig, -1) as engine:
        found = pictures(engine, job)
    assert np.abs(found - expected).max() < 1e-4
    with TorchEngine(tiny_network(SPEC), SHAPES, compile_with=True) as rows:
        assert isinstance(rows, TorchEngine)
        assert not rows.network.training
        np.testing.assert_array_equal(pictures(rows, job), found)


def test_pictures_are_a_tensor_of_their_own() -> None:
    job = job_of(SolverSettings("ddim", 2), GuidanceSettings(2.0))
    engine = ReplayEngine(TorchRig(tiny_network(SPEC), SHAPES, device="cpu"), 1)
    with engine:
        run_trajectory(engine, job, range(2))
        expected = engine.state()[0]
        engine._bad = np.array([False, True])
        found = engine.pictures_on_device()
    expected[1] = 0.0
    assert found.numpy().tobytes() == expected.tobytes()
    assert expected.std() > 0.1
