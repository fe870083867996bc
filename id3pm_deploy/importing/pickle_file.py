"""A pickled state dict as a safetensors file, made by a process with limits.

Unpickling is the one way to read what torch.save wrote. It is left to a child process
(``pickle_child``) that calls torch's weights-only unpickler, has neither standard input
nor this process's environment, and ends at a limit of memory and of time. What comes
back is a safetensors file, in which nothing can be run.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputError
from .pickle_child import FORBIDDEN_STATUS, REPORT, TENSORS, refused

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from id3pm_deploy.importing.pickle_child import main; main()"
)
_KEPT = ("LD_LIBRARY_PATH",)
_MAX_REPORT = 1 << 16
_MEBIBYTE = 1 << 20
_SECONDS = 120.0
_BYTES_A_SECOND = 10 * _MEBIBYTE
_GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class ImportLimits:
    """What the process that reads a pickle may use.

    Attributes:
        memory: Bytes of address space beyond torch's own, the mapped file included;
            None is twice the file and 512 MiB.
        seconds: Time in all; None is two minutes and a second for each 10 MiB.
    """

    memory: int | None = None
    seconds: float | None = None

    def of(self, size: int) -> tuple[int, float]:
        """Memory and seconds for a file of ``size`` bytes."""
        memory = 2 * size + 512 * _MEBIBYTE if self.memory is None else self.memory
        seconds = self.seconds
        if seconds is None:
            seconds = _SECONDS + size / _BYTES_A_SECOND
        return memory, seconds


def tensors_of_pickle(path: Path, work: Path, limits: ImportLimits) -> Path:
    """Have a child process turn a pickled state dict into a safetensors file.

    Args:
        path: What torch.save wrote.
        work: A private folder, for the file that comes back.
        limits: Of the child.

    Returns:
        A safetensors file in ``work`` with the same tensors.

    Raises:
        CheckpointError: The file is no plain state dict, needs more than the limits,
            or ends the process that reads it; a signal is named.
        OutputError: There is no room.
    """
    size = path.stat().st_size
    memory, seconds = limits.of(size)
    if size > memory:
        raise CheckpointError(
            f"{path.name} is larger than the memory limit",
            why=f"it has {size} bytes, the limit is {memory}",
            fix=f"give --memory-limit {_gibibytes(ImportLimits().of(size)[0])} if you "
            "trust the file",
        )
    request = {
        "path": os.path.abspath(path),
        "work": os.path.abspath(work),
        "memory": memory,
        "seconds": math.ceil(seconds),
        "file_size": 2 * size + 64 * _MEBIBYTE,
    }
    status = _run_child(request, work, seconds, path.name)
    report = _report(work)
    if status == 0 and report.get("done") is True:
        return work / TENSORS
    if status == 0 and report.get("memory") is True:
        raise CheckpointError(
            f"reading {path.name} takes more memory than the limit",
            why=f"the limit is {memory} bytes",
            fix=f"give --memory-limit {_gibibytes(2 * memory)} if you trust the file",
        )
    if status == 0 and "what" in report:
        kind = OutputError if report.get("kind") == "OutputError" else CheckpointError
        raise kind(report["what"], why=report["why"], fix=report["fix"])
    raise _failure(status, path.name, seconds)


def _run_child(request: dict[str, Any], work: Path, seconds: float, name: str) -> int:
    """Run the child to its end; its exit status, negative for a signal."""
    paths = [os.path.abspath(entry) for entry in sys.path]
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(work)}
    command = [sys.executable, "-I", "-B", "-W", "ignore", "-c", _BOOT]
    with (
        open(work / "log", "wb") as log,
        subprocess.Popen(
            [*command, json.dumps(paths), json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=work,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise CheckpointError(
                f"reading {name} takes longer than the time limit",
                why=f"the limit is {seconds:g} s",
                fix=f"give --time-limit {2 * seconds:g} if you trust the file",
            ) from None
        finally:
            process.kill()


def _report(work: Path) -> dict[str, Any]:
    try:
        with open(work / REPORT, "rb") as handle:
            found = json.loads(handle.read(_MAX_REPORT))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


_SIGNALS = {
    "SIGKILL": "the machine most likely ran out of memory: close other programs",
    "SIGXCPU": "raise --time-limit if you trust the file",
    "SIGXFSZ": "do not use this file; it makes more of itself than it holds",
    "SIGSEGV": "do not use this file; it is damaged, or made to do harm",
    "SIGABRT": "do not use this file; it is damaged, or made to do harm",
    "SIGBUS": "do not use this file; it was cut off while it was read",
}


def _failure(status: int, name: str, seconds: float) -> Exception:
    if status < 0:
        try:
            which = signal.Signals(-status).name
        except ValueError:
            which = f"signal {-status}"
        return CheckpointError(
            f"the process that reads {name} was ended by {which}",
            why=f"its time limit is {seconds:g} s" if which == "SIGXCPU" else "",
            fix=_SIGNALS.get(which, "try again; if it stays, do not use the file"),
        )
    if status == FORBIDDEN_STATUS:
        return refused(name, "reading it tried to do more than read")
    if status == 0:
        return OutputError(f"the tensors of {name} could not be written")
    return CheckpointError(
        f"the process that reads {name} ended with status {status}",
        fix="run `id3pm-deploy doctor`: PyTorch may not work here",
    )


def _gibibytes(size: int) -> str:
    return f"{math.ceil(10 * size / _GIBIBYTE) / 10:g}"
