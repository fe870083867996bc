"""How a bundle is read: sizes and hashes are checked before anything is parsed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError
from ..files import open_plain
from ..user_folders import cache_folder
from .manifest import (
    BASE,
    MANIFEST,
    MANIFEST_NAME,
    FileEntry,
    GraphEntry,
    Manifest,
    manifest_from_bytes,
)
from .stamps import Stamps, sight

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder; nothing in it has been parsed but the manifest.

    Attributes:
        folder: Where it lies.
        manifest: What it says.
        data: The bytes of ``manifest.json``, which a signature covers.
    """

    folder: Path
    manifest: Manifest
    data: bytes = field(default=b"", repr=False)

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, after size and SHA-256 were checked.

        What is hashed is what is returned. A large file whose stamp says that this
        very file was hashed before is not hashed again, unless it is a plan.

        Raises:
            BundleError: Missing, of another size or hash, a link, or not listed.
        """
        entry = self.manifest.file_entry(name)
        with self._opened(name, entry) as handle:
            stamps = self._stamps(name)
            before = sight(handle.fileno())
            data = handle.read(entry.size + 1)
            after = sight(handle.fileno())
            if len(data) != entry.size:
                raise self._changed(name)
            if not stamps.hold(before, after, entry.sha256):
                if hashlib.sha256(data).hexdigest() != entry.sha256:
                    raise self._changed(name)
                stamps.add(before, after, entry.sha256)
        return data

    def path_of(self, name: str) -> Path:
        """The path of a listed file, after the same check as :meth:`read`.

        For what cannot be loaded from bytes: whoever may write to the folder can
        change the file between this check and its use.

        Raises:
            BundleError: As :meth:`read`.
        """
        entry = self.manifest.file_entry(name)
        with self._opened(name, entry) as handle:
            self._check(handle, name, entry, self._stamps(name))
        return self.folder / name

    def verify(self, on_file: Callable[[str], None] | None = None) -> None:
        """Hash every listed file in full, whatever its stamp says.

        Args:
            on_file: Called with the name of each file that was found right.

        Raises:
            BundleError: The first file that is missing, unreadable or has changed.
        """
        for name in self.manifest.files:
            entry = self.manifest.file_entry(name)
            with self._opened(name, entry) as handle:
                self._check(handle, name, entry, Stamps(None))
            if on_file is not None:
                on_file(name)

    def stream(self, name: str) -> Iterator[bytes]:
        """The bytes of a listed file in pieces; its hash is checked after the last.

        Raises:
            BundleError: As :meth:`read`; whoever took the pieces must drop them.
        """
        entry = self.manifest.file_entry(name)
        with self._opened(name, entry) as handle:
            yield from checked(handle, entry, lambda: self._changed(name))

    def graph(self, kind: str, precision: str, stage: str = BASE) -> GraphEntry | None:
        """The graph of that kind, precision and stage, if the bundle holds one."""
        for entry in self.manifest.graphs:
            if (entry.kind, entry.precision, entry.stage) == (kind, precision, stage):
                return entry
        return None

    @contextlib.contextmanager
    def _opened(self, name: str, entry: FileEntry) -> Iterator[BinaryIO]:
        """Open a plain file of the right size; OSErrors become BundleErrors."""
        path = self.folder / name
        try:
            with open_plain(path) as handle:
                if os.fstat(handle.fileno()).st_size != entry.size:
                    raise self._changed(name)
                yield handle
        except OSError as error:
            raise BundleError(
                f"{path} is missing or cannot be read",
                why=error.strerror or str(error),
                fix="copy the whole bundle again, or change the permissions",
            ) from error

    def _check(
        self, handle: BinaryIO, name: str, entry: FileEntry, stamps: Stamps
    ) -> None:
        before = sight(handle.fileno())
        if stamps.hold(before, before, entry.sha256):
            return
        for _ in checked(handle, entry, lambda: self._changed(name)):
            pass
        stamps.add(before, sight(handle.fileno()), entry.sha256)

    def _stamps(self, name: str) -> Stamps:
        """Where stamps of that file are kept: nowhere for a plan, which is code."""
        plans = {entry.file for entry in self.manifest.plans}
        return Stamps(None if name in plans else cache_folder())

    def _changed(self, name: str) -> BundleError:
        return BundleError(
            f"{self.folder / name} is not the file that the manifest describes",
            why="its size or SHA-256 differs",
            fix="copy the bundle again or rebuild it; do not use this file",
        )


def checked(
    handle: BinaryIO, entry: FileEntry, error: Callable[[], BundleError]
) -> Iterator[bytes]:
    """``entry.size`` bytes of ``handle`` in pieces, then the check of their hash.

    Raises:
        BundleError: What ``error`` makes: there are fewer bytes or another hash.
    """
    digest, left = hashlib.sha256(), entry.size
    while left:
        piece = handle.read(min(_CHUNK, left))
        if not piece:
            raise error()
        left -= len(piece)
        digest.update(piece)
        yield piece
    if digest.hexdigest() != entry.sha256:
        raise error()


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` has a manifest (nothing is verified)."""
    return os.path.isfile(folder / MANIFEST_NAME)


def manifest_bytes(folder: Path) -> bytes:
    """The bytes of a folder's manifest, not yet parsed.

    Raises:
        BundleError: There is none, or it is no plain file, or too large.
    """
    try:
        return MANIFEST.read(folder / MANIFEST_NAME)
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle",
            why=f"{MANIFEST_NAME}: {error.strerror or error}",
            fix="make one with `id3pm-deploy build-engine CHECKPOINT --out BUNDLE`",
        ) from error


def open_bundle(folder: Path) -> Bundle:
    """Read and check the manifest; files are checked when they are read.

    Raises:
        BundleError: Not a bundle, another format or version, or a damaged manifest.
    """
    data = manifest_bytes(folder)
    manifest = manifest_from_bytes(data, folder / MANIFEST_NAME)
    return Bundle(folder, manifest, data)
