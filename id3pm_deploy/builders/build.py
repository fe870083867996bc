"""CHECKPOINT or BUNDLE to BUNDLE: export what is missing, build, self-test, record."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..bundle import (
    BASE,
    SIGNATURE_NAME,
    SUPER_RESOLUTION,
    Bundle,
    EngineEntry,
    GraphEntry,
    SecondStage,
    is_bundle,
    open_bundle,
)
from ..bundle.ledger import record_plan, why_not_built_here
from ..bundle.writer import BundleWriter, bundle_writer
from ..checkpoint_config import is_checkpoint, load_spec, weights_sha256
from ..errors import (
    BuildError,
    BundleError,
    CheckpointError,
    InputError,
    RecipeError,
)
from ..files import beside
from ..optional import require
from ..progress import progress
from ..recipes import load_recipe
from ..selftest import golden_bytes
from ..solvers import STATE_SLOTS, STEP_WIDTH, STEP_WIDTHS
from ..spec import check_chain
from .cache import PlanCache
from .engine_entries import made_with, onnxruntime_entry, tensorrt_entries
from .export_recipe import ExportRecipe
from .recipe import EngineRecipe, check_export_fits


@dataclass(frozen=True)
class BuiltEngine:
    """A bundle and the engine that was just added to it.

    ``entry`` and ``graph`` are the base's; ``super_resolution`` is the engine of the
    second stage, where one was built. ``notes`` is what the user should know although
    nothing failed. ``from_cache`` says that nothing was built anew: the plans had been
    built before, and were in the bundle or came from the cache.
    """

    bundle: Bundle
    entry: EngineEntry
    graph: GraphEntry
    notes: tuple[str, ...] = ()
    super_resolution: EngineEntry | None = None
    from_cache: bool = False


def export_bundle(
    checkpoint: Path,
    recipe_name: str,
    out: Path,
    super_resolution: Path | None = None,
) -> Bundle:
    """Export a CHECKPOINT into the BUNDLE ``out``, made or added to.

    Args:
        checkpoint: CHECKPOINT folder.
        recipe_name: Recipe in ``export/``, or a TOML file.
        out: BUNDLE folder.
        super_resolution: CHECKPOINT of the model behind it, exported as well.

    Raises:
        CheckpointError, RecipeError, BundleError: Unusable input or output.
        InputError: The second model cannot enlarge what the first one makes.
        BuildError, ParityError: The export failed or computes something else.
    """
    recipe = _export_recipe(recipe_name)
    return _export_with(checkpoint, recipe, recipe_name, out, super_resolution)


def export_unet(
    checkpoint: Path,
    recipe_name: str,
    out: Path,
    super_resolution: Path | None = None,
) -> Bundle:
    """As :func:`export_bundle`, but the bare UNets, in the precision of a recipe."""
    recipe = dataclasses.replace(_export_recipe(recipe_name), graph="unet")
    return _export_with(checkpoint, recipe, recipe_name, out, super_resolution)


def _export_recipe(name: str) -> ExportRecipe:
    for module in ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime"):
        require(module, extra="export")
    return load_recipe("export", name, ExportRecipe)


def _export_with(
    checkpoint: Path,
    recipe: ExportRecipe,
    recipe_name: str,
    out: Path,
    super_resolution: Path | None,
) -> Bundle:
    chain = _chain(checkpoint, super_resolution)
    writer = _chain_writer(out, chain)
    for stage, path in chain.items():
        _exported(writer, path, recipe, Path(recipe_name).stem, stage)
    return writer.commit()


def _chain(checkpoint: Path, super_resolution: Path | None) -> dict[str, Path]:
    """CHECKPOINTs by stage, base first."""
    chain = {BASE: checkpoint}
    if super_resolution is not None:
        chain[SUPER_RESOLUTION] = super_resolution
    return chain


def _chain_writer(out: Path, chain: dict[str, Path]) -> BundleWriter:
    """A writer of the BUNDLE ``out`` for these CHECKPOINTs; nothing is written yet.

    Raises:
        InputError: The second model does not fit behind the first.
        CheckpointError, BundleError: Unusable input or output.
    """
    specs = {stage: load_spec(path) for stage, path in chain.items()}
    second = None
    if SUPER_RESOLUTION in chain:
        check_chain(specs[BASE], specs[SUPER_RESOLUTION])
        digest = weights_sha256(chain[SUPER_RESOLUTION])
        second = SecondStage(specs[SUPER_RESOLUTION], digest)
    digest = weights_sha256(chain[BASE])
    return bundle_writer(out, specs[BASE], digest, __version__, second)


def _exported(
    writer: BundleWriter,
    checkpoint: Path,
    recipe: ExportRecipe,
    recipe_name: str,
    stage: str,
) -> GraphEntry:
    """Add a fresh graph to a writer; returns its entry.

    Raises:
        CheckpointError: The checkpoint is damaged, or has just been replaced.
        BuildError, ParityError: The export failed or computes something else.
    """
    from ..reference.checkpoint import load_checkpoint
    from .onnx import export_graph

    loaded = load_checkpoint(checkpoint)
    if loaded.weights_sha256 != writer.manifest.stages[stage].checkpoint_sha256:
        raise CheckpointError(f"{checkpoint} has changed meanwhile", fix="try again")
    with progress(None, f"exporting {recipe.graph} {recipe.precision}"):
        exported = export_graph(loaded.network, loaded.spec, recipe, writer.folder)
    stem = f"{recipe.graph}-{recipe.precision}"
    prefix = "" if stage == BASE else f"{stage}-"
    entry = GraphEntry(
        file=writer.add_file(f"{prefix}{stem}", ".onnx", exported.data),
        kind=recipe.graph,
        precision=recipe.precision,
        max_relative_error=exported.worst_error,
        golden=writer.add_file("golden", ".npz", golden_bytes(exported.golden)),
        recipe=recipe_name,
        made_with=made_with("torch", "onnx", "onnxscript"),
        stage=stage,
        **_settings(recipe),
    )
    writer.add_graph(entry)
    return entry


def _settings(recipe: ExportRecipe) -> dict[str, Any]:
    """Fields of a graph's entry that the recipe and this release fix."""
    step = recipe.graph == "step"
    return {
        "opset": recipe.opset,
        "tolerance_step": recipe.tolerance_step,
        "tolerance_trajectory": recipe.tolerance_trajectory,
        "state_slots": STATE_SLOTS if step else 0,
        "step_width": STEP_WIDTH if step else 0,
        "body": _body(recipe),
    }


