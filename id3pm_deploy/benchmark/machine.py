"""What a benchmark ran on: processor, versions, and who else used the cores."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_INSTRUCTIONS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def facts() -> dict[str, Any]:
    """Processor, cores, memory and system; None for what cannot be read."""
    lines = _lines(Path("/proc/cpuinfo"))
    flags = set((_value(lines, "flags") or _value(lines, "Features") or "").split())
    memory = (_value(_lines(Path("/proc/meminfo")), "MemTotal") or "").split()
    governor = _lines(_GOVERNOR)
    return {
        "processor": _value(lines, "model name") or platform.machine(),
        "cores": usable_cores(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "virtual": "hypervisor" in flags,
        "governor": governor[0] if governor else None,
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Python's version and the packages', None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def command_line(program: str, arguments: Sequence[str]) -> str:
    """How to run this again, without a path of this machine.

    Args:
        program: How it is called.
        arguments: What follows it.
    """
    words = [program]
    for word in arguments:
        name, equals, value = word.rpartition("=")
        short = Path(value).name if os.path.isabs(value) else value
        words.append(name + equals + short)
    return " ".join(words)


@dataclass(frozen=True)
class Load:
    """Who used the cores while a benchmark ran.

    Attributes:
        before: Load average over one minute at the start.
        after: The same at the end.
        others: Share of the cores that other processes took, 0 to 1.
        stolen: Share that the host of a virtual machine took away.
    """

    before: float
    after: float
    others: float | None
    stolen: float | None

    def to_json(self) -> dict[str, Any]:
        """The fields, rounded."""
        return {
            key: None if value is None else round(value, 3)
            for key, value in vars(self).items()
        }


class Watch:
    """Looks at the machine's counters at its making and at :meth:`stop`."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._begun = time.monotonic()
        self._ticks = _ticks()
        self._own = _own_seconds()

    def stop(self) -> Load:
        """The load since this was made."""
        cores = os.cpu_count() or 1
        whole = max(time.monotonic() - self._begun, 1e-9) * cores
        before, after = self._ticks, _ticks()
        others = stolen = None
        if before and after:
            busy, stolen = (b - a for a, b in zip(before, after, strict=True))
            own = _own_seconds() - self._own
            others, stolen = max(busy - own, 0.0) / whole, stolen / whole
        return Load(self._load, os.getloadavg()[0], others, stolen)


def _ticks() -> tuple[float, float] | None:
    """Seconds that all cores were busy, and were stolen, since the start."""
    first = _lines(Path("/proc/stat"))[:1]
    if not first:
        return None
    values = [int(v) / os.sysconf("SC_CLK_TCK") for v in first[0].split()[1:9]]
    user, nice, system, _, _, irq, soft, stolen = values
    return user + nice + system + irq + soft, stolen


def _own_seconds() -> float:
    """Processor seconds of this process and of children that have ended."""
    return sum(os.times()[:4])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _value(lines: Sequence[str], name: str) -> str | None:
    """The text behind the first ``name :`` of a file such as /proc/cpuinfo."""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
