"""The artefact: a folder with graphs, engines, golden data and a manifest.

BUNDLE_FORMAT.md specifies it. What reading needs is here; writing, packing, signing and
trust have modules of their own. There is no pickle anywhere.
"""

from .manifest import (
    BASE,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    SUPER_RESOLUTION,
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    SecondStage,
)
from .reader import Bundle, is_bundle, open_bundle

__all__ = [
    "BASE",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "SIGNATURE_NAME",
    "SUPER_RESOLUTION",
    "Bundle",
    "EngineEntry",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "SecondStage",
    "is_bundle",
    "open_bundle",
]
