"""Replayed trajectories over a rig that does nothing before it has to."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.rig import FakeRig, Step, short_of_memory, torch_step
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.replay import (
    LEAST_GRAPHS,
    MOST_GRAPH_BYTES,
    MOST_GRAPHS,
    MOST_ROWS,
    STAGING_BUDGET,
    GraphStore,
    ReplayEngine,
)
from id3pm_deploy.enlarging import low_res_from_pixels
from id3pm_deploy.errors import DeviceMemoryError, EngineError, InputError
from id3pm_deploy.guidance import GuidanceSettings, guidance_table
from id3pm_deploy.images import to_uint8
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory, sample_batches
from id3pm_deploy.solvers import SolverSettings, solver_table

Float32 = npt.NDArray[np.float32]

SPEC = tiny_spec(
    schedule="cosine",
    prediction_type="v",
    learned_variance=True,
    image_size=8,
    attention_resolutions=(),
    base_channels=32,
)
SHAPES = step_shapes(SPEC)
IDENTITY = random_identity(4, SPEC)
GUIDED = GuidanceSettings(2.0)
MOVED = GuidanceSettings(3.0, interval=(200, 800), rescale=0.5)


@pytest.fixture(scope="module")
def step() -> Step:
    return torch_step(tiny_network(SPEC))


def job_of(
    solver: str = "ddpm",
    steps: int = 8,
    guidance: GuidanceSettings = GUIDED,
    seed: int = 3,
) -> SampleJob:
    table = solver_table(SPEC, SolverSettings(solver, steps))
    return SampleJob(IDENTITY, table, guidance, SeededNoise(seed))


def images_of(rig: FakeRig, job: SampleJob, rows: int = 0, batch: int = 4) -> Float32:
    with ReplayEngine(rig, rows) as engine:
        parts = list(sample_batches(engine, job, batch))
    assert rig.live_graphs == rig.buffers == 0
    return np.concatenate([part.images for part in parts])


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m", "heun"])
@pytest.mark.parametrize("guidance", [GUIDED, MOVED], ids=["guided", "moved"])
def test_every_rung_makes_the_same_pictures(
    step: Step, guidance: GuidanceSettings, solver: str, keeps: bool
) -> None:
    job = job_of(solver, guidance=guidance)
    plain = images_of(FakeRig(SHAPES, step, keeps=keeps), job, -1)
    assert plain.std() > 0.1
    for rows, most in ((0, 10_000), (1, 10_000), (3, 10_000), (3, 4), (3, 0)):
        rig = FakeRig(SHAPES, step, keeps=keeps, can_capture=most)
        assert images_of(rig, job, rows).tobytes() == plain.tobytes()
    for batch in (1, 3):
        rig = FakeRig(SHAPES, step, keeps=keeps)
        found = images_of(rig, job, 3, batch)
        assert np.abs(found - plain).max() < 1e-4


def test_the_order_of_a_trajectory(step: Step) -> None:
    """7 rows with noise in chunks of 3, 3 and 1, then one without."""
    rig = FakeRig(SHAPES, step)
    with ReplayEngine(rig, 3) as engine:
        assert rig.names() == ["open"]
        run_trajectory(engine, job_of(), range(4))
    calls = [c for c in rig.calls if c[0] not in ("feed", "step", "log")]
    assert [call[0] for call in calls] == [
        *["open", "finite", "size", "enqueue"],
        *["put", "put", "put", "put"],
        *["stage", "capture", "launch", "finish"],
        *["stage", "capture", "launch", "finish"],
        *["stage", "capture", "launch", "finish"],
        *["stage", "launch", "finish"],
        *["fetch", "finite", "close"],
    ]
    assert [call[1] for call in calls if call[0] == "put"] == [
        *["state", "identity", "row", "mix"]
    ]
    staged = [call[1:4] for call in calls if call[0] == "stage"]
    assert staged == [(0, 3, True), (1, 3, True), (0, 1, True), (1, 1, False)]
    sizes = [call[1:] for call in calls if call[0] == "size"]
    assert sizes == [(4, 8, 3)]


def test_a_graph_is_captured_for_a_new_key_alone(step: Step) -> None:
    """Identities, scale, seed and coefficients are no part of the key."""
    rig = FakeRig(SHAPES, step)
    with ReplayEngine(rig, 3) as engine:
        run_trajectory(engine, job_of(), range(4))
        captured = rig.kinds["capture"]
        assert captured == 3  # two slots of three rows, and one row
        for job in (
            job_of(seed=4),
            job_of(guidance=GuidanceSettings(5.0)),
            dataclasses.replace(job_of(), identity=IDENTITY[::-1].copy()),
            job_of(steps=11),
        ):
            found = run_trajectory(engine, job, range(4)).images
            assert rig.kinds["capture"] == captured
            fresh = images_of(FakeRig(SHAPES, step), job, 3)
            assert found.tobytes() == fresh.tobytes()
        run_trajectory(engine, job_of("ddim", 6), range(4))
        assert rig.kinds["capture"] == captured + 2  # no noise: the copies differ
        run_trajectory(engine, job_of(), range(2))
        assert rig.kinds["capture"] == captured + 5
        run_trajectory(engine, job_of(), range(4))
        assert rig.kinds["capture"] == captured + 5
    for key, places in rig.addresses.items():
        assert len(places) == 1, key


def test_graphs_over_buffers_that_moved_are_dropped(step: Step) -> None:
    rig = FakeRig(SHAPES, step, keeps=False)
    job = job_of()
    with ReplayEngine(rig, 3) as engine:
        first = run_trajectory(engine, job, range(4)).images
        assert rig.live_graphs == 3
        run_trajectory(engine, job, range(2))
        assert rig.live_graphs == 3
        again = run_trajectory(engine, job, range(4)).images
        assert rig.kinds["capture"] == 9
    assert again.tobytes() == first.tobytes()


def test_the_host_waits_only_for_a_slot_that_is_in_use(step: Step) -> None:
    """And the sentinel is read once, at the end."""
    rig = FakeRig(SHAPES, step)
    with ReplayEngine(rig, 2) as engine:
        run_trajectory(engine, job_of(steps=11), range(4))
        waits = [call[4] for call in rig.calls if call[0] == "stage"]
        # Rows 2+2+2+2+2 with noise and one without, over two slots.
        assert waits == [False, False, True, True, True, True]
        assert rig.kinds["fetch"] == 1
        assert rig.kinds["finite"] == 2  # what an earlier trajectory left, and the end
        assert rig.kinds["drain"] == 0


def test_run_rows_returns_before_the_device_has_begun(step: Step) -> None:
    rig = FakeRig(SHAPES, step)
    job = job_of("ddim", 4, GuidanceSettings(1.0))
    rows = np.repeat(job.table.rows[:, None], 4, axis=1)
    with ReplayEngine(rig, 4) as engine:
        engine.begin(
            job.noise.start(range(4), SHAPES.picture), guidance_table(IDENTITY, 1.0)
        )
        steps, noise = rows.copy(), [None] * 4
        engine.run_rows(steps, noise)
        steps[...] = np.nan  # it is the caller's again
        assert rig.waiting > 4
        done = [rig.steps_done]
        engine.drain()
        done.append(rig.steps_done)
        assert done == [0, 4]
        assert rig.waiting == 0
        assert np.isfinite(engine.state()).all()
        assert not engine.failed_samples().any()


def test_deterministic_solvers_stage_no_noise(step: Step) -> None:
    rig = FakeRig(SHAPES, step)
    images_of(rig, job_of("dpmpp-2m", 6))
    assert not any(call[3] for call in rig.calls if call[0] == "stage")
    assert not any(str(key[0]).startswith("staged noise") for key in rig.addresses)


def test_the_chunks_keep_within_the_staging_budget() -> None:
    asked = {1: MOST_ROWS, 64: 10, 400: 1, 1000: 1}
    for samples, rows in asked.items():
        shapes = dataclasses.replace(SHAPES, size=64)
        engine = ReplayEngine(FakeRig(shapes, torch_step(tiny_network(SPEC))))
        found = engine._rows_for(samples)
        assert found == rows
        noise = 2 * rows * samples * 4 * 3 * 64 * 64
        assert noise <= STAGING_BUDGET or rows == 1
    rig = FakeRig(SHAPES, torch_step(tiny_network(SPEC)))
    assert ReplayEngine(rig, 77)._rows_for(9) == 77


@pytest.mark.parametrize("rows", [-2, 1001])
def test_replayed_rows_out_of_range(step: Step, rows: int) -> None:
    with pytest.raises(InputError, match="replayed table rows must be"):
        ReplayEngine(FakeRig(SHAPES, step), rows)


@pytest.mark.parametrize(
    ("most", "note"),
    [
        (10_000, "graphs of 3 table rows and graphs of one table row"),
        (4, "graphs of one table row; no graphs of 3 table rows: "),
        (0, "no graphs; no graphs of 3 table rows: "),
    ],
)
def test_a_step_down_is_logged_once_with_its_reason(
    step: Step, caplog: pytest.LogCaptureFixture, most: int, note: str
) -> None:
    rig = FakeRig(SHAPES, step, can_capture=most)
    caplog.set_level(logging.WARNING, "id3pm_deploy")
    with ReplayEngine(rig, 3) as engine:
        for size in (4, 2, 4):
            run_trajectory(engine, job_of(), range(size))
    told = [record.getMessage() for record in caplog.records]
    rungs = [
        "graphs of one table row instead of graphs of 3 table rows: the fake device "
        "cannot capture this (12 nodes)",
        "no graphs instead of graphs of one table row: the fake device cannot capture "
        "this (1 nodes)",
    ]
    assert told == rungs[: {10_000: 0, 4: 1, 0: 2}[most]]
    assert rig.kinds["capture"] == {10_000: 6, 4: 3, 0: 2}[most]
    assert engine.replay_note.startswith(note)
    assert engine.replay_note.count("cannot capture this") == len(told)


def test_a_later_step_down_is_noted_too(step: Step) -> None:
    rig = FakeRig(SHAPES, step)
    with ReplayEngine(rig, 3) as engine:
        run_trajectory(engine, job_of(), range(4))
        assert (
            engine.replay_note == "graphs of 3 table rows and graphs of one table row"
        )
        rig.can_capture = 4
        run_trajectory(engine, job_of(), range(2))
    assert "; no graphs of 3 table rows: the fake device" in engine.replay_note


def test_no_graphs_where_none_are_wanted(step: Step) -> None:
    rig = FakeRig(SHAPES, step)
    with ReplayEngine(rig, -1) as engine:
        run_trajectory(engine, job_of(), range(2))
        assert engine.rows_at_once == 1
    assert not rig.kinds["capture"]
    assert engine.replay_note == "no graphs"


CALLS = ["open", "size", "enqueue", "put", "stage", "feed", "step", "log", "capture"]
CALLS += ["launch", "finish", "fetch", "finite"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", CALLS)
def test_everything_is_released_after_an_error(
    step: Step, kind: str, number: int
) -> None:
    """Also after one inside a capture, which is no more than a rung less."""
    rig = FakeRig(SHAPES, step)
    rig.fail_at = (kind, number)
    job = job_of(guidance=MOVED)
    whole = images_of(FakeRig(SHAPES, step), job, 2)
    failed = None
    try:
        with ReplayEngine(rig, 2) as engine:
            found = run_trajectory(engine, job, range(4)).images
    except EngineError as error:
        failed = error
    assert rig.live_graphs == rig.buffers == 0
    assert rig.opened is False
    if (kind, number) in [("open", 2), ("fetch", 2)] or kind in (
        "capture",
        "feed",
        "step",
        "log",
    ):
        assert failed is None
        assert found.tobytes() == whole.tobytes()
    else:
        assert "the fake device fails" in str(failed)


@pytest.mark.parametrize("kind", ["stage", "launch", "finish", "feed", "log"])
def test_a_broken_trajectory_gives_no_picture_and_can_be_begun_again(
    step: Step, kind: str
) -> None:
    job = job_of()
    whole = images_of(FakeRig(SHAPES, step), job, 3)
    rig = FakeRig(SHAPES, step)
    with ReplayEngine(rig, 3) as engine:
        run_trajectory(engine, job, range(4))
        rig.fail_at = (kind, rig.kinds[kind] + 2)
        with pytest.raises(EngineError, match="the fake device fails"):
            run_trajectory(engine, job, range(4))
        for getter in (engine.state, engine.preview, engine.failed_samples):
            with pytest.raises(EngineError, match="no trajectory was begun"):
                getter()
        again = run_trajectory(engine, job, range(4)).images
        assert again.tobytes() == whole.tobytes()
    assert rig.live_graphs == rig.buffers == 0


def test_a_device_without_room_for_more(step: Step) -> None:
    """The sizes that did fit can be used again."""
    rig = FakeRig(SHAPES, step)
    job = job_of()
    with ReplayEngine(rig, 3) as engine:
        first = run_trajectory(engine, job, range(2)).images
        short_of_memory(rig)
        with pytest.raises(DeviceMemoryError):
            run_trajectory(engine, job, range(4))
        assert rig.live_graphs == 0
        again = run_trajectory(engine, job, range(2)).images
    assert again.tobytes() == first.tobytes()


@pytest.mark.parametrize("guidance", [GUIDED, MOVED], ids=["guided", "moved"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("when", [1, 4, 7])
def test_one_bad_row_fails_its_sample_alone(
    step: Step, rows: int, when: int, guidance: GuidanceSettings
) -> None:
    """In the chunk and under the guidance table in which it happened."""
    job = job_of(guidance=guidance)
    timestep = np.float32(job.table.timesteps[when])
    samples = range(3)

    def stumbles(inputs: dict[str, Any]) -> Any:
        state, x0, finite = step(inputs)
        if inputs["step"][0, 0] == timestep:
            finite = finite.copy()
            finite[np.flatnonzero(inputs["row"] == 1)[-1:]] = 0.0
        return state, x0, finite

    with ReplayEngine(FakeRig(SHAPES, stumbles), rows) as engine:
        found = run_trajectory(engine, job, samples)
        assert found.failed.tolist() == [False, True, False]
        found = run_trajectory(engine, job, [0, 2])
        assert found.failed.tolist() == [False, True]


def test_a_sentinel_that_is_no_number_is_a_failure(step: Step) -> None:
    def lost(inputs: dict[str, Any]) -> Any:
        state, x0, finite = step(inputs)
        return state, x0, finite * np.float32(np.nan)

    with ReplayEngine(FakeRig(SHAPES, lost)) as engine:
        assert run_trajectory(engine, job_of(), range(2)).failed.all()


def test_an_abandoned_trajectory_leaves_no_failures_behind(step: Step) -> None:
    poison = True

    def sick(inputs: dict[str, Any]) -> Any:
        state, x0, finite = step(inputs)
        return state, x0, finite * np.float32(0 if poison else 1)

    job = job_of()
    rows = np.repeat(job.table.rows[:2, None], 4, axis=1)
    with ReplayEngine(FakeRig(SHAPES, sick), 2) as engine:
        x_t = job.noise.start(range(4), SHAPES.picture)
        engine.begin(x_t, guidance_table(IDENTITY, 2.0))
        engine.run_rows(rows, [None, None])
        engine.drain()
        poison = False
        assert not run_trajectory(engine, job, range(4)).failed.any()


class Graph:
    """A captured graph that says when it is released."""

    nodes = 1

    def __init__(self, size: int, gone: list[Graph]) -> None:
        self.bytes, self._gone = size, gone

    def launch(self) -> None:
        raise AssertionError

    def close(self) -> None:
        self._gone.append(self)


def test_the_store_drops_what_was_longest_unused() -> None:
    gone: list[Graph] = []
    drained: list[int] = []
    store = GraphStore(3, 100, 1, lambda: drained.append(len(gone)))
    graphs = [Graph(size, gone) for size in (10, 20, 30, 40, 90, 500, 1)]
    for name in range(3):
        store.add((name,), graphs[name])
    assert store.get((0,)) is graphs[0]
    assert not gone
    assert not drained
    store.add((3,), graphs[3])  # a fourth: too many
    assert gone == [graphs[1]]
    assert drained == [0]  # before it is released
    store.add((4,), graphs[4])  # 90 more bytes: only 10 fit beside them
    assert gone == [graphs[1], graphs[2], graphs[0], graphs[3]]
    store.add((5,), graphs[5])  # too large for itself: kept, alone
    assert len(store) == 1
    assert store.get((5,)) is graphs[5]
    store.add((6,), graphs[6])
    assert len(store) == 1
    store.clear()
    assert len(gone) == 7
    assert store.get((6,)) is None


def test_the_store_keeps_the_newest_whatever_they_take() -> None:
    """The first graph tells all of a pool that the others use, too."""
    gone: list[Graph] = []
    store = GraphStore(6, 100, 3, lambda: None)
    graphs = [Graph(size, gone) for size in (500, 0, 0, 0, 0, 0, 0, 0)]
    for name in range(3):
        store.add((name,), graphs[name])
    assert not gone
    store.add((3,), graphs[3])
    assert gone == [graphs[0]]
    for name in range(4, 8):
        store.add((name,), graphs[name])
    assert gone == graphs[:2]
    assert len(store) == 6


def test_large_graphs_of_one_trajectory_stay(step: Step) -> None:
    """Guided and not, of two lengths in both slots: none is captured twice."""
    rig = FakeRig(SHAPES, step)
    rig.graph_bytes = MOST_GRAPH_BYTES + 1
    job = job_of(steps=20, guidance=MOVED)
    with ReplayEngine(rig, 3) as engine:
        for _ in range(3):
            run_trajectory(engine, job, range(4))
        captured = rig.kinds["capture"]
        run_trajectory(engine, job, range(4))
        assert rig.kinds["capture"] == captured == rig.live_graphs > 4
        assert not rig.kinds["drain"]


def test_graphs_go_when_they_take_too_much(step: Step) -> None:
    """They are drained first: one of them may be running."""
    rig = FakeRig(SHAPES, step)
    rig.graph_bytes = 100 << 20
    job = job_of()
    whole = images_of(FakeRig(SHAPES, step), job, 3, 2)
    with ReplayEngine(rig, 3) as engine:
        for batch in (1, 2, 3, 4, 1, 2):
            run_trajectory(engine, job, range(batch))
            assert rig.live_graphs <= LEAST_GRAPHS
        assert rig.kinds["capture"] == LEAST_GRAPHS + rig.kinds["drain"]
        assert rig.kinds["drain"] > 4
        found = run_trajectory(engine, job, [0, 1]).images
        assert found.tobytes() == whole[:2].tobytes()


def cheap(inputs: dict[str, Any]) -> Any:
    """Some function of all that a step is given, in no time."""
    state = inputs["state"] * np.float32(0.9) + inputs["noise"] * np.float32(0.1)
    state += inputs["step"].mean() + inputs["mix"].mean() + inputs["identity"].mean()
    return state, state[0], np.ones(len(inputs["row"]), np.float32)


def launched(rig: FakeRig) -> list[int]:
    """Nodes of the graphs that were launched since the last look."""
    found = [call[1] for call in rig.calls if call[0] == "launch"]
    rig.calls.clear()
    return found


@pytest.mark.parametrize(
    ("solver", "steps", "first", "then"),
    [
        # A row is three operations, four with noise; one of a graph by itself is one.
        ("dpmpp-2m", 10, [1] * 10, [30]),
        ("ddpm", 10, [1] * 10, [36, 1]),
        ("dpmpp-2m", 16, [48], [48]),
        ("dpmpp-2m", 20, [1] * 10 + [30], [30, 30]),
        ("dpmpp-2m", 35, [1] * 12 + [36] + [1] * 11, [36, 36, 33]),
    ],
)
def test_a_graph_is_as_long_as_a_short_trajectory_needs(
    solver: str, steps: int, first: list[int], then: list[int]
) -> None:
    """From its second time on, and in the same slots."""
    rig = FakeRig(SHAPES, cheap)
    job = job_of(solver, steps)
    wanted = images_of(FakeRig(SHAPES, cheap), job, -1, 1)[0]
    with ReplayEngine(rig, 16) as engine:
        for nodes in (first, then, then, then):
            found = run_trajectory(engine, job, [0]).images[0]
            assert found.tobytes() == wanted.tobytes()
            assert launched(rig) == nodes
            captured = rig.kinds["capture"]
        run_trajectory(engine, job_of(solver, steps, seed=8), [0])
        assert rig.kinds["capture"] == captured
        length = max(then) // (4 if solver == "ddpm" else 3)
        assert engine.replay_note.startswith(f"graphs of {length} table rows")


def test_ever_changing_lengths_stay_within_the_store() -> None:
    rig = FakeRig(SHAPES, cheap)
    job = job_of("ddim", 20, GuidanceSettings(1.0))
    rng = np.random.default_rng(0)
    with ReplayEngine(rig, 20) as opened:
        engine: Any = opened
        for _ in range(12):
            count = int(rng.integers(1, 5))
            rows = np.repeat(job.table.rows[:, None], count, axis=1)
            x_t = job.noise.start(range(count), SHAPES.picture)
            engine.begin(x_t, guidance_table(IDENTITY[:count], 1.0))
            for _ in range(12):
                n = int(rng.integers(1, 20))
                engine.run_rows(rows[:n], [None] * n)
            assert rig.live_graphs <= MOST_GRAPHS
            assert len(engine._asked) <= MOST_GRAPHS
        assert rig.kinds["drain"] > 0, "more were captured than are kept"


SMALL = tiny_spec(schedule="cosine", image_size=8, attention_resolutions=())
LARGE = tiny_spec(
    schedule="cosine", image_size=16, low_res_size=8, attention_resolutions=()
)


@pytest.fixture(scope="module")
def chain() -> tuple[Step, Step]:
    return torch_step(tiny_network(SMALL)), torch_step(tiny_network(LARGE))


def test_pictures_are_handed_on_with_their_grey_levels(
    chain: tuple[Step, Step],
) -> None:
    """Bit for bit what the way through the host gives."""
    base_step, large_step = chain
    base_rig = FakeRig(step_shapes(SMALL), base_step)
    large_rig = FakeRig(step_shapes(LARGE), large_step)
    job = SampleJob(
        IDENTITY,
        solver_table(SMALL, SolverSettings("ddpm", 4)),
        GUIDED,
        SeededNoise(3),
    )
    with ReplayEngine(base_rig) as base, ReplayEngine(large_rig) as large:
        images = run_trajectory(base, job, range(4)).images
        wanted = low_res_from_pixels(to_uint8(images))
        x_t = np.zeros((2, 3, 16, 16), np.float32)
        nothing_yet = np.zeros((2, 3, 8, 8), np.float32)
        guidance = guidance_table(IDENTITY[:2], 1.0)
        large.begin(x_t, guidance, nothing_yet)
        fetched = base_rig.kinds["fetch"]
        for first in (0, 1, 2):
            assert base.hand_over(large, first)
            assert base_rig.kinds["fetch"] == fetched
            given = large_rig.fetch("low_res")
            assert given.tobytes() == wanted[first : first + 2].tobytes()
        with pytest.raises(EngineError, match="cannot be handed on"):
            base.hand_over(large, 3)
