"""Where the doctor's facts come from, so that a test can put a folder in its place."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_PATH = re.compile(r"(?<![\w./~…])/[^\s'\":;,()<>\[\]]*")
_HOMES = ("home", "Users", "root")


def usable_processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Host:
    """The machine and the interpreter that are looked at.

    Attributes:
        root: Folder that stands for ``/``: ``proc``, ``sys``, ``etc`` are read there.
        system: Name of the operating system, as ``Linux``.
        kernel: Its release, the number alone.
        machine: Architecture, as ``x86_64`` or ``aarch64``.
        python: Version of Python, as ``3.11.7``.
        search: Where modules and packages are looked for, as ``sys.path``.
        logical: Processors of the machine, as the operating system counts them.
        affinity: Processors that this process may use.
        home: The user's home folder; named nowhere in what is reported.
        environment: Environment variables.
    """

    root: Path = Path("/")
    system: str = field(default_factory=platform.system)
    kernel: str = field(default_factory=lambda: _number(platform.release()))
    machine: str = field(default_factory=platform.machine)
    python: str = field(default_factory=platform.python_version)
    search: tuple[str, ...] = field(default_factory=lambda: _absolute(sys.path))
    logical: int = field(default_factory=lambda: os.cpu_count() or 1)
    affinity: int = field(default_factory=usable_processors)
    home: Path = field(default_factory=lambda: Path(os.path.expanduser("~")))
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def text(self, path: str) -> str:
        """A file under the root; empty where it cannot be read."""
        try:
            data = (self.root / path.lstrip("/")).read_bytes()
        except OSError:
            return ""
        return data.decode("utf-8", "replace").strip("\0 \t\r\n")

    def glob(self, pattern: str) -> Iterator[Path]:
        """Paths under the root, sorted."""
        return iter(sorted(self.root.glob(pattern)))

    def redacted(self, text: str) -> str:
        """``text`` without folders: of a path only the last part is kept.

        The home folder becomes ``~``, and so does anybody else's.
        """
        for folder in sorted({str(self.home), *self.search}, key=len, reverse=True):
            if len(folder) > 1:
                mark = "~" if folder == str(self.home) else "…"
                text = re.sub(rf"{re.escape(folder)}(?![\w-])", mark, text)
        return _PATH.sub(lambda found: _shortened(found[0]), text)


def _number(release: str) -> str:
    """What follows the number says who built it."""
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else ""


def _shortened(path: str) -> str:
    parts = [part for part in path.split("/") if part]
    if parts and parts[0] in _HOMES and len(parts) <= 2:
        return "~"
    return f"…/{parts[-1]}" if parts else path


def _absolute(paths: list[str]) -> tuple[str, ...]:
    return tuple(os.path.abspath(path) for path in paths)
