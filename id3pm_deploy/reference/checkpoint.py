"""The CHECKPOINT folder: ``model.safetensors`` and ``config.json``.

Loading runs no code from the folder: JSON and safetensors only, never pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ..errors import CheckpointError, RecipeError
from ..files import atomic_path, json_text, make_folder, sha256_of_file, write_bytes
from ..recipes import dataclass_from_mapping
from ..spec import DiffusionSpec
from .unet import IdentityUNet

FORMAT = "id3pm-checkpoint"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_MAX_CONFIG_BYTES = 1 << 20
_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its facts, its network in float32, its weights' hash."""

    spec: DiffusionSpec
    network: IdentityUNet
    weights_sha256: str


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


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a CHECKPOINT folder.

    Returns:
        The network in float32 and evaluation mode.

    Raises:
        CheckpointError: Missing, truncated or wrong files, tensors that do not fit the
            config (named), or weights that are not finite.
    """
    spec = load_spec(folder)
    path = folder / WEIGHTS_NAME
    tensors = _read_tensors(path)
    network = _empty_network(spec, folder / CONFIG_NAME)
    _check_tensors(tensors, network.state_dict(), path)
    own = {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}
    network.load_state_dict(own, assign=True)
    return Checkpoint(spec, network.eval(), sha256_of_file(path))


def _empty_network(spec: DiffusionSpec, path: Path) -> IdentityUNet:
    """The network without memory for its weights, so that a config that asks for
    terabytes costs nothing before it is held against the file."""
    try:
        with torch.device("meta"):
            return IdentityUNet(spec.model, spec.identity.dim)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} does not describe a network that can be built", why=str(error)
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the weights {path}",
            why=str(error),
            fix="copy the file again; it is missing, truncated or not safetensors",
        ) from error


def _check_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path
) -> None:
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise CheckpointError(
            f"the tensors in {path} are not those of its config",
            why=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
            fix="check that config.json and model.safetensors belong together",
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"tensor {name} in {path} has shape {tuple(tensor.shape)}",
                why=f"the config asks for {tuple(wanted[name].shape)}",
                fix="check that config.json and model.safetensors belong together",
            )
        if tensor.dtype not in _STORED_DTYPES:
            raise CheckpointError(
                f"tensor {name} in {path} is stored as {tensor.dtype}",
                fix="store it as float32 or float16",
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"tensor {name} in {path} holds NaN or infinity",
                fix="use an earlier checkpoint; this one has diverged",
            )


def _some(names: list[str], most: int = 4) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def save_checkpoint(
    folder: Path,
    spec: DiffusionSpec,
    tensors: Mapping[str, Tensor],
    storage: Literal["float32", "float16"] = "float32",
) -> None:
    """Write a CHECKPOINT folder.

    Both files are complete on the disk before either replaces an old one; the config
    is the last to do so.

    Raises:
        CheckpointError: A weight does not fit float16 storage.
        OutputError: The folder cannot be written.
    """
    dtype = getattr(torch, storage)
    stored = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.detach().to("cpu", dtype).contiguous()
        if not torch.isfinite(stored[name]).all():
            raise CheckpointError(
                f"tensor {name} cannot be stored as {storage}",
                why="it holds values beyond its range, or NaN",
                fix="store as float32, or use an earlier state of the training",
            )
    config = {"format": FORMAT, "format_version": FORMAT_VERSION, **spec.to_json()}
    text, data = json_text(config), tensors_to_bytes(stored)
    make_folder(folder)
    with atomic_path(folder / CONFIG_NAME) as config_file:
        config_file.write_text(text, encoding="utf-8")
        write_bytes(folder / WEIGHTS_NAME, data)


def checkpoint_or_error(folder: Path) -> Path:
    """``folder`` if it can be a checkpoint, else a clear error."""
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {folder}", fix="give a CHECKPOINT folder"
        )
    load_spec(folder)
    return folder
