"""CHECKPOINT or BUNDLE to BUNDLE: export what is missing, build, self-test, record."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..backends.base import step_shapes
from ..backends.graph_check import check_graph
from ..bundle import (
    SIGNATURE_NAME,
    Bundle,
    EngineEntry,
    GraphEntry,
    is_bundle,
    open_bundle,
)
from ..bundle.ledger import record_plan
from ..bundle.writer import BundleWriter, bundle_writer
from ..checkpoint_config import is_checkpoint, load_spec, weights_sha256
from ..errors import BuildError, BundleError, InputError
from ..files import beside
from ..optional import require
from ..progress import progress
from ..recipes import load_recipe
from ..selftest import golden_bytes, self_test
from ..solvers import RESCALE_COLUMN, STATE_SLOTS, STEP_WIDTH
from .export_recipe import ExportRecipe
from .recipe import EngineRecipe


@dataclass(frozen=True)
class BuiltEngine:
    """A bundle and the engine that was just added to it.

    ``notes`` is what the user should know although nothing failed.
    """

    bundle: Bundle
    entry: EngineEntry
    graph: GraphEntry
    notes: tuple[str, ...] = ()


def export_bundle(checkpoint: Path, recipe_name: str, out: Path) -> Bundle:
    """Export a CHECKPOINT into the BUNDLE ``out``, made or added to.

    Args:
        checkpoint: CHECKPOINT folder.
        recipe_name: Recipe in ``export/``, or a TOML file.
        out: BUNDLE folder.

    Raises:
        CheckpointError, RecipeError, BundleError: Unusable input or output.
        BuildError, ParityError: The export failed or computes something else.
    """
    recipe = _export_recipe(recipe_name)
    return _export_with(checkpoint, recipe, Path(recipe_name).stem, out)


def export_unet(checkpoint: Path, recipe_name: str, out: Path) -> Bundle:
    """Export the bare UNet of a CHECKPOINT, in the precision of a recipe."""
    recipe = dataclasses.replace(_export_recipe(recipe_name), graph="unet")
    return _export_with(checkpoint, recipe, Path(recipe_name).stem, out)


def _export_recipe(name: str) -> ExportRecipe:
    for module in ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime"):
        require(module, extra="export")
    return load_recipe("export", name, ExportRecipe)


def _export_with(
    checkpoint: Path, recipe: ExportRecipe, recipe_name: str, out: Path
) -> Bundle:
    writer, _ = _exported(checkpoint, recipe, recipe_name, out)
    return writer.commit()


def _exported(
    checkpoint: Path, recipe: ExportRecipe, recipe_name: str, out: Path
) -> tuple[BundleWriter, GraphEntry]:
    """A writer that holds the fresh graph; nothing is written yet."""
    from ..reference.checkpoint import load_checkpoint
    from .onnx import export_graph

    loaded = load_checkpoint(checkpoint)
    writer = bundle_writer(out, loaded.spec, loaded.weights_sha256, __version__)
    with progress(None, f"exporting {recipe.graph} {recipe.precision}"):
        exported = export_graph(loaded.network, loaded.spec, recipe)
    stem = f"{recipe.graph}-{recipe.precision}"
    entry = GraphEntry(
        file=writer.add_file(stem, ".onnx", exported.data),
        kind=recipe.graph,
        precision=recipe.precision,
        max_relative_error=exported.worst_error,
        golden=writer.add_file("golden", ".npz", golden_bytes(exported.golden)),
        recipe=recipe_name,
        made_with=_made_with("torch", "onnx", "onnxscript"),
        **_settings(recipe),
    )
    writer.add_graph(entry)
    return writer, entry


def _settings(recipe: ExportRecipe) -> dict[str, Any]:
    """Fields of a graph's entry that the recipe and this release fix."""
    step = recipe.graph == "step"
    return {
        "opset": recipe.opset,
        "tolerance_step": recipe.tolerance_step,
        "tolerance_trajectory": recipe.tolerance_trajectory,
        "state_slots": STATE_SLOTS if step else 0,
        "step_width": STEP_WIDTH if step else 0,
    }


