"""Commands in a home, a temporary folder and a working folder of their own.

A :class:`Sandbox` runs ``id3pm-deploy`` in a child of a fork server (see
``forkserver.py``) under limits of memory and file size, and says what it printed,
what it cost and which files are there afterwards.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MEMORY = 2 << 30
"""Bytes of address space that a command may take beyond its imports."""
SECONDS = 300.0
"""Longest a command may take on a machine however busy; what counts is its CPU time."""

# Not onnxruntime: importing it starts a thread, which a fork would lose.
DEVICE = ("click", "numpy", "PIL.Image", "cv2")
BUILD = (
    *DEVICE,
    "torch",
    "torch.export",
    "torch.onnx",
    "onnx",
    "onnxscript",
    "safetensors.torch",
    "diffusers.models.unets.unet_2d",
)


class ForkServer:
    """A process that runs one command at a time in forked children."""

    def __init__(self, modules: Sequence[str]) -> None:
        script = str(HERE / "forkserver.py")
        # One thread, and so a process that can be forked without fear.
        single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self._process = subprocess.Popen(
            [sys.executable, script, str(ROOT), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **single, "HF_HUB_OFFLINE": "1"},
        )
        assert self._answer() == {"threads": 1}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@dataclass(frozen=True)
class Finished:
    """What became of a command.

    Attributes:
        status: Exit status; minus the signal where one ended it.
        stdout: What it printed.
        stderr: Its messages.
        peak: Most bytes resident beyond the imports.
        cpu: CPU seconds.
        seconds: Wall time.
        timed_out: Whether it was killed for taking too long.
    """

    status: int
    stdout: str
    stderr: str
    peak: int
    cpu: float
    seconds: float
    timed_out: bool


@dataclass
class Sandbox:
    """Folders of its own under ``root``, and commands that see only those.

    Attributes:
        server: Runs the commands.
        root: Holds ``home``, ``temporary``, ``log`` and ``work``, where commands start.
        limits: Changes of the default limits: ``memory``, ``file_size``; None is none.
        path: Folders in front of the module search path.
        before: ``module:function`` to call in the child before the command.
        variables: More variables of its environment.
    """

    server: ForkServer
    root: Path
    limits: dict[str, int | None] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("home", "temporary", "work", "log"):
            (self.root / name).mkdir(exist_ok=True)

    @property
    def work(self) -> Path:
        """Where commands start."""
        return self.root / "work"

    def start(self, *arguments: object, kill_before: int | None = None) -> int:
        """Begin a command; returns its process, which leads a session of its own.

        Args:
            arguments: Of ``id3pm-deploy``.
            kill_before: Number of the change of a file in the sandbox before which the
                command is killed.
        """
        (self.root / "log" / "changes").unlink(missing_ok=True)
        request = {
            "args": [os.fsdecode(str(a)) for a in arguments],
            "cwd": str(self.work),
            "env": self.environment(),
            "stdout": str(self.root / "log" / "stdout"),
            "stderr": str(self.root / "log" / "stderr"),
            "memory": self.limits.get("memory", MEMORY),
            "file_size": self.limits.get("file_size"),
            "path": [str(HERE), *self.path],
            "before": list(self.before),
            "watch": [str(self.root), str(self.root / "log/changes"), kill_before],
        }
        return int(self.server.ask(request)["pid"])

    def environment(self) -> dict[str, str]:
        """Variables of the commands: a home and a temporary folder of their own."""
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}
        own = {"HOME": str(self.root / "home"), "TMPDIR": str(self.root / "temporary")}
        single = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        return {**kept, **own, **single, "PYTHONPATH": str(ROOT), **self.variables}

    def finish(self, seconds: float = SECONDS) -> Finished:
        """Wait for the command that was begun last."""
        found = self.server.ask({"wait": seconds})
        for name in ("stdout", "stderr"):
            data = (self.root / "log" / name).read_bytes()
            found[name] = data.decode("utf-8", "replace")
        return Finished(**found)

    def run(self, *arguments: object, seconds: float = SECONDS) -> Finished:
        """Run a command to its end."""
        self.start(*arguments)
        return self.finish(seconds)

    def changes(self) -> list[str]:
        """The changes of files that the last command made, in order."""
        path = self.root / "log" / "changes"
        return path.read_text().splitlines() if path.exists() else []

    def files(self) -> list[str]:
        """Everything in the sandbox but logs, as sorted relative paths."""
        places = (self.root / name for name in ("home", "temporary", "work"))
        found = (path for place in places for path in place.rglob("*"))
        return sorted(str(path.relative_to(self.root)) for path in found)


def kill(process: int) -> None:
    """SIGKILL to a command and everything it started."""
    os.killpg(process, signal.SIGKILL)


def check_refused(
    found: Finished, *words: str, peak: int = MEMORY, seconds: float = 20.0
) -> None:
    """Fail unless a command ended with a message of ours, soon and in little memory.

    Args:
        found: The finished command.
        words: Parts of the message.
        peak: Most bytes beyond the imports.
        seconds: Most CPU seconds.
    """
    said = found.stderr
    assert not found.timed_out, said
    assert found.status in (1, 2), (found.status, found.stdout, said)
    assert "Traceback" not in said, said
    # A warning may come first: of memory, on a machine that has little of it free.
    lines = itertools.dropwhile(
        lambda one: one.startswith("warning: "), said.split("\n")
    )
    assert next(lines, "").startswith("error: "), said
    assert len(said) < 4000, said[:4000]
    assert all(c.isprintable() or c == "\n" for c in said), repr(said)
    for word in words:
        assert word in said, said
    assert found.peak < peak, found.peak
    assert found.cpu < seconds, found.cpu


def check_done(found: Finished) -> None:
    """Fail unless a command succeeded."""
    assert found.status == 0, (found.status, found.stdout, found.stderr)