def _body(recipe: ExportRecipe) -> dict[str, Any]:
    """The form of the UNet's body as JSON values; its precision is the graph's."""
    form = dataclasses.asdict(recipe.form)
    del form["precision"]
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in form.items()}
    return dict(sorted(listed.items()))


def build_engine(
    source: Path,
    target: str,
    out: Path | None,
    super_resolution: Path | None = None,
    settings: tuple[str, ...] = (),
    cache: PlanCache | None = None,
) -> BuiltEngine:
    """Build the engines of ``target`` from a CHECKPOINT or a BUNDLE, one a stage.

    Nothing is written before they are built and have passed their self-tests.

    Args:
        source: CHECKPOINT (exported first where the bundle lacks an undamaged graph of
            the recipe), or BUNDLE.
        target: Recipe in ``engines/``, or a TOML file.
        out: BUNDLE folder; None: the bundle itself, or ``SOURCE.bundle`` for a
            checkpoint.
        super_resolution: CHECKPOINT of the model behind ``source``. A bundle knows its
            own.
        settings: ``KEY=VALUE`` that replace what the recipe says.
        cache: Plans that were built before; None to build again whatever is there.

    Raises:
        RecipeError: There is no such recipe, or it is unusable.
        InputError: ``source`` is neither, ``out`` contradicts it, or the second model
            cannot enlarge what the first one makes.
        BundleError: A BUNDLE is damaged, or ``out`` is of another checkpoint.
        BuildError: The graph is missing or the engine cannot be built.
        ParityError: The engine fails its self-test.
    """
    recipe = load_recipe("engines", target, EngineRecipe, settings)
    if recipe.backend == "onnxruntime" and recipe.flavour != "cpu":
        raise BuildError(
            f"this release builds no engine of flavour {recipe.flavour!r}",
            fix="use the target cpu",
        )
    if is_bundle(source):
        if super_resolution is not None:
            raise InputError(
                "a BUNDLE knows its own second stage",
                fix="add it with `id3pm-deploy export BASE --super-resolution SR`",
            )
        writer, graphs = _from_bundle(source, recipe, out)
    else:
        chain = _chain(source, super_resolution)
        writer, graphs = _from_checkpoints(chain, recipe, out)
    name, taken, notes = Path(target).stem, False, []
    if recipe.backend == "tensorrt":
        entries, taken = tensorrt_entries(writer, graphs, recipe, name, cache)
        # Before the commit: no plan in a bundle may lack its note because of a crash.
        digests = [writer.file_entry(entry.file).sha256 for entry in entries]
        notes = [record_plan(one) for one in digests if why_not_built_here(one)]
        notes += cache.notes if cache is not None else []
    else:
        entries = [onnxruntime_entry(writer, g, recipe, name) for g in graphs]
    for entry in entries:
        writer.add_engine(entry)
    if os.path.lexists(writer.folder / SIGNATURE_NAME):
        notes.append("the bundle's signature was removed, as the bundle has changed")
    said = tuple(dict.fromkeys(filter(None, notes)))
    second = entries[1] if len(entries) > 1 else None
    bundle = writer.commit()
    return BuiltEngine(bundle, entries[0], graphs[0], said, second, taken)


