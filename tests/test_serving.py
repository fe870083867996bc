"""Continuous batching: pictures are those made alone, whatever comes and goes."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_spec

import id3pm_deploy
from id3pm_deploy.api import Sampler
from id3pm_deploy.backends.base import Engine, Float32
from id3pm_deploy.batch import Picture
from id3pm_deploy.errors import (
    CancelledError,
    DeadlineError,
    EngineError,
    InputError,
)
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.places import row_bucket

DIM = tiny_spec().identity.dim
VECTORS = np.random.default_rng(3).normal(size=(5, DIM)).astype(np.float32)
PLACES, WAITING = 3, 4
SOLVERS = ("ddpm", "ddim", "heun", "dpmpp-2m", "dpmpp-2m-sde", "unipc-2", "unipc-3")
GUIDANCES = (
    1.0,
    2.0,
    GuidanceSettings(4.0, "linear"),
    GuidanceSettings(3.0, interval=(200, 800), rescale=0.5),
    GuidanceSettings(2.0, guide_variance=True),
)


@pytest.fixture
def sampler(tiny_bundle: Path) -> Iterator[Sampler]:
    given: dict[str, Any] = {"places": PLACES, "waiting": WAITING, "threads": 1}
    with id3pm_deploy.load(tiny_bundle, **given) as opened:
        yield opened


def a_request(choose: random.Random) -> dict[str, Any]:
    who = choose.randrange(-1, len(VECTORS))
    return {
        "identity": None if who < 0 else VECTORS[who : who + 1],
        "steps": choose.randrange(3, 12),
        "solver": choose.choice(SOLVERS),
        "guidance": choose.choice(GUIDANCES),
        "seed": choose.randrange(4),
        "sample": choose.randrange(3),
    }


def alone(sampler: Sampler, request: dict[str, Any]) -> Float32:
    """The same sample made with no company."""
    given = {k: v for k, v in request.items() if k not in ("identity", "sample")}
    number = request["sample"]
    batches = sampler.sample(
        request["identity"], count=number + 1, batch_size=1, **given
    )
    image: Float32 = list(batches)[number].images[0]
    return image


@pytest.mark.parametrize("seed", range(3))
def test_pictures_under_load_are_those_made_alone(sampler: Sampler, seed: int) -> None:
    choose = random.Random(seed)  # noqa: S311 - no secret
    requests = [a_request(choose) for _ in range(24)]
    delays = [choose.uniform(0, 0.3) for _ in requests]
    given_up = set(choose.sample(range(len(requests)), 6))

    async def one(i: int) -> Picture | None:
        await asyncio.sleep(delays[i])
        task = asyncio.ensure_future(sampler.submit(**requests[i]))
        if i in given_up:
            await asyncio.sleep(0.02)
            task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return None

    async def main() -> list[Picture | None]:
        return await asyncio.gather(*map(one, range(len(requests))))

    made = asyncio.run(main())
    for i, picture in enumerate(made):
        assert picture is not None or i in given_up
        if picture is not None:
            expected = alone(sampler, requests[i])
            assert (picture.image == expected).all(), requests[i]
            assert picture.mark.sample == requests[i]["sample"]


class Watched:
    """Counts what an engine does, and can hold it up or break it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self.rows: list[int] = []
        self.go, self.broken = threading.Event(), False
        self.go.set()
        begin, run = Engine.begin, Engine.run_rows

        def counted_begin(engine: Engine, x_t: Float32, *rest: Any) -> None:
            self.begun.append(len(x_t))
            begin(engine, x_t, *rest)

        def counted_run(
            engine: Engine, steps: Float32, noise: Sequence[Float32 | None]
        ) -> None:
            assert self.go.wait(60)
            if self.broken:
                raise EngineError("it broke", why="the test said so")
            assert engine._row is not None
            self.rows.append(len(engine._row))
            run(engine, steps, noise)

        patch.setattr(Engine, "begin", counted_begin)
        patch.setattr(Engine, "run_rows", counted_run)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def submit(sampler: Sampler, **given: Any) -> asyncio.Task[Picture]:
    given = {"solver": "ddim", "steps": 4, "identity": VECTORS[:1], **given}
    return asyncio.ensure_future(sampler.submit(**given))


