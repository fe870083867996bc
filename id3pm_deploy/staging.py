"""Folders that appear when they are complete, and never without what was there before.

Files have ``files.atomic_path``; this is the same for a folder as a whole.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError, OutputError
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


def check_folder(
    out: Path, is_ours: Callable[[Path], bool], kind: str, *, force: bool
) -> None:
    """Refuse an output folder before any work is done.

    Args:
        out: The folder; new, empty, or with ``force`` an earlier one.
        is_ours: Whether a folder holds what an earlier command of this kind wrote.
        kind: What such a folder is of, for messages.
        force: Whether an earlier one may be replaced.

    Raises:
        InputError: It is not empty, and may not be replaced.
        OutputError: It cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", fix="choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not is_ours(out):
            raise InputError(
                f"{out} is not empty and no earlier {kind}'s folder",
                fix="choose another --out",
            )
        if not force:
            raise InputError(
                f"{out} is not empty", fix="choose another --out, or give --force"
            )
    there = next(p for p in Path(os.path.abspath(out)).parents if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {out}",
            why=f"{there} is not a folder you may write to",
            fix="choose another --out",
        )
