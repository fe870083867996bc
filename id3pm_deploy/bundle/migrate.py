"""Older bundles: version 1 becomes version 2. Only the manifest is rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MANIFEST_NAME,
    Manifest,
    manifest_from_body,
    manifest_from_bytes,
)
from .reader import manifest_bytes
from .writer import locked, write_manifest

_NEW_IN_2 = {
    "graphs": ("made_with",),
    "engines": (
        "gpu_name",
        "compute_capability",
        "multiprocessors",
        "cuda",
        "made_with",
    ),
}


def migrate_bundle(folder: Path) -> int:
    """Bring a bundle to the version of this release, in place and all at once.

    Graphs, engines and their files stay as they are; files are not hashed.

    Returns:
        The version it had; this release's own means that nothing was written.

    Raises:
        BundleError: No bundle, damaged, or of a version that cannot be migrated.
        OutputError: The manifest cannot be replaced.
    """
    if _migrated(folder)[0] == FORMAT_VERSION:
        return FORMAT_VERSION
    with locked(folder):
        version, manifest = _migrated(folder)
        if version != FORMAT_VERSION:
            write_manifest(folder, manifest)
    return version


def _migrated(folder: Path) -> tuple[int, Manifest]:
    """The version of what lies there, and its manifest in this release's version."""
    path = folder / MANIFEST_NAME
    data = manifest_bytes(folder)
    values = MANIFEST.values(data, str(path))
    version = values.get("format_version")
    if type(version) is not int or version != 1:
        return FORMAT_VERSION, manifest_from_bytes(data, path)
    body = dataclasses.replace(MANIFEST, version=1).body(values, str(path))
    return 1, manifest_from_body(_from_version_1(body, str(path)), str(path))


def _from_version_1(body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Entries keep their keys; the new ones take the values that mean "not known"."""
    changed = dict(body)
    for name, new in _NEW_IN_2.items():
        entries = body.get(name)
        if not isinstance(entries, list):
            raise BundleError(f"{where} lacks the list {name}")
        for entry in entries:
            if not isinstance(entry, dict) or set(new) & entry.keys():
                raise BundleError(f"{where} is not of format version 1, in {name}")
    # Version 1 wrote 0 where the peak memory was not measured.
    changed["engines"] = [
        {**entry, "peak_memory_bytes": entry.get("peak_memory_bytes") or None}
        for entry in body["engines"]
    ]
    return changed
