"""Training recipes: a config as TOML, and what it comes to before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..recipes import load_recipe, recipe_text
from ..spec import DiffusionSpec
from .config import TrainingConfig

KIND = "training"


def config_from_recipe(name: str, changes: Mapping[str, Any]) -> TrainingConfig:
    """The config of a recipe, with some of its values replaced.

    Args:
        name: Name of a recipe in ``training/recipes``, or path of a TOML file whose
            keys are fields of :class:`TrainingConfig`.
        changes: Values that replace what the recipe says.

    Raises:
        RecipeError: There is no such recipe, or it is not of that form.
        InputError: A value is out of its range.
    """
    recipe = load_recipe(KIND, name, TrainingConfig)
    return dataclasses.replace(recipe, **changes)


def config_text(config: TrainingConfig, spec: DiffusionSpec) -> str:
    """``config`` as a recipe, its size and its shares of a batch above it."""
    import torch

    from ..reference.unet import IdentityUNet

    with torch.device("meta"):  # no memory is taken
        network = IdentityUNet(spec.model, spec.condition_dim)
    count = sum(parameter.numel() for parameter in network.parameters())
    stored = count * (2 if config.storage == "float16" else 4)
    piece = config.batch_size // (config.processes * config.accumulation)
    comments = [
        f"{count:,} parameters, {stored / 1e6:.1f} MB as {config.storage}",
        f"each process takes {config.accumulation} x {piece} samples a step",
    ]
    return recipe_text(config, comments)
