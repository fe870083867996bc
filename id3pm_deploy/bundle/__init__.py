"""The artefact: a folder with graphs, engines, golden data and a manifest.

BUNDLE_FORMAT.md specifies it. What reading needs is here; writing, packing, signing and
trust have modules of their own. There is no pickle anywhere.
"""

from .manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
)
from .reader import Bundle, is_bundle, open_bundle

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "SIGNATURE_NAME",
    "Bundle",
    "EngineEntry",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "is_bundle",
    "open_bundle",
]
