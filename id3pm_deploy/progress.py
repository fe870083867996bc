"""One line of progress on standard error, for people; silence for everything else.

Drawing is left to a small thread, so that a tick costs two additions, and a step that
takes a minute still shows that time passes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

_DELAY = 0.5
"""Seconds of work before anything is shown."""
_INTERVAL = 0.1
"""Seconds between two drawings, at least."""
_BAR = 24
"""Width of the bar, in characters."""


class Tick(Protocol):
    """What :func:`progress` yields: call it when ``n`` more units are done."""

    def __call__(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` units as done; a note stays until the next one."""


def _clock(seconds: float) -> str:
    """``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _rate(done: int, seconds: float) -> str:
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def _one_line(text: str) -> str:
    """``text`` without anything that could move the cursor."""
    return "".join(c if c.isprintable() else " " for c in text)


def format_line(
    label: str, done: int, total: int | None, seconds: float, note: str = ""
) -> str:
    """The line that :func:`progress` shows, of any width.

    Args:
        label: What is being done.
        done: Units finished.
        total: Units in all, or None where nobody knows.
        seconds: Time since the start.
        note: The last note given to a tick.
    """
    parts = [_one_line(label)]
    if total is not None:
        share = min(1.0, done / total) if total > 0 else 1.0
        full = int(share * _BAR)
        parts += [f"[{'#' * full}{'.' * (_BAR - full)}]", f"{done}/{total}"]
    elif done:
        parts.append(str(done))
    parts.append(_rate(done, seconds))
    if total is not None and 0 < done < total:
        parts.append(f"{_clock(seconds * (total - done) / done)} left")
    else:
        parts.append(_clock(seconds))
    parts.append(_one_line(note))
    return "  ".join(part for part in parts if part)


class _Line:
    """The line on the terminal and the thread that keeps it fresh."""

    def __init__(self, stream: TextIO, total: int | None, label: str) -> None:
        self._stream, self._total, self._label = stream, total, label
        self._done, self._note, self._shown = 0, "", ""
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tick(self, n: int = 1, note: str = "") -> None:
        self._done += n
        if note:
            self._note = note

    def close(self) -> None:
        """Stop drawing; finish the line if there is one."""
        self._stop.set()
        self._thread.join()
        if self._shown:
            self._draw()
            self._write("\n")

    def _run(self) -> None:
        wait = _DELAY
        while not self._stop.wait(wait):
            self._draw()
            wait = _INTERVAL

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _draw(self) -> None:
        seconds = time.monotonic() - self._began
        line = format_line(self._label, self._done, self._total, seconds, self._note)
        line = line[: self._columns() - 1]
        if line != self._shown:
            self._write("\r" + line.ljust(len(self._shown)))
            self._shown = line

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # a closed terminal is no error
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()


def _nothing(n: int = 1, note: str = "") -> None:
    """A tick where nobody is watching."""


@contextlib.contextmanager
def progress(
    total: int | None, label: str, *, enabled: bool | None = None
) -> Iterator[Tick]:
    """Show how far a piece of work is, with its rate and the time left.

    Args:
        total: Units of work in all; None where it is not known, then only the count
            and the time are shown.
        label: What is being done, a word or two.
        enabled: Draw or not; None means only where standard error is a terminal.

    Yields:
        A function to call after each unit, ``tick(n=1, note="")``; a note stays until
        the next one. Work that ends within half a second shows nothing.
    """
    stream = sys.stderr  # None under pythonw
    if stream is None or not (stream.isatty() if enabled is None else enabled):
        yield _nothing
        return
    line = _Line(stream, total, label)
    try:
        yield line.tick
    finally:
        line.close()
