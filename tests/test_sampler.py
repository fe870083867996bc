"""The sampler over a recording engine, and over the torch engine."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import Engine, EngineInfo, RowEngine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.calls import engine_calls
from id3pm_deploy.errors import CancelledError, DeadlineError, InputError
from id3pm_deploy.guidance import (
    GuidanceSettings,
    GuidanceTable,
    guidance_plan,
    guidance_table,
)
from id3pm_deploy.noise_ahead import NoiseAhead
from id3pm_deploy.sampler import (
    Limits,
    SampleBatch,
    SampleJob,
    SeededNoise,
    run_trajectory,
    sample_batches,
    step_rows,
    table_chunks,
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


class ChunkEngine(RecordingEngine):
    """Takes several table rows at once and notes how many, and of which samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        super()._begin(x_t, guidance, low_res)
        self.rows_at_once = self.most

    def _run_rows(self, steps: Float32, noise: Sequence[Float32 | None]) -> None:
        self.calls.append(("rows", len(steps)))
        super()._run_rows(steps, noise)


def test_chunks_share_a_guidance_table_and_whether_they_take_noise() -> None:
    """Of 8 rows the last takes no noise; 4 in the middle are guided."""
    table = solver_table(SPEC, SolverSettings("ddpm", 8))
    inside = (table.timesteps[5], table.timesteps[2])
    settings = GuidanceSettings(2.0, interval=(float(inside[0]), float(inside[1])))
    plan = guidance_plan(IDENTITY, settings, table.timesteps)
    calls = engine_calls(step_rows(table, plan), table.stochastic, plan)
    for most, lengths in {
        1: [1] * 8,
        2: [2, 2, 2, 1, 1],
        3: [2, 2, 2, 1, 1],
        99: [2, 4, 1, 1],
    }.items():
        chunks = list(table_chunks(calls, most))
        assert [len(chunk) for chunk in chunks] == lengths
        assert [j for chunk in chunks for j in chunk] == list(range(8))
        engine = ChunkEngine(most)
        noise = RecordingNoise()
        job = SampleJob(IDENTITY, table, settings, noise)
        told: list[int] = []
        run_trajectory(engine, job, [0, 1], told.append)
        assert told == list(range(8))
        assert [c[1] for c in engine.calls if c[0] == "rows"] == lengths
        assert [asked[0] for asked in noise.asked] == ["start", *range(7)]
        drawn = [call[2] for call in engine.calls if call[0] == "row"]
        assert drawn[-1] is None
        for j, one in enumerate(drawn[:-1]):
            assert (one[:, 0, 0, 0] == [100 * (j + 1), 100 * (j + 1) + 1]).all()


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [(10, [10]), (16, [16]), (17, [9, 8]), (35, [12, 12, 11]), (50, [13, 13, 13, 11])],
)
def test_a_run_of_equal_rows_is_cut_evenly(steps: int, lengths: list[int]) -> None:
    table = solver_table(SPEC, SolverSettings("dpmpp-2m", steps))
    plan = guidance_plan(IDENTITY, PLAIN, table.timesteps)
    calls = engine_calls(step_rows(table, plan), table.stochastic, plan)
    chunks = list(table_chunks(calls, 16))
    assert [len(chunk) for chunk in chunks] == lengths
    assert [j for chunk in chunks for j in chunk] == list(range(steps))


def test_a_walk_can_be_asked_for_every_row() -> None:
    table = solver_table(SPEC, SolverSettings("ddim", 5))
    job = SampleJob(IDENTITY, table, PLAIN, SeededNoise(0))
    assert list(walk(ChunkEngine(3), job, [0])) == [2, 4]
    assert list(walk(ChunkEngine(3), job, [0], most=1)) == [0, 1, 2, 3, 4]


def test_rows_are_told_after_their_chunk() -> None:
    engine = ChunkEngine(2)
    table = solver_table(SPEC, SolverSettings("ddim", 3))
    job = SampleJob(IDENTITY, table, PLAIN, SeededNoise(0))

    def told(j: int) -> None:
        engine.calls.append(("told", j))

    run_trajectory(engine, job, [0], told)
    found = [call[:2] if call[0] == "told" else call[0] for call in engine.calls]
    first = ["begin", "rows", "row", "row", ("told", 0), ("told", 1)]
    assert found == [*first, "rows", "row", ("told", 2)]


