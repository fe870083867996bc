"""How long a command takes, and how much memory it and all it starts hold at most."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.4
METHOD = (
    "the larger of: the sum of the tree's proportional set sizes, looked at every "
    f"{INTERVAL:g} s, file pages that are mapped included; the kernel's own high-water "
    "mark of the largest process"
)

_PROC = Path("/proc")


@dataclass(frozen=True)
class Ran:
    """A command that has ended.

    Attributes:
        seconds: Wall-clock time.
        processor_seconds: Of it and of what it started.
        peak_bytes: Most memory of the tree; see METHOD.
        anonymous_bytes: Most memory of it that belongs to no file, sampled.
        status: Exit status; negative for a signal.
        output: The end of what it printed.
    """

    seconds: float
    processor_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    status: int
    output: str


def run_measured(
    command: Sequence[str], log: Path, cwd: Path, limit: float | None = None
) -> Ran:
    """Run a command to its end; it is killed after ``limit`` seconds."""
    begun = time.perf_counter()
    peak = anonymous = 0
    with open(log, "w+b") as handle:
        process = subprocess.Popen(
            command, stdout=handle, stderr=subprocess.STDOUT, cwd=cwd
        )
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            whole, own, largest = tree_bytes(process.pid)
            peak, anonymous = max(peak, whole, largest), max(anonymous, own)
            if limit is not None and time.perf_counter() - begun > limit:
                process.kill()
            time.sleep(INTERVAL)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    return Ran(
        seconds=time.perf_counter() - begun,
        processor_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak,
        anonymous_bytes=anonymous,
        status=process.returncode,
        output=log.read_text("utf-8", "replace")[-2000:],
    )


def tree_bytes(pid: int) -> tuple[int, int, int]:
    """Of a process and its descendants: proportional set size, what of it belongs to no
    file, and the largest process's high-water mark."""
    whole = own = largest = 0
    for one in _tree(pid):
        now = _values(_PROC / str(one) / "smaps_rollup")
        whole, own = whole + now.get("Pss", 0), own + now.get("Pss_Anon", 0)
        status = _values(_PROC / str(one) / "status")
        largest = max(largest, status.get("VmHWM", 0))
    return whole, own, largest


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for path in _PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in path.read_text().split():
                yield from _tree(int(child))


def _values(path: Path) -> dict[str, int]:
    """Bytes by name in a file with ``Name: 12 kB``; none for a process that ended."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, rest = line.partition(":")
            if rest.endswith(" kB"):
                found[name] = int(rest.split()[0]) * 1024
    return found
