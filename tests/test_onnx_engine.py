"""ONNX Runtime's engine: pictures that batches cannot change, and golden data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity

from id3pm_deploy.backends.base import Engine
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine, make_session
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.errors import EngineError, InputError, ParityError
from id3pm_deploy.guidance import guidance_table
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory, sample_batches
from id3pm_deploy.selftest import load_golden, run_golden, self_test
from id3pm_deploy.solvers import SolverSettings, solver_table

SOLVERS = [
    SolverSettings("ddpm", 6),
    SolverSettings("ddim", 5, eta=0.5),
    SolverSettings("dpmpp-2m", 5),
]


def _job(bundle: Path, settings: SolverSettings, count: int, scale: float) -> SampleJob:
    spec = open_bundle(bundle).manifest.diffusion
    table = solver_table(spec, settings)
    return SampleJob(random_identity(count, spec), table, scale, SeededNoise(11))


def _all(engine: Engine, job: SampleJob, batch_size: int) -> npt.NDArray[np.float32]:
    parts = [batch.images for batch in sample_batches(engine, job, batch_size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("settings", SOLVERS, ids=lambda s: s.solver)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("threads", [1, 2])
def test_images_are_bit_equal_over_batch_sizes(
    tiny_bundle: Path, settings: SolverSettings, scale: float, threads: int
) -> None:
    job = _job(tiny_bundle, settings, 5, scale)
    with open_engine(open_model(tiny_bundle), threads=threads) as engine:
        whole = _all(engine, job, 5)
        assert np.isfinite(whole).all()
        assert whole.std() > 0.05
        for size in (1, 2, 3):
            np.testing.assert_array_equal(_all(engine, job, size), whole)


def test_images_are_bit_equal_in_any_order(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[0], 4, 2.0)
    with open_engine(open_model(tiny_bundle)) as engine:
        forwards = run_trajectory(engine, job, [0, 1, 2, 3]).images
        mixed = run_trajectory(engine, job, [2, 0, 3]).images
    np.testing.assert_array_equal(mixed, forwards[[2, 0, 3]])


def test_different_samples_seeds_and_identities_differ(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[2], 2, 2.0)
    same_person = SampleJob(
        np.repeat(job.identity[:1], 2, axis=0), job.table, 2.0, SeededNoise(11)
    )
    other_seed = SampleJob(job.identity, job.table, 2.0, SeededNoise(12))
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


def test_state_buffers_keep_their_addresses(tiny_bundle: Path) -> None:
    job = _job(tiny_bundle, SOLVERS[0], 2, 2.0)
    with open_engine(open_model(tiny_bundle)) as engine:
        assert isinstance(engine, OnnxRuntimeEngine)
        run_trajectory(engine, job, [0, 1])
        buffers = engine._buffers()
        before = [state.ctypes.data for state in buffers.states]
        run_trajectory(engine, job, [0, 1])
        assert engine._buffers() is buffers
        assert [state.ctypes.data for state in buffers.states] == before


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
    with pytest.raises(EngineError, match="cannot load the graph"):
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
        wide = SampleJob(np.ones((1, 99), np.float32), job.table, 1.0, job.noise)
        with pytest.raises(InputError, match="identity vectors must be"):
            list(sample_batches(engine, wide, 1))
