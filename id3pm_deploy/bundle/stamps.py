"""Stamps: a note that a file, unchanged since, was hashed in full before.

A stamp is an empty file in the user's cache whose name is a hash over the hashed
file's identity (device, inode, size, mtime, ctime) and its SHA-256. Any write, rename
over it or ``touch`` changes the identity, because no ordinary call sets the ctime.

What a stamp cannot see: a file written through a mapping that was dirty all along, a
clock that was set back, a file system that keeps no honest ctime. Whoever can write to
the cache folder can forge stamps; it is the user's alone, and who can write there could
as well replace this program. So stamps save time on graphs, where the worst is a wrong
picture, and plans, which are native code, are hashed every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..user_folders import make_private, why_not_ours

LEAST_BYTES = 4 << 20
"""Smaller files are hashed sooner than a stamp would be worth it."""
MOST_STAMPS = 512
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before its hash began gets no stamp: another
change in the same tick of the file system's clock would not show."""


@dataclass(frozen=True)
class Sight:
    """What an open file looked like: its identity, and whether it had settled."""

    identity: tuple[int, ...]
    size: int
    settled: bool


def sight(descriptor: int) -> Sight:
    """Look at an open file; do it before and after its bytes are read."""
    status = os.fstat(descriptor)
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    settled = 0 <= status.st_ctime_ns < time.time_ns() - SETTLED_NS
    return Sight(identity, status.st_size, settled)


class Stamps:
    """The stamps in one cache folder; without a folder there are none.

    A cache that cannot be used is no error: files are hashed.
    """

    def __init__(self, cache: Path | None) -> None:
        self._folder = None if cache is None else cache / "stamps"

    def hold(self, before: Sight, after: Sight, sha256: str) -> bool:
        """Whether the file was hashed once and found to have ``sha256``.

        Args:
            before: The file before its bytes were read.
            after: The file afterwards.
            sha256: The hash it should have.
        """
        if self._folder is None or not _worthwhile(before, after):
            return False
        path = self._folder / _key(before, sha256)
        with contextlib.suppress(OSError):
            return not why_not_ours(self._folder) and not why_not_ours(path)
        return False

    def add(self, before: Sight, after: Sight, sha256: str) -> None:
        """Note that the file has ``sha256``; arguments as for :meth:`hold`."""
        if self._folder is None or not _worthwhile(before, after):
            return
        if not before.settled:
            return
        with contextlib.suppress(OSError):
            make_private(self._folder)
            _prune(self._folder)
            path = self._folder / _key(before, sha256)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))


def _worthwhile(before: Sight, after: Sight) -> bool:
    return before.identity == after.identity and before.size >= LEAST_BYTES


def _key(seen: Sight, sha256: str) -> str:
    text = " ".join(map(str, (*seen.identity, sha256)))
    return hashlib.sha256(text.encode()).hexdigest()


def _prune(folder: Path) -> None:
    """Remove the older half once there are too many."""
    names = os.listdir(folder)
    if len(names) < MOST_STAMPS:
        return
    paths = sorted((folder / name for name in names), key=os.path.getmtime)
    for path in paths[: len(paths) // 2]:
        with contextlib.suppress(OSError):
            path.unlink()
