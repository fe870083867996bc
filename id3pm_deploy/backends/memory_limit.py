"""How much memory ONNX Runtime may take: what is there, and not all of it.

A graph can compute the sizes of what it makes, so no look at the file can tell how much
memory it will ask for. The runtime's own allocator is given a limit instead, and an
engine that needs more fails with a message.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

SHARE = 0.75
"""Of the memory that is available when a session is made."""
MAX_FOLDED = 1 << 16
"""Bytes of the largest result that is computed while a graph is loaded, which the
limit above does not cover; larger ones are computed as the graph runs."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process could still take; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = _MEMINFO.read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free = int(line.split()[1]) * 1024
        with contextlib.suppress(OSError, ValueError):
            most = int((_CGROUP / "memory.max").read_text())
            used = int((_CGROUP / "memory.current").read_text())
            free = min(free, max(most - used, 0))
        return free
    return None


def limit_memory(runtime: Any, options: Any) -> None:
    """Have sessions made with ``options`` share an allocator with a limit.

    Nor do they plan one block for all that a run makes: from the second run on that
    block would be held beside what the first one took, twice the memory. Without it a
    step's time did not differ beyond noise (25 M model, R=8, one thread).

    Args:
        runtime: The module ``onnxruntime``.
        options: Its SessionOptions.
    """
    options.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(MAX_FOLDED)
    )
    options.enable_mem_pattern = False
    free = available_memory()
    if free is None:
        return
    place = runtime.OrtMemoryInfo(
        "Cpu",
        runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        runtime.OrtMemType.DEFAULT,
    )
    # The other settings are ONNX Runtime's own. Registering again replaces the limit
    # for the sessions to come; older releases refuse and keep the first one.
    limit = runtime.OrtArenaCfg({"max_mem": max(int(free * SHARE), 1)})
    with contextlib.suppress(RuntimeError):
        runtime.create_and_register_allocator(place, limit)
    options.add_session_config_entry("session.use_env_allocators", "1")
