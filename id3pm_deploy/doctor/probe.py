"""Trying something in a child process with a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .host import Host

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from id3pm_deploy.doctor.probes import main; main(*sys.argv[2:])"
)
_HERE = str(Path(__file__).resolve().parent.parent.parent)
_SECONDS_TO_DIE = 2.0
_AT_ONCE = 4


@dataclass(frozen=True)
class Probe:
    """Something to try.

    Attributes:
        name: Of a function in ``probes.PROBES``.
        arguments: Its arguments.
        doing: What it does, in words: "importing numpy".
    """

    name: str
    arguments: tuple[str, ...]
    doing: str


@dataclass(frozen=True)
class Outcome:
    """What came of a probe.

    Attributes:
        facts: What it found; empty if it failed.
        problem: Why it failed, one sentence; empty if it did not.
        absent: It failed because there is nothing to try.
        seconds: How long it took.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    absent: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it worked."""
        return not self.problem

    @property
    def broken(self) -> bool:
        """Whether something is there and does not work."""
        return bool(self.problem) and not self.absent


Prober = Callable[[Probe, Host, float], Outcome]


def importing(*modules: str) -> Probe:
    """The probe that imports modules in this order."""
    return Probe("import", modules, f"importing {' and '.join(modules)}")


def run_probe(probe: Probe, host: Host, limit: float) -> Outcome:
    """Run one probe in a process group of its own.

    Args:
        probe: What to try.
        host: Its search path is the child's; paths in messages are shortened by it.
        limit: Seconds after which the child is ended.
    """
    command = [sys.executable, "-I", "-c", _BOOT]
    # The product itself is importable wherever the child looks for other modules.
    command += [json.dumps([*host.search, _HERE]), probe.name, *probe.arguments]
    begun = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(problem=f"{probe.doing} could not be tried: {error.strerror}")
    said, late = _listen(process, limit)
    seconds = round(time.monotonic() - begun, 3)
    if late:
        return Outcome(problem=f"{probe.doing} took over {limit:g} s", seconds=seconds)
    return _outcome(probe, host, said, process.returncode, seconds)


def _listen(process: subprocess.Popen[bytes], limit: float) -> tuple[bytes, bool]:
    """What the child printed, and whether it ran out of time.

    A process that waits inside a driver cannot be ended; it is left behind.
    """
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _end(process)
        return b"", True
    except BaseException:  # Ctrl-C leaves no child behind
        _end(process)
        raise
    return said, False


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_DIE)


def _outcome(
    probe: Probe, host: Host, said: bytes, status: int, seconds: float
) -> Outcome:
    if status < 0:
        return Outcome(
            problem=f"{probe.doing} died of {_signal_name(-status)}", seconds=seconds
        )
    try:
        answer = json.loads(said)
        if "facts" in answer:
            return Outcome(facts=dict(answer["facts"]), seconds=seconds)
        error, absent = str(answer["error"]), bool(answer["absent"])
    except (ValueError, KeyError, TypeError):
        error, absent = f"the process ended with status {status}", False
    problem = f"{probe.doing} failed: {host.redacted(error)}"
    return Outcome(problem=problem, absent=absent, seconds=seconds)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def run_probes(
    probes: Mapping[str, Probe], host: Host, limit: float, prober: Prober = run_probe
) -> dict[str, Outcome]:
    """Run several probes, a few at a time; the results by the same names."""

    def one(probe: Probe) -> Outcome:
        return prober(probe, host, limit)

    asked: Sequence[Probe] = list(probes.values())
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        return dict(zip(probes, pool.map(one, asked), strict=True))
