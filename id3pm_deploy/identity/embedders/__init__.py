"""Black-box face recognition models: aligned crops in, raw vectors out.

Nothing here looks inside a model: a file's SHA-256 is its identity, and a Python
callable or a program has none. One file fed other pixels is another function, so a
preprocessing that is not the file's usual one is hashed as well, see
:func:`~id3pm_deploy.identity.preprocessing.function_sha256`.
"""

from .base import Embedder, checked_vectors
from .external import CommandEmbedder
from .function import CallableEmbedder
from .load import SPEC_HELP, load_embedder
from .onnx import OnnxEmbedder
from .opencv import SFACE_FILE, OpenCVEmbedder, SFaceEmbedder

__all__ = [
    "SFACE_FILE",
    "SPEC_HELP",
    "CallableEmbedder",
    "CommandEmbedder",
    "Embedder",
    "OnnxEmbedder",
    "OpenCVEmbedder",
    "SFaceEmbedder",
    "checked_vectors",
    "load_embedder",
]
