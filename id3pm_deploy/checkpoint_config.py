"""What a CHECKPOINT folder says of itself: ``config.json``, read without torch."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError
from .files import sha256_of_file
from .spec import DiffusionSpec
from .versioned_json import JsonFormat

FORMAT = "id3pm-checkpoint"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

CONFIG = JsonFormat(
    name=FORMAT,
    version=FORMAT_VERSION,
    what="an ID3PM checkpoint",
    noun="config",
    max_bytes=1 << 20,
    error=CheckpointError,
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
    body = CONFIG.body(CONFIG.values(data, str(path)), str(path))
    return CONFIG.into(DiffusionSpec, body, str(path))


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
