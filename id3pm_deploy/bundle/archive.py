"""A bundle as one file: a plain, uncompressed tar that the bundle's content fixes.

The manifest comes first, then its signature if there is one, then the files in the
order of their names. Every header is the one that :func:`tar_header` makes, so a
reader has nothing to interpret: links, devices, sparse files and all extensions differ
from it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError, InputError
from ..files import atomic_path, open_plain
from ..staging import staged_folder
from .manifest import (
    MANIFEST,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    FileEntry,
    Manifest,
    manifest_from_bytes,
)
from .reader import Bundle, checked, open_bundle
from .signing import SIGNATURE, read_signature

BLOCK = 512
_END = bytes(2 * BLOCK)
_OCTAL = re.compile(rb"[0-7]{11}")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"S": "a sparse file",
}
_FIX = "make it with `id3pm-deploy bundle pack`; do not use this file"


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a file in a POSIX ustar archive.

    Mode 0644, owner and time 0, no names of owners.

    Args:
        name: At most 100 ASCII characters.
        size: In bytes, at most 8 GiB - 1.
    """
    blank = b" " * 8
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        b"%011o\0" % size + b"0" * 11 + b"\0",
        blank + b"0" + bytes(100),
        b"ustar\0" + b"00" + bytes(64),
        b"0000000\0" * 2 + bytes(167),
    )
    header = b"".join(fields)
    return header.replace(blank, b"%06o\0 " % sum(header), 1)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


@dataclass(frozen=True)
class Member:
    """A file in a tar: where its bytes begin, and what the manifest says of it."""

    name: str
    offset: int
    entry: FileEntry


@dataclass(frozen=True)
class Archive:
    """A tar whose every header was checked; the files were not hashed yet.

    Attributes:
        path: Where it lies.
        manifest: What it says.
        data: The bytes of ``manifest.json``.
        signature: The bytes of ``manifest.sig``, if it is there.
        members: The listed files, in order.
    """

    path: Path
    manifest: Manifest
    data: bytes
    signature: bytes | None
    members: tuple[Member, ...]

    def stream(self, handle: BinaryIO, member: Member) -> Iterator[bytes]:
        """The bytes of a file in pieces; its hash is checked after the last.

        Raises:
            BundleError: It is not what the manifest describes.
        """
        handle.seek(member.offset)
        yield from checked(handle, member.entry, lambda: self._changed(member.name))
        padding = _padding(member.entry.size)
        if handle.read(len(padding)) != padding:
            raise self._changed(member.name)

    def _changed(self, name: str) -> BundleError:
        return BundleError(
            f"{name} in {self.path} is not the file that the manifest describes",
            why="its bytes end early or its SHA-256 differs",
            fix="copy the tar again; do not use this one",
        )


def pack_bundle(folder: Path, out: Path, *, force: bool = False) -> int:
    """Write a bundle as a tar, every file hashed on the way; returns its size.

    The same bundle makes the same bytes, wherever and whenever.

    Args:
        folder: The bundle.
        out: The tar; it appears when it is complete.
        force: Replace a file that is there.

    Raises:
        InputError: ``out`` exists.
        BundleError: ``folder`` is no bundle, or is damaged.
        OutputError: The tar cannot be written.
    """
    if os.path.lexists(out) and not force:
        raise InputError(f"{out} exists", fix="choose another name, or give --force")
    bundle = open_bundle(folder)
    signature = read_signature(folder)
    with atomic_path(out) as temporary, open(temporary, "wb") as handle:
        for piece in _pieces(bundle, signature):
            handle.write(piece)
        size = handle.tell()
    return size


def _pieces(bundle: Bundle, signature: bytes | None) -> Iterator[bytes]:
    small = [(MANIFEST_NAME, bundle.data)]
    if signature is not None:
        small.append((SIGNATURE_NAME, signature))
    for name, data in small:
        yield tar_header(name, len(data)) + data + _padding(len(data))
    for name in sorted(bundle.manifest.files):
        size = bundle.manifest.file_entry(name).size
        yield tar_header(name, size)
        yield from bundle.stream(name)
        yield _padding(size)
    yield _END


