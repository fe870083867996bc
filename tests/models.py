"""Small models and a plain executor of solver tables, for the numeric tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.reference.step import StepModule
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.solvers import STATE_SLOTS, STEP_HEAD, SolverTable, matrices
from id3pm_deploy.spec import DiffusionSpec, IdentitySpec, ModelSpec, ScheduleSpec

Float64 = npt.NDArray[np.float64]

_MODEL = ModelSpec(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 2),
    residual_blocks=1,
    attention_resolutions=(8,),
    num_head_channels=16,
    norm_groups=32,
)


def tiny_model(**changes: Any) -> ModelSpec:
    """A UNet of 0.8 M parameters on 16×16 pictures, with some fields changed."""
    if "num_heads" in changes:
        changes.setdefault("num_head_channels", None)
    return dataclasses.replace(_MODEL, **changes)


def tiny_spec(**changes: Any) -> DiffusionSpec:
    """A spec around :func:`tiny_model`.

    Args:
        changes: Fields of ModelSpec or DiffusionSpec, and ``schedule`` as a name or a
            ScheduleSpec.
    """
    names = {field.name for field in dataclasses.fields(DiffusionSpec)}
    own = {key: changes.pop(key) for key in list(changes) if key in names}
    if isinstance(own.get("schedule"), str):
        own["schedule"] = ScheduleSpec(own["schedule"])
    own.setdefault("model", tiny_model(**changes))
    own.setdefault("identity", IdentitySpec(16, "test model", "0" * 64))
    return DiffusionSpec(**own)


def tiny_network(spec: DiffusionSpec, seed: int = 0) -> IdentityUNet:
    """A network with random weights in evaluation mode; none of them is all zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = IdentityUNet(spec.model, spec.condition_dim)
        with torch.no_grad():
            for weight in network.parameters():
                if not weight.any():
                    weight.normal_(0.0, 0.1)
    return network.eval()


def random_identity(
    count: int, spec: DiffusionSpec, seed: int = 0
) -> npt.NDArray[np.float32]:
    """[count, D] float32 vectors of length √D, and random numbers for attributes."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(count, spec.identity.dim))
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled = vectors / length * np.sqrt(spec.identity.dim)
    others = generator.normal(size=(count, spec.condition_dim - spec.identity.dim))
    return np.concatenate([scaled, others], axis=1).astype(np.float32)


def run_table(
    table: SolverTable,
    denoise: Callable[[Float64, float], Float64],
    x_t: Float64,
    noise: Callable[[int], Float64 | float] = lambda j: 0.0,
    learned: bool = False,
) -> list[Float64]:
    """Execute a table in float64, as DESIGN's formula says; x after every row.

    Args:
        table: The table.
        denoise: The model's output for x [B, C, ...] at a timestep, after guidance;
            twice as many channels where ``learned``.
        x_t: [B, C, ...], unit variance.
        noise: The noise of row j.
        learned: Whether the second half of the channels is the learned variance.
    """
    state = np.zeros((STATE_SLOTS, *x_t.shape))
    state[0] = x_t * table.x_scale
    after = []
    rows = table.rows.astype(np.float64)
    for j, (row, matrix) in enumerate(zip(rows, matrices(rows), strict=True)):
        t, c_in, c_x, c_p, clip, low, high = row[:STEP_HEAD]
        out = denoise(c_in * state[0], float(t))
        prediction, variance = np.split(out, 2, axis=1) if learned else (out, 0.0)
        x0 = np.clip(c_x * state[0] + c_p * prediction, -clip, clip)
        share = (variance + 1) / 2
        drawn = noise(j) * np.exp(0.5 * (share * high + (1 - share) * low))
        columns = np.stack([*state, x0, np.broadcast_to(drawn, x0.shape)])
        state = np.tensordot(matrix, columns, axes=1)
        after.append(state[0].copy())
    return after


class _Stub(nn.Module):
    """Stands for a network: a NumPy function of x and t, whatever the identity."""

    def __init__(self, denoise: Callable[[Float64, Float64], Float64]) -> None:
        super().__init__()
        self.spec = _MODEL
        self.denoise = denoise

    def forward(self, x: Tensor, timesteps: Tensor, identity: Tensor) -> Tensor:
        return torch.from_numpy(self.denoise(x.numpy(), timesteps.numpy()))


def step_states(
    rows: Float64,
    denoise: Callable[[Float64, Float64], Float64],
    state: Float64,
    noise: Float64 | None = None,
) -> Iterator[Float64]:
    """Run table rows through the product's StepModule in float64.

    Args:
        rows: [N, B, S], the rows of each sample.
        denoise: The model's output for x [B, 3, H, W] at timesteps [B].
        state: [K, B, 3, H, W] to start from.
        noise: [B, 3, H, W], the same at every row; None is none.

    Yields:
        The state after every row.
    """
    count = state.shape[1]
    module = StepModule(_Stub(denoise))  # type: ignore[arg-type]
    constant = (
        torch.zeros(state[0].shape) if noise is None else torch.from_numpy(noise),
        torch.zeros((count, 1)),
        torch.arange(count, dtype=torch.int32),
        torch.eye(count, dtype=torch.float64).expand(2, count, count),
    )
    now = torch.from_numpy(state)
    for step in rows:
        now = module(now, *constant, torch.from_numpy(step)).state
        assert now.dtype == torch.float64
        yield now.numpy()


def checkpoint_spec() -> DiffusionSpec:
    """A spec with no field at its default but attributes, for what goes through
    files."""
    return tiny_spec(
        channel_multipliers=(1, 1),
        num_head_channels=32,
        learned_variance=True,
        schedule=ScheduleSpec("linear", 500),
        prediction_type="v",
        identity=IdentitySpec(16, "model of a test", "ab" * 32, "unit"),
        title="a test",
        origin={"steps": 12, "loss": 0.5, "faces": ["a", "b"]},
    )


def save_tiny_checkpoint(folder: Path) -> Path:
    """Write a good checkpoint of :func:`checkpoint_spec`."""
    spec = checkpoint_spec()
    save_checkpoint(folder, spec, tiny_network(spec).state_dict())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
