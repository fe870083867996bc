"""How a bundle is written: everything at once, or not at all.

Files are named after their content and complete before the manifest is replaced, all
of it under a lock. An interrupted write leaves the bundle as it was, and two writers
keep each other's entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from ..errors import BundleError, Id3pmError
from ..files import (
    ScratchFile,
    json_text,
    make_folder,
    output_error,
    sha256_of_file,
    write_bytes,
)
from ..spec import DiffusionSpec
from .manifest import (
    BASE,
    MANIFEST,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    SecondStage,
    check_manifest,
    used_files,
)
from .reader import Bundle, is_bundle, open_bundle

T = TypeVar("T")

_LOCK_NAME = ".lock"
# What a write that was killed leaves: the lock, whole files and half ones.
_LEFTOVER = re.compile(r"\.lock|\..+\.tmp|.+-[0-9a-f]{12}\.(onnx|npz|plan)")


def _differences(one: Manifest, other: Manifest) -> list[str]:
    """Which facts that fix the computed function differ; not title and origin."""
    found: list[str] = []
    for stage in one.stages.keys() & other.stages.keys():
        ours, theirs = one.stages[stage], other.stages[stage]
        names = ours.diffusion.differences(theirs.diffusion)
        if ours.checkpoint_sha256 != theirs.checkpoint_sha256:
            names.append("weights")
        found += names if stage == BASE else [f"{stage}.{name}" for name in names]
    return found


def _current(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest in ``folder``, or an empty one of the checkpoint of ``wanted``; with
    its second stage if that alone has one."""
    if not is_bundle(folder):
        return dataclasses.replace(wanted, files={}, graphs=(), engines=())
    there = open_bundle(folder).manifest
    if found := _differences(there, wanted):
        raise BundleError(
            f"{folder} is a bundle of another checkpoint or with other settings",
            why=f"these differ: {', '.join(found)}",
            fix="choose another --out",
        )
    second = there.super_resolution or wanted.super_resolution
    joined = dataclasses.replace(there, super_resolution=second)
    check_manifest(joined, str(folder / MANIFEST_NAME))
    return joined


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, made if needed; writers wait for each other.

    Raises:
        OutputError: The folder or its lock file cannot be written.
    """
    descriptor = None
    while descriptor is None:
        descriptor = _lock_of(make_folder(folder) / _LOCK_NAME)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock_of(path: Path) -> int | None:
    """The held lock file; None if a failed first write removed it meanwhile."""
    import fcntl

    try:
        with contextlib.ExitStack() as stack:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o644)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return None
            stack.pop_all()
            return descriptor
    except FileNotFoundError:
        return None
    except OSError as error:
        raise output_error(path, error) from error


class BundleWriter:
    """Collects files and entries in memory; ``commit`` writes all of them at once.

    Args:
        folder: The bundle's folder; ``commit`` makes it if needed.
        manifest: What stands in it, or an empty one for a new bundle.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._data: dict[str, bytes | ScratchFile] = {}
        self._entries: dict[str, FileEntry] = {}
        self._graphs: list[GraphEntry] = []
        self._engines: list[EngineEntry] = []

    def add_file(
        self, prefix: str, suffix: str, data: bytes | ScratchFile, sha256: str = ""
    ) -> str:
        """Keep ``data`` under a name made of its SHA-256; returns the name.

        Args:
            prefix: What the name begins with.
            suffix: What it ends with.
            data: The bytes.
            sha256: Of a ScratchFile whose writer hashed what it wrote; empty to hash.
        """
        if isinstance(data, ScratchFile):
            size, digest = data.size, sha256 or data.sha256()
        else:
            size, digest = len(data), hashlib.sha256(data).hexdigest()
        plain = re.sub(r"[^A-Za-z0-9]+", "-", prefix).strip("-")[:60] or "file"
        name = f"{plain}-{digest[:12]}{suffix}"
        self._data[name] = data
        self._entries[name] = FileEntry(size, digest)
        return name

    def add_graph(self, entry: GraphEntry) -> None:
        """List a graph, replacing the one of the same stage, kind and precision."""
        self._graphs.append(entry)

    def add_engine(self, entry: EngineEntry) -> None:
        """List an engine, replacing the one of the same stage and target."""
        self._engines.append(entry)

    def file_entry(self, name: str) -> FileEntry:
        """Size and hash of an added file, or of one in the bundle.

        Raises:
            BundleError: It is neither.
        """
        return self._entries.get(name) or self.manifest.file_entry(name)

    def read(self, name: str) -> bytes:
        """The bytes of an added file, or of one in the bundle, as Bundle.read."""
        if name in self._data:
            data = self._data[name]
            return data.read() if isinstance(data, ScratchFile) else data
        return Bundle(self.folder, self.manifest).read(name)

    def path_of(self, name: str) -> Path:
        """A path that holds the bytes of :meth:`read`, for what reads files.

        That of an added file is good in this process alone and as long as the writer
        is there; see ``ScratchFile``.
        """
        data = self._data.get(name)
        if data is None:
            return Bundle(self.folder, self.manifest).path_of(name)
        if isinstance(data, bytes):
            held = ScratchFile(self.folder)
            held.write([data])
            self._data[name] = data = held
        return data.path

    def commit(self) -> Bundle:
        """Write the files, replace the manifest, remove files it no longer needs.

        The manifest is read anew under the lock, so that what others added meanwhile
        stays. After a failure the folder holds what it held before. A signature is
        removed: it is not of the new manifest.

        Raises:
            BundleError: The folder holds something else than when it was opened.
            OutputError: It cannot be written.
        """
        new = not os.path.lexists(self.folder)
        with locked(self.folder):
            old = filter(_LEFTOVER.fullmatch, os.listdir(self.folder))
            names = {*self._data, *old} - {_LOCK_NAME}
            try:
                base = _current(self.folder, self.manifest)
                names |= {*base.files}
                manifest = self._merged(base)
                for name in manifest.files.keys() & self._data.keys():
                    self._write(name)
                data = write_manifest(self.folder, manifest)
            finally:
                _tidy(self.folder, names, new)
        return Bundle(self.folder, manifest, data)

    def _merged(self, base: Manifest) -> Manifest:
        """``base`` with what was added and without what nothing uses any more."""
        graphs = _replaced(
            base.graphs, self._graphs, lambda g: (g.stage, g.kind, g.precision)
        )
        engines = _replaced(base.engines, self._engines, lambda e: (e.stage, e.target))
        listed = {(graph.stage, graph.file) for graph in graphs}
        if any((entry.stage, entry.graph) not in listed for entry in self._engines):
            raise BundleError(
                f"the graph of the new engine is no longer in {self.folder}",
                why="another process has exported it anew meanwhile",
                fix="build the engine again",
            )
        manifest = dataclasses.replace(
            base,
            graphs=graphs,
            engines=tuple(e for e in engines if (e.stage, e.graph) in listed),
        )
        files = dict(base.files)
        files |= {n: dataclasses.asdict(e) for n, e in self._entries.items()}
        used = used_files(manifest)
        files = {name: entry for name, entry in files.items() if name in used}
        if any(entry.file not in files for entry in self._engines):
            raise BundleError(
                f"the file of the new engine is no longer in {self.folder}",
                why="another process has built another engine for its target meanwhile",
                fix="build the engine again",
            )
        manifest = dataclasses.replace(manifest, files=files)
        check_manifest(manifest, str(self.folder / MANIFEST_NAME))
        return manifest

    def _write(self, name: str) -> None:
        """Write an added file unless it is there already, whole and right."""
        data, path = self._data[name], self.folder / name
        with contextlib.suppress(OSError):
            wanted = self._entries[name].sha256
            if stat.S_ISREG(path.lstat().st_mode) and sha256_of_file(path) == wanted:
                return
        if isinstance(data, ScratchFile):
            data.save_as(path)
        else:
            write_bytes(path, data)


