"""The sampler over a recording engine, and over the torch engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import Engine, EngineInfo, RowEngine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.errors import InputError
from id3pm_deploy.guidance import (
    GuidanceSettings,
    GuidanceTable,
    guidance_plan,
    guidance_table,
)
from id3pm_deploy.sampler import (
    SampleBatch,
    SampleJob,
    SeededNoise,
    run_trajectory,
    sample_batches,
    step_rows,
    walk,
)
from id3pm_deploy.solvers import (
    RESCALE_COLUMN,
    STATE_SLOTS,
    STEP_WIDTH,
    SolverSettings,
    solver_table,
)

Float32 = npt.NDArray[np.float32]

SPEC = tiny_spec(schedule="cosine", prediction_type="v", learned_variance=True)
SHAPES = step_shapes(SPEC)
IDENTITY = random_identity(5, SPEC)
PLAIN, GUIDED = GuidanceSettings(1.0), GuidanceSettings(2.0)
MOVED = GuidanceSettings(4.0, "linear", interval=(200, 900), rescale=0.6)


class RecordingEngine(RowEngine):
    """Keeps x_T as its state and notes every call."""

    def __init__(self) -> None:
        super().__init__(EngineInfo("recording", "1", "float32", "none"), SHAPES)
        self.calls: list[tuple[Any, ...]] = []
        self.bad: Float32 | None = None
        self._state: Float32 = np.zeros((STATE_SLOTS, 0, *SHAPES.picture), np.float32)

    def close(self) -> None:
        self.calls.append(("close",))

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        self.calls.append(("begin", x_t.copy(), guidance))
        self._state = np.zeros((STATE_SLOTS, *x_t.shape), dtype=np.float32)
        self._state[0] = x_t

    def _guide(self, guidance: GuidanceTable) -> None:
        self.calls.append(("guide", guidance))

    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        self.calls.append(("replace", list(samples)))
        self._state[0, list(samples)] = x_t

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        self.calls.append(("row", step.copy(), noise))
        assert self._row is not None
        found = np.ones(len(self._row), dtype=np.float32)
        return found if self.bad is None else self.bad

    def state(self) -> Float32:
        return np.array(self._state)

    def load_state(self, state: Float32) -> None:
        self._state = state.copy()

    def preview(self) -> Float32:
        return np.array(self._state[0])


class RecordingNoise:
    """Noise that says which draw and sample it is."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        self.asked.append(("start", *samples))
        return self._filled(samples, shape, 0)

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        self.asked.append((j, *samples))
        return self._filled(samples, shape, j + 1)

    @staticmethod
    def _filled(samples: Sequence[int], shape: tuple[int, ...], draw: int) -> Float32:
        values = [np.full(shape, 100 * draw + i, dtype=np.float32) for i in samples]
        return np.stack(values)


def recorded(job: SampleJob, batch_size: int) -> tuple[RecordingEngine, list[Any]]:
    engine = RecordingEngine()
    return engine, list(sample_batches(engine, job, batch_size))


def test_noise_is_asked_for_in_order_and_only_where_it_is_used() -> None:
    noise = RecordingNoise()
    table = solver_table(SPEC, SolverSettings("ddpm", 4))
    job = SampleJob(IDENTITY, table, PLAIN, noise, first_sample=10)
    engine, batches = recorded(job, 3)
    assert noise.asked == [
        *[("start", 10, 11, 12), (0, 10, 11, 12), (1, 10, 11, 12), (2, 10, 11, 12)],
        *[("start", 13, 14), (0, 13, 14), (1, 13, 14), (2, 13, 14)],
    ]
    assert [batch.samples for batch in batches] == [(10, 11, 12), (13, 14)]
    rows = [call for call in engine.calls if call[0] == "row"]
    assert len(rows) == 8
    numbers = np.arange(10, 13)
    for j, (_, step, drawn) in enumerate(rows[:4]):
        assert (step == table.rows[j]).all()
        assert step.shape == (3, STEP_WIDTH)
        assert (drawn is None) == (j == 3)
        if drawn is not None:
            assert (drawn[:, 0, 0, 0] == 100 * (j + 1) + numbers).all()


def test_a_deterministic_table_asks_for_the_start_alone() -> None:
    noise = RecordingNoise()
    table = solver_table(SPEC, SolverSettings("dpmpp-2m", 4))
    engine, _ = recorded(SampleJob(IDENTITY, table, GUIDED, noise), 5)
    assert noise.asked == [("start", 0, 1, 2, 3, 4)]
    assert all(call[2] is None for call in engine.calls if call[0] == "row")


