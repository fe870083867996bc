"""Models for benchmark tables: recipes in ``models/``, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.builders.graph_inputs import step_inputs
from id3pm_deploy.builders.onnx import export_graph
from id3pm_deploy.errors import ParityError
from id3pm_deploy.recipes import load_recipe
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.solvers import CLIP_COLUMN, NO_CLIP
from id3pm_deploy.spec import DiffusionSpec

Arrays = dict[str, npt.NDArray[Any]]

_FOLDER = Path(__file__).resolve().parent / "models"
_LEAST_SPREAD = 1e-3


def load_model(name: str) -> DiffusionSpec:
    """A model by its recipe's name in ``models/``, or by the path of a TOML file.

    Raises:
        RecipeError: No such recipe, or not of the form of a DiffusionSpec.
    """
    path = name if name.endswith(".toml") else str(_FOLDER / f"{name}.toml")
    return load_recipe("models", path, DiffusionSpec)


def parameter_count(spec: DiffusionSpec) -> int:
    """Number of weights; takes no memory for them."""
    with torch.device("meta"):
        network = IdentityUNet(spec.model, spec.condition_dim)
    return sum(weight.numel() for weight in network.parameters())


def random_network(spec: DiffusionSpec, seed: int = 0) -> IdentityUNet:
    """A network in evaluation mode whose weights follow from ``seed``.

    No weight is left as a constant: an optimiser could drop the addition of a zero
    bias or the product with a scale of one, which no trained model has.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = IdentityUNet(spec.model, spec.condition_dim)
        for weight in network.parameters():
            if weight.min() == weight.max():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return network.eval().requires_grad_(requires_grad=False)


def channels_last(module: nn.Module) -> None:
    """Keep convolution weights the way PyTorch is fastest with on a CPU, in place."""
    cast(Any, module).to(memory_format=torch.channels_last)


def exported(network: IdentityUNet, spec: DiffusionSpec, recipe: str) -> bytes:
    """The product's own export of the step graph, checked by it, as ONNX."""
    made = export_graph(network, spec, load_recipe("export", recipe, ExportRecipe))
    return made.read()


def inputs(spec: DiffusionSpec, samples: int, unet_rows: int, seed: int = 0) -> Arrays:
    """Random inputs of one step of ``samples`` (B) and ``unet_rows`` (R), without a
    clamp of x0, which could hide an error."""
    made = step_inputs(spec, samples, unet_rows, seed)
    made["step"] = made["step"].copy()
    made["step"][:, CLIP_COLUMN] = NO_CLIP
    return made


def refuse_trivial(outputs: Arrays) -> None:
    """Raise :class:`ParityError` where a comparison would prove nothing.

    Args:
        outputs: What the reference made: each is to vary from pixel to pixel.
    """
    for name, values in outputs.items():
        spread = float(np.std(values))
        if not spread > _LEAST_SPREAD:
            raise ParityError(
                f"the reference's {name} hardly varies, so any engine would agree",
                why=f"its standard deviation is {spread:.1e}",
            )