def write_manifest(folder: Path, manifest: Manifest) -> bytes:
    """Replace a bundle's manifest and remove its signature; returns the bytes.

    The caller holds the lock, and has written the files.

    Raises:
        BundleError: The manifest would be too large to be read.
        OutputError: It cannot be written.
    """
    data = json_text(manifest.to_json()).encode()
    path = folder / MANIFEST_NAME
    if len(data) > MANIFEST.max_bytes:
        raise BundleError(
            f"{path} would be longer than {MANIFEST.max_bytes} bytes",
            fix="write another bundle",
        )
    write_bytes(path, data)
    with contextlib.suppress(OSError):
        os.unlink(folder / SIGNATURE_NAME)
    return data


def _replaced(
    old: Iterable[T], new: Iterable[T], key: Callable[[T], Hashable]
) -> tuple[T, ...]:
    """``old`` without those that ``new`` replaces, then ``new``."""
    latest = {key(entry): entry for entry in new}
    kept = [entry for entry in old if key(entry) not in latest]
    return (*kept, *latest.values())


def _tidy(folder: Path, names: set[str], new: bool) -> None:
    """Remove those of ``names`` that no manifest lists; then a folder without any."""
    with contextlib.suppress(OSError, Id3pmError):
        listed = open_bundle(folder).manifest.files if is_bundle(folder) else {}
        for name in names - listed.keys():
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
        if os.listdir(folder) == [_LOCK_NAME]:
            os.unlink(folder / _LOCK_NAME)
            if new:
                os.rmdir(folder)


def bundle_writer(
    folder: Path,
    diffusion: DiffusionSpec,
    checkpoint_sha256: str,
    tool_version: str,
    super_resolution: SecondStage | None = None,
) -> BundleWriter:
    """A writer for a new bundle, or for the one in ``folder`` if it is of the same
    checkpoints.

    Args:
        folder: Where the bundle is to lie.
        diffusion: The model's facts.
        checkpoint_sha256: Of its weights.
        tool_version: This release.
        super_resolution: The model behind it, which a bundle may get later; None
            leaves the one that is there.

    Raises:
        BundleError: ``folder`` holds a bundle of another checkpoint or with other
            settings, or other files.
        OutputError: It cannot be looked into.
    """
    wanted = Manifest(
        diffusion,
        checkpoint_sha256,
        tool_version,
        {},
        super_resolution=super_resolution,
    )
    if not is_bundle(folder) and not _is_free(folder):
        raise BundleError(
            f"{folder} exists and is not a bundle", fix="choose another --out"
        )
    return BundleWriter(folder, _current(folder, wanted))


def _is_free(folder: Path) -> bool:
    """Whether it is absent, empty, or what a killed first write left."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return not os.path.lexists(folder)
    except OSError as error:
        raise output_error(folder, error) from error
    return not names or (_LOCK_NAME in names and all(map(_LEFTOVER.fullmatch, names)))
