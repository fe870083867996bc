"""The resumable state of a run: one safetensors file, no pickle.

All randomness of step k is drawn from seeds made of (seed, k), so nothing but the
tensors and the step number has to be kept for a run to go on exactly.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from ..errors import TrainingError
from ..files import write_bytes

STATE_NAME = "state.safetensors"


class Ema:
    """Exponential moving average of a network's parameters, in float32."""

    def __init__(self, network: nn.Module) -> None:
        self.tensors = {
            name: tensor.detach().clone()
            for name, tensor in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Move the average towards ``network`` by 1 - ``decay``."""
        current = network.state_dict()
        names = list(self.tensors)
        torch._foreach_lerp_(
            [self.tensors[name] for name in names],
            [current[name] for name in names],
            1.0 - decay,
        )


def save_state(
    folder: Path, step: int, network: nn.Module, ema: Ema, optimizer: torch.optim.AdamW
) -> None:
    """Write weights, average and optimizer moments after ``step`` steps."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.tensors.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {"step": json.dumps(step)}
    write_bytes(folder / STATE_NAME, tensors_to_bytes(kept, metadata=metadata), 0o600)


def load_state(
    folder: Path, network: nn.Module, ema: Ema, optimizer: torch.optim.AdamW
) -> int:
    """Read what :func:`save_state` wrote into the three objects.

    Returns:
        The number of steps done.

    Raises:
        TrainingError: The file is damaged or of another network.
    """
    path = folder / STATE_NAME
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            step = int(json.loads((handle.metadata() or {})["step"]))
        network.load_state_dict(_under(tensors, "network."))
        for name, tensor in _under(tensors, "ema.").items():
            ema.tensors[name].copy_(tensor)
        optimizer.load_state_dict(_optimizer_state(tensors, optimizer))
    except (OSError, safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise TrainingError(
            f"cannot resume from {path}",
            why=str(error).splitlines()[0],
            fix="check that the settings are those of the run, or start afresh",
        ) from error
    return step


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _optimizer_state(
    tensors: dict[str, Tensor], optimizer: torch.optim.AdamW
) -> dict[str, object]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    return {"state": state, "param_groups": groups}
