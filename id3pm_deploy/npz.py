"""Reading ``.npz`` files that nobody vouches for.

Nothing is unpickled. Counts, sizes, packing and headers are looked at before memory is
taken, so that a file of eighty bytes cannot ask for gigabytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .errors import first_line

Array = npt.NDArray[Any]

MAX_MEMBERS = 32
_MEMBER_BYTES = 512
"""Of a member's entry in the directory; one of NumPy's takes less than a hundred."""
_END_BYTES = 22
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_KINDS = "iufU"
"""Integers, floats and text; an object array would have to be unpickled."""


class NpzError(ValueError):
    """Why a file cannot be used, in one clause; callers say which file and what to do.

    It is no :class:`~id3pm_deploy.errors.Id3pmError` because it never reaches a user
    as it is.
    """


@dataclass(frozen=True)
class NpyHeader:
    """What a ``.npy`` says of itself; ``start`` is where its data begins, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    start: int

    @property
    def bytes(self) -> int:
        """Length of header and data together."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


def npy_header(stream: IO[bytes]) -> NpyHeader:
    """Read the header of a ``.npy``.

    Raises:
        NpzError: It is damaged, or its type is not plain numbers or text.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADER_READERS:
            raise NpzError(f".npy version {version}")
        shape, fortran, dtype = _HEADER_READERS[version](stream)
        start = stream.tell()
    except NpzError:
        raise
    except Exception as error:  # a damaged header can raise almost anything
        raise NpzError(first_line(error)) from error
    if dtype.kind not in _KINDS or dtype.itemsize == 0 or any(n < 0 for n in shape):
        raise NpzError(f"unexpected type {dtype} or shape {shape}")
    return NpyHeader(shape, dtype, fortran, start)


def array_from_npy(data: bytes) -> Array:
    """Decode one ``.npy`` whose header must agree exactly with its length.

    Returns:
        A new array, in C order and the machine's byte order.

    Raises:
        NpzError: The header is damaged, or the length is another.
    """
    header = npy_header(io.BytesIO(data))
    if len(data) != header.bytes:
        raise NpzError("its length is not what its header says")
    flat = np.frombuffer(data, dtype=header.dtype, offset=header.start)
    array = flat.reshape(header.shape, order="F" if header.fortran else "C")
    return array.astype(header.dtype.newbyteorder("="), order="C")


class NpzReader:
    """The members of an open ``.npz``, none of which has been read yet.

    Args:
        archive: The zip archive.
        most_bytes: What all members may unpack to, together.
        most_members: How many there may be.

    Raises:
        NpzError: More than that, two of one name, or packed in an unusual way.
    """

    def __init__(
        self,
        archive: zipfile.ZipFile,
        most_bytes: int,
        most_members: int = MAX_MEMBERS,
    ) -> None:
        members = archive.infolist()
        self._archive = archive
        self._members = {member.filename: member for member in members}
        if len(members) > most_members or len(self._members) != len(members):
            raise NpzError("it has too many or doubled members")
        # zipfile unpacks these two piece by piece; others could fill the memory.
        plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if any(member.compress_type not in plain for member in members):
            raise NpzError("it is packed in a way that is not allowed")
        if sum(member.file_size for member in members) > most_bytes:
            raise NpzError(f"it unpacks to more than {most_bytes} bytes")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the arrays, in the file's order; other members are left out."""
        suffix = ".npy"
        return tuple(n[: -len(suffix)] for n in self._members if n.endswith(suffix))

    def header(self, name: str) -> NpyHeader:
        """Shape and type of an array, of which nothing else is read.

        Raises:
            NpzError: It is missing or damaged, or is not as long as its header says.
        """
        with self._open(name) as (stream, length):
            header = npy_header(stream)
        if length != header.bytes:
            raise NpzError(f"{name}: its length is not what its header says")
        return header

    def read(self, name: str) -> Array:
        """One array.

        Raises:
            NpzError: It is missing or damaged.
        """
        self.header(name)
        with self._open(name) as (stream, _):
            return array_from_npy(stream.read())

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], int]]:
        member = self._members.get(f"{name}.npy")
        if member is None:
            raise NpzError(f"it has no {name}")
        try:
            with self._archive.open(member) as stream:
                yield stream, member.file_size
        except Exception as error:  # a damaged zip can raise almost anything
            raise NpzError(f"{name} cannot be read ({first_line(error)})") from error


@contextlib.contextmanager
def open_npz(
    source: Path | bytes, most_bytes: int, most_members: int = MAX_MEMBERS
) -> Iterator[NpzReader]:
    """Open a ``.npz``: a file or its bytes; nothing in it is trusted.

    Args:
        source: Path of the file, or its contents.
        most_bytes: What the file may have, and what it may unpack to.
        most_members: How many arrays there may be.

    Raises:
        FileNotFoundError, OSError: The file is not there or cannot be read.
        NpzError: It is too large, no regular file, no zip archive or a strange one.
    """
    if isinstance(source, Path):
        status = source.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NpzError("it is not a regular file")
        if status.st_size > most_bytes:
            raise NpzError(f"it has more than {most_bytes} bytes")
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        if _directory_bytes(file) > most_members * _MEMBER_BYTES:
            raise NpzError("it has too many or doubled members")
        try:
            archive = zipfile.ZipFile(file)
        except OSError:
            raise
        except Exception as error:  # a damaged zip can raise almost anything
            why = first_line(error)
            raise NpzError(f"it is not a readable .npz ({why})") from error
        with archive:
            yield NpzReader(archive, most_bytes, most_members)


def _directory_bytes(file: IO[bytes]) -> int:
    """Length of a zip archive's directory, of which a reader makes objects at once.

    The record that states it lies in the last 64 KiB; of several, which could mislead
    one reader or another, the largest counts.
    """
    file.seek(max(0, file.seek(0, io.SEEK_END) - (1 << 16) - _END_BYTES))
    tail = file.read()
    places = [found.start() + 12 for found in re.finditer(b"PK\x05\x06", tail)]
    sizes = (int.from_bytes(tail[at : at + 4], "little") for at in places)
    return max(sizes, default=0)