@contextlib.contextmanager
def opened_tar(path: Path) -> Iterator[tuple[BinaryIO, Archive]]:
    """Open a tar and check the manifest, all headers and the length, in this order.

    Raises:
        InputError: There is no such file.
        BundleError: It is not a bundle as :func:`pack_bundle` writes it.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(open_plain(path, follow=True))
            archive = _scanned(handle, path)
        except OSError as error:
            raise InputError(
                f"cannot read {path}", why=error.strerror or str(error)
            ) from error
        yield handle, archive


def _scanned(handle: BinaryIO, path: Path) -> Archive:
    length = os.fstat(handle.fileno()).st_size
    data = _small(handle, path, MANIFEST_NAME, MANIFEST.max_bytes)
    manifest = manifest_from_bytes(data, path / MANIFEST_NAME)
    signature, block = None, handle.read(BLOCK)
    if _name(block) == SIGNATURE_NAME.encode():
        handle.seek(-BLOCK, os.SEEK_CUR)
        signature = _small(handle, path, SIGNATURE_NAME, SIGNATURE.max_bytes)
    else:
        handle.seek(-len(block), os.SEEK_CUR)
    members, offset = [], handle.tell()
    for name in sorted(manifest.files):
        entry = manifest.file_entry(name)
        handle.seek(offset)
        _check_header(handle.read(BLOCK), name, entry.size, manifest, path)
        members.append(Member(name, offset + BLOCK, entry))
        offset += BLOCK + entry.size + len(_padding(entry.size))
    handle.seek(offset)
    if handle.read(len(_END)) != _END or length != offset + len(_END):
        raise _refusal(path, "it does not end after the files that the manifest lists")
    return Archive(path, manifest, data, signature, tuple(members))


def _small(handle: BinaryIO, path: Path, name: str, most: int) -> bytes:
    """The manifest or the signature, which come first and are small."""
    block = handle.read(BLOCK)
    digits = _OCTAL.fullmatch(block[124:135])
    size = int(digits[0], 8) if digits else most + 1
    if size > most or block != tar_header(name, size):
        raise _refusal(path, f"{name} is not where it belongs, or its header is odd")
    data = handle.read(size)
    padding = _padding(size)
    if len(data) != size or handle.read(len(padding)) != padding:
        raise _refusal(path, f"{name} ends early")
    return data


def _name(block: bytes) -> bytes:
    return block[:100].rstrip(b"\0")


def _check_header(
    block: bytes, name: str, size: int, manifest: Manifest, path: Path
) -> None:
    """Refuse any header but the expected one; say what is wrong with it."""
    if block == tar_header(name, size):
        return
    found = _name(block).decode("utf-8", "replace")
    why = f"the header of {name} is not as `bundle pack` writes it"
    if len(block) < BLOCK or not any(block):
        why = f"it ends before {name}"
    elif block[156:157] != b"0":
        kind = _KINDS.get(block[156:157], "an extension of the tar format")
        why = f"{found!r:.80} is {kind}"
    elif found != name:
        odd = found not in manifest.files
        why = f"{found!r:.80} is {'not listed' if odd else 'out of order or twice'}"
    elif block[124:136] != tar_header(name, size)[124:136]:
        why = f"{name} has another size than the manifest says"
    raise _refusal(path, why)


def _refusal(path: Path, why: str) -> BundleError:
    return BundleError(f"{path} is not a packed bundle", why=why, fix=_FIX)


def unpack_bundle(path: Path, folder: Path) -> Bundle:
    """Write the bundle in a tar to a new folder, all of it or nothing.

    Nothing is written before the manifest and all headers were checked. Files are
    hashed as they are written, into a hidden folder beside ``folder`` that takes its
    name when everything is right and on disk.

    Raises:
        InputError: ``folder`` exists, or there is no tar.
        BundleError: The tar is not a bundle as :func:`pack_bundle` writes it.
        OutputError: The folder cannot be written.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists", fix="choose another folder")
    with (
        opened_tar(path) as (handle, archive),
        staged_folder(folder, replace=False) as staging,
    ):
        _write(staging / MANIFEST_NAME, [archive.data])
        if archive.signature is not None:
            _write(staging / SIGNATURE_NAME, [archive.signature])
        for member in archive.members:
            _write(staging / member.name, archive.stream(handle, member))
    return Bundle(folder, archive.manifest, archive.data)


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with open(path, "xb") as handle:
        for piece in pieces:
            handle.write(piece)
        handle.flush()
        os.fsync(handle.fileno())
