"""The name under which a plan is kept: a hash of everything that determines it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BuildError, MissingPackageError
from ..files import sha256_of_file
from .graph_facts import graph_facts
from .recipe import EngineRecipe, is_portable

KEY_FORMAT = "id3pm-plan-key"
KEY_VERSION = 1
"""Raise it when a release tells the builder something else for the same recipe, which
another default of a key does as well."""

NOT_BUILT_IN = ("summary", "export", "threads", "max_opset", "operators_refused")
"""Keys of a recipe that never reach TensorRT. Any other is part of a plan's key, also
one that is added later."""


@dataclass(frozen=True)
class GpuFacts:
    """The GPU that builds, and the CUDA version of its driver."""

    name: str
    compute_capability: str
    multiprocessors: int
    cuda: str | None


@dataclass(frozen=True)
class Builder:
    """What of this machine determines a plan.

    Attributes:
        version: Full version of the recipe's TensorRT.
        gpu: None where the plan does not depend on it.
    """

    version: str
    gpu: GpuFacts | None = None


def depends_on_gpu(recipe: EngineRecipe) -> bool:
    """Whether anything about the GPU that builds determines the plan."""
    same = recipe.hardware_compatibility == "same_compute_capability"
    return not is_portable(recipe) or same


def builder_here(recipe: EngineRecipe) -> Builder | None:
    """What of this machine determines the recipe's plan.

    TensorRT is not imported into this process, and the driver is asked in a child.

    Returns:
        None where it cannot be known: TensorRT is missing, or a GPU is needed and
        there is none. Building says why.
    """
    from ..preflight import here, library_version

    if not depends_on_gpu(recipe):
        try:
            return Builder(library_version(recipe.flavour))
        except MissingPackageError:
            return None
    found = here((recipe.flavour,))
    if recipe.flavour not in found.versions or not found.gpus:
        return None
    first = found.gpus[0]  # the one that TensorRT takes
    return Builder(
        found.versions[recipe.flavour],
        GpuFacts(
            first.name, first.compute_capability, first.multiprocessors, found.cuda
        ),
    )


def plan_key(
    graph: Path, recipe: EngineRecipe, builder: Builder, graph_sha256: str = ""
) -> str:
    """SHA-256 over all that determines a plan, as 64 hexadecimal digits.

    Args:
        graph: An ONNX file; weights in other files count as well.
        recipe: Of the ``tensorrt`` backend.
        builder: Library and GPU.
        graph_sha256: Of the file ``graph``, where the caller has checked it; empty to
            hash it.

    Raises:
        BuildError: The graph cannot be read.
    """
    facts = {
        "format": KEY_FORMAT,
        "format_version": KEY_VERSION,
        "graph": _graph_hashes(graph, graph_sha256),
        "recipe": _recipe_in_key(recipe),
        "version": builder.version,
        "gpu": _gpu_in_key(recipe, builder.gpu),
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _recipe_in_key(recipe: EngineRecipe) -> dict[str, Any]:
    """Without what has its default, so that a new key leaves older plans' keys."""
    return {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if field.name not in NOT_BUILT_IN
        and getattr(recipe, field.name) != field.default
    }


def _gpu_in_key(recipe: EngineRecipe, gpu: GpuFacts | None) -> dict[str, Any] | None:
    if gpu is None or not depends_on_gpu(recipe):
        return None
    if is_portable(recipe):
        return {"compute_capability": gpu.compute_capability}
    return dataclasses.asdict(gpu)


def _graph_hashes(graph: Path, digest: str) -> list[Any]:
    """The graph's hash, then names and hashes of the files that hold its weights."""
    try:
        digest = digest or sha256_of_file(graph)
    except OSError as error:
        raise BuildError(
            f"cannot read {graph}", why=error.strerror or str(error)
        ) from error
    try:
        names = graph_facts(graph).external
    except BuildError:
        names = ()  # no ONNX file; TensorRT's parser says what is wrong with it
    hashes: list[Any] = [digest]
    for name in names:
        try:
            hashes.append([ascii(name), sha256_of_file(graph.parent / name)])
        except (OSError, ValueError):
            hashes.append([ascii(name), None])
    return hashes
