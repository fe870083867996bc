"""Files in the kernel's page cache: how much of them is there, and putting them out.

No privilege is needed, and nobody else's files are touched. Pages that another process
has mapped stay where they are, so ask :func:`resident_share` afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_MAP_FAILED = ctypes.c_void_p(-1).value


def evict(files: Iterable[Path]) -> None:
    """Ask the kernel to forget what it holds of these files."""
    for path in files:
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            os.fsync(descriptor)  # a page that is not on the disk yet cannot go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(files: Iterable[Path]) -> float:
    """Share of the files' pages that are in memory, 0 to 1; files that cannot be read
    are left out."""
    pages = resident = 0
    for path in files:
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            there = _residency(descriptor)
            pages += len(there)
            resident += sum(byte & 1 for byte in there)
    return resident / pages if pages else 0.0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _residency(descriptor: int) -> bytes:
    """What mincore(2) says: one byte for each page, its lowest bit set if there."""
    size = os.fstat(descriptor).st_size
    if not size:
        return b""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        *(ctypes.c_int,) * 3,
        ctypes.c_long,
    ]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "cannot map the file")
    try:
        found = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if libc.mincore(address, size, found):
            raise OSError(ctypes.get_errno(), "cannot ask for the file's pages")
        return found.raw
    finally:
        libc.munmap(address, size)