def _from_bundle(
    source: Path, recipe: EngineRecipe, out: Path | None
) -> tuple[BundleWriter, list[GraphEntry]]:
    if out is not None and out.resolve() != source.resolve():
        raise InputError(
            "a bundle is built in place", fix="copy it first, or leave out --out"
        )
    bundle = open_bundle(source)
    graphs = []
    for stage in bundle.manifest.stages:
        graph = bundle.graph("step", recipe.precision, stage)
        of = "" if stage == BASE else f" of its stage {stage}"
        fix = f"id3pm-deploy export CHECKPOINT --recipe {recipe.export} --out {source}"
        if graph is None:
            with contextlib.suppress(RecipeError):  # a file that was left elsewhere
                export = load_recipe("export", recipe.export, ExportRecipe)
                _check_agreement(recipe, export)
            raise BuildError(
                f"{source} holds no step graph in {recipe.precision}{of}", fix=fix
            )
        if graph.state_slots != STATE_SLOTS or graph.step_width not in STEP_WIDTHS:
            raise BuildError(f"the graph in {source} is of another release", fix=fix)
        graphs.append(graph)
    return BundleWriter(source, bundle.manifest), graphs


def _check_agreement(recipe: EngineRecipe, export: ExportRecipe) -> None:
    """Raise :class:`BuildError` where the export makes another graph than is built."""
    if (export.graph, export.precision) != ("step", recipe.precision):
        raise BuildError(
            f"the export recipe {recipe.export} makes no step graph in "
            f"{recipe.precision}",
            why=f"it makes a {export.graph} graph in {export.precision}",
            fix="make `export` and `precision` of the engine's recipe agree",
        )


def _from_checkpoints(
    chain: dict[str, Path], recipe: EngineRecipe, out: Path | None
) -> tuple[BundleWriter, list[GraphEntry]]:
    for path in chain.values():
        if not is_checkpoint(path):
            raise InputError(
                f"{path} is neither a CHECKPOINT nor a BUNDLE",
                fix="give the folder that `train`, `export` or `build-engine` wrote",
            )
    folder = out or beside(chain[BASE], ".bundle")
    export = _export_recipe(recipe.export)
    _check_agreement(recipe, export)
    check_export_fits(recipe, export)
    writer = _chain_writer(folder, chain)
    there = Bundle(folder, writer.manifest)
    name = Path(recipe.export).stem
    graphs = [
        _reusable(there, export, stage) or _exported(writer, path, export, name, stage)
        for stage, path in chain.items()
    ]
    return writer, graphs


def _reusable(bundle: Bundle, recipe: ExportRecipe, stage: str) -> GraphEntry | None:
    """The bundle's graph, if the recipe would make the same and it is undamaged."""
    graph = bundle.graph(recipe.graph, recipe.precision, stage)
    if graph is None or graph != dataclasses.replace(graph, **_settings(recipe)):
        return None
    try:
        bundle.read(graph.file)
        bundle.read(graph.golden)
    except BundleError:
        return None
    return graph
