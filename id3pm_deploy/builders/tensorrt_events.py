"""What the process that builds a plan tells its parent: messages and progress."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BuildError, Id3pmError

if TYPE_CHECKING:
    import tensorrt

_PROFILE_PHASE = "Computing profile costs"
"""TensorRT's name of the phase whose steps are shared out among the profiles."""

_KEPT_MESSAGES = 20
_SECONDS_BETWEEN_EVENTS = 0.05

SECONDS_OF_REST = 60.0
_SECONDS_BETWEEN_LOOKS = 0.5
_LEAST_WORK = 0.02
"""Share of a processor that a process at work uses."""

_NO_KERNEL = ("find any implementation", "within workspace limit")
"""What TensorRT says of a node when no kernel fits into its workspace."""

_REQUESTED = re.compile(r"requested size was ([0-9]+)")
"""What it says of memory that it did not get, be it for want or by the limit."""

_MEMORY = (
    "out of memory",
    "outofmemory",
    "bad_alloc",
    "insufficient memory",
    "myelin_tensor.h:47: check(p) failed",
    "resource temporarily unavailable",
)
"""What a message holds, in lower case, when an allocation failed.

The last two are TensorRT-RTX's words for one that it does not check, and for a thread
that cannot be started. They and the two before ``insufficient memory`` were seen when
its memory was limited; the others are documented, and of GPUs.
"""

_DEVICE = ("cuda", "gpu", "device memory")
"""What such a message holds if the memory was the GPU's."""

_HINTS = {
    "turing": "compute capability 7.5 has no float32 matrix products in TensorRT-RTX; "
    "leave it out of compute_capabilities",
    "libnvinfer_lean": "install TensorRT's lean runtime, or leave out "
    "version_compatible",
    "driver version is insufficient": "build where a GPU and its driver are, or name "
    "the compute_capabilities to build for",
}
"""What a message of TensorRT holds, in lower case, to what can be done."""


@dataclass(frozen=True)
class Limits:
    """What bounds the memory of a build, to be named when it was not enough.

    Attributes:
        samples: Most samples of all profiles.
        workspace: Bytes that the workspace may have; None if the library decides.
        capabilities: How many GPUs the plan is for.
    """

    samples: int = 1
    workspace: int | None = None
    capabilities: int = 0

    def memory_error(self, why: str) -> BuildError | None:
        """The error for what TensorRT said, if memory was the cause."""
        lower = why.lower()
        wanted = max(map(int, _REQUESTED.findall(lower)), default=0)
        limited = self.workspace is not None and wanted > self.workspace
        if limited or any(needle in lower for needle in _NO_KERNEL):
            return self._no_kernel(why, wanted)
        if not says_memory(lower):
            return None
        if any(needle in lower for needle in _DEVICE):
            return self._device(why)
        return self.host_error(why)

    def _no_kernel(self, why: str, wanted: int) -> BuildError:
        what = "no kernel fits into the memory that TensorRT may work in"
        if self.workspace is None:
            fix = f"free memory on the GPU, or {self._fewer_samples()}"
            return BuildError(what, why=why, fix=fix)
        size = f"{self.workspace / (1 << 20):.0f} MiB"
        fix = f"raise workspace_bytes or workspace_share: the limit is {size}"
        if wanted > self.workspace:
            fix += f", and {wanted / (1 << 20):.0f} MiB were asked for"
        return BuildError(what, why=why, fix=fix)

    def _device(self, why: str) -> BuildError:
        size = "not set"
        if self.workspace is not None:
            size = f"{self.workspace / (1 << 20):.0f} MiB"
        return BuildError(
            "the build ran out of GPU memory",
            why=why,
            fix=f"lower workspace_bytes (now {size}) in the recipe, or "
            + self._fewer_samples(),
        )

    def host_error(self, why: str) -> BuildError:
        """The error for a build that ran out of the machine's memory."""
        fix = f"close other programs, or {self._fewer_samples()}"
        if self.capabilities > 1:
            fix += f", or name fewer compute_capabilities (now {self.capabilities})"
        return BuildError("the build ran out of memory", why=why, fix=fix)

    def _fewer_samples(self) -> str:
        return f"build for fewer samples at a time (now up to {self.samples})"


def says_memory(text: str) -> bool:
    """Whether a message of TensorRT's tells of an allocation that failed."""
    lower = text.lower()
    return any(needle in lower for needle in _MEMORY)


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
    limits: Limits = Limits()
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
        memory = self.limits.memory_error(why)
        if memory is not None:
            return memory
        hints = [hint for needle, hint in _HINTS.items() if needle in why.lower()]
        return BuildError(what, why=why, fix=(hints or [fix])[0])


class Watch:
    """Ends this process when nothing has worked in it for a while.

    TensorRT-RTX waits for ever for a thread that could not be started for want of
    memory, and says nothing. To be used where the GPU has no part in the build: who
    waits for one uses no processor time either.

    Args:
        channel: Who is told, before the process ends.
        error: What is told.
        seconds: How long nothing may happen.
    """

    def __init__(
        self, channel: Channel, error: BuildError, seconds: float = SECONDS_OF_REST
    ) -> None:
        self._channel, self._error, self._seconds = channel, error, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        rested, before = 0.0, time.process_time()
        while rested < self._seconds:
            if self._stop.wait(_SECONDS_BETWEEN_LOOKS):
                return
            now = time.process_time()
            worked = now - before > _LEAST_WORK * _SECONDS_BETWEEN_LOOKS
            rested, before = 0.0 if worked else rested + _SECONDS_BETWEEN_LOOKS, now
        send_error(self._channel, self._error)
        os._exit(0)


def send_error(channel: Channel, error: Id3pmError) -> None:
    """Tell the parent why there will be no plan."""
    texts = {"what": error.what, "why": error.why, "fix": error.fix}
    channel.send("error", kind=type(error).__name__, **texts)


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


class Listener(Protocol):
    """Who is told what TensorRT says."""

    def add(self, severity: str, text: str) -> None:
        """A message of severity ``ERROR``, ``INTERNAL_ERROR`` or ``WARNING``."""


def make_logger(trt: Any, messages: Listener) -> tensorrt.ILogger:
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
