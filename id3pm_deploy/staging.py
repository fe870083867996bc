"""Folders that appear when they are complete, and never without what was there before.

Files have ``files.atomic_path``; this is the same for a folder as a whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .files import remove, temporary_folder

_EXCHANGE = 2
_HERE = -100


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a new folder that takes the place of ``target`` if the block succeeds.

    Args:
        target: What is above it has to be there.
        replace: Replace an earlier folder of that name, or fail if there is one.

    An earlier folder of that name stays until the new one has its place, and is then
    removed. Where the file system cannot exchange two names at once, there is a moment
    with neither, in which the earlier one lies beside it, as ``.NAME.DIGITS.old``.

    Raises:
        OutputError: The folder cannot be made, filled or put in its place.
    """
    whole = Path(os.path.abspath(target))
    with temporary_folder(target, mode=0o777) as staging:
        yield staging
        sync_folder(staging)
        if replace and os.path.lexists(whole):
            _replace(whole, staging)
        else:
            staging.rename(whole)
        sync_folder(whole.parent)


def _replace(target: Path, staging: Path) -> None:
    if exchange(staging, target):
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(6)}.old")
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    remove(old)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names at once; False where the system or the file system cannot."""
    import ctypes

    function = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    if function is None:
        return False
    first, second = os.fsencode(one), os.fsencode(other)
    return bool(function(_HERE, first, _HERE, second, _EXCHANGE) == 0)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to disk.

    Raises:
        OSError: It cannot be done.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
