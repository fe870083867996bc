"""What an exported graph takes: the module to trace, its names, example inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..backends.base import STEP_INPUTS, STEP_OUTPUTS, step_shapes
from ..noise import batch_normals
from ..reference.precision import body_in
from ..reference.step import step_module
from ..reference.unet import IdentityUNet
from ..solvers import RESCALE_COLUMN, STATE_SLOTS, SolverSettings, solver_table
from ..spec import DiffusionSpec
from .export_recipe import ExportRecipe

Arrays = dict[str, npt.NDArray[Any]]

UNET_INPUTS = ("x", "timestep", "identity")
UNET_OUTPUTS = ("out",)


class _UnetModule(nn.Module):
    """The bare UNet with named inputs."""

    def __init__(self, network: IdentityUNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, identity: Tensor) -> Tensor:
        """[R, C, H, W], [R], [R, D] to [R, C or 2C, H, W]; see IdentityUNet."""
        out: Tensor = self.network(x, timestep, identity)
        return out


def step_inputs(spec: DiffusionSpec, samples: int, unet_rows: int, seed: int) -> Arrays:
    """Random but sensible inputs of the step graph: real table rows, unit noise,
    guidance at scale 2 with rescale where there are more UNet rows than samples.

    Args:
        spec: Facts of the model.
        samples: B.
        unet_rows: R; any number, the rows are dealt to the samples in turn.
        seed: Seed of all numbers.
    """
    shapes = step_shapes(spec)
    picture = shapes.picture
    steps = min(10, spec.schedule.timesteps)
    table = solver_table(spec, SolverSettings(solver="ddpm", steps=steps))
    chosen = np.arange(samples) * 3 % (len(table) - 1)
    identity = batch_normals(seed, range(unet_rows), 0, 1, (shapes.identity_dim,))
    identity[-1] *= 0.0 if unet_rows > 1 else 1.0
    row = (np.arange(unet_rows) % samples).astype(np.int32)
    step = table.rows[chosen]
    drawn = batch_normals(seed, range(samples), 3, 0, (1,))
    step[:, RESCALE_COLUMN] = 0.5 + 0.4 * np.tanh(drawn[:, 0])
    state = np.zeros((STATE_SLOTS, samples, *picture), np.float32)
    for slot in range(STATE_SLOTS):
        state[slot] = batch_normals(seed, range(samples), 1, slot, picture)
    return {
        "state": state,
        "noise": batch_normals(seed, range(samples), 2, 0, picture),
        "identity": identity,
        "row": row,
        "mix": _guided_mix(row, samples),
        "step": step,
    }


def _guided_mix(row: npt.NDArray[np.int32], samples: int) -> npt.NDArray[np.float32]:
    """Guidance at scale 2, [2, B, R]: a sample's first UNet row against its others."""
    count = len(row)
    own = np.arange(min(samples, count))
    others = np.arange(len(own), count)
    each = np.bincount(row[others], minlength=samples)
    mix = np.zeros((2, samples, count), np.float32)
    mix[:, own, own] = 1.0
    mix[0, own, own] += each[own] > 0
    mix[0, row[others], others] = -1 / each[row[others]]
    return mix


def unet_inputs(spec: DiffusionSpec, unet_rows: int, seed: int) -> Arrays:
    """Random inputs of the bare UNet, R rows."""
    shapes = step_shapes(spec)
    times = np.linspace(0, spec.schedule.timesteps - 1, unet_rows)
    return {
        "x": batch_normals(seed, range(unet_rows), 0, 0, shapes.picture),
        "timestep": times.astype(np.float32),
        "identity": batch_normals(seed, range(unet_rows), 0, 1, (shapes.identity_dim,)),
    }


def module_and_names(
    network: IdentityUNet, recipe: ExportRecipe
) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The module that a recipe exports, and the names of its inputs and outputs."""
    if recipe.graph == "step":
        return step_module(network, recipe.form), STEP_INPUTS, STEP_OUTPUTS
    body = body_in(network, recipe.form)
    return _UnetModule(body).eval(), UNET_INPUTS, UNET_OUTPUTS


def example_inputs(
    spec: DiffusionSpec, recipe: ExportRecipe, size: tuple[int, int]
) -> Arrays:
    """Random inputs of the graph that a recipe exports, ``size`` being (B, R)."""
    if recipe.graph == "step":
        return step_inputs(spec, *size, seed=sum(size))
    return unet_inputs(spec, size[1], seed=size[1])


def dynamic_shapes(recipe: ExportRecipe) -> tuple[dict[int, Any], ...]:
    """Which axes of the inputs may have any size, for ``torch.onnx.export``."""
    r = torch.export.Dim("R", min=1, max=4096)
    if recipe.graph == "unet":
        return ({0: r}, {0: r}, {0: r})
    b = torch.export.Dim("B", min=1, max=2048)
    return ({1: b}, {0: b}, {0: r}, {0: r}, {1: b, 2: r}, {0: b})
