"""The commands that make a plan for this machine, as a person would type them."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from ..builders.recipe import EngineRecipe
from ..bundle import EngineEntry
from ..errors import Id3pmError, RecipeError
from ..recipes import (
    dataclass_from_mapping,
    load_recipe,
    recipe_names,
    toml_value,
)
from .machine import Here

_MOST = 1000
"""Characters of a command that is still worth typing."""


def entry_recipe(entry: EngineEntry) -> EngineRecipe:
    """The recipe that an engine was built with, ``--set`` included.

    It is what the manifest keeps of it; in a bundle of an older release, which kept
    nothing, the recipe of the target's name.

    Raises:
        RecipeError: What is kept is no recipe of that engine, or nothing is kept and
            there is no such recipe.
    """
    if entry.settings:
        where = f"the settings of the engine {entry.target!r:.80}"
        recipe = dataclass_from_mapping(EngineRecipe, entry.settings, where)
    else:
        recipe = _named_recipe(entry.target)
    kept = (recipe.backend, recipe.flavour, recipe.precision)
    if kept != (entry.backend, entry.flavour, entry.precision):
        raise RecipeError(
            f"the recipe of the engine {entry.target!r:.80} is not the one that it was "
            "built with",
            why=f"it makes a plan of {recipe.flavour} in {recipe.precision}",
            fix="build it with `id3pm-deploy build-engine BUNDLE --target FILE.toml`",
        )
    return recipe


def _named_recipe(target: str) -> EngineRecipe:
    if target not in recipe_names("engines"):
        raise RecipeError(
            f"the bundle does not say how the engine {target!r:.80} was built",
            why="a release before format version 4 wrote it, and there is no recipe "
            "of that name",
            fix="build it with `id3pm-deploy build-engine BUNDLE --target FILE.toml`",
        )
    return load_recipe("engines", target, EngineRecipe)


def rebuild_command(entry: EngineEntry, bundle: Path | None) -> str:
    """The command that builds the plan of ``entry`` again, with the same settings.

    Args:
        entry: An engine with a plan.
        bundle: Its BUNDLE; None for a placeholder.
    """
    where = "BUNDLE" if bundle is None else shlex.quote(str(bundle))
    build = f"id3pm-deploy build-engine {where} --target"
    try:
        recipe, usual = entry_recipe(entry), _named_recipe(entry.target)
    except Id3pmError:
        return f"{build} FILE.toml"
    words = [build, shlex.quote(entry.target)]
    for name, value in dataclasses.asdict(recipe).items():
        if name == "summary" or value is None:
            continue
        if value != getattr(usual, name):
            words += ["--set", shlex.quote(f"{name}={toml_value(value)}")]
    command = " ".join(words)
    return command if len(command) <= _MOST else f"{build} FILE.toml"


def fitting_targets(here: Here, precision: str) -> list[str]:
    """Recipes whose plans are for a GPU of this machine, from graphs of ``precision``.

    Those whose library is installed come alone, where there are any.
    """
    capabilities = {gpu.compute_capability for gpu in here.gpus}
    found: dict[str, str] = {}
    for name in recipe_names("engines"):
        try:
            recipe = load_recipe("engines", name, EngineRecipe)
        except Id3pmError:
            continue
        if recipe.backend != "tensorrt" or recipe.precision != precision:
            continue
        if recipe.flavour == "tensorrt_rtx" and here.host.machine != "x86_64":
            continue
        if capabilities & set(recipe.compute_capabilities):
            found[name] = recipe.flavour
    installed = [name for name, flavour in found.items() if flavour in here.versions]
    return installed or list(found)
