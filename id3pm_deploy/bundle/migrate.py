"""Older bundles become this release's version. Only the manifest is rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .manifest import (
    MANIFEST,
    MANIFEST_NAME,
    PLAIN_VERSION,
    Manifest,
    manifest_from_body,
    manifest_from_bytes,
)
from .reader import manifest_bytes
from .writer import locked, write_manifest

_NEW_IN: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "graphs": ("made_with",),
        "engines": (
            "gpu_name",
            "compute_capability",
            "multiprocessors",
            "cuda",
            "made_with",
        ),
    },
    3: {"graphs": ("stage", "body"), "engines": ("stage",)},
    4: {
        "engines": (
            "hardware_compatibility",
            "version_compatible",
            "plan_types",
            "peak_device_memory_bytes",
            "settings",
            "plan_key",
        )
    },
}
"""Keys that a version brought, which an older one must not have."""


def migrate_bundle(folder: Path) -> int:
    """Bring a bundle to a version that this release reads, in place and all at once.

    Graphs, engines and their files stay as they are; files are not hashed.

    Returns:
        The version it had; 4 and newer ones mean that nothing was written.

    Raises:
        BundleError: No bundle, damaged, or of a version that cannot be migrated.
        OutputError: The manifest cannot be replaced.
    """
    if (version := _migrated(folder)[0]) >= PLAIN_VERSION:
        return version
    with locked(folder):
        version, manifest = _migrated(folder)
        if version < PLAIN_VERSION:
            write_manifest(folder, manifest)
    return version


def _migrated(folder: Path) -> tuple[int, Manifest]:
    """The version of what lies there, and its manifest as this release has it."""
    path = folder / MANIFEST_NAME
    data = manifest_bytes(folder)
    values = MANIFEST.values(data, str(path))
    version = values.get("format_version")
    if type(version) is not int or not 0 < version < PLAIN_VERSION:
        manifest = manifest_from_bytes(data, path)
        return manifest.format_version, manifest
    old = dataclasses.replace(MANIFEST, version=version, oldest=None)
    body = old.body(values, str(path))
    if version < 2:
        body = _from_version_1(body, str(path))
    what = f"{path} is not of format version {version}"
    if version < 3:
        body = _from_version_2(body, what)
    body = _from_version_3(body, what)
    return version, manifest_from_body(body, version, str(path))


def _from_version_1(body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Entries keep their keys; the new ones take the values that mean "not known"."""
    _check_new(body, 2, f"{where} is not of format version 1")
    # Version 1 wrote 0 where the peak memory was not measured.
    engines = [
        {**entry, "peak_memory_bytes": entry.get("peak_memory_bytes") or None}
        for entry in body["engines"]
    ]
    return {**body, "engines": engines}


def _from_version_2(body: Mapping[str, Any], what: str) -> dict[str, Any]:
    """One stage, models with identity and without super-resolution: the new keys'
    defaults say that."""
    _check_new(body, 3, what)
    diffusion = body.get("diffusion")
    model = diffusion.get("model") if isinstance(diffusion, dict) else None
    if "super_resolution" in body or "low_res_size" in (model or ()):
        raise BundleError(what, why="it has keys of version 3")
    return dict(body)


def _from_version_3(body: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The new keys' defaults: a plan for the GPU and the version that built it, of
    which no more is known."""
    _check_new(body, 4, what)
    return dict(body)


def _check_new(body: Mapping[str, Any], version: int, what: str) -> None:
    """Raise :class:`BundleError` where entries have keys that ``version`` brought."""
    for name, new in _NEW_IN[version].items():
        entries = body.get(name, [] if version > 2 else None)
        if not isinstance(entries, list):
            raise BundleError(what, why=f"it lacks the list {name}")
        for entry in entries:
            if not isinstance(entry, dict) or set(new) & entry.keys():
                raise BundleError(what, why=f"its {name} have keys of a later version")
