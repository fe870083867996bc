"""A photo to embed."""

from __future__ import annotations

from pathlib import Path

import pytest


def photo() -> Path:
    """A photo of a person who does not exist, or a skipped test."""
    from id3pm_deploy.demo import synthetic_photo
    from id3pm_deploy.errors import MissingPackageError

    try:
        return synthetic_photo()
    except MissingPackageError as error:
        pytest.skip(error.what)