def test_each_sample_gets_its_own_identity_and_start() -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 2))
    both = GuidanceSettings(2.0, guide_variance=True)
    job = SampleJob(IDENTITY, table, both, RecordingNoise())
    engine, batches = recorded(job, 2)
    begun = [call for call in engine.calls if call[0] == "begin"]
    assert len(begun) == 3
    for (_, x_t, guidance), start in zip(begun, (0, 2, 4), strict=True):
        own = IDENTITY[start : start + 2]
        expected = guidance_table(own, 2.0, guide_variance=True)
        assert x_t[:, 0, 0, 0].tolist() == [start + i for i in range(len(own))]
        for part in ("row", "identity", "mix"):
            assert (getattr(guidance, part) == getattr(expected, part)).all()
    assert [batch.images.shape for batch in batches] == [
        (2, *SHAPES.picture),
        (2, *SHAPES.picture),
        (1, *SHAPES.picture),
    ]


def test_guidance_changes_only_where_it_has_to() -> None:
    """λ ≥ -5.1 puts the rows at 995, 746, 498, 249 and 0."""
    table = solver_table(SPEC, SolverSettings("ddim", 5))
    settings = GuidanceSettings(2.0, interval=(300, 800), rescale=0.5)
    engine, _ = recorded(SampleJob(IDENTITY, table, settings, SeededNoise(0)), 5)
    kinds = [call[0] for call in engine.calls]
    assert kinds == ["begin", "row", "guide", "row", "row", "guide", "row", "row"]
    begun, *guided = [call[-1] for call in engine.calls if call[0] != "row"]
    assert [table.unet_rows for table in (begun, *guided)] == [5, 10, 5]
    steps = [call[1] for call in engine.calls if call[0] == "row"]
    for step, row, phi in zip(steps, table.rows, (0, 0.5, 0.5, 0, 0), strict=True):
        assert (step[:, RESCALE_COLUMN] == phi).all()
        assert (step[:, :RESCALE_COLUMN] == row[:RESCALE_COLUMN]).all()
        assert len(step) == 5


def test_step_rows_leave_the_table_alone() -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 5))
    before = table.rows.copy()
    plan = guidance_plan(IDENTITY, MOVED, table.timesteps)
    rows = step_rows(table, plan)
    assert rows.dtype == np.float32
    assert (rows[:, RESCALE_COLUMN] == plan.rescale).all()
    assert plan.rescale.any()
    assert (table.rows == before).all()


def test_guidance_that_does_not_fit_the_table() -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 5))
    listed = GuidanceSettings(scales=(1.0, 2.0))
    with pytest.raises(InputError, match="must be 5 guidance scales"):
        recorded(SampleJob(IDENTITY, table, listed, SeededNoise(0)), 5)


def test_failures_are_kept_until_the_next_trajectory() -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 3))
    identity = IDENTITY[:3].copy()
    identity[1] = 0.0
    job = SampleJob(identity, table, GUIDED, SeededNoise(0))
    engine = RecordingEngine()

    def fail_once(j: int) -> None:
        # Sample 1 is unconditional: UNet row 4 is the null row of sample 2.
        flags = np.ones(5, dtype=np.float32)
        flags[4] = float(j != 0)
        engine.bad = flags

    found = run_trajectory(engine, job, [0, 1, 2], fail_once)
    assert found.failed.tolist() == [False, False, True]
    engine.bad = None
    assert not run_trajectory(engine, job, [0, 1, 2]).failed.any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_that_is_not_finite_has_failed(value: float) -> None:
    """Whatever the engine's own flags say."""

    class Overflowing(RecordingEngine):
        def state(self) -> Float32:
            state = super().state()
            state[0, 1, 2, 3, 4] = value
            return state

    table = solver_table(SPEC, SolverSettings("ddim", 2))
    job = SampleJob(IDENTITY[:3], table, PLAIN, SeededNoise(0))
    found = run_trajectory(Overflowing(), job, [0, 1, 2])
    assert found.failed.tolist() == [False, True, False]


@pytest.mark.parametrize("size", [0, -1])
def test_batch_sizes_out_of_range(size: int) -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 2))
    with pytest.raises(InputError, match="batch size must be at least 1"):
        recorded(SampleJob(IDENTITY, table, PLAIN, SeededNoise(0)), size)


@pytest.mark.parametrize("shape", [(5, 15), (5, 17), (16,), (1, 5, 16)])
def test_identities_of_another_length(shape: tuple[int, ...]) -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 2))
    job = SampleJob(np.zeros(shape, np.float32), table, PLAIN, SeededNoise(0))
    with pytest.raises(InputError, match="must be \\[n, 16\\]"):
        recorded(job, 2)


