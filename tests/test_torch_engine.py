"""The torch engine: what goes in, what comes out, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import EngineInfo, StepShapes, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.errors import EngineError
from id3pm_deploy.guidance import GuidanceSettings, GuidanceTable, guidance_table
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import STATE_SLOTS, STEP_WIDTH, SolverSettings, solver_table

Float32 = npt.NDArray[np.float32]

SPEC = tiny_spec(schedule="cosine", prediction_type="v", learned_variance=True)
SHAPES = step_shapes(SPEC)
IDENTITY = random_identity(2, SPEC)


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with TorchEngine(tiny_network(SPEC), SHAPES) as made:
        assert isinstance(made, TorchEngine)
        yield made


def test_the_engines_getters_between_rows(engine: TorchEngine) -> None:
    table = solver_table(SPEC, SolverSettings("dpmpp-2m", 4))
    job = SampleJob(IDENTITY[:2], table, GuidanceSettings(1.0), SeededNoise(7))
    rows: list[int] = []

    def look(j: int) -> None:
        rows.append(j)
        state, preview = engine.state(), engine.preview()
        assert state.shape == (STATE_SLOTS, 2, *SHAPES.picture)
        assert preview.shape == (2, *SHAPES.picture)
        # Slot 1 of this solver keeps x0, and the copies are the caller's own.
        assert (state[1] == preview).all()
        state[...] = np.nan
        preview[...] = np.nan

    found = run_trajectory(engine, job, [0, 1], look)
    assert rows == [0, 1, 2, 3]
    assert np.isfinite(found.images).all()


def test_a_trajectory_can_be_taken_up_again(engine: TorchEngine) -> None:
    table = solver_table(SPEC, SolverSettings("dpmpp-2m", 4))
    guidance = guidance_table(IDENTITY[:2], 2.0)
    x_t = SeededNoise(3).start([0, 1], SHAPES.picture)
    rows = [np.repeat(row[None], 2, axis=0) for row in table.rows]
    engine.begin(x_t, guidance)
    engine.run_row(rows[0], None)
    engine.run_row(rows[1], None)
    kept = engine.state()
    engine.run_row(rows[2], None)
    expected = engine.state()
    engine.begin(np.zeros_like(x_t), guidance)
    engine.load_state(kept)
    engine.run_row(rows[2], None)
    assert engine.state().tobytes() == expected.tobytes()


def test_no_noise_is_zero_noise(engine: TorchEngine) -> None:
    table = solver_table(SPEC, SolverSettings("ddpm", 4))
    x_t = SeededNoise(3).start([0], SHAPES.picture)
    ends = []
    for noise in (None, np.zeros_like(x_t), x_t):
        engine.begin(x_t, guidance_table(IDENTITY[:1], 1.0))
        engine.run_row(table.rows[:1], noise)
        ends.append(engine.state())
    assert ends[0].tobytes() == ends[1].tobytes()
    assert np.abs(ends[0] - ends[2]).max() > 0.01


def test_tf32_is_off_while_a_row_runs_and_only_then() -> None:
    """Convolutions would take it on a GPU; the setting is there without one."""
    seen: list[bool] = []
    network = tiny_network(SPEC)
    network.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    before = torch.backends.cudnn.allow_tf32
    with TorchEngine(network, SHAPES) as engine:
        engine.begin(X_T, GUIDANCE)
        engine.run_row(STEP, None)
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before
    assert not torch.backends.cuda.matmul.allow_tf32


GUIDANCE = guidance_table(IDENTITY[:2], 2.0)
X_T = SeededNoise(0).start([0, 1], SHAPES.picture)
STEP = np.zeros((2, STEP_WIDTH), dtype=np.float32)


@pytest.mark.parametrize(
    ("x_t", "parts", "message"),
    [
        (X_T[:1], {}, "x_T must be"),
        (X_T[..., :8], {}, "x_T must be"),
        (X_T.astype(np.float64), {}, "x_T must be float32"),
        (X_T, {"identity": GUIDANCE.identity[:, :8]}, "identity must be"),
        (X_T, {"identity": GUIDANCE.identity[:2]}, "identity must be"),
        (X_T, {"identity": GUIDANCE.identity.astype(np.float16)}, "identity must be"),
        (X_T, {"mix": GUIDANCE.mix[:1]}, "mix must be"),
        (X_T, {"mix": GUIDANCE.mix[:, :, :2]}, "mix must be"),
        (X_T, {"row": GUIDANCE.row.astype(np.int64)}, "row must be int32"),
        (X_T, {"row": np.int32([0, 1, 2, 0])}, "row must name samples from 0 to 1"),  # type: ignore[arg-type]
        (X_T, {"row": np.int32([0, 1, -1, 0])}, "row must name samples from 0 to 1"),  # type: ignore[arg-type]
    ],
)
def test_a_trajectory_that_does_not_fit(
    engine: TorchEngine, x_t: Float32, parts: dict[str, Any], message: str
) -> None:
    whole = {name: getattr(GUIDANCE, name) for name in ("row", "identity", "mix")}
    table = GuidanceTable(**{**whole, **parts})
    with pytest.raises(EngineError, match=message):
        engine.begin(x_t, table)
    if parts:
        engine.begin(X_T, GUIDANCE)
        with pytest.raises(EngineError, match=message):
            engine.guide(table)


def test_guidance_for_other_samples(engine: TorchEngine) -> None:
    engine.begin(X_T, GUIDANCE)
    for count in (1, 3):
        other = guidance_table(np.repeat(IDENTITY[:1], count, axis=0), 2.0)
        with pytest.raises(EngineError, match="cannot change the number of samples"):
            engine.guide(other)


def test_guidance_changes_and_the_state_stays(engine: TorchEngine) -> None:
    rows = solver_table(SPEC, SolverSettings("dpmpp-2m", 4)).rows
    steps = [np.repeat(row[None], 2, axis=0) for row in rows]
    engine.begin(X_T, GUIDANCE)
    engine.run_row(steps[0], None)
    state, preview = engine.state(), engine.preview()
    for scale in (1.0, 3.0, 1.0, 2.0):
        engine.guide(guidance_table(IDENTITY[:2], scale))
        assert engine.state().tobytes() == state.tobytes()
        assert engine.preview().tobytes() == preview.tobytes()
    engine.run_row(steps[1], None)
    found = engine.state()
    # The same as if nothing had been changed in between.
    engine.begin(X_T, GUIDANCE)
    for step in steps[:2]:
        engine.run_row(step, None)
    assert engine.state().tobytes() == found.tobytes()
    engine.load_state(state)
    engine.guide(guidance_table(IDENTITY[:2], 1.0))
    engine.run_row(steps[1], None)
    assert np.abs(engine.state() - found).max() > 1e-3


def test_failures_of_a_table_outlast_it(engine: TorchEngine) -> None:
    """UNet rows are counted by the table that a row ran with."""
    broken = IDENTITY.copy()
    broken[1] = np.nan
    engine.begin(X_T, guidance_table(broken, 1.0))
    engine.run_row(STEP, None)
    engine.guide(guidance_table(IDENTITY, 2.0))
    engine.run_row(STEP, None)
    assert engine.failed_samples().tolist() == [False, True]


@pytest.mark.parametrize(
    ("step", "noise", "message"),
    [
        (STEP[:1], None, "step must be"),
        (STEP[:, :30], None, "step must be"),
        (STEP.astype(np.float64), None, "step must be float32"),
        (STEP, X_T[:1], "noise must be"),
        (STEP, X_T.astype(np.float64), "noise must be float32"),
    ],
)
def test_a_row_that_does_not_fit(
    engine: TorchEngine, step: Float32, noise: Float32 | None, message: str
) -> None:
    engine.begin(X_T, GUIDANCE)
    with pytest.raises(EngineError, match=message):
        engine.run_row(step, noise)


def test_a_state_that_does_not_fit(engine: TorchEngine) -> None:
    engine.begin(X_T, GUIDANCE)
    wrong: list[Any] = [engine.state()[:1], engine.state().astype(np.float64)]
    for state in wrong:
        with pytest.raises(EngineError, match="state must be float32"):
            engine.load_state(state)


def test_nothing_works_before_a_trajectory_is_begun() -> None:
    with TorchEngine(tiny_network(SPEC), SHAPES) as fresh:
        with pytest.raises(EngineError, match="before a trajectory was begun"):
            fresh.run_row(STEP, None)
        with pytest.raises(EngineError, match="before a trajectory was begun"):
            fresh.guide(GUIDANCE)
        for call in (
            fresh.state,
            fresh.preview,
            fresh.failed_samples,
            lambda: fresh.load_state(np.zeros(1, np.float32)),
        ):
            with pytest.raises(EngineError, match="no trajectory was begun"):
                call()


def test_a_device_that_is_not_there() -> None:
    for device in ("cuda:63", "abacus"):
        with pytest.raises(EngineError, match="PyTorch cannot use the device"):
            TorchEngine(tiny_network(SPEC), SHAPES, device=device)


def test_what_an_engine_says_of_itself() -> None:
    network = tiny_network(SPEC)
    with TorchEngine(network, SHAPES, BodyForm("float16")) as half:
        assert half.info == EngineInfo("torch", torch.__version__, "float16", "cpu")
        assert half.shapes == StepShapes(3, 16, 16)
        half.begin(X_T, GUIDANCE)
        half.run_row(STEP, None)
        assert half.state().dtype == np.float32
        assert not half.failed_samples().any()
