"""What a CHECKPOINT folder says of itself: ``config.json``, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import sha256_of_file
from .spec import DiffusionSpec
from .versioned_json import JsonFormat

FORMAT = "id3pm-checkpoint"
FORMAT_VERSION = 2
PLAIN_VERSION = 1
"""What a config without attributes has: 2 brought them, and nothing else."""
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

CONFIG = JsonFormat(
    name=FORMAT,
    version=FORMAT_VERSION,
    what="an ID3PM checkpoint",
    noun="config",
    max_bytes=1 << 20,
    error=CheckpointError,
    oldest=PLAIN_VERSION,
)


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
        data = CONFIG.read(path, follow=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint folder",
            why=f"{CONFIG_NAME}: {error.strerror or error}",
            fix="give the folder that `id3pm-deploy train` wrote",
        ) from error
    values = CONFIG.values(data, str(path))
    body = CONFIG.body(values, str(path))
    version = values["format_version"]
    if ("attributes" in body) != (version == FORMAT_VERSION):
        raise CheckpointError(
            f"{path} is not of format version {version}",
            why=f"version {FORMAT_VERSION} is that of attributes",
        )
    return CONFIG.into(DiffusionSpec, body, str(path))


def config_values(spec: DiffusionSpec) -> dict[str, Any]:
    """What ``config.json`` holds, of the oldest format version that can say it."""
    version = FORMAT_VERSION if spec.attributes else PLAIN_VERSION
    return {"format": FORMAT, "format_version": version, **spec.to_json()}


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
