"""What the process that builds a plan tells its parent: messages and progress."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import BuildError

if TYPE_CHECKING:
    import tensorrt

_PROFILE_PHASE = "Computing profile costs"
"""TensorRT's name of the phase whose steps are shared out among the profiles."""

_KEPT_MESSAGES = 20
_SECONDS_BETWEEN_EVENTS = 0.05

_MEMORY = (
    "out of memory",
    "outofmemory",
    "bad_alloc",
    "insufficient memory",
    "find any implementation",
)
"""What a message of TensorRT holds, in lower case, when memory was short.

The last one names a node, and nearly always means that no kernel fitted in the
workspace.
"""

_HINTS = {
    "turing": "compute capability 7.5 has no float32 matrix products in TensorRT-RTX; "
    "leave it out of compute_capabilities",
    "driver version is insufficient": "build where a GPU and its driver are, or name "
    "the compute_capabilities to build for",
}
"""What a message of TensorRT holds, in lower case, to what can be done."""


def out_of_memory(why: str) -> BuildError:
    """The error for a build that wanted more memory than there is."""
    return BuildError(
        "the build ran out of memory",
        why=why,
        fix="close other programs, or change the recipe: lower the most samples of "
        "dynamic_samples, workspace_share or workspace_bytes, or optimization_level",
    )


class Channel:
    """Events to the parent. What anything else prints goes to standard error."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._out = os.dup(1)
        os.dup2(2, 1)

    def send(self, event: str, **values: Any) -> None:
        """Send one event, whole; without a parent, end."""
        line = json.dumps({"event": event, **values}).encode() + b"\n"
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._out, line) :]
            except OSError:
                os._exit(1)


@dataclass
class Messages:
    """What TensorRT said, errors and warnings, each text once."""

    channel: Channel
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Keep a message of severity ``ERROR``, ``INTERNAL_ERROR`` or ``WARNING``."""
        kept = self.warnings if severity == "WARNING" else self.errors
        text = " ".join(text.split())
        if text not in kept and len(kept) < _KEPT_MESSAGES:
            kept.append(text)
            self.channel.send("message", severity=severity, text=text)

    def error(self, what: str, fix: str = "") -> BuildError:
        """A :class:`BuildError` whose cause is what TensorRT said."""
        why = "; ".join(self.errors)
        if any(needle in why.lower() for needle in _MEMORY):
            return out_of_memory(f"{what}: {why}")
        hints = [hint for needle, hint in _HINTS.items() if needle in why.lower()]
        return BuildError(what, why=why, fix=(hints or [fix])[0])


class Phases:
    """Turns the monitor's calls, from any thread, into events now and then."""

    def __init__(self, channel: Channel, profiles: int) -> None:
        self._channel, self._profiles = channel, profiles
        self._steps: dict[str, int] = {}
        self._done, self._last = 0, 0.0

    def start(self, name: str, steps: int) -> None:
        """A phase of that many steps begins."""
        self._steps[name] = steps
        self._send(name, 0)

    def step(self, name: str, index: int) -> None:
        """Step ``index``, counted from 0, of a phase is done."""
        steps = self._steps.get(name, 1)
        if name == _PROFILE_PHASE:
            done = (index + 1) * self._profiles // steps
            self._channel.send("profiles", done=done - self._done)
            self._done = done
        self._send(name, index + 1)

    def _send(self, name: str, done: int) -> None:
        now = time.monotonic()
        if done == 0 or now - self._last > _SECONDS_BETWEEN_EVENTS:
            self._last = now
            self._channel.send("phase", name=name, done=done, steps=self._steps[name])


def make_logger(trt: Any, messages: Messages) -> tensorrt.ILogger:
    """An ``ILogger`` that keeps errors and warnings."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR", "WARNING"):
                messages.add(severity.name, text)

    return Logger()


def make_monitor(trt: Any, phases: Phases) -> tensorrt.IProgressMonitor:
    """An ``IProgressMonitor`` that reports to ``phases``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, steps)

        def step_complete(self, name: str, index: int) -> bool:
            phases.step(name, index)
            return True

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
