"""The CHECKPOINT folder: ``model.safetensors`` and ``config.json``.

Loading runs no code from the folder: JSON and safetensors only, never pickle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    config_values,
    load_spec,
    weights_sha256,
)
from ..errors import CheckpointError, some_of
from ..files import (
    atomic_path,
    json_text,
    make_folder,
    open_plain,
    output_error,
    temporary_folder,
)
from ..spec import DiffusionSpec
from .unet import IdentityUNet

_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ALIGNMENT = 4
"""Bytes; safetensors files of other writers may start their numbers anywhere."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its facts, its network in float32, its weights' hash."""

    spec: DiffusionSpec
    network: IdentityUNet
    weights_sha256: str


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a CHECKPOINT folder.

    Weights that are stored in float32 are not copied: they are the file's own pages,
    private to this process once it writes to them.

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
    for name in tensors:
        tensors[name] = _in_float32(tensors[name])
    network.load_state_dict(tensors, assign=True)
    return Checkpoint(spec, network.eval(), weights_sha256(folder))


def _empty_network(spec: DiffusionSpec, path: Path) -> IdentityUNet:
    """The network without memory for its weights, so that a config that asks for
    terabytes costs nothing before it is held against the file."""
    try:
        with torch.device("meta"):
            return IdentityUNet(spec.model, spec.condition_dim)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} does not describe a network that can be built", why=str(error)
        ) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with open_plain(path, follow=True):  # no pipe, which would be waited for
            pass
        with safetensors.safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the weights {path}",
            why=str(error),
            fix="copy the file again; it is missing, truncated or not safetensors",
        ) from error


def _in_float32(tensor: Tensor) -> Tensor:
    """The tensor itself where it is stored as the processor wants it."""
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    return tensor.to(torch.float32, copy=not aligned)


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; takes no memory."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _check_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path
) -> None:
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise CheckpointError(
            f"the tensors in {path} are not those of its config",
            why=f"missing: {some_of(missing) or 'none'}; "
            f"unexpected: {some_of(unexpected) or 'none'}",
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
        if not _is_finite(tensor):
            raise CheckpointError(
                f"tensor {name} in {path} holds NaN or infinity",
                fix="use an earlier checkpoint; this one has diverged",
            )


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
        if not _is_finite(stored[name]):
            raise CheckpointError(
                f"tensor {name} cannot be stored as {storage}",
                why="it holds values beyond its range, or NaN",
                fix="store as float32, or use an earlier state of the training",
            )
    text = json_text(config_values(spec))
    make_folder(folder)
    with atomic_path(folder / CONFIG_NAME) as config_file:
        config_file.write_text(text, encoding="utf-8")
        _write_tensors(folder / WEIGHTS_NAME, stored)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; its bytes are never in memory as a whole."""
    with atomic_path(path) as temporary, temporary_folder(path) as work:
        try:
            save_file(tensors, work / path.name)
        except safetensors.SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            found = (int(number[1]), os.strerror(int(number[1]))) if number else ()
            raise output_error(path, OSError(*found)) from error
        os.replace(work / path.name, temporary)
