"""From nothing to the first picture, in a process of its own, and what that took of
memory.

A column that the system kills for want of memory takes only its own process with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError, first_line
from .case import Case

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from id3pm_deploy.benchmark.child import main; main()"
)
MEMORY_METHOD = (
    "host: the process's high-water mark of resident memory; device: what the GPU had "
    "in use more at the end than before, by nvidia-smi"
)


@dataclass(frozen=True)
class ColdStart:
    """One cold start.

    Attributes:
        seconds: From starting the process to the picture on the host.
        opened: From there to an engine that is ready.
        peak_bytes: Most memory of the process; None where the system does not say.
        device_bytes: Memory on the GPU; None without one.
    """

    seconds: float
    opened: float
    peak_bytes: int | None
    device_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """The fields, as they are."""
        return dict(vars(self))


def cold_start(case: Case, column: str) -> ColdStart:
    """Make one picture in a new process.

    Raises:
        EngineError: The column cannot run there, or its process died.
    """
    request = {
        "bundle": os.path.abspath(case.model.path),
        "checkpoint": case.checkpoint and os.path.abspath(case.checkpoint),
        "settings": case.settings.to_json(),
        "column": column,
    }
    paths = [os.path.abspath(path) for path in sys.path]
    before = gpu_bytes()
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _BOOT, json.dumps(paths)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise EngineError(_how_it_died(done)) from error
    if "reason" in found:
        raise EngineError(found["reason"], why=found["why"])
    device = found["gpu_bytes"]
    return ColdStart(
        seconds=found["picture"] - begun,
        opened=found["opened"] - begun,
        peak_bytes=found["peak_bytes"],
        device_bytes=None if None in (before, device) else max(device - before, 0),
    )


def _how_it_died(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        more = ", as the system does where memory is short" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{more}"
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return f"its process ended with status {done.returncode}: {''.join(last)[:200]}"


def peak_bytes() -> int | None:
    """This process's high-water mark; ``getrusage`` would count its parent's."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def gpu_bytes() -> int | None:
    """Memory in use on the first GPU, by all; None where nvidia-smi does not say."""
    words = ["--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, check=True
        )
        return int(done.stdout.splitlines()[0]) << 20
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def reason_of(error: Exception) -> str:
    """Why a column did not run, in a line for the table."""
    what = getattr(error, "what", None) or first_line(error)
    why = getattr(error, "why", "")
    return f"{what} ({why})" if why else str(what)
