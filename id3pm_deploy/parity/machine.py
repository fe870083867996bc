"""On what machine a comparison ran, for its report."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np

from .. import __version__

_CPUINFO = Path("/proc/cpuinfo")


def machine_facts() -> dict[str, str]:
    """Processor, system and versions; no name of the machine or its user."""
    version = ".".join(map(str, sys.version_info[:3]))
    return {
        "Processor": f"{processor_name()}, {usable_cores()} cores usable",
        "System": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": f"{version}, NumPy {np.__version__}",
        "Tool": f"id3pm-deploy {__version__}",
    }


def usable_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name() -> str:
    """What the processor calls itself, or its architecture."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
