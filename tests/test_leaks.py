"""Loading and closing leaves nothing behind: no memory, descriptors or threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CYCLES, SETTLE = 500, 50
MOST_GROWTH = 2 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")
def test_500_cycles_leave_nothing_behind(tiny_bundle: Path, root: Path) -> None:
    """In a process of its own, as other tests would disturb the figures."""
    script = root / "tests" / "leak_process.py"
    command = [sys.executable, str(script), str(tiny_bundle), str(CYCLES), str(SETTLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["held_now"] == found["held_then"]
    assert found["python_threads"] == 1
    growth = found["at_the_end"] - found["after_settling"]
    assert growth <= MOST_GROWTH, f"{growth / 2**20:.2f} MiB in {CYCLES} cycles"
