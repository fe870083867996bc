"""What a bundle says of itself: ``manifest.json``, specified in BUNDLE_FORMAT.md."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BundleError, InputError
from ..spec import DiffusionSpec, check_chain
from ..versioned_json import JsonFormat

FORMAT_VERSION = 5
PLAIN_VERSION = 4
"""What a bundle without attributes has: 5 brought them, and nothing else."""
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.sig"

BASE, SUPER_RESOLUTION = "base", "super_resolution"
"""Stages: the model of ``diffusion``, and the one behind it that enlarges."""

MAX_FILES = 1024
MAX_FILE_BYTES = (8 << 30) - 1
"""The most that the header of a plain tar can state."""
MAX_TOTAL_BYTES = 64 << 30
MAX_GRAPHS = 64
MAX_ENGINES = 256

HARDWARE_COMPATIBILITY = ("none", "ampere_plus", "same_compute_capability")
"""On which other GPUs than the builder's a plan of plain TensorRT may run."""

MANIFEST = JsonFormat(
    name="id3pm-bundle",
    version=FORMAT_VERSION,
    what="an ID3PM bundle",
    noun="manifest",
    max_bytes=4 << 20,
    error=BundleError,
    oldest=PLAIN_VERSION,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIX = "export or build the bundle again"
_RANGES = {
    "opset": (1, 1000),
    "state_slots": (0, 64),
    "step_width": (0, 4096),
    "threads": (0, 1024),
    "multiprocessors": (1, 1 << 20),
    "peak_memory_bytes": (1, 1 << 50),
    "peak_device_memory_bytes": (1, 1 << 50),
    "build_seconds": (0, 1 << 30),
    "tolerance_step": (0, 1),
    "tolerance_trajectory": (0, 1),
}


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """An ONNX graph: ``step`` (a whole solver step) or ``unet`` (the bare UNet).

    ``golden`` is an .npz with random inputs and what PyTorch made of them;
    ``max_relative_error`` is ONNX Runtime's against PyTorch over all checked sizes;
    ``made_with`` gives the versions of what exported it, by package. ``stage`` says of
    which of the bundle's models it is, ``body`` in which form the UNet was exported.
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
    made_with: dict[str, Any] = field(default_factory=dict)
    stage: str = BASE
    body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineEntry:
    """An engine: how a graph is run on one kind of machine.

    ``file`` is the compiled plan, or the graph itself where the runtime compiles when
    it loads (ONNX Runtime). ``compute_capabilities`` are those a portable plan targets;
    ``gpu_name``, ``compute_capability``, ``multiprocessors`` and ``cuda`` describe the
    GPU and the CUDA that a plan is bound to. ``warnings`` is what the library that
    built it warned of. ``stage`` is its graph's. ``hardware_compatibility`` and
    ``version_compatible`` say how far a plan of plain TensorRT may travel.
    ``layer_types`` was counted in the parsed network, ``plan_types`` in the plan.
    ``settings`` is the recipe as it was resolved, ``plan_key`` the hash of everything
    that determined the plan. None stands for what does not apply or was not measured.
    """

    target: str
    backend: str
    flavour: str
    version: str
    precision: str
    graph: str
    file: str
    compute_capabilities: tuple[str, ...] = ()
    gpu_name: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None
    cuda: str | None = None
    profiles: tuple[dict[str, Any], ...] = ()
    layer_types: dict[str, Any] = field(default_factory=dict)
    build_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    self_test_error: float | None = None
    threads: int = 0
    warnings: tuple[str, ...] = ()
    made_with: dict[str, Any] = field(default_factory=dict)
    stage: str = BASE
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    plan_types: dict[str, Any] = field(default_factory=dict)
    peak_device_memory_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    plan_key: str = ""

    @property
    def label(self) -> str:
        """What tells it from the bundle's other engines: its target, and its stage
        where that is not the base."""
        return self.target if self.stage == BASE else f"{self.target} ({self.stage})"


@dataclass(frozen=True)
class SecondStage:
    """The super-resolution model of a bundle that has one behind its base."""

    diffusion: DiffusionSpec
    checkpoint_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything the bundle says of itself."""

    diffusion: DiffusionSpec
    checkpoint_sha256: str
    tool_version: str
    files: dict[str, Any]
    graphs: tuple[GraphEntry, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    super_resolution: SecondStage | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values, with format and version first."""
        head = {"format": MANIFEST.name, "format_version": self.format_version}
        values = dataclasses.asdict(self)
        values["diffusion"] = self.diffusion.to_json()
        if self.super_resolution is not None:
            second = self.super_resolution.diffusion.to_json()
            values["super_resolution"]["diffusion"] = second
        return {**head, **values, "files": dict(sorted(self.files.items()))}

    @property
    def format_version(self) -> int:
        """The oldest version that can say it; 5 where a stage has attributes."""
        stages = self.stages.values()
        some = any(stage.diffusion.attributes for stage in stages)
        return FORMAT_VERSION if some else PLAIN_VERSION

    def file_entry(self, name: str) -> FileEntry:
        """Size and hash of the file ``name``.

        Raises:
            BundleError: The manifest does not list it.
        """
        try:
            return FileEntry(**self.files[name])
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"the manifest does not describe the file {name!r:.120}", fix=_FIX
            ) from error

    @property
    def stages(self) -> dict[str, SecondStage]:
        """Function and weights of each stage, base first."""
        found = {BASE: SecondStage(self.diffusion, self.checkpoint_sha256)}
        if self.super_resolution is not None:
            found[SUPER_RESOLUTION] = self.super_resolution
        return found

    @property
    def plans(self) -> tuple[EngineEntry, ...]:
        """Engines whose file is a compiled plan, which is native code."""
        return tuple(e for e in self.engines if e.backend != "onnxruntime")


def manifest_from_bytes(data: bytes, path: Path) -> Manifest:
    """The manifest in ``data``, checked against every rule of the format.

    Args:
        data: What ``manifest.json`` holds.
        path: How errors call it.

    Raises:
        BundleError: It breaks a rule, or is of another version.
    """
    values = MANIFEST.values(data, str(path))
    older = f"id3pm-deploy bundle migrate {path.parent}"
    body = MANIFEST.body(values, str(path), older=older)
    return manifest_from_body(body, values["format_version"], str(path))


def manifest_from_body(body: Mapping[str, Any], version: int, where: str) -> Manifest:
    """As :func:`manifest_from_bytes`, from the values without format and version."""
    _check_version(body, version, where)
    manifest = MANIFEST.into(Manifest, body, where)
    check_manifest(manifest, where)
    return manifest


def _check_version(body: Mapping[str, Any], version: int, where: str) -> None:
    """Refuse attributes in a manifest of another version than theirs, and their
    version where there are none."""
    stages = [part for part in (body, body.get("super_resolution")) if part]
    found = (stage.get("diffusion") for stage in stages if isinstance(stage, Mapping))
    some = any("attributes" in one for one in found if isinstance(one, Mapping))
    if some != (version == FORMAT_VERSION):
        raise BundleError(
            f"{where} is not of format version {version}",
            why=f"version {FORMAT_VERSION} is that of attributes",
            fix=_FIX,
        )


def check_manifest(manifest: Manifest, where: str) -> None:
    """Raise :class:`BundleError` for a manifest that breaks a rule of the format.

    Args:
        manifest: What to look at.
        where: How the message calls it.
    """
    _check_files(manifest, where)
    _check_hash(manifest.checkpoint_sha256, f"{where}, checkpoint_sha256")
    _check_second_stage(manifest, where)
    for name in used_files(manifest):
        manifest.file_entry(name)
    _check_entries(manifest, where)


def _check_second_stage(manifest: Manifest, where: str) -> None:
    second = manifest.super_resolution
    if second is None:
        return
    _check_hash(
        second.checkpoint_sha256, f"{where}, super_resolution, checkpoint_sha256"
    )
    try:
        check_chain(manifest.diffusion, second.diffusion)
    except InputError as error:
        raise BundleError(
            f"{where}: its super_resolution does not fit behind its base",
            why=f"{error.what}; {error.why}",
            fix=_FIX,
        ) from error


def _check_files(manifest: Manifest, where: str) -> None:
    if len(manifest.files) > MAX_FILES:
        raise BundleError(f"{where} lists more than {MAX_FILES} files", fix=_FIX)
    for name in [*manifest.files, *used_files(manifest)]:
        if not _NAME.fullmatch(name) or name in (MANIFEST_NAME, SIGNATURE_NAME):
            raise BundleError(
                f"{where} names the file {name!r:.80}",
                why="a bundle's files lie in its own folder under plain names",
                fix="do not use this bundle",
            )
    total = 0
    for name, values in manifest.files.items():
        entry = MANIFEST.into(FileEntry, values, f"{where}, file {name}")
        _check_hash(entry.sha256, f"{where}, file {name}, sha256")
        if not 0 <= entry.size <= MAX_FILE_BYTES:
            raise BundleError(
                f"{where}, file {name}: its size must be from 0 to {MAX_FILE_BYTES}",
                why=f"it is {entry.size}",
            )
        total += entry.size
    if total > MAX_TOTAL_BYTES:
        raise BundleError(
            f"{where} lists more than {MAX_TOTAL_BYTES} bytes", why=f"{total} in all"
        )


def _check_hash(text: str, where: str) -> None:
    if not _SHA256.fullmatch(text):
        raise BundleError(
            f"{where} must be 64 hexadecimal digits in lower case",
            why=f"it is {text!r:.80}",
        )


def _check_entries(manifest: Manifest, where: str) -> None:
    """Ranges of numbers; every engine has its graph; nothing is there twice."""
    if len(manifest.graphs) > MAX_GRAPHS or len(manifest.engines) > MAX_ENGINES:
        raise BundleError(
            f"{where} lists more than {MAX_GRAPHS} graphs or {MAX_ENGINES} engines"
        )
    entries: list[GraphEntry | EngineEntry] = [*manifest.graphs, *manifest.engines]
    for entry in entries:
        _check_ranges(entry, where)
        if entry.stage not in manifest.stages:
            raise BundleError(
                f"{where}: the bundle has no stage {entry.stage!r:.40}",
                why=f"it has {', '.join(manifest.stages)}",
                fix=_FIX,
            )
    named = [f"{g.stage} {g.kind} {g.precision}" for g in manifest.graphs]
    _check_unique(named, where, "graph")
    _check_unique((f"{e.stage} {e.target}" for e in manifest.engines), where, "engine")
    graphs = {(graph.stage, graph.file) for graph in manifest.graphs}
    for engine in manifest.engines:
        _check_plan_facts(engine, where)
        if (engine.stage, engine.graph) not in graphs:
            raise BundleError(
                f"the engine {engine.target!r:.80} names a graph that is not listed "
                "for its stage",
                why=f"its graph is {engine.graph!r:.80}",
                fix="build it again with `id3pm-deploy build-engine CHECKPOINT "
                "--target TARGET --out BUNDLE`",
            )


def _check_plan_facts(engine: EngineEntry, where: str) -> None:
    if engine.hardware_compatibility not in HARDWARE_COMPATIBILITY:
        raise BundleError(
            f"{where}: hardware_compatibility must be one of "
            f"{', '.join(HARDWARE_COMPATIBILITY)}",
            why=f"it is {engine.hardware_compatibility!r:.80}",
        )
    if engine.plan_key:
        _check_hash(engine.plan_key, f"{where}, plan_key")


def _check_ranges(entry: GraphEntry | EngineEntry, where: str) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(entry, name, None)
        if value is not None and not low <= value <= high:
            raise BundleError(
                f"{where}: {name} must be from {low} to {high}", why=f"it is {value}"
            )
    if not all(isinstance(text, str) for text in entry.made_with.values()):
        raise BundleError(f"{where}: made_with must map names to versions")


def _check_unique(names: Iterable[str], where: str, noun: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"{where} has two entries of the {noun} {name!r:.80}")
        seen.add(name)


def used_files(manifest: Manifest) -> set[str]:
    """Names of the files that graphs and engines need."""
    names = {name for g in manifest.graphs for name in (g.file, g.golden)}
    return names | {name for e in manifest.engines for name in (e.file, e.graph)}
