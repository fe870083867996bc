"""Continuous batching: requests join a running batch and leave it when they are done.

An asyncio front for one engine. Coroutines wait; one worker thread runs table rows
over all places of a :class:`~id3pm_deploy.places.Places`, and between two of them it
drops what was cancelled or is too late, and fills empty places: the nearest deadline
first, then in order of arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .backends.base import Engine
from .errors import (
    CancelledError,
    DeadlineError,
    EngineError,
    Id3pmError,
    InputError,
    first_line,
)
from .places import Finished, Places, Trajectory
from .worker import Worker

PLACES = 8
"""Samples in one batch unless told."""
WAITING = 64
"""Requests that wait for a place before ``submit`` itself waits."""


@dataclass(order=True)
class _Request:
    """A trajectory that somebody waits for; ordered by deadline, then arrival."""

    deadline: float
    arrival: int
    trajectory: Trajectory = field(compare=False)
    future: asyncio.Future[Finished] = field(compare=False)
    loop: asyncio.AbstractEventLoop = field(compare=False)
    dropped: bool = field(default=False, compare=False)

    def settle(self, result: Finished | BaseException) -> None:
        """Hand over a result, from whatever thread; nobody may wait any more."""

        def put() -> None:
            if self.future.done():
                return
            if isinstance(result, Finished):
                self.future.set_result(result)
            else:
                self.future.set_exception(result)

        with contextlib.suppress(RuntimeError):  # the loop was closed
            self.loop.call_soon_threadsafe(put)


class Front:
    """Runs single samples for many coroutines of one event loop on one engine.

    Args:
        engine: Gives the entered engine; called in the worker's thread.
        worker: Whose thread the engine belongs to. Other calls to it have their turn
            when all that is in the batch is done.
        places: Samples that share a batch.
        waiting: How many requests may wait for a place; beyond that ``submit`` waits
            before it queues its own.

    Raises:
        InputError: ``places`` or ``waiting`` is out of range.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        worker: Worker,
        places: int = PLACES,
        waiting: int = WAITING,
    ) -> None:
        for name, value in (("places", places), ("waiting", waiting)):
            if not 1 <= value <= 4096:
                raise InputError(f"{name} must be from 1 to 4096", why=f"it is {value}")
        self._engine, self._worker = engine, worker
        self._count, self._room = places, places + waiting
        self._lock = threading.Lock()
        self._queue: list[_Request] = []
        self._serving = False
        self._closed: Id3pmError | None = None
        self._arrivals = itertools.count()
        self._pace: float | None = None
        self._inside = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left = asyncio.Semaphore(self._room)
        self._idle = asyncio.Event()

    async def submit(
        self, trajectory: Trajectory, deadline: float | None = None
    ) -> Finished:
        """Run one trajectory in company; cancel the task to take it out again.

        Args:
            trajectory: Not yet begun.
            deadline: When it must be done, by ``time.monotonic``; looked at between
                table rows.

        Raises:
            DeadlineError: It cannot be done in time, even at the best pace seen.
            CancelledError: The front was closed meanwhile.
            EngineError: The engine failed; the front is closed then.
            InputError: It is used from two event loops at once.
        """
        due = math.inf if deadline is None else deadline
        self._enter()
        try:
            await _acquired(self._left, due)
            try:
                return await self._run(trajectory, due)
            finally:
                self._left.release()
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    async def drain(self) -> None:
        """Wait until nothing is in flight."""
        while self._inside:
            await self._idle.wait()

    def close(self) -> None:
        """Take nothing more and cancel what is in flight; it ends after the table row
        that runs."""
        self._close(CancelledError("the sampler was closed"))

    def _close(self, why: Id3pmError) -> None:
        with self._lock:
            self._closed = self._closed or why

    def _check_open(self) -> None:
        if self._closed is not None:
            raise _again(self._closed)

    def _enter(self) -> None:
        """Count a request in, if it is of the one event loop that is served."""
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._inside:
                raise InputError(
                    "a sampler serves one event loop at a time",
                    why="requests of another one are not done",
                    fix="load the model once for each event loop",
                )
            self._loop = loop
            self._left, self._idle = asyncio.Semaphore(self._room), asyncio.Event()
        self._inside += 1
        self._idle.clear()

    async def _run(self, trajectory: Trajectory, due: float) -> Finished:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Finished] = loop.create_future()
        arrival = next(self._arrivals)
        request = _Request(due, arrival, trajectory, future, loop)
        with self._lock:
            self._check_open()
            heapq.heappush(self._queue, request)
            if not self._serving:
                self._worker.submit(self._serve)
                self._serving = True
        try:
            return await future
        finally:
            request.dropped = True

    def _serve(self) -> None:
        """The worker's turn: until nothing is left to do, or others wait for it."""
        held: list[_Request] = []
        try:
            places = Places(self._engine(), self._count)
            while True:
                self._drop(places, held)
                new = self._take(places.free)
                held += new
                places.admit([one.trajectory for one in new])
                if held:
                    self._step(places, held)
                elif self._rest():
                    return
        except Exception as error:
            self._fail(held, error)

    def _rest(self) -> bool:
        """Whether the turn is over."""
        with self._lock:
            if not self._queue:
                self._serving = False
                return True
            if self._worker.waiting:
                self._worker.submit(self._serve)
                return True
        return False

    def _step(self, places: Places, held: list[_Request]) -> None:
        done, begun = places.rows_run, time.monotonic()
        for finished in places.run():
            index = [one.trajectory for one in held].index(finished.trajectory)
            held.pop(index).settle(finished)
        pace = (time.monotonic() - begun) / (places.rows_run - done)
        self._pace = pace if self._pace is None else min(pace, self._pace)

    def _drop(self, places: Places, held: list[_Request]) -> None:
        """Put out who is not waited for any more, who is late, and all once closed."""
        for one in list(held):
            if self._is_over(one):
                held.remove(one)
                places.drop(one.trajectory)
        with self._lock:
            kept = [one for one in self._queue if not self._is_over(one)]
            if len(kept) < len(self._queue):
                heapq.heapify(kept)
                self._queue = kept

    def _is_over(self, request: _Request) -> bool:
        """Asked of all who wait before every table row, so the usual case is short."""
        if self._closed is not None:
            request.settle(_again(self._closed))
        elif request.dropped:
            return True
        elif request.deadline == math.inf:
            return False
        elif (late := self._lateness(request)) > 0:
            request.settle(
                DeadlineError(
                    "the picture cannot be made before its deadline",
                    why=f"{request.trajectory.remaining} table rows are left, and it "
                    f"would be {late:.3f} s late at best",
                    fix="allow more time or fewer steps, or send fewer requests",
                )
            )
        else:
            return False
        return True

    def _lateness(self, request: _Request) -> float:
        """Seconds by which it misses its deadline at the best pace seen; below 0 if it
        need not."""
        left = request.trajectory.remaining * (self._pace or 0.0)
        return time.monotonic() + left - request.deadline

    def _take(self, free: int) -> list[_Request]:
        """Who comes next; nobody while another call waits for the worker."""
        with self._lock:
            count = 0 if self._worker.waiting else min(free, len(self._queue))
            return [heapq.heappop(self._queue) for _ in range(count)]

    def _fail(self, held: Sequence[_Request], error: Exception) -> None:
        why = error.what if isinstance(error, Id3pmError) else first_line(error)
        failure = EngineError(
            "the engine failed while it served requests",
            why=why,
            fix="load the model again",
        )
        failure.__cause__ = error
        self._close(failure)
        with self._lock:
            waiting, self._queue = self._queue, []
            self._serving = False
        assert self._closed is not None
        for one in (*held, *waiting):
            one.settle(_again(self._closed))


async def _acquired(semaphore: asyncio.Semaphore, due: float) -> None:
    """Take one of what the semaphore has, before the deadline."""
    if not semaphore.locked():
        await semaphore.acquire()
        return
    task = asyncio.ensure_future(semaphore.acquire())
    timeout = None if due == math.inf else max(due - time.monotonic(), 0)
    try:
        done, _ = await asyncio.wait([task], timeout=timeout)
    except asyncio.CancelledError:
        if not task.cancel():
            semaphore.release()
        raise
    if not done:
        task.cancel()
        raise DeadlineError("no place in the queue became free before the deadline")


def _again(error: Id3pmError) -> Id3pmError:
    """The same error for another caller: a traceback belongs to one."""
    copy = type(error)(error.what, why=error.why, fix=error.fix)
    copy.__cause__ = error.__cause__
    return copy
