"""What a CHECKPOINT folder says of itself: ``config.json``, read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, RecipeError
from .files import sha256_of_file
from .recipes import dataclass_from_mapping
from .spec import DiffusionSpec

FORMAT = "id3pm-checkpoint"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_MAX_CONFIG_BYTES = 1 << 20


def is_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` says it is a CHECKPOINT (nothing is verified)."""
    return (folder / CONFIG_NAME).is_file()


def load_spec(folder: Path) -> DiffusionSpec:
    """Read and check ``config.json`` alone.

    Raises:
        CheckpointError: No such folder or file, not JSON, another format or version,
            or contradictory facts.
    """
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large to be a config")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint folder",
            why=f"{CONFIG_NAME}: {error.strerror or error}",
            fix="give the folder that `id3pm-deploy train` wrote",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON", why=str(error)) from error
    return _spec_from_json(values, str(path))


def _spec_from_json(values: Any, where: str) -> DiffusionSpec:
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{where} does not describe an ID3PM checkpoint")
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version!r}; this release reads "
            f"{FORMAT_VERSION}",
            fix="update id3pm-deploy",
        )
    rest = {k: v for k, v in values.items() if k not in ("format", "format_version")}
    try:
        return dataclass_from_mapping(DiffusionSpec, rest, where)
    except RecipeError as error:
        raise CheckpointError(error.what, why=error.why, fix=error.fix) from error


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights file, which stands for the checkpoint in records.

    Raises:
        CheckpointError: There is no weights file.
    """
    try:
        return sha256_of_file(folder / WEIGHTS_NAME)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {folder / WEIGHTS_NAME}", why=error.strerror or str(error)
        ) from error
