"""Calls of the engine: guided rows one after the other give what they give together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.calls import engine_calls
from id3pm_deploy.errors import InputError
from id3pm_deploy.guidance import GuidanceSettings, GuidanceTable, guidance_plan
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.sampler import (
    SampleJob,
    SeededNoise,
    run_trajectory,
    sample_batches,
    step_rows,
    walk,
)
from id3pm_deploy.solvers import (
    CARRY_COLUMN,
    RESCALE_COLUMN,
    STATE_SLOTS,
    SolverSettings,
    solver_table,
)

Float32 = npt.NDArray[np.float32]

SPEC = tiny_spec(schedule="cosine", prediction_type="v", learned_variance=True)
IDENTITY = random_identity(3, SPEC)
IDENTITY[1] = 0.0
"""The middle one is an unconditional sample."""

GUIDED = [
    GuidanceSettings(2.5),
    GuidanceSettings(0.0),
    GuidanceSettings(4.0, "linear", interval=(200, 900), rescale=0.6),
]
SOLVERS = [
    SolverSettings("ddpm", 4),
    SolverSettings("ddim", 4, eta=0.5),
    SolverSettings("heun", 3),
    SolverSettings("dpmpp-2m-sde", 4),
    SolverSettings("unipc-2", 4),
]


def sequential(job: SampleJob) -> SampleJob:
    settings = dataclasses.replace(job.guidance, rows="sequential")
    return dataclasses.replace(job, guidance=settings)


def job_of(spec: Any, solver: SolverSettings, guidance: GuidanceSettings) -> SampleJob:
    table = solver_table(spec, solver)
    return SampleJob(IDENTITY, table, guidance, SeededNoise(3))


def torch_engine(spec: Any) -> TorchEngine:
    return TorchEngine(tiny_network(spec), step_shapes(spec))


def distance(a: Float32, b: Float32) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("guidance", GUIDED, ids=["plain", "zero", "moved"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda one: one.solver)
def test_rows_one_after_the_other_make_the_same_pictures(
    solver: SolverSettings, guidance: GuidanceSettings
) -> None:
    """Row by row from the same state; 1e-5 is the tolerance of a float32 step. The
    UNet rounds a batch of R rows in its own way, and the weights are up to 4."""
    job = job_of(SPEC, solver, guidance)
    with torch_engine(SPEC) as engine, torch_engine(SPEC) as other:
        both = zip(
            walk(engine, sequential(job), range(3), most=1),
            walk(other, job, range(3), most=1),
            strict=True,
        )
        for j, again in both:
            assert j == again
            state, expected = engine.state(), other.state()
            assert distance(state[0], expected[0]) < 1e-5
            assert distance(engine.preview(), other.preview()) < 1e-5
            assert not state[STATE_SLOTS - 1].any(), "nothing is left in the last slot"
            engine.load_state(expected)
        assert not engine.failed_samples().any()


def test_a_scale_does_nothing_to_an_unconditional_sample() -> None:
    """To the last bit: its null row weighs exactly 0, and its own exactly 1."""
    job = sequential(job_of(SPEC, SOLVERS[0], GUIDED[2]))
    plain = dataclasses.replace(job, guidance=GuidanceSettings(1.0))
    with torch_engine(SPEC) as engine:
        found = run_trajectory(engine, job, range(3)).images
        expected = run_trajectory(engine, plain, range(3)).images
    assert (found[1] == expected[1]).all()
    assert not (found[0] == expected[0]).all()


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_other_predictions_without_learned_variance(prediction: str) -> None:
    spec = tiny_spec(prediction_type=prediction)
    job = job_of(spec, SolverSettings("ddpm", 5), GUIDED[2])
    with torch_engine(spec) as engine:
        found = run_trajectory(engine, sequential(job), range(3)).images
        expected = run_trajectory(engine, job, range(3)).images
    assert distance(found, expected) < 1e-4
    assert not (found == expected).all()


def test_onnx_runtime_and_bit_equal_over_batches(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    job = job_of(model.spec, SolverSettings("ddpm", 4), GUIDED[2])
    with open_engine(model) as engine:
        by_size = [
            np.concatenate([b.images for b in sample_batches(engine, one, size)])
            for one, size in ((sequential(job), 3), (sequential(job), 1), (job, 3))
        ]
    assert (by_size[0] == by_size[1]).all()
    assert distance(by_size[0], by_size[2]) < 1e-4


def unet_rows(engine: Engine, job: SampleJob, monkeypatch: Any) -> list[int]:
    """R of every call of the engine."""
    found: list[int] = []
    run = engine._run  # type: ignore[attr-defined]

    def counted(step: Float32, noise: Float32 | None) -> Float32:
        finite: Float32 = run(step, noise)
        found.append(len(finite))
        return finite

    monkeypatch.setattr(engine, "_run", counted)
    run_trajectory(engine, job, range(len(job.identity)))
    return found


@pytest.mark.parametrize("rows", ["parallel", "sequential"])
def test_unet_rows_inside_and_outside_an_interval(rows: str, monkeypatch: Any) -> None:
    """λ ≥ -5.1 puts the rows at 995, 746, 498, 249 and 0; two of them are guided."""
    guidance = GuidanceSettings(2.0, interval=(300, 800), rows=rows)
    job = job_of(SPEC, SolverSettings("ddim", 5), guidance)
    job = dataclasses.replace(job, identity=random_identity(3, SPEC))
    with torch_engine(SPEC) as engine:
        counted = unet_rows(engine, job, monkeypatch)
    assert counted == ([3, 6, 6, 3, 3] if rows == "parallel" else [3] * 7)


def test_calls_of_a_parallel_plan_are_its_rows() -> None:
    job = job_of(SPEC, SOLVERS[0], GUIDED[2])
    plan = guidance_plan(IDENTITY, job.guidance, job.table.timesteps)
    rows = step_rows(job.table, plan)
    calls = engine_calls(rows, job.table.stochastic, plan)
    assert calls.tables == plan.tables
    assert calls.last.all()
    assert (calls.rows == rows).all()
    assert (calls.stochastic == job.table.stochastic).all()
    assert (calls.guidance == plan.index).all()
    assert calls.solver_row.tolist() == list(range(4))


def test_what_the_two_calls_are() -> None:
    job = job_of(SPEC, SOLVERS[0], GuidanceSettings(2.5))
    plan = guidance_plan(IDENTITY, job.guidance, job.table.timesteps)
    rows = step_rows(job.table, plan)
    calls = engine_calls(rows, job.table.stochastic, plan, sequential=True)
    assert len(calls) == 8
    assert calls.solver_row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert calls.last.tolist() == [False, True] * 4
    assert calls.stochastic.tolist() == [False, True] * 3 + [False, False]
    assert calls.rows.dtype == np.float32
    assert (calls.rows[::2, :2] == rows[:, :2]).all(), "the UNet sees the same"
    assert not calls.rows[::2, RESCALE_COLUMN:].any()
    assert (calls.rows[1::2, CARRY_COLUMN] == 1).all()
    assert (calls.rows[1::2, :CARRY_COLUMN] == rows[:, :CARRY_COLUMN]).all()
    null, own = (calls.tables[i] for i in calls.guidance[:2])
    assert not null.identity.any()
    assert null.mix[0].tolist() == [[-1.5, 0, 0], [0, 0, 0], [0, 0, -1.5]]
    assert own.mix[0].tolist() == [[2.5, 0, 0], [0, 1, 0], [0, 0, 2.5]]
    assert (own.mix[1] == np.eye(3)).all()
    assert (own.identity == IDENTITY).all()


def test_solvers_that_leave_no_slot_are_refused_where_they_are_guided() -> None:
    job = sequential(job_of(SPEC, SolverSettings("unipc-3", 5), GUIDED[0]))
    with torch_engine(SPEC) as engine:
        with pytest.raises(InputError, match="cannot be guided with sequential rows"):
            run_trajectory(engine, job, range(3))
        plain = GuidanceSettings(1.0, rows="sequential")
        run_trajectory(engine, dataclasses.replace(job, guidance=plain), range(3))


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="learned variance cannot be guided"):
        GuidanceSettings(2.0, rows="sequential", guide_variance=True)
    with pytest.raises(InputError, match="guidance rows cannot be 'one'"):
        GuidanceSettings(2.0, rows="one")


def test_a_failure_of_the_null_row_is_the_sample_s(monkeypatch: Any) -> None:
    job = sequential(job_of(SPEC, SolverSettings("ddim", 2), GUIDED[0]))
    guides: list[GuidanceTable] = []
    with torch_engine(SPEC) as opened:
        engine: Any = opened
        run, guide = engine._run, engine._guide

        def failing(step: Float32, noise: Float32 | None) -> Float32:
            finite: Float32 = run(step, noise)
            if len(guides) < 2:
                finite[2] = 0.0
            return finite

        def noted(guidance: GuidanceTable) -> None:
            guides.append(guidance)
            guide(guidance)

        monkeypatch.setattr(engine, "_run", failing)
        monkeypatch.setattr(engine, "_guide", noted)
        found = run_trajectory(engine, job, range(3))
    assert found.failed.tolist() == [False, False, True]