def _made_with(*packages: str) -> dict[str, str]:
    """Versions of this package and of others, where they state one."""
    versions = {"id3pm-deploy": __version__}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def build_engine(source: Path, target: str, out: Path | None) -> BuiltEngine:
    """Build the engine of ``target`` from a CHECKPOINT or a BUNDLE.

    Nothing is written before the engine is built and has passed its self-test.

    Args:
        source: CHECKPOINT (exported first where the bundle lacks an undamaged graph of
            the recipe), or BUNDLE.
        target: Recipe in ``engines/``, or a TOML file.
        out: BUNDLE folder; None: the bundle itself, or ``SOURCE.bundle`` for a
            checkpoint.

    Raises:
        InputError: ``source`` is neither, or ``out`` contradicts it.
        BundleError: A BUNDLE is damaged, or ``out`` is of another checkpoint.
        BuildError: The graph is missing or the engine cannot be built.
        ParityError: The engine fails its self-test.
    """
    recipe = load_recipe("engines", target, EngineRecipe)
    if recipe.backend == "onnxruntime" and recipe.flavour != "cpu":
        raise BuildError(
            f"this release builds no engine of flavour {recipe.flavour!r}",
            fix="use the target cpu",
        )
    name = Path(target).stem
    if is_bundle(source):
        writer, graph = _from_bundle(source, recipe, out)
    else:
        writer, graph = _from_checkpoint(source, recipe, out)
    if recipe.backend == "tensorrt":
        entry = _tensorrt_entry(writer, graph, recipe, name)
    else:
        entry = _onnxruntime_entry(writer, graph, recipe, name)
    writer.add_engine(entry)
    notes = []
    # Before the commit: no plan in a bundle may lack its note because of a crash.
    if recipe.backend == "tensorrt":
        notes.append(record_plan(writer.file_entry(entry.file).sha256))
    if os.path.lexists(writer.folder / SIGNATURE_NAME):
        notes.append("the bundle's signature was removed, as the bundle has changed")
    return BuiltEngine(writer.commit(), entry, graph, tuple(filter(None, notes)))


def _from_bundle(
    source: Path, recipe: EngineRecipe, out: Path | None
) -> tuple[BundleWriter, GraphEntry]:
    if out is not None and out.resolve() != source.resolve():
        raise InputError(
            "a bundle is built in place", fix="copy it first, or leave out --out"
        )
    bundle = open_bundle(source)
    graph = bundle.graph("step", recipe.precision)
    fix = f"id3pm-deploy export CHECKPOINT --recipe {recipe.export} --out {source}"
    if graph is None:
        raise BuildError(f"{source} holds no step graph in {recipe.precision}", fix=fix)
    widths = range(RESCALE_COLUMN, STEP_WIDTH + 1)
    if graph.state_slots != STATE_SLOTS or graph.step_width not in widths:
        raise BuildError(f"the graph in {source} is of another release", fix=fix)
    return BundleWriter(source, bundle.manifest), graph


def _from_checkpoint(
    source: Path, recipe: EngineRecipe, out: Path | None
) -> tuple[BundleWriter, GraphEntry]:
    if not is_checkpoint(source):
        raise InputError(
            f"{source} is neither a CHECKPOINT nor a BUNDLE",
            fix="give the folder that `train`, `export` or `build-engine` wrote",
        )
    folder = out or beside(source, ".bundle")
    export = _export_recipe(recipe.export)
    if (export.graph, export.precision) != ("step", recipe.precision):
        raise BuildError(
            f"the export recipe {recipe.export} makes no step graph in "
            f"{recipe.precision}",
            why=f"it makes a {export.graph} graph in {export.precision}",
            fix="make `export` and `precision` of the engine's recipe agree",
        )
    if is_bundle(folder):
        spec, digest = load_spec(source), weights_sha256(source)
        writer = bundle_writer(folder, spec, digest, __version__)
        graph = _reusable(Bundle(folder, writer.manifest), export)
        if graph is not None:
            return writer, graph
    return _exported(source, export, Path(recipe.export).stem, folder)


def _reusable(bundle: Bundle, recipe: ExportRecipe) -> GraphEntry | None:
    """The bundle's graph, if the recipe would make the same and it is undamaged."""
    graph = bundle.graph(recipe.graph, recipe.precision)
    if graph is None or graph != dataclasses.replace(graph, **_settings(recipe)):
        return None
    try:
        bundle.read(graph.file)
        bundle.read(graph.golden)
    except BundleError:
        return None
    return graph


def _onnxruntime_entry(
    writer: BundleWriter, graph: GraphEntry, recipe: EngineRecipe, target: str
) -> EngineEntry:
    from ..backends.onnxruntime import OnnxRuntimeEngine

    begun = time.perf_counter()
    shapes = step_shapes(writer.manifest.diffusion)
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
        made_with=_made_with(),
    )


def _tensorrt_entry(
    writer: BundleWriter, graph: GraphEntry, recipe: EngineRecipe, target: str
) -> EngineEntry:
    from .tensorrt import build_plan

    data = writer.read(graph.file)
    check_graph(data)
    plan = build_plan(data, recipe)
    return EngineEntry(
        target=target,
        backend=recipe.backend,
        flavour=plan.flavour,
        version=plan.version,
        precision=plan.precision,
        graph=graph.file,
        file=writer.add_file(target, ".plan", plan.data),
        compute_capabilities=plan.compute_capabilities,
        profiles=plan.profiles,
        layer_types=plan.layer_types,
        build_seconds=round(plan.build_seconds, 3),
        peak_memory_bytes=plan.peak_memory_bytes,
        warnings=plan.warnings,
        made_with=_made_with(),
    )