class TestLimits:
    table = solver_table(SPEC, SolverSettings("ddpm", 6))

    def job(self) -> SampleJob:
        return SampleJob(IDENTITY, self.table, PLAIN, SeededNoise(0))

    def test_no_chunk_is_begun_after_a_cancel(self) -> None:
        engine, cancelled = ChunkEngine(2), threading.Event()

        def stop(j: int) -> None:
            if j == 2:
                cancelled.set()

        with pytest.raises(CancelledError, match="was cancelled"):
            run_trajectory(engine, self.job(), [0], stop, Limits(cancelled=cancelled))
        assert sum(call[0] == "row" for call in engine.calls) == 4
        # The engine can be used on.
        assert not run_trajectory(engine, self.job(), [0]).failed.any()

    def test_a_cancelled_run_does_not_begin(self) -> None:
        engine, cancelled = ChunkEngine(2), threading.Event()
        cancelled.set()
        with pytest.raises(CancelledError):
            run_trajectory(engine, self.job(), [0], None, Limits(cancelled=cancelled))
        assert not engine.calls

    def test_a_deadline(self) -> None:
        engine = ChunkEngine(2)
        limits = Limits(deadline=time.monotonic() + 0.2)
        batches = sample_batches(
            engine, self.job(), 1, lambda _: time.sleep(0.01), limits
        )
        assert next(batches).samples == (0,)
        time.sleep(0.2)
        with pytest.raises(DeadlineError, match="before its deadline"):
            next(batches)
        far = Limits(deadline=time.monotonic() + 1000)
        run_trajectory(engine, self.job(), [0], None, far)

    def test_no_thread_is_left(self) -> None:
        before = threading.active_count()
        for limit in (Limits(time.monotonic()), Limits()):
            walked = walk(ChunkEngine(2), self.job(), [0], limit)
            with contextlib.suppress(DeadlineError):
                next(walked)
            walked.close()
            assert threading.active_count() == before

        def broken(j: int) -> None:
            raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug") as caught:
            run_trajectory(ChunkEngine(2), self.job(), [0], broken)
        assert threading.active_count() == before
        assert caught.value.args


class TestNoiseAhead:
    def test_it_draws_one_chunk_ahead_and_no_more(self) -> None:
        drawn: list[int] = []
        seen = threading.Semaphore(0)

        def draw(j: int) -> Float32:
            drawn.append(j)
            seen.release()
            return np.full(2, j, np.float32)

        with NoiseAhead(draw, [range(2), range(2, 3), range(5, 7)]) as ahead:
            for taken, upto in (([0, 1], 3), ([2], 5), ([5, 6], 5)):
                assert [int(one[0]) for one in ahead.take()] == taken
                deadline = time.monotonic() + 5
                while len(drawn) < upto and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(0.01)
                assert len(drawn) == upto

    def test_the_thread_is_another_one(self) -> None:
        found = []

        def draw(j: int) -> Float32:
            found.append(threading.current_thread())
            return np.zeros(1, np.float32)

        with NoiseAhead(draw, [range(1), range(1, 2)]) as ahead:
            ahead.take()
            ahead.take()
        assert threading.current_thread() not in found
        assert len(set(found)) == 1
        assert not found[0].is_alive()

    def test_deterministic_rows_start_no_thread(self) -> None:
        before = threading.active_count()
        with NoiseAhead(lambda j: pytest.fail("drawn"), []):
            assert threading.active_count() == before

    def test_what_goes_wrong_comes_out(self) -> None:
        def draw(j: int) -> Float32:
            raise InputError(f"no noise for {j}")

        before = threading.active_count()
        with (
            pytest.raises(InputError, match="no noise for 0"),
            NoiseAhead(draw, [range(1), range(1, 9)]) as ahead,
        ):
            ahead.take()
        assert threading.active_count() == before


class SizedNoise:
    """Noise that costs no time: zeros, which are touched so that they are there."""

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        return np.ones((len(samples), *shape), np.float32)

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        return np.ones((len(samples), *shape), np.float32)


class LightEngine(RecordingEngine):
    """Keeps nothing of what it is given, and takes longer than the noise."""

    def __init__(self, size: int, most: int) -> None:
        super().__init__()
        self.shapes = step_shapes(tiny_spec(image_size=size))
        self.most = most

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        self.rows_at_once = self.most
        self._state = x_t[None]

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        time.sleep(0.004)
        assert self._row is not None
        return np.ones(len(self._row), np.float32)


def test_a_long_trajectory_of_large_pictures_needs_no_gigabytes() -> None:
    """256x256, batch 16, 250 rows: 3 GiB of noise, of which two chunks are alive."""
    table = solver_table(SPEC, SolverSettings("ddpm", 250))
    identity = random_identity(16, SPEC)
    job = SampleJob(identity, table, GUIDED, SizedNoise())
    row, most = 16 * 3 * 256 * 256 * 4, 2
    engine = LightEngine(256, most)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in walk(engine, job, range(16)):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # x_T stays there beside two chunks.
    assert 2 * most * row < peak < (2 * most + 1) * row + 1e6


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
