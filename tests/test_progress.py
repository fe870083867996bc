"""The progress line: silent for machines and for short work, tidy for people."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from id3pm_deploy.progress import format_line, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Puts a terminal in the place of standard error, when called in the test.

    (A fixture runs in pytest's setup phase, after which pytest sets it once more.)
    """

    def replace() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


def test_nothing_is_shown_where_standard_error_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(3, "work") as tick:
        time.sleep(0.7)
        tick()
    assert stream.getvalue() == ""


def test_it_can_be_switched_off_on_a_terminal(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()
    with progress(3, "work", enabled=False) as tick:
        time.sleep(0.7)
        tick()
    assert screen.getvalue() == ""


def test_short_work_shows_nothing(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()
    with progress(3, "work") as tick:
        for _ in range(3):
            tick()
    assert screen.getvalue() == ""


def test_long_work_is_drawn_on_one_line_and_ends_at_its_total(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()
    with progress(8, "work") as tick:
        for i in range(8):
            time.sleep(0.1)
            tick(1, f"loss {i}")
    text = screen.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    last = text.rstrip().split("\r")[-1]
    assert "8/8" in last
    assert "loss 7" in last


def test_many_ticks_are_not_many_drawings(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()
    end = time.monotonic() + 1.0
    with progress(None, "work") as tick:
        while time.monotonic() < end:
            tick()
    assert 1 <= screen.getvalue().count("\r") <= 8


def test_time_passes_visibly_without_a_tick(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()
    with progress(None, "building"):
        time.sleep(0.8)
    assert "building" in screen.getvalue()


def test_an_exception_ends_the_line_and_passes_through(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()

    def work() -> None:
        with progress(5, "work") as tick:
            tick()
            time.sleep(0.7)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work()
    assert "1/5" in screen.getvalue()
    assert screen.getvalue().endswith("\n")


def test_a_closed_terminal_does_not_stop_the_work(
    terminal: Callable[[], Terminal],
) -> None:
    screen = terminal()
    with progress(5, "work") as tick:
        screen.close()
        time.sleep(0.7)
        tick()


@pytest.mark.parametrize(
    ("done", "total", "seconds", "expected"),
    [
        (0, 4, 1.0, "work  [........................]  0/4  0:01"),
        (1, 4, 2.0, "work  [######..................]  1/4  2.0 s each  0:06 left"),
        (4, 4, 2.0, "work  [########################]  4/4  2.0/s  0:02"),
        (9, 4, 1.0, "work  [########################]  9/4  9.0/s  0:01"),
        (0, 0, 1.0, "work  [########################]  0/0  0:01"),
        (7, None, 3700.0, "work  7  528.6 s each  1:01:40"),
    ],
)
def test_the_line(done: int, total: int | None, seconds: float, expected: str) -> None:
    assert format_line("work", done, total, seconds) == expected


def test_a_note_cannot_move_the_cursor() -> None:
    line = format_line("wo\x1brk", 1, 2, 1.0, "a\r\nb\x1b[2J")
    assert line.isprintable()


def test_the_module_imports_nothing_heavy() -> None:
    code = "import sys, id3pm_deploy.progress; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert loaded.isdisjoint({"numpy", "PIL", "torch", "onnx", "cv2"})
