"""Files of the plan cache: copying with a hash, and a lock for each key."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from ..files import output_error
from ..progress import progress

_CHUNK = 1 << 20


def copy_hashed(source: BinaryIO, target: Path, *, durable: bool = False) -> str:
    """Overwrite ``target`` with what is left of ``source``; returns its SHA-256.

    What is hashed, by a thread, are the very bytes that are being written.

    Args:
        source: An open file.
        target: An existing file.
        durable: Flush it to the disk.

    Raises:
        OSError: ``source`` cannot be read.
        OutputError: ``target`` cannot be written.
    """
    digest = hashlib.sha256()
    hashed: Future[None] | None = None
    with contextlib.ExitStack() as stack:
        hasher = stack.enter_context(ThreadPoolExecutor(1))
        try:
            handle = stack.enter_context(open(target, "wb", buffering=0))
        except OSError as error:
            raise output_error(target, error) from error
        while piece := source.read(_CHUNK):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, piece)
            try:
                left = memoryview(piece)
                while left:
                    left = left[handle.write(left) :]
            except OSError as error:
                raise output_error(target, error) from error
        if hashed is not None:
            hashed.result()
        if durable:
            try:
                os.fsync(handle.fileno())
            except OSError as error:
                raise output_error(target, error) from error
    return digest.hexdigest()


def held_lock(path: Path) -> int | None:
    """The held lock file; None if its last holder removed it meanwhile.

    Raises:
        OSError: It cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        _wait(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _wait(descriptor: int) -> None:
    """Lock an open file; where there are no locks, go on without."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with progress(None, "waiting for the process that builds this plan"):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def unlink_lock(path: Path, descriptor: int) -> None:
    """Remove a lock file that is held, if it is still the one of that name."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            os.unlink(path)


def remove_free_lock(path: Path) -> None:
    """Remove a lock file that a killed process left; nobody holds it."""
    import fcntl

    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlink_lock(path, descriptor)
        finally:
            os.close(descriptor)
