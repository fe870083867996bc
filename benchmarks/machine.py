"""What a benchmark ran on: what the package knows of it, and the commit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from id3pm_deploy.benchmark import machine
from id3pm_deploy.benchmark.machine import Load, Watch, facts, usable_cores, versions

__all__ = [
    "ROOT",
    "Load",
    "Watch",
    "command_line",
    "commit",
    "facts",
    "usable_cores",
    "versions",
]

ROOT = Path(__file__).resolve().parent.parent


def commit() -> dict[str, Any]:
    """The repository's commit, and whether files differ from it; None without git.

    Results do not count: one script's would make the next one's commit doubtful.
    """
    but_results = ("--", ".", ":(exclude)benchmarks/results")
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", *but_results)
    return {"commit": head, "changed": None if changes is None else bool(changes)}


def command_line(arguments: Sequence[str]) -> str:
    """How to run this script again, without a path of this machine.

    Args:
        arguments: ``sys.argv``; the script's path first.
    """
    script = f"python benchmarks/{Path(arguments[0]).name}"
    return machine.command_line(script, arguments[1:])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
