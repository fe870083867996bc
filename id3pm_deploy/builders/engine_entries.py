"""What is written of an engine: it is built, tested where it can run, described."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..backends.base import step_shapes
from ..backends.graph_check import check_graph_file
from ..bundle import EngineEntry, GraphEntry
from ..bundle.ledger import why_not_built_here
from ..bundle.writer import BundleWriter
from ..errors import BundleError
from ..files import ScratchFile
from ..selftest import self_test
from .cache import PlanCache
from .graph_facts import graph_facts
from .recipe import EngineRecipe, check_graph_fits

if TYPE_CHECKING:
    from .tensorrt import PlanIdentity


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
        The entries, and whether all their plans had been built before.

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
    from .tensorrt import build_plan, plan_identity

    identity = None
    if cache is not None:
        # What ``path_of`` checked is not hashed again; a build does it anew.
        checked = writer.file_entry(graph.file).sha256
        identity = plan_identity(path, recipe, checked)
        if (own := _own_entry(writer, graph, recipe, target, identity)) is not None:
            return own, True
    file = ScratchFile(writer.folder)
    plan = build_plan(path, recipe, cache, file.path, identity)
    facts = dict(vars(plan))
    taken, digest = facts.pop("from_cache"), facts.pop("sha256")
    facts["build_seconds"] = round(plan.build_seconds, 3)
    entry = EngineEntry(
        target=target,
        backend=recipe.backend,
        graph=graph.file,
        file=writer.add_file(target, ".plan", file, digest),
        hardware_compatibility=recipe.hardware_compatibility,
        version_compatible=recipe.version_compatible,
        settings=_as_json(recipe),
        made_with=made_with(),
        stage=graph.stage,
        **facts,
    )
    return entry, taken


def _own_entry(
    writer: BundleWriter,
    graph: GraphEntry,
    recipe: EngineRecipe,
    target: str,
    identity: PlanIdentity,
) -> EngineEntry | None:
    """The bundle's own engine, if building would make it again; None if not.

    Whoever wrote the manifest could have put any key beside any plan. So the plan has
    to be one that this user built, and whole, and the manifest has to say of it what
    recipe and machine do. What its build measured stays as the manifest has it.
    """
    if identity.builder is None:
        return None
    wanted = (graph.stage, target)
    found = [e for e in writer.manifest.plans if (e.stage, e.target) == wanted]
    if not found or found[0] != _as_built_here(found[0], graph, recipe, identity):
        return None
    # What of the recipe does not reach the plan, such as its summary, may be new.
    own = dataclasses.replace(found[0], settings=_as_json(recipe))
    if why_not_built_here(writer.file_entry(own.file).sha256):
        return None
    try:
        writer.path_of(own.file)
    except BundleError:
        return None
    return own


def _as_built_here(
    entry: EngineEntry,
    graph: GraphEntry,
    recipe: EngineRecipe,
    identity: PlanIdentity,
) -> EngineEntry:
    """``entry`` with all that is known before a build as it would be of one here."""
    from .tensorrt import bound_to

    assert identity.builder is not None
    gpu = identity.builder.gpu
    return dataclasses.replace(
        entry,
        backend=recipe.backend,
        flavour=recipe.flavour,
        version=identity.builder.version,
        precision=recipe.precision,
        graph=graph.file,
        compute_capabilities=recipe.compute_capabilities,
        profiles=tuple(profile.to_json() for profile in recipe.profiles),
        self_test_error=None,
        threads=0,
        hardware_compatibility=recipe.hardware_compatibility,
        version_compatible=recipe.version_compatible,
        plan_key=identity.key,
        **bound_to(recipe, None if gpu is None else dataclasses.asdict(gpu)),
    )


def _as_json(recipe: EngineRecipe) -> dict[str, Any]:
    values = dataclasses.asdict(recipe)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
