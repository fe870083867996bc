"""The resumable state of a run: one safetensors file, no pickle.

All randomness of step k is drawn from seeds made of (seed, k), so nothing but the
tensors, the step number and the loss scale of float16 has to be kept for a run to go
on exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from ..errors import TrainingError
from ..files import write_bytes
from .ema import Ema

STATE_NAME = "state.safetensors"
_DAMAGED = (OSError, RuntimeError, LookupError, ValueError, TypeError)


def save_state(
    folder: Path,
    step: int,
    network: nn.Module,
    averages: Sequence[Ema],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write weights, averages and optimizer moments after ``step`` steps.

    Raises:
        TrainingError: A weight or its average is NaN or infinite; the state that was
            saved before is left as it is.
        OutputError: The file cannot be written.
    """
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    for place, ema in enumerate(averages):
        tensors |= {f"{_prefix(place)}{k}": v for k, v in ema.tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"the weights are not finite at step {step}",
                why=f"{name} holds NaN or infinity",
                fix="lower --learning-rate; the last saved state is intact",
            )
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"step": json.dumps(step)}
    if scaler is not None:
        metadata["scaler"] = json.dumps(scaler.state_dict())
    write_bytes(folder / STATE_NAME, tensors_to_bytes(kept, metadata=metadata), 0o600)


def load_state(
    folder: Path,
    network: nn.Module,
    averages: Sequence[Ema],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Read what :func:`save_state` wrote into the objects.

    Returns:
        The number of steps done.

    Raises:
        TrainingError: The file is damaged or of another network.
    """
    path = folder / STATE_NAME
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = handle.metadata() or {}
        step = int(json.loads(metadata["step"]))
        if step < 0:
            raise ValueError(f"its step is {step}")
        averaged = [_under(tensors, _prefix(place)) for place in range(len(averages))]
        for found, ema in zip(averaged, averages, strict=True):
            _check_shapes(found, ema.tensors)
        network.load_state_dict(_under(tensors, "network."))
        for found, ema in zip(averaged, averages, strict=True):
            for name, tensor in found.items():
                ema.tensors[name].copy_(tensor)
        optimizer.load_state_dict(_optimizer_state(tensors, optimizer))
        if scaler is not None and "scaler" in metadata:
            scaler.load_state_dict(json.loads(metadata["scaler"]))
    except (safetensors.SafetensorError, *_DAMAGED) as error:
        raise TrainingError(
            f"cannot resume from {path}",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            fix="check that the settings are those of the run, or start afresh",
        ) from error
    return step


def _prefix(place: int) -> str:
    """How the tensors of an average are called; the first is the CHECKPOINT's."""
    return f"ema{place}." if place else "ema."


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _check_shapes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if found.keys() != wanted.keys():
        raise ValueError("its tensors are not those of this network")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"its {name} has shape {list(tensor.shape)}")


def _optimizer_state(
    tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for place, values in state.items():
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameters[place])
        _check_shapes(values, {"step": torch.tensor(0.0), **moments})
    groups = optimizer.state_dict()["param_groups"]
    return {"state": state, "param_groups": groups}