def test_samples_share_a_batch_of_one_size(sampler: Sampler, watched: Watched) -> None:
    async def main() -> None:
        watched.go.clear()
        tasks = [submit(sampler, steps=3 + i, guidance=1.0) for i in range(5)]
        await asyncio.sleep(0.2)
        watched.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert watched.begun == [PLACES]
    # At first the one that was alone when the batch began; 25 UNet rows in all.
    assert sum(watched.rows) == 3 + 4 + 5 + 6 + 7
    assert max(watched.rows) == PLACES
    assert len(watched.rows) < 14


def test_the_event_loop_never_waits_for_the_engine(
    sampler: Sampler, watched: Watched
) -> None:
    async def main() -> float:
        watched.go.clear()
        task = submit(sampler)
        longest = 0.0
        for _ in range(20):
            begun = time.perf_counter()
            await asyncio.sleep(0.005)
            longest = max(longest, time.perf_counter() - begun)
        assert not task.done()
        watched.go.set()
        await task
        return longest

    assert asyncio.run(main()) < 1.0


def test_the_nearest_deadline_goes_first(sampler: Sampler, watched: Watched) -> None:
    ended: list[str] = []

    def noted(name: str) -> Callable[[object], None]:
        return lambda _: ended.append(name)

    async def main() -> None:
        watched.go.clear()
        running = [submit(sampler, steps=6) for _ in range(PLACES)]
        await asyncio.sleep(0.2)
        now, waiting = time.monotonic(), {}
        for name, wait in (("late", 300.0), ("none", None), ("soon", 100.0)):
            deadline = None if wait is None else now + wait
            waiting[name] = submit(sampler, steps=6, deadline=deadline)
            waiting[name].add_done_callback(noted(name))
        await asyncio.sleep(0.05)
        # One place alone becomes free at a time.
        watched.go.set()
        running[0].cancel()
        await asyncio.gather(*waiting.values(), *running[1:])

    asyncio.run(main())
    assert ended[0] == "soon"
    assert set(ended) == {"soon", "late", "none"}


def test_what_cannot_be_in_time_fails_and_frees_its_place(sampler: Sampler) -> None:
    async def main() -> None:
        await submit(sampler, steps=8)  # now the pace is known
        begun = time.monotonic()
        doomed = [
            submit(sampler, steps=900, deadline=begun + 0.2) for _ in range(PLACES)
        ]
        good = submit(sampler, steps=4)
        results = await asyncio.gather(*doomed, return_exceptions=True)
        assert all(isinstance(one, DeadlineError) for one in results)
        await good
        with pytest.raises(DeadlineError):
            await submit(sampler, deadline=time.monotonic() - 1)

    asyncio.run(main())


def test_who_gave_up_costs_no_more_table_rows(
    sampler: Sampler, watched: Watched
) -> None:
    async def main() -> None:
        watched.go.clear()
        tasks = [submit(sampler, steps=400) for _ in range(PLACES + 1)]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        watched.go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await submit(sampler, steps=4)

    asyncio.run(main())
    # The table row that ran when they were cancelled, and the four of the other one.
    assert 4 <= len(watched.rows) <= 6


def test_a_full_queue_holds_submit_up(sampler: Sampler, watched: Watched) -> None:
    async def main() -> None:
        watched.go.clear()
        tasks = [submit(sampler) for _ in range(PLACES + WAITING + 3)]
        await asyncio.sleep(0.2)
        front = sampler._stage.front
        assert len(front._queue) <= PLACES + WAITING
        with pytest.raises(DeadlineError, match="queue"):
            await submit(sampler, deadline=time.monotonic() + 0.05)
        tasks[-1].cancel()
        watched.go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, Picture) for one in results[:-1])
        await asyncio.wait_for(sampler.drain(), 10)
        assert front._left._value == PLACES + WAITING

    asyncio.run(main())


