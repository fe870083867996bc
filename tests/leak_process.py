"""Loads and closes a bundle again and again, and prints what that left behind.

    python tests/leak_process.py BUNDLE CYCLES SETTLE

One JSON line: bytes of memory after ``SETTLE`` cycles and at the end, open descriptors
and threads then and before.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

import id3pm_deploy


def resident() -> int:
    """Bytes of memory that are this process's own, in RAM or swapped out.

    Pages of files are left out: the system takes them away and reads them again.
    """
    gc.collect()
    text = Path("/proc/self/status").read_text(encoding="ascii")
    facts = dict(line.split(":", 1) for line in text.splitlines())
    return sum(int(facts[name].split()[0]) << 10 for name in ("RssAnon", "VmSwap"))


def held() -> tuple[int, int]:
    """Open descriptors, and the threads of the system's count."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def main(bundle: str, cycles: int, settle: int) -> None:
    """Cycle, and print the figures."""
    sizes, first = [], (0, 0)
    for cycle in range(cycles):
        with id3pm_deploy.load(bundle, threads=1) as sampler:
            sampler.sample_all(None, count=2, steps=1, solver="ddim")
        if cycle + 1 >= settle:
            sizes.append(resident())
        if cycle + 1 == settle:
            first = held()
    found = {
        "after_settling": sizes[0],
        "at_the_end": sizes[-1],
        "held_then": first,
        "held_now": held(),
        "python_threads": threading.active_count(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
