"""The artefact: a folder with graphs, engines, golden data and a manifest.

This is how it is read; ``bundle_writer`` makes it. Sizes and hashes are checked before
anything is parsed. There is no pickle anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError, RecipeError
from .files import sha256_of_file
from .recipes import dataclass_from_mapping
from .spec import DiffusionSpec

FORMAT = "id3pm-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
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
    it loads (ONNX Runtime). ``compute_capabilities`` are those a portable plan targets;
    ``warnings`` is what the library that built it warned of.
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
    warnings: tuple[str, ...] = ()


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
        with _reading(path):
            _check_plain_file(path, entry)
            data = path.read_bytes()
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _changed(path)
        return data

    def verify(self) -> None:
        """Check size and hash of every listed file.

        Raises:
            BundleError: The first file that is missing, unreadable or has changed.
        """
        for name in self.manifest.files:
            entry = self.manifest.file_entry(name)
            path = self.folder / name
            with _reading(path):
                _check_plain_file(path, entry)
                digest = sha256_of_file(path)
            if digest != entry.sha256:
                raise _changed(path)

    def graph(self, kind: str, precision: str) -> GraphEntry | None:
        """The graph of that kind and precision, if the bundle holds one."""
        for entry in self.manifest.graphs:
            if (entry.kind, entry.precision) == (kind, precision):
                return entry
        return None


def _changed(path: Path) -> BundleError:
    return BundleError(
        f"{path} is not the file that the manifest describes",
        why="its size or SHA-256 differs",
        fix="copy the bundle again or rebuild it; do not use this file",
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a BundleError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{path} is missing or cannot be read",
            why=error.strerror or str(error),
            fix="copy the whole bundle again, or change the permissions",
        ) from error


def _check_plain_file(path: Path, entry: FileEntry) -> None:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(
            f"{path} is not a plain file", fix="copy the whole bundle again"
        )
    if status.st_size != entry.size:
        raise _changed(path)


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` has a manifest (nothing is verified)."""
    return os.path.isfile(folder / MANIFEST_NAME)


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
    check_names(manifest, where)
    return manifest


def check_names(manifest: Manifest, where: str) -> None:
    """Raise :class:`BundleError` unless names are plain and all that is used is listed.

    Args:
        manifest: What to look at.
        where: How the message calls it.
    """
    used = used_files(manifest)
    for name in [*manifest.files, *used]:
        if not _NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise BundleError(
                f"{where} names the file {name!r:.80}",
                why="a bundle's files lie in its own folder under plain names",
                fix="do not use this bundle",
            )
    for name in used:
        manifest.file_entry(name)


def used_files(manifest: Manifest) -> set[str]:
    """Names of the files that graphs and engines need."""
    names = {name for g in manifest.graphs for name in (g.file, g.golden)}
    return names | {name for e in manifest.engines for name in (e.file, e.graph)}
