"""One thread that an engine belongs to: what is asked of it is done in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from .errors import CancelledError

T = TypeVar("T")


class Worker:
    """Runs calls one after another in a thread of its own, which starts with the first
    of them.

    A device's context belongs to a thread, and an engine to one thread at a time; a
    call that waits for this one leaves the interpreter free for others.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="id3pm-engine")
        self._lock = threading.Lock()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return self._waiting

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Queue a call.

        Raises:
            RuntimeError: The worker was closed.
        """

        def run() -> T:
            self._count(-1)
            return function()

        self._count(1)
        try:
            return self._pool.submit(run)
        except RuntimeError:
            self._count(-1)
            raise

    def call(self, function: Callable[[Callable[[], None]], T]) -> T:
        """Run a call and wait for it.

        It is handed a check to be called often, which ends it with
        :class:`CancelledError` once the waiting thread was interrupted (Ctrl-C): that
        thread goes on when the engine is at rest.
        """
        stop = threading.Event()

        def check() -> None:
            if stop.is_set():
                raise CancelledError("the run was interrupted")

        future = self.submit(lambda: function(check))
        try:
            return future.result()
        except BaseException:
            stop.set()
            if not future.cancel():
                wait([future])
            raise

    def _count(self, change: int) -> None:
        with self._lock:
            self._waiting += change

    def close(self) -> None:
        """Wait for what was queued and end the thread."""
        self._pool.shutdown(wait=True)