def test_a_broken_engine_fails_all_and_closes_the_front(
    sampler: Sampler, watched: Watched
) -> None:
    async def main() -> None:
        watched.go.clear()
        tasks = [submit(sampler) for _ in range(PLACES + 2)]
        await asyncio.sleep(0.1)
        watched.broken = True
        watched.go.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "it broke" in str(result)
        with pytest.raises(EngineError, match="while it served"):
            await submit(sampler)

    asyncio.run(main())


def test_closing_cancels_what_is_in_flight(tiny_bundle: Path) -> None:
    async def main() -> None:
        with id3pm_deploy.load(tiny_bundle, threads=1, places=2) as opened:
            tasks = [submit(opened, steps=900) for _ in range(4)]
            await asyncio.sleep(0.1)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, CancelledError)

    asyncio.run(main())


def test_an_async_block_waits_for_what_is_in_flight(tiny_bundle: Path) -> None:
    async def main() -> None:
        async with id3pm_deploy.load(tiny_bundle, threads=1, places=2) as opened:
            tasks = [submit(opened) for _ in range(5)]
            await asyncio.sleep(0)
        assert all(isinstance(task.result(), Picture) for task in tasks)

    asyncio.run(main())


def test_batches_and_requests_take_turns(sampler: Sampler) -> None:
    expected = sampler.sample_all(VECTORS, count=1, steps=3)

    async def main() -> None:
        tasks = [submit(sampler, steps=5 + i) for i in range(6)]
        await asyncio.sleep(0.02)
        pixels = await asyncio.to_thread(
            sampler.sample_all, VECTORS, count=1, steps=3, batch_size=2
        )
        assert (pixels == expected).all()
        pictures = await asyncio.gather(*tasks)
        same = {"solver": "ddim", "steps": 7, "sample": 0}
        one = alone(sampler, {"identity": VECTORS[:1], **same})
        assert (pictures[2].image == one).all()

    asyncio.run(main())
    asyncio.run(main())  # another event loop, later


def test_two_event_loops_at_once_are_refused(
    sampler: Sampler, watched: Watched
) -> None:
    async def second() -> None:
        with pytest.raises(InputError, match="one event loop"):
            await submit(sampler)

    async def main() -> None:
        watched.go.clear()
        task = submit(sampler)
        await asyncio.sleep(0.05)
        await asyncio.to_thread(asyncio.run, second())
        watched.go.set()
        await task

    asyncio.run(main())


def test_one_picture_is_of_one_identity(sampler: Sampler) -> None:
    with pytest.raises(InputError, match="one identity"):
        asyncio.run(sampler.submit(VECTORS))


def test_a_picture_is_saved_with_its_mark(sampler: Sampler, tmp_path: Path) -> None:
    from id3pm_deploy.images import read_mark

    picture = asyncio.run(sampler.submit(VECTORS[:1], steps=3, seed=9))
    picture.save(tmp_path / "new" / "one.png")
    assert read_mark(tmp_path / "new" / "one.png") == picture.mark
    assert picture.mark.seed == 9


@pytest.mark.parametrize("wrong", [{"places": 0}, {"waiting": 5000}])
def test_sizes_out_of_range_are_refused(tiny_bundle: Path, wrong: Any) -> None:
    with pytest.raises(InputError, match="from 1 to 4096"):
        id3pm_deploy.load(tiny_bundle, **wrong)


def test_buckets_waste_at_most_a_third() -> None:
    buckets = [row_bucket(rows) for rows in range(1, 100)]
    assert sorted(set(buckets))[:8] == [1, 2, 3, 4, 6, 8, 12, 16]
    for rows, bucket in enumerate(buckets, start=1):
        assert rows <= bucket < rows * 1.5 or rows == bucket