def test_no_identities_make_no_batches() -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 2))
    _, batches = recorded(SampleJob(IDENTITY[:0], table, PLAIN, SeededNoise(0)), 2)
    assert batches == []


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with TorchEngine(tiny_network(SPEC), SHAPES) as made:
        assert isinstance(made, TorchEngine)
        yield made


def sampled(engine: Engine, job: SampleJob, batch_size: int) -> SampleBatch:
    """All batches of the job as one."""
    parts = list(sample_batches(engine, job, batch_size))
    return SampleBatch(
        tuple(i for part in parts for i in part.samples),
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.failed for part in parts]),
    )


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp-2m"])
@pytest.mark.parametrize("guidance", [PLAIN, GUIDED, MOVED], ids=lambda g: g.schedule)
def test_the_batch_does_not_change_a_picture(
    engine: TorchEngine, guidance: GuidanceSettings, solver: str
) -> None:
    table = solver_table(SPEC, SolverSettings(solver, 4))
    job = SampleJob(IDENTITY, table, guidance, SeededNoise(7))
    whole = sampled(engine, job, 5)
    assert whole.images.dtype == np.float32
    assert whole.images.shape == (5, *SHAPES.picture)
    assert whole.samples == (0, 1, 2, 3, 4)
    assert not whole.failed.any()
    assert np.abs(whole.images).max() <= 1
    for size in (1, 2, 3):
        other = sampled(engine, job, size).images
        assert np.abs(other - whole.images).max() <= 1e-5
    # The samples do differ from each other by much more.
    assert np.abs(whole.images[0] - whole.images[1]).max() > 0.1


def test_a_walk_takes_up_a_state_between_rows(engine: TorchEngine) -> None:
    """What parity does: every row from another trajectory's state."""
    table = solver_table(SPEC, SolverSettings("dpmpp-2m", 5))
    job = SampleJob(IDENTITY[:2], table, MOVED, SeededNoise(7))
    states = [engine.state() for _ in walk(engine, job, [0, 1])]
    other = SampleJob(IDENTITY[:2], table, MOVED, SeededNoise(8))
    for j in walk(engine, other, [0, 1]):
        same = engine.state().tobytes() == states[j].tobytes()
        assert same == (j > 0), j
        engine.load_state(states[j])
    assert j == 4


def test_a_sample_is_known_by_its_number(engine: TorchEngine) -> None:
    table = solver_table(SPEC, SolverSettings("ddpm", 3))
    whole = sampled(engine, SampleJob(IDENTITY, table, PLAIN, SeededNoise(7)), 5)
    tail = SampleJob(IDENTITY[3:], table, PLAIN, SeededNoise(7), first_sample=3)
    found = sampled(engine, tail, 2)
    assert found.samples == (3, 4)
    assert np.abs(found.images - whole.images[3:]).max() <= 1e-5
    again = sampled(engine, SampleJob(IDENTITY, table, PLAIN, SeededNoise(7)), 5)
    assert again.images.tobytes() == whole.images.tobytes()
    for noise in (SeededNoise(8), SeededNoise(7, stage=1)):
        other = sampled(engine, SampleJob(IDENTITY, table, PLAIN, noise), 5)
        assert np.abs(other.images - whole.images).max() > 0.1


def test_an_unconditional_sample_in_any_company(engine: TorchEngine) -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 4))
    mixed = IDENTITY[:3].copy()
    mixed[1] = 0.0
    both = GuidanceSettings(3.3, guide_variance=True)
    job = SampleJob(mixed, table, both, SeededNoise(7))
    together = sampled(engine, job, 3).images[1]
    for size in (1, 2):
        assert np.abs(sampled(engine, job, size).images[1] - together).max() <= 1e-5
    nobody = SampleJob(np.zeros_like(mixed), table, PLAIN, SeededNoise(7))
    assert np.abs(sampled(engine, nobody, 3).images[1] - together).max() <= 1e-5


def test_a_bad_identity_fails_its_own_sample_only(engine: TorchEngine) -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 3))
    bad = IDENTITY[:3].copy()
    bad[2, 0] = np.inf
    jobs = [
        SampleJob(identity, table, GUIDED, SeededNoise(7))
        for identity in (IDENTITY, bad)
    ]
    good, found = (run_trajectory(engine, job, [0, 1, 2]) for job in jobs)
    assert good.failed.tolist() == [False, False, False]
    assert found.failed.tolist() == [False, False, True]
    assert np.isfinite(found.images).all()
    assert found.images[:2].tobytes() == good.images[:2].tobytes()
