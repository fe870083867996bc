"""Stands in for the process in which TensorRT builds, also in a command of its own.

The plan it writes says what it was built from, so that a stale one shows. Each build is
noted in the file that the environment variable ``SPAWNS`` names, and takes as long as
``BUILD_SECONDS`` says. ``DIE_AT``, as in
``copying:3``, has the process kill itself in the middle of a step that makes no change
that the hostile tests' sandbox could see.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Link = Callable[[Any, Path, Path], None]

PIECES = 10
"""In how many pieces a plan is written and copied."""
_PIECE_BYTES = 600


def plan_of(graph: bytes, recipe: dict[str, Any]) -> bytes:
    """The plan that is built from a graph."""
    built_from = [hashlib.sha256(graph).hexdigest(), recipe]
    text = json.dumps(built_from, sort_keys=True).encode()
    return text.ljust(PIECES * _PIECE_BYTES, b" ")


def run_child(
    request: dict[str, Any], work: Path, tick: Any, files: tuple[int, ...]
) -> dict[str, Any]:
    """In place of ``tensorrt._run_child``."""
    descriptor = os.open(os.environ["SPAWNS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)
    data = plan_of(Path(request["graph"]).read_bytes(), request["recipe"])
    time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
    with open(request["plan"], "wb", buffering=0) as handle:
        for number in range(PIECES):
            _maybe_die("building", number)
            handle.write(data[number * _PIECE_BYTES :][:_PIECE_BYTES])
    return {
        "version": "1.0",
        "layer_types": {},
        "plan_types": {},
        "warnings": [],
        "build_seconds": 1.0,
        "peak_memory_bytes": 1 << 20,
        "gpu": None,
    }


def spawns() -> int:
    """How many plans were built so far."""
    path = Path(os.environ["SPAWNS"])
    return len(path.read_text().split()) if path.exists() else 0


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Put it in place; TensorRT counts as installed, in version 1.0.

    Args:
        put: As ``setattr``, or a monkeypatch's.
    """
    from id3pm_deploy.builders import cache_entry, cache_files, tensorrt
    from id3pm_deploy.builders.plan_key import Builder
    from id3pm_deploy.files import ScratchFile

    put(tensorrt, "_run_child", run_child)
    put(tensorrt, "builder_here", lambda recipe: Builder("1.0"))
    if not os.environ.get("DIE_AT"):
        return
    put(cache_files, "_CHUNK", _PIECE_BYTES)
    put(cache_files, "hashlib", _DyingHashes())
    put(cache_entry, "write_new", _dying_write_new)
    put(ScratchFile, "_link_over", _dying_link_over(ScratchFile._link_over))


def _maybe_die(step: str, number: int) -> None:
    if os.environ.get("DIE_AT") == f"{step}:{number}":
        os.killpg(0, signal.SIGKILL)


class _DyingHashes:
    """In place of ``hashlib`` where plans are copied: to the cache, or from it."""

    def sha256(self) -> Any:
        return _DyingHash()


class _DyingHash:
    def __init__(self) -> None:
        self._digest, self._number = hashlib.sha256(), 0

    def update(self, piece: bytes) -> None:
        _maybe_die("copying", self._number)
        self._number += 1
        self._digest.update(piece)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _dying_write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    for number in range(PIECES):
        if os.environ["DIE_AT"] == f"{path.name}:{number}":
            path.write_bytes(data[: len(data) * number // PIECES])
            os.killpg(0, signal.SIGKILL)
    path.write_bytes(data)
    path.chmod(mode)


def _dying_link_over(link_over: Link) -> Link:
    """As where the file is copied, dying at an even number; or, at an odd one, with the
    file under its temporary name."""

    def dying(scratch: Any, target: Path, name: Path) -> None:
        for number in range(PIECES):
            if os.environ["DIE_AT"] != f"commit:{number}":
                continue
            if number % 2:
                os.link(scratch.path, name, src_dir_fd=os.open("/", os.O_RDONLY))
            else:
                target.write_bytes(scratch.read()[: number * _PIECE_BYTES])
            os.killpg(0, signal.SIGKILL)
        link_over(scratch, target, name)

    return dying
