"""ONNX Runtime's engine: pictures that batches cannot change, and golden data."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from models import random_identity, tiny_spec
from onnx import TensorProto, helper

from id3pm_deploy.backends.base import STEP_OUTPUTS, Engine, StepShapes
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine, make_session
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import BundleError, EngineError, InputError, ParityError
from id3pm_deploy.guidance import GuidanceSettings, guidance_table
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory, sample_batches
from id3pm_deploy.selftest import golden_bytes, load_golden, run_golden, self_test
from id3pm_deploy.solvers import (
    CARRY_COLUMN,
    RESCALE_COLUMN,
    STEP_WIDTH,
    SolverSettings,
    solver_table,
)

SOLVERS = [
    SolverSettings("ddpm", 6),
    SolverSettings("ddim", 5, eta=0.5),
    SolverSettings("dpmpp-2m", 5),
]
GUIDANCE = {
    "none": GuidanceSettings(1.0),
    "constant": GuidanceSettings(2.5),
    "moved": GuidanceSettings(4.0, "cosine", interval=(150, 900), rescale=0.7),
}


def _job(
    bundle: Path,
    settings: SolverSettings,
    count: int,
    guidance: float | GuidanceSettings,
) -> SampleJob:
    spec = open_bundle(bundle).manifest.diffusion
    table = solver_table(spec, settings)
    if isinstance(guidance, float):
        guidance = GuidanceSettings(guidance)
    return SampleJob(random_identity(count, spec), table, guidance, SeededNoise(11))


def _all(engine: Engine, job: SampleJob, batch_size: int) -> npt.NDArray[np.float32]:
    parts = [batch.images for batch in sample_batches(engine, job, batch_size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("settings", SOLVERS, ids=lambda s: s.solver)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("threads", [1, 2])
def test_images_are_bit_equal_over_batch_sizes(
    tiny_bundle: Path, settings: SolverSettings, guidance: str, threads: int
) -> None:
    job = _job(tiny_bundle, settings, 5, GUIDANCE[guidance])
    with open_engine(open_model(tiny_bundle), threads=threads) as engine:
        whole = _all(engine, job, 5)
        assert np.isfinite(whole).all()
        assert whole.std() > 0.05
        for size in (1, 2, 3):
            np.testing.assert_array_equal(_all(engine, job, size), whole)


@pytest.mark.parametrize("guidance", ["constant", "moved"])
def test_images_are_bit_equal_in_any_order(tiny_bundle: Path, guidance: str) -> None:
    """And in any company: one of them is unconditional."""
    job = _job(tiny_bundle, SOLVERS[0], 4, GUIDANCE[guidance])
    job.identity[1] = 0.0
    with open_engine(open_model(tiny_bundle)) as engine:
        forwards = run_trajectory(engine, job, [0, 1, 2, 3]).images
        for order in ([2, 0, 3], [1], [3, 1]):
            mixed = run_trajectory(engine, job, order).images
            np.testing.assert_array_equal(mixed, forwards[order])


def test_moving_guidance_is_pytorchs(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """Rescale, interval and schedule in one trajectory, under both engines."""
    job = _job(tiny_bundle, SOLVERS[2], 2, GUIDANCE["moved"])
    without = dataclasses.replace(GUIDANCE["moved"], rescale=0.0)
    plain = dataclasses.replace(job, guidance=without)
    loaded = load_checkpoint(tiny_checkpoint)
    with open_engine(open_model(tiny_bundle)) as engine:
        found = _all(engine, job, 2)
        assert np.abs(found - _all(engine, plain, 2)).max() > 1e-2
        with TorchEngine(loaded.network, engine.shapes) as reference:
            assert compare(found, _all(reference, job, 2)).passes(1e-4)


def test_different_samples_seeds_and_identities_differ(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[2], 2, 2.0)
    same_person = SampleJob(
        np.repeat(job.identity[:1], 2, axis=0), job.table, job.guidance, SeededNoise(11)
    )
    other_seed = SampleJob(job.identity, job.table, job.guidance, SeededNoise(12))
    with open_engine(open_model(tiny_bundle)) as engine:
        base = _all(engine, job, 2)
        assert np.abs(_all(engine, same_person, 2)[1] - base[0]).max() > 1e-2
        assert np.abs(_all(engine, same_person, 2)[1] - base[1]).max() > 1e-4
        assert np.abs(_all(engine, other_seed, 2) - base).max() > 1e-2


def test_an_engine_can_be_used_again_with_other_sizes(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[1], 3, 2.0)
    with open_engine(open_model(tiny_bundle)) as engine:
        first = _all(engine, job, 3)
        _all(engine, job, 1)
        np.testing.assert_array_equal(_all(engine, job, 3), first)


def test_buffers_keep_their_addresses(tiny_bundle: Path) -> None:
    """Also from row to row, while guidance switches between 2 and 4 UNet rows."""
    job = _job(tiny_bundle, SOLVERS[0], 2, GUIDANCE["moved"])
    with open_engine(open_model(tiny_bundle)) as engine:
        assert isinstance(engine, OnnxRuntimeEngine)
        run_trajectory(engine, job, [0, 1])
        held, by_rows = engine._buffers(), dict(engine._by_rows)
        assert sorted(by_rows) == [2, 4]
        before = [state.ctypes.data for state in held.states]
        run_trajectory(engine, job, [0, 1])
        assert engine._buffers() is held
        assert [state.ctypes.data for state in held.states] == before
        assert all(engine._by_rows[size] is kept for size, kept in by_rows.items())


def test_guidance_changes_and_the_state_stays(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[2], 2, 2.0)
    shape = (2, 3, 16, 16)
    steps = [np.repeat(row[None], 2, axis=0) for row in job.table.rows]
    guided, plain = (guidance_table(job.identity, scale) for scale in (2.0, 1.0))
    with open_engine(open_model(tiny_bundle)) as engine:
        with pytest.raises(EngineError, match="before a trajectory was begun"):
            engine.guide(guided)
        engine.begin(job.noise.start([0, 1], shape[1:]), guided)
        engine.run_row(steps[0], None)
        state, preview = engine.state(), engine.preview()
        assert state[0].any()
        assert state[1].any(), "the solver's memory"
        for table in (plain, guided, plain):
            engine.guide(table)
            np.testing.assert_array_equal(engine.state(), state)
            np.testing.assert_array_equal(engine.preview(), preview)
        engine.run_row(steps[1], None)
        switched = engine.state()
        engine.begin(np.zeros(shape, np.float32), plain)
        engine.load_state(state)
        engine.run_row(steps[1], None)
        np.testing.assert_array_equal(engine.state(), switched)


def test_golden_self_test_passes_and_notices_a_wrong_answer(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    assert model.bundle is not None
    graph = model.bundle.graph("step", "float32")
    assert graph is not None
    golden = load_golden(model.bundle, graph)
    with open_engine(model) as engine:
        assert self_test(engine, model.bundle, graph) <= 1e-5
        golden["identity"] = golden["identity"] + np.float32(0.1)
        assert not run_golden(engine, golden).passes(1e-5)
        strict = type(graph)(**{**vars(graph), "tolerance_step": 1e-12})
        with pytest.raises(ParityError, match="does not compute what PyTorch"):
            self_test(engine, model.bundle, strict)


def test_a_non_finite_sample_does_not_touch_the_others(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[2], 3, 2.0)
    broken = job.identity.copy()
    broken[1] = np.float32(3e38)
    bad_job = SampleJob(broken, job.table, job.guidance, job.noise)
    with open_engine(open_model(tiny_bundle)) as engine:
        good = run_trajectory(engine, job, [0, 1, 2])
        bad = run_trajectory(engine, bad_job, [0, 1, 2])
    assert good.failed.tolist() == [False, False, False]
    assert bad.failed.tolist() == [False, True, False]
    np.testing.assert_array_equal(bad.images[[0, 2]], good.images[[0, 2]])
    assert np.isfinite(bad.images).all()


def test_wrong_use_is_refused(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    with pytest.raises(InputError, match="threads must be"):
        open_engine(model, threads=-1)
    with pytest.raises(EngineError, match="not one that this tool runs"):
        make_session(b"not a graph", 1)
    job = _job(tiny_bundle, SOLVERS[0], 2, 2.0)
    with open_engine(model) as engine:
        with pytest.raises(EngineError, match="before a trajectory"):
            engine.run_row(job.table.rows[:2], None)
        guided = guidance_table(job.identity, 2.0)
        with pytest.raises(EngineError, match="x_T must be float32"):
            engine.begin(np.zeros((2, 3, 8, 8), np.float32), guided)
        with pytest.raises(InputError, match="batch size"):
            list(sample_batches(engine, job, 0))
        wide = SampleJob(
            np.ones((1, 99), np.float32), job.table, job.guidance, job.noise
        )
        with pytest.raises(InputError, match="identity vectors must be"):
            list(sample_batches(engine, wide, 1))


SHAPES = StepShapes(3, 16, 16)


def _old_graph(width: int | str = RESCALE_COLUMN) -> bytes:
    """A step graph of ``width`` columns that does state' = c_x·state, and no more."""
    sizes: dict[str, list[Any]] = {
        "state": [4, "B", 3, 16, 16],
        "noise": ["B", 3, 16, 16],
        "identity": ["R", 16],
        "row": ["R"],
        "mix": [2, "B", "R"],
        "step": ["B", width],
        "state_next": [4, "B", 3, 16, 16],
        "x0": ["B", 3, 16, 16],
        "finite": ["R"],
    }
    values = {
        name: helper.make_tensor_value_info(
            name, TensorProto.INT32 if name == "row" else TensorProto.FLOAT, size
        )
        for name, size in sizes.items()
    }
    constants = {"c_x": np.array([2]), "to": np.array([1, -1, 1, 1, 1])}
    constants |= {"slot": np.array(0), "last": np.array([1])}
    arrays = [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()]
    one = onnx.numpy_helper.from_array(np.array(1, np.float32), "one")
    nodes = [
        helper.make_node("Gather", ["step", "c_x"], ["column"], axis=1),
        helper.make_node("Reshape", ["column", "to"], ["gain"]),
        helper.make_node("Mul", ["state", "gain"], ["state_next"]),
        helper.make_node("Gather", ["state_next", "slot"], ["x0"], axis=0),
        helper.make_node("Sub", ["identity", "identity"], ["zero"]),
        helper.make_node("ReduceMax", ["zero", "last"], ["none"], keepdims=0),
        helper.make_node("Add", ["none", "one"], ["finite"]),
    ]
    graph = helper.make_graph(
        nodes,
        "old",
        [values[name] for name in SHAPES.inputs],
        [values[name] for name in STEP_OUTPUTS],
        [*arrays, one],
    )
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def test_a_graph_from_before_rescale_runs_what_it_can() -> None:
    spec = tiny_spec()
    guidance = GuidanceSettings(3.0, "linear", interval=(200, 900))
    table = solver_table(spec, SolverSettings("ddpm", 4))
    job = SampleJob(random_identity(2, spec), table, guidance, SeededNoise(11))
    with OnnxRuntimeEngine(_old_graph(), SHAPES, "float32") as engine:
        assert engine.step_width == 31
        found = run_trajectory(engine, job, [0, 1])
        expected = job.noise.start([0, 1], SHAPES.picture)
        for row in job.table.rows:
            expected = expected * row[2]
        assert found.failed.tolist() == [False, False]
        np.testing.assert_array_equal(found.images, expected)
        rescaled = dataclasses.replace(
            job, guidance=dataclasses.replace(guidance, rescale=0.5)
        )
        with pytest.raises(EngineError, match="before guidance rescale") as error:
            run_trajectory(engine, rescaled, [0, 1])
        assert "export the checkpoint again" in error.value.fix
    for width in (CARRY_COLUMN, STEP_WIDTH):
        with OnnxRuntimeEngine(_old_graph(width), SHAPES, "float32") as engine:
            assert engine.step_width == width
            run_trajectory(engine, rescaled, [0, 1])

    split = dataclasses.replace(guidance, rows="sequential")
    job = dataclasses.replace(job, guidance=split)
    with OnnxRuntimeEngine(_old_graph(CARRY_COLUMN), SHAPES, "float32") as engine:
        with pytest.raises(EngineError, match="before sequential guidance") as error:
            run_trajectory(engine, job, [0, 1])
        assert "export the checkpoint again" in error.value.fix


