"""Importing packages that only some installation tiers have."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import MissingPackageError


def require(module: str, *, extra: str) -> Any:
    """Import ``module``, or say which extra of this package brings it.

    Raises:
        MissingPackageError: The module, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this needs the Python module {module!r}, which cannot be imported",
            why=str(error),
            fix=f"pip install 'id3pm-deploy[{extra}]'",
        ) from error
