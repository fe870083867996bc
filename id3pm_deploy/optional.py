"""Importing packages that only some installation tiers have."""

from __future__ import annotations

import importlib
import os
from typing import Any

from .errors import MissingPackageError

# Since 1.29, ONNX Runtime's own wheels report the use of models to their maker and keep
# a device id and a queue of reports in the user's cache. Who wants that sets it to 0.
_ENVIRONMENT = {"onnxruntime": ("ORT_DISABLE_TELEMETRY", "1")}


def require(module: str, *, extra: str) -> Any:
    """Import ``module``, or say which extra of this package brings it.

    Raises:
        MissingPackageError: The module, or something it needs, is not installed.
    """
    if module in _ENVIRONMENT:
        os.environ.setdefault(*_ENVIRONMENT[module])
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the Python module {module!r}, which cannot be imported",
            why=str(error),
            fix=f"pip install 'id3pm-deploy[{extra}]'",
        ) from error
