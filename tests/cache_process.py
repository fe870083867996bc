"""Takes a plan from a cache in a process of its own; see test_plan_cache.py.

Run as ``python cache_process.py CACHE KEY FILE LOG SECONDS``. The plan is not built by
TensorRT: the process notes that it builds in LOG, waits, and writes some bytes. What it
printed last is ``built`` or ``taken``.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from id3pm_deploy.builders.cache import PlanCache

FACTS = {"version": "1", "seconds": 0.5}


def build(file: Path, log: Path, seconds: float) -> dict[str, Any]:
    """Write the plan in two halves, with time for something to happen between."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)
    with open(file, "wb") as handle:
        handle.write(b"half a plan, ")
        handle.flush()
        time.sleep(seconds)
        handle.write(b"and the other half" * 1000)
    return FACTS


def main() -> None:
    """Take the plan; say who built it."""
    folder, key, file, log, seconds = sys.argv[1:]
    cache = PlanCache(Path(folder))
    path = Path(file)
    served = cache.get_or_build(
        key, lambda: build(path, Path(log), float(seconds)), path, lambda _: None
    )
    assert served.facts == FACTS
    assert cache.notes == [], cache.notes
    sys.stdout.write("taken\n" if served.from_cache else "built\n")


if __name__ == "__main__":
    main()
