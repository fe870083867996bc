"""One thread that an engine belongs to: what is asked of it is done in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from .errors import CancelledError

T = TypeVar("T")

_CLOSED = "the sampler was closed"


class Worker:
    """Runs calls one after another in a thread of its own, which starts with the first
    of them.

    A device's context belongs to a thread, and an engine to one thread at a time;
    whoever waits for this one leaves the interpreter free for others.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="id3pm-engine")
        self._lock = threading.Lock()
        self._waiting = 0
        self._closing = False

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return self._waiting

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queue a call.

        Raises:
            CancelledError: The worker was closed.
        """

        def run() -> T:
            with self._lock:
                self._waiting -= 1
            return function()

        with self._lock:
            if self._closing:
                raise CancelledError(_CLOSED)
            self._waiting += 1
            return self._pool.submit(run)

    def call(self, function: Callable[[Callable[[], None]], T]) -> T:
        """Run a call and wait for it.

        It is handed a check to be called often, which raises :class:`CancelledError`
        once the worker is being closed or the waiting thread was interrupted (Ctrl-C):
        the interruption goes on when the engine is at rest.

        Raises:
            CancelledError: The worker was closed.
        """
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise CancelledError("the run was interrupted")
            if self._closing:
                raise CancelledError(_CLOSED)

        def work() -> T:
            check()
            return function(check)

        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            stop.set()
            wait([future])
            raise

    def close(self, last: Callable[[], None]) -> None:
        """End the call that runs and those that wait, run ``last``, end the thread;
        nothing happens if that was done before."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            done = self._pool.submit(last)
        self._pool.shutdown(wait=True)
        done.result()
