"""The artefact: a folder with graphs, engines, golden data and a manifest.

Files are named after their content and complete before the manifest is replaced, so
an interrupted write leaves the bundle as it was. Sizes and hashes are checked before
anything is parsed. There is no pickle anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError, RecipeError
from .files import make_folder, sha256_of_file, write_bytes, write_json
from .recipes import dataclass_from_mapping
from .spec import DiffusionSpec

FORMAT = "id3pm-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_LOCK_NAME = ".lock"
_MAX_MANIFEST_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """An ONNX graph: ``step`` (a whole solver step) or ``unet`` (the bare UNet).

    ``golden`` is an .npz with random inputs and what PyTorch made of them;
    ``max_relative_error`` is ONNX Runtime's against PyTorch over all checked sizes.
    """

    file: str
    kind: str
    precision: str
    opset: int
    state_slots: int
    step_width: int
    max_relative_error: float
    tolerance_step: float
    tolerance_trajectory: float
    golden: str
    recipe: str = ""


@dataclass(frozen=True)
class EngineEntry:
    """An engine: how a graph is run on one kind of machine.

    ``file`` is the compiled plan, or the graph itself where the runtime compiles when
    it loads (ONNX Runtime). ``compute_capabilities`` are those a portable plan targets.
    """

    target: str
    backend: str
    flavour: str
    version: str
    precision: str
    graph: str
    file: str
    compute_capabilities: tuple[str, ...] = ()
    profiles: tuple[dict[str, Any], ...] = ()
    layer_types: dict[str, Any] = field(default_factory=dict)
    build_seconds: float = 0.0
    peak_memory_bytes: int = 0
    self_test_error: float | None = None
    threads: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything the bundle says of itself."""

    diffusion: DiffusionSpec
    checkpoint_sha256: str
    tool_version: str
    files: dict[str, Any]
    graphs: tuple[GraphEntry, ...] = ()
    engines: tuple[EngineEntry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, with format and version first."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION}
        return {**head, **dataclasses.asdict(self)}

    def file_entry(self, name: str) -> FileEntry:
        """Size and hash of the file ``name``.

        Raises:
            BundleError: The manifest does not list it, or lists it badly.
        """
        try:
            return dataclass_from_mapping(FileEntry, self.files[name], f"file {name}")
        except (KeyError, RecipeError) as error:
            raise BundleError(
                f"the manifest does not describe the file {name!r}",
                fix="export or build the bundle again",
            ) from error


@dataclass(frozen=True)
class Bundle:
    """An opened bundle folder; nothing in it has been parsed but the manifest."""

    folder: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The bytes of a listed file, after size and SHA-256 were checked.

        Raises:
            BundleError: Missing, of another size or hash, a link, or not listed.
        """
        entry = self.manifest.file_entry(name)
        path = self.folder / name
        _check_plain_file(path, entry)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(
                f"cannot read {path}", why=error.strerror or str(error)
            ) from error
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _changed(path)
        return data

    def verify(self) -> None:
        """Check size and hash of every listed file.

        Raises:
            BundleError: The first file that is missing or has changed.
        """
        for name in self.manifest.files:
            entry = self.manifest.file_entry(name)
            path = self.folder / name
            _check_plain_file(path, entry)
            if sha256_of_file(path) != entry.sha256:
                raise _changed(path)

    def graph(self, kind: str, precision: str) -> GraphEntry | None:
        """The graph of that kind and precision, if the bundle holds one."""
        for entry in self.manifest.graphs:
            if (entry.kind, entry.precision) == (kind, precision):
                return entry
        return None

    def engine(
        self, target: str | None = None, backend: str | None = None
    ) -> EngineEntry:
        """The engine of that target or backend; the only one if neither is given.

        Raises:
            BundleError: No such engine; the message lists those there are.
        """
        found = [
            entry
            for entry in self.manifest.engines
            if target in (None, entry.target) and backend in (None, entry.backend)
        ]
        if found:
            return found[0]
        there = ", ".join(e.target for e in self.manifest.engines) or "none"
        wanted = target or backend or "any"
        raise BundleError(
            f"{self.folder} holds no engine for {wanted}",
            why=f"engines in it: {there}",
            fix=f"id3pm-deploy build-engine {self.folder} --target {target or 'cpu'}",
        )


def _changed(path: Path) -> BundleError:
    return BundleError(
        f"{path} is not the file that the manifest describes",
        why="its size or SHA-256 differs",
        fix="copy the bundle again or rebuild it; do not use this file",
    )


def _check_plain_file(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{path} is missing or not a plain file",
            fix="copy the whole bundle again",
        )
    if path.stat().st_size != entry.size:
        raise _changed(path)


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` has a manifest (nothing is verified)."""
    return (folder / MANIFEST_NAME).is_file()


def open_bundle(folder: Path) -> Bundle:
    """Read and check the manifest; files are checked when they are read.

    Raises:
        BundleError: Not a bundle, another format or version, or a damaged manifest.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is too large to be a manifest")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle",
            why=f"{MANIFEST_NAME}: {error.strerror or error}",
            fix="make one with `id3pm-deploy build-engine CHECKPOINT --out BUNDLE`",
        ) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON", why=str(error)) from error
    return Bundle(folder, _manifest_from_json(values, str(path)))


def _manifest_from_json(values: Any, where: str) -> Manifest:
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise BundleError(f"{where} does not describe an ID3PM bundle")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{where} has format version {version!r}; this release reads "
            f"{FORMAT_VERSION}",
            fix="use the release that wrote it, or build the bundle again",
        )
    rest = {k: v for k, v in values.items() if k not in ("format", "format_version")}
    try:
        manifest = dataclass_from_mapping(Manifest, rest, where)
    except RecipeError as error:
        raise BundleError(error.what, why=error.why, fix=error.fix) from error
    _check_names(manifest, where)
    return manifest


def _check_names(manifest: Manifest, where: str) -> None:
    used = _used_files(manifest)
    for name in [*manifest.files, *used]:
        if not _NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise BundleError(
                f"{where} names the file {name!r:.80}",
                why="a bundle's files lie in its own folder under plain names",
                fix="do not use this bundle",
            )
    for name in used:
        manifest.file_entry(name)


def _used_files(manifest: Manifest) -> set[str]:
    names = {name for g in manifest.graphs for name in (g.file, g.golden)}
    return names | {name for e in manifest.engines for name in (e.file, e.graph)}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the bundle's lock file; writers wait for each other."""
    import fcntl

    with open(folder / _LOCK_NAME, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@dataclass
class BundleWriter:
    """Collects new files, then replaces the manifest once.

    Args:
        folder: The bundle's folder; created if needed.
        manifest: What stands in it, or an empty one for a new bundle.
    """

    folder: Path
    manifest: Manifest

    def add_file(self, prefix: str, suffix: str, data: bytes) -> str:
        """Write ``data`` under a name made of its SHA-256; returns the name."""
        digest = hashlib.sha256(data).hexdigest()
        name = f"{prefix}-{digest[:12]}{suffix}"
        make_folder(self.folder)
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != len(data):
            write_bytes(path, data)
        entry = {"size": len(data), "sha256": digest}
        files = {**self.manifest.files, name: entry}
        self.manifest = dataclasses.replace(self.manifest, files=files)
        return name

    def add_graph(self, entry: GraphEntry) -> None:
        """List a graph, replacing the one of the same kind and precision."""
        kept = tuple(
            graph
            for graph in self.manifest.graphs
            if (graph.kind, graph.precision) != (entry.kind, entry.precision)
        )
        self.manifest = dataclasses.replace(self.manifest, graphs=(*kept, entry))

    def add_engine(self, entry: EngineEntry) -> None:
        """List an engine, replacing the one of the same target."""
        kept = tuple(e for e in self.manifest.engines if e.target != entry.target)
        self.manifest = dataclasses.replace(self.manifest, engines=(*kept, entry))

    def commit(self) -> Bundle:
        """Replace the manifest, then remove files that it no longer needs."""
        manifest = self._without_unused()
        make_folder(self.folder)
        with _locked(self.folder):
            write_json(self.folder / MANIFEST_NAME, manifest.to_json())
            for name in set(self.manifest.files) - set(manifest.files):
                with contextlib.suppress(OSError):
                    os.unlink(self.folder / name)
        self.manifest = manifest
        return Bundle(self.folder, manifest)

    def _without_unused(self) -> Manifest:
        used = _used_files(self.manifest)
        files = {k: v for k, v in self.manifest.files.items() if k in used}
        return dataclasses.replace(self.manifest, files=files)


def bundle_writer(
    folder: Path, diffusion: DiffusionSpec, checkpoint_sha256: str, tool_version: str
) -> BundleWriter:
    """A writer for a new bundle, or for the one in ``folder`` if it is of the same
    checkpoint.

    Raises:
        BundleError: ``folder`` holds a bundle of another checkpoint, or other files.
    """
    if is_bundle(folder):
        bundle = open_bundle(folder)
        if bundle.manifest.checkpoint_sha256 != checkpoint_sha256:
            raise BundleError(
                f"{folder} is a bundle of another checkpoint",
                fix="choose another --out",
            )
        return BundleWriter(folder, bundle.manifest)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(
            f"{folder} exists and is not a bundle", fix="choose another --out"
        )
    empty = Manifest(diffusion, checkpoint_sha256, tool_version, {})
    return BundleWriter(folder, empty)
