"""What kind of checkpoint a path holds, told by its contents, and its tensors."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
from torch import Tensor

from ..checkpoint_config import FORMAT, WEIGHTS_NAME
from ..errors import CheckpointError
from ..files import open_plain
from .diffusers_folder import CLASS_NAME, read_json
from .pickle_file import ImportLimits, tensors_of_pickle

Kind = Literal["guided-diffusion", "diffusers", "checkpoint"]
_CONFIG = "config.json"
_SCHEDULER = "scheduler_config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_RAW = re.compile(r"model(\d+)\.(?:pt|safetensors)")
_EMA = re.compile(r"ema_.+_(\d+)\.(?:pt|safetensors)")
_MAX_HEADER = 100_000_000
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True)
class Source:
    """Something to import.

    Attributes:
        kind: What wrote it.
        weights: The file of its tensors.
        config: A diffusers folder's config.
        scheduler: A diffusers folder's scheduler; empty where there is none.
        warnings: What the user should know.
    """

    kind: Kind
    weights: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def find_source(path: Path) -> Source:
    """Say what ``path`` holds.

    Raises:
        CheckpointError: It is missing, or nothing that can be imported.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", fix="check the path")
    return Source("guided-diffusion", path, warnings=_raw_warnings(path))


def _folder(path: Path) -> Source:
    if not (path / _CONFIG).is_file() and (path / "unet" / _CONFIG).is_file():
        path = path / "unet"  # a pipeline's folder
    if not (path / _CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds no {_CONFIG}",
            fix="give a state dict (.pt, .safetensors), the folder of a UNet2DModel or "
            "a CHECKPOINT",
        )
    config = read_json(path / _CONFIG)
    if config.get("format") == FORMAT:
        return Source("checkpoint", path / WEIGHTS_NAME)
    if config.get("_class_name") != CLASS_NAME:
        raise CheckpointError(
            f"{path} cannot be imported",
            why=f"its config is of {config.get('_class_name')!r:.60}, not {CLASS_NAME}",
            fix="other networks of diffusers compute another function",
        )
    warnings: tuple[str, ...] = ()
    if path.name == "unet" and path.with_name("unet_ema").is_dir():
        warnings = (_raw_warning("unet", ["unet_ema"]),)
    return Source(
        "diffusers", _diffusers_weights(path), config, _scheduler(path), warnings
    )


def _diffusers_weights(path: Path) -> Path:
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} has no weights",
        why=f"neither {' nor '.join(_WEIGHTS)} is there",
        fix="save the model in one file: save_pretrained(max_shard_size='100GB')",
    )


def _scheduler(path: Path) -> dict[str, Any]:
    """The scheduler's config in a pipeline's folder, or in that of the UNet."""
    for place in (path.parent / "scheduler", path / "scheduler", path):
        if (place / _SCHEDULER).is_file():
            return read_json(place / _SCHEDULER)
    return {}


def _raw_warnings(path: Path) -> tuple[str, ...]:
    """A warning if weights that were averaged over training lie beside raw ones."""
    raw = _RAW.fullmatch(path.name)
    if raw is None:
        return ()
    names = sorted(
        one.name
        for one in path.parent.iterdir()
        if (ema := _EMA.fullmatch(one.name)) and int(ema[1]) == int(raw[1])
    )
    return (_raw_warning(path.name, names),) if names else ()


def _raw_warning(name: str, averaged: list[str]) -> str:
    return (
        f"{name} holds the raw weights; {', '.join(averaged[:4])} beside it holds "
        "their moving average, which usually makes better pictures"
    )


def load_tensors(path: Path, work: Path, limits: ImportLimits) -> dict[str, Tensor]:
    """The tensors in a file, left there until they are used.

    Args:
        path: A safetensors file or what torch.save wrote, whatever it is called.
        work: A private folder for a pickle's tensors.
        limits: Of the process that reads a pickle.

    Raises:
        CheckpointError: It is neither, damaged, or a pickle of more than tensors.
        OutputError: There is no room.
    """
    try:
        with open_plain(path, follow=True) as handle:
            head = handle.read(9)
    except OSError as error:
        why = error.strerror or str(error)
        raise CheckpointError(f"cannot read {path}", why=why) from error
    # First, for a length can begin with the byte that a pickle begins with.
    if head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER:
        return read_safetensors(path, path.name)
    if head.startswith((_ZIP, _PICKLE)):
        return read_safetensors(tensors_of_pickle(path, work, limits), path.name)
    raise CheckpointError(
        f"{path.name} cannot be imported",
        why="it is neither a safetensors file nor what torch.save writes",
        fix="take a state dict as torch.save or safetensors wrote it",
    )


def read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped.

    Raises:
        CheckpointError: It is not one, or damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{name} cannot be read as safetensors",
            why=str(error),
            fix="copy the file again; it is truncated or damaged",
        ) from error