@pytest.mark.parametrize("width", [30, 34, "S"])
def test_a_graph_of_another_width_is_refused(width: int | str) -> None:
    with pytest.raises(EngineError, match="of another release"):
        OnnxRuntimeEngine(_old_graph(width), SHAPES, "float32")


def test_no_step_graph_is_refused() -> None:
    model = onnx.load_from_string(_old_graph())
    model.graph.output[1].name = model.graph.node[3].output[0] = "preview"
    with pytest.raises(EngineError, match="not a step graph"):
        OnnxRuntimeEngine(model.SerializeToString(), SHAPES, "float32")


class _Files:
    """Golden data that did not come out of a bundle."""

    def __init__(self, golden: dict[str, Any]) -> None:
        self.data = golden_bytes(golden)

    def read(self, name: str, /) -> bytes:
        assert name
        return self.data


def _golden(tiny_bundle: Path) -> tuple[Any, dict[str, Any]]:
    bundle = open_bundle(tiny_bundle)
    graph = bundle.graph("step", "float32")
    assert graph is not None
    with np.load(io.BytesIO(bundle.read(graph.golden))) as archive:
        return graph, dict(archive)


def test_golden_data_of_an_old_graph(tiny_bundle: Path) -> None:
    graph, golden = _golden(tiny_bundle)
    assert golden["step"].shape == (2, 33)
    assert (golden["step"][:, RESCALE_COLUMN] > 0.1).all(), "rescale is in the test"
    golden["step"] = golden["step"][:, :RESCALE_COLUMN]
    gain = golden["step"][:, 2].reshape(1, -1, 1, 1, 1)
    golden["expected.state_next"] = golden["state"] * gain
    with OnnxRuntimeEngine(_old_graph(), SHAPES, "float32") as engine:
        assert self_test(engine, _Files(golden), graph) == 0
    golden["step"] = golden["step"][:, :30]
    with pytest.raises(BundleError, match="wrong shape or type in step"):
        load_golden(_Files(golden), graph)


@pytest.mark.parametrize("column", [RESCALE_COLUMN, CARRY_COLUMN])
def test_golden_data_notices_a_wrong_column(tiny_bundle: Path, column: int) -> None:
    graph, golden = _golden(tiny_bundle)
    with open_engine(open_model(tiny_bundle)) as engine:
        assert run_golden(engine, load_golden(_Files(golden), graph)).passes(1e-5)
        golden["step"][0, column] *= 0.9
        assert not run_golden(engine, golden).passes(1e-4)
