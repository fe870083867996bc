"""CHECKPOINT or BUNDLE to BUNDLE: export what is missing, build, self-test, record."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..backends.base import step_shapes
from ..bundle import (
    Bundle,
    BundleWriter,
    EngineEntry,
    GraphEntry,
    bundle_writer,
    is_bundle,
    open_bundle,
)
from ..errors import BuildError, InputError
from ..optional import require
from ..progress import progress
from ..recipes import load_recipe
from ..selftest import golden_bytes, self_test
from ..solvers import STATE_SLOTS, STEP_WIDTH
from .recipe import EngineRecipe

if TYPE_CHECKING:
    from .onnx import ExportRecipe


@dataclass(frozen=True)
class BuiltEngine:
    """A bundle and the engine that was just added to it."""

    bundle: Bundle
    entry: EngineEntry
    graph: GraphEntry


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
    from .onnx import ExportRecipe

    return load_recipe("export", name, ExportRecipe)


def _export_with(
    checkpoint: Path, recipe: ExportRecipe, recipe_name: str, out: Path
) -> Bundle:
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
        opset=recipe.opset,
        state_slots=STATE_SLOTS if recipe.graph == "step" else 0,
        step_width=STEP_WIDTH if recipe.graph == "step" else 0,
        max_relative_error=exported.worst_error,
        tolerance_step=recipe.tolerance_step,
        tolerance_trajectory=recipe.tolerance_trajectory,
        golden=writer.add_file("golden", ".npz", golden_bytes(exported.golden)),
        recipe=recipe_name,
    )
    writer.add_graph(entry)
    return writer.commit()


def build_engine(source: Path, target: str, out: Path | None) -> BuiltEngine:
    """Build the engine of ``target`` from a CHECKPOINT or a BUNDLE.

    Args:
        source: CHECKPOINT (exported first where the bundle lacks the graph), or BUNDLE.
        target: Recipe in ``engines/``, or a TOML file.
        out: BUNDLE folder; None: the bundle itself, or ``SOURCE.bundle`` for a
            checkpoint.

    Raises:
        InputError: ``source`` is neither, or ``out`` contradicts it.
        BuildError: The graph is missing or the engine cannot be built.
        ParityError: The engine fails its self-test.
    """
    recipe = load_recipe("engines", target, EngineRecipe)
    name = Path(target).stem
    bundle, graph = _bundle_with_graph(source, recipe, out)
    writer = BundleWriter(bundle.folder, bundle.manifest)
    if recipe.backend == "tensorrt":
        entry = _tensorrt_entry(writer, bundle, graph, recipe, name)
    else:
        entry = _onnxruntime_entry(bundle, graph, recipe, name)
    writer.add_engine(entry)
    return BuiltEngine(writer.commit(), entry, graph)


def _bundle_with_graph(
    source: Path, recipe: EngineRecipe, out: Path | None
) -> tuple[Bundle, GraphEntry]:
    if is_bundle(source):
        if out is not None and out.resolve() != source.resolve():
            raise InputError(
                "a bundle is built in place", fix="copy it first, or leave out --out"
            )
        bundle = open_bundle(source)
    else:
        bundle = _exported(source, recipe, out)
    graph = bundle.graph("step", recipe.precision)
    if graph is None:
        raise BuildError(
            f"{bundle.folder} holds no step graph in {recipe.precision}",
            fix=f"id3pm-deploy export CHECKPOINT --recipe {recipe.export} "
            f"--out {bundle.folder}",
        )
    return bundle, graph


def _exported(source: Path, recipe: EngineRecipe, out: Path | None) -> Bundle:
    if not (source / "config.json").is_file():
        raise InputError(
            f"{source} is neither a CHECKPOINT nor a BUNDLE",
            fix="give the folder that `train`, `export` or `build-engine` wrote",
        )
    folder = out or source.with_name(source.name + ".bundle")
    if is_bundle(folder) and open_bundle(folder).graph("step", recipe.precision):
        from ..reference.checkpoint import load_spec, weights_sha256

        load_spec(source)
        bundle = open_bundle(folder)
        if bundle.manifest.checkpoint_sha256 == weights_sha256(source):
            return bundle
    return export_bundle(source, recipe.export, folder)


def _onnxruntime_entry(
    bundle: Bundle, graph: GraphEntry, recipe: EngineRecipe, target: str
) -> EngineEntry:
    if recipe.flavour != "cpu":
        raise BuildError(f"this release has no engine of flavour {recipe.flavour!r}")
    from ..backends.onnxruntime import OnnxRuntimeEngine

    begun = time.perf_counter()
    shapes = step_shapes(bundle.manifest.diffusion)
    data = bundle.read(graph.file)
    with OnnxRuntimeEngine(data, shapes, graph.precision, recipe.threads) as engine:
        error = self_test(engine, bundle, graph)
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
    )


def _tensorrt_entry(
    writer: BundleWriter,
    bundle: Bundle,
    graph: GraphEntry,
    recipe: EngineRecipe,
    target: str,
) -> EngineEntry:
    from .tensorrt import build_plan

    plan = build_plan(bundle.read(graph.file), recipe)
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
    )
