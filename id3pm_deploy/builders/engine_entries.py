"""What is written of an engine: it is built, tested where it can run, described."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import time
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends.base import step_shapes
from ..backends.graph_check import check_graph_file
from ..bundle import EngineEntry, GraphEntry
from ..bundle.writer import BundleWriter
from ..files import ScratchFile
from ..selftest import self_test
from .cache import PlanCache
from .graph_facts import graph_facts
from .recipe import EngineRecipe, check_graph_fits


def made_with(*packages: str) -> dict[str, str]:
    """Versions of this package and of others, where they state one."""
    versions = {"id3pm-deploy": __version__}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def onnxruntime_entry(
    writer: BundleWriter, graph: GraphEntry, recipe: EngineRecipe, target: str
) -> EngineEntry:
    """An engine of ONNX Runtime, which compiles the graph when it loads it.

    Raises:
        ParityError: It fails its self-test.
        BundleError, EngineError: The graph is damaged or cannot be run.
    """
    from ..backends.onnxruntime import OnnxRuntimeEngine

    begun = time.perf_counter()
    shapes = step_shapes(writer.manifest.stages[graph.stage].diffusion)
    data = writer.read(graph.file)
    with OnnxRuntimeEngine(data, shapes, graph.precision, recipe.threads) as engine:
        error = self_test(engine, writer, graph)
        version = engine.info.version
    return EngineEntry(
        target=target,
        backend=recipe.backend,
        flavour=recipe.flavour,
        version=version,
        precision=graph.precision,
        graph=graph.file,
        file=graph.file,
        build_seconds=round(time.perf_counter() - begun, 3),
        self_test_error=error,
        threads=recipe.threads,
        settings=_as_json(recipe),
        made_with=made_with(),
        stage=graph.stage,
    )


def tensorrt_entries(
    writer: BundleWriter,
    graphs: list[GraphEntry],
    recipe: EngineRecipe,
    target: str,
    cache: PlanCache | None,
) -> tuple[list[EngineEntry], bool]:
    """Engines with a plan, one for each graph; the plans are added to ``writer``.

    All graphs are looked at before the first plan, which may take an hour.

    Returns:
        The entries, and whether all their plans came from the cache.

    Raises:
        BuildError: A graph is not for this target, or a plan cannot be built.
        BundleError, EngineError: A graph is damaged or holds what no graph may.
    """
    paths = [writer.path_of(graph.file) for graph in graphs]
    for path in paths:
        check_graph_file(path)
        facts = graph_facts(path)
        check_graph_fits(recipe, facts.opset, facts.operators)
    made = [
        _tensorrt_entry(writer, graph, path, recipe, target, cache)
        for graph, path in zip(graphs, paths, strict=True)
    ]
    return [entry for entry, _ in made], all(taken for _, taken in made)


def _tensorrt_entry(
    writer: BundleWriter,
    graph: GraphEntry,
    path: Path,
    recipe: EngineRecipe,
    target: str,
    cache: PlanCache | None,
) -> tuple[EngineEntry, bool]:
    from .tensorrt import build_plan

    file = ScratchFile(writer.folder)
    plan = build_plan(path, recipe, cache, file.path)
    facts = dict(vars(plan))
    taken = facts.pop("from_cache")
    facts["build_seconds"] = round(plan.build_seconds, 3)
    entry = EngineEntry(
        target=target,
        backend=recipe.backend,
        graph=graph.file,
        file=writer.add_file(target, ".plan", file),
        hardware_compatibility=recipe.hardware_compatibility,
        version_compatible=recipe.version_compatible,
        settings=_as_json(recipe),
        made_with=made_with(),
        stage=graph.stage,
        **facts,
    )
    return entry, taken


def _as_json(recipe: EngineRecipe) -> dict[str, Any]:
    values = dataclasses.asdict(recipe)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
