"""What an exported graph takes: the module to trace, its names, example inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..backends.base import STEP_OUTPUTS, StepShapes, step_shapes
from ..noise import batch_normals
from ..reference.step import StepModule, StepWithoutIdentity, with_enlarged
from ..reference.unet import IdentityUNet
from ..solvers import (
    CARRY_COLUMN,
    RESCALE_COLUMN,
    STATE_SLOTS,
    SolverSettings,
    solver_table,
)
from ..spec import DiffusionSpec
from .export_recipe import ExportRecipe

Arrays = dict[str, npt.NDArray[Any]]

UNET_INPUTS = ("x", "timestep", "identity", "low_res")
"""All that a bare UNet may have; a model has those of the step graph's."""
UNET_OUTPUTS = ("out",)


class _UnetModule(nn.Module):
    """The bare UNet; it enlarges the small pictures of super-resolution itself."""

    def __init__(self, network: IdentityUNet) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        identity: Tensor | None,
        low_res: Tensor | None = None,
    ) -> Tensor:
        """[R, C, H, W], [R], [R, D], [R, C, h, w] to [R, C or 2C, H, W]."""
        if low_res is not None:
            x = with_enlarged(x, low_res)
        out: Tensor = self.network(x, timestep, identity)
        return out


class _UnetWithoutIdentity(nn.Module):
    """The same for a model without identity."""

    def __init__(self, unet: _UnetModule) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Tensor, timestep: Tensor, low_res: Tensor | None = None
    ) -> Tensor:
        """[R, C, H, W], [R], [R, C, h, w] to [R, C or 2C, H, W]."""
        out: Tensor = self.unet(x, timestep, None, low_res)
        return out


def _unet_names(shapes: StepShapes) -> tuple[str, ...]:
    known = {"x", "timestep", *shapes.inputs}
    return tuple(name for name in UNET_INPUTS if name in known)


def _small_pictures(shapes: StepShapes, count: int, seed: int) -> Arrays:
    """``low_res`` in [-1, 1] as super-resolution takes it, if the model is of that
    kind."""
    if shapes.low_res is None:
        return {}
    drawn = batch_normals(seed, range(count), 4, 0, shapes.low_res)
    return {"low_res": np.tanh(drawn)}


def step_inputs(spec: DiffusionSpec, samples: int, unet_rows: int, seed: int) -> Arrays:
    """Random but sensible inputs of the step graph: real table rows, unit noise,
    guidance at scale 2 with rescale where there are more UNet rows than samples, and
    a share of the last slot.

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
    identity[-1:] *= 0.0 if unet_rows > 1 else 1.0
    row = (np.arange(unet_rows) % samples).astype(np.int32)
    step = table.rows[chosen]
    drawn = batch_normals(seed, range(samples), 3, 0, (1,))
    step[:, RESCALE_COLUMN] = 0.5 + 0.4 * np.tanh(drawn[:, 0])
    step[:, CARRY_COLUMN] = 0.3 + 0.2 * np.tanh(drawn[:, 0])
    state = np.zeros((STATE_SLOTS, samples, *picture), np.float32)
    for slot in range(STATE_SLOTS):
        state[slot] = batch_normals(seed, range(samples), 1, slot, picture)
    made = {
        "state": state,
        "noise": batch_normals(seed, range(samples), 2, 0, picture),
        "identity": identity,
        "row": row,
        "mix": _guided_mix(row, samples),
        "step": step,
        **_small_pictures(shapes, samples, seed),
    }
    return {name: made[name] for name in shapes.inputs}


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
    made = {
        "x": batch_normals(seed, range(unet_rows), 0, 0, shapes.picture),
        "timestep": times.astype(np.float32),
        "identity": batch_normals(seed, range(unet_rows), 0, 1, (shapes.identity_dim,)),
        **_small_pictures(shapes, unet_rows, seed),
    }
    return {name: made[name] for name in _unet_names(shapes)}


def module_and_names(
    body: IdentityUNet, recipe: ExportRecipe
) -> tuple[nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The module that a recipe exports, and the names of its inputs and outputs, of a
    network that is in the recipe's form already."""
    model = body.spec
    shapes = StepShapes(
        model.image_channels,
        model.image_size,
        body.identity_dim,
        model.low_res_size,
    )
    known = "identity" in shapes.inputs
    if recipe.graph == "step":
        step = StepModule(body).eval()
        module = step if known else StepWithoutIdentity(step).eval()
        return module, shapes.inputs, STEP_OUTPUTS
    bare = _UnetModule(body).eval()
    unet = bare if known else _UnetWithoutIdentity(bare).eval()
    return unet, _unet_names(shapes), UNET_OUTPUTS


def example_inputs(
    spec: DiffusionSpec, recipe: ExportRecipe, size: tuple[int, int]
) -> Arrays:
    """Random inputs of the graph that a recipe exports, ``size`` being (B, R)."""
    if recipe.graph == "step":
        return step_inputs(spec, *size, seed=sum(size))
    return unet_inputs(spec, size[1], seed=size[1])


def dynamic_shapes(
    recipe: ExportRecipe, inputs: tuple[str, ...]
) -> tuple[dict[int, Any], ...]:
    """Which axes of the named inputs may have any size, for ``torch.onnx.export``."""
    # diffusers' upsampling does something else from 64 rows on, which is nothing in
    # ONNX; a wider range would have the exporter trace twice and arrive at this one.
    r = torch.export.Dim("R", min=1, max=63)
    if recipe.graph == "unet":
        return ({0: r},) * len(inputs)
    b = torch.export.Dim("B", min=1, max=2048)
    axes: dict[str, dict[int, Any]] = {
        "state": {1: b},
        "identity": {0: r},
        "row": {0: r},
        "mix": {1: b, 2: r},
    }
    return tuple(axes.get(name, {0: b}) for name in inputs)
