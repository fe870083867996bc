"""A small file system of the tests' own, which can be filled and made read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096
_FILLER = "filler"


class Disk:
    """A tmpfs at ``path``; making one takes root and the right to mount."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")

    def fill(self, pages: int) -> None:
        """Leave so many pages of 4 KiB."""
        self.drain()
        free = os.statvfs(self.path)
        size = (free.f_bavail - pages) * free.f_bsize
        with open(self.path / _FILLER, "wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, size)

    def drain(self) -> None:
        """Give the room back."""
        (self.path / _FILLER).unlink(missing_ok=True)

    def writable(self, yes: bool) -> None:
        """Mount it anew, read-only or not."""
        how = "rw" if yes else "ro"
        self._run("mount", "-o", f"remount,{how}", str(self.path))

    def contents(self) -> dict[str, bytes | None]:
        """All names on it, hidden ones too, with their bytes; None for a folder."""
        paths = (path for path in self.path.rglob("*") if path.name != _FILLER)
        return {
            str(path.relative_to(self.path)): None
            if path.is_dir()
            else path.read_bytes()
            for path in sorted(paths)
        }

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, size: int = 8 << 20) -> Iterator[Disk]:
    """A :class:`Disk` while the block runs."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    disk = Disk(path, size)
    try:
        yield disk
    finally:
        disk.close()
