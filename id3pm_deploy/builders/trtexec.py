"""The vendor's own command for a build: ``trtexec``, or ``tensorrt_rtx``.

For comparing, or for reporting a problem with something that is not ours. The options
are those of the two programs' help and manuals for TensorRT 10.x and 11.x and
TensorRT-RTX 1.x.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import StepShapes, step_shapes
from ..bundle import BASE, is_bundle, open_bundle
from ..errors import BuildError, InputError
from ..solvers import STATE_SLOTS
from .recipe import CURRENT_GPU, EngineRecipe

Dimensions = dict[str, tuple[int | str, ...]]
"""Input to its dimensions; ``B`` and ``R`` stand for samples and UNet rows."""

_PROGRAMS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}
_LEVELS = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}
_MIB = 1 << 20


@dataclass(frozen=True)
class Command:
    """A command, its words quoted for a shell, and what it leaves out."""

    words: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " \\\n  ".join(shlex.quote(word) for word in self.words)


def step_dimensions(shapes: StepShapes, step_width: int) -> Dimensions:
    """Dimensions of a step graph's inputs.

    Args:
        shapes: Of the model.
        step_width: Numbers in a table row that the graph takes.
    """
    known: Dimensions = {
        "state": (STATE_SLOTS, "B", *shapes.picture),
        "noise": ("B", *shapes.picture),
        "identity": ("R", shapes.identity_dim),
        "row": ("R",),
        "mix": (2, "B", "R"),
        "step": ("B", step_width),
        "low_res": ("B", *(shapes.low_res or ())),
    }
    return {name: known[name] for name in shapes.inputs}


def trtexec_command(
    recipe: EngineRecipe, graph: Path, plan: Path, inputs: Dimensions
) -> Command:
    """The command that builds about the plan that ``build-engine`` would.

    Args:
        recipe: Of the ``tensorrt`` backend.
        graph: The ONNX step graph.
        plan: The file that the command is to write.
        inputs: Dimensions of the graph's inputs.

    Raises:
        InputError: The recipe makes no plan.
    """
    if recipe.backend != "tensorrt":
        raise InputError(
            f"a recipe of the {recipe.backend} backend makes no plan",
            fix="use a target whose backend is tensorrt",
        )
    options, notes = _options(recipe)
    words = (
        _PROGRAMS[recipe.flavour],
        f"--onnx={graph}",
        f"--saveEngine={plan}",
        "--skipInference",
        "--noTF32",
        *options,
        *_shapes(recipe, inputs),
    )
    return Command(words, tuple(notes))


def bundle_commands(source: Path, recipe: EngineRecipe, target: str) -> list[Command]:
    """The command for each stage of a BUNDLE; of its files only the manifest is read.

    Args:
        source: BUNDLE folder.
        recipe: Of the ``tensorrt`` backend.
        target: What the plan is called, in the current folder.

    Raises:
        InputError: ``source`` is no bundle, or the recipe makes no plan.
        BuildError: The bundle lacks the graph.
        BundleError: It is damaged.
    """
    if not is_bundle(source):
        raise InputError(
            f"{source} is no BUNDLE, whose graph the command would name",
            fix=f"id3pm-deploy export CHECKPOINT --recipe {recipe.export} --out BUNDLE",
        )
    bundle = open_bundle(source)
    commands = []
    for stage, model in bundle.manifest.stages.items():
        graph = bundle.graph("step", recipe.precision, stage)
        if graph is None:
            of = "" if stage == BASE else f" of its stage {stage}"
            raise BuildError(
                f"{source} holds no step graph in {recipe.precision}{of}",
                fix=f"id3pm-deploy export CHECKPOINT --recipe {recipe.export} "
                f"--out {source}",
            )
        inputs = step_dimensions(step_shapes(model.diffusion), graph.step_width)
        name = f"{target}.plan" if stage == BASE else f"{stage}-{target}.plan"
        path = bundle.folder / graph.file
        commands.append(trtexec_command(recipe, path, Path(name), inputs))
    return commands


def _options(recipe: EngineRecipe) -> tuple[list[str], list[str]]:
    """Options beside files and shapes, and what they leave out."""
    options, notes = [], []
    if recipe.flavour == "tensorrt":
        options.append("--stronglyTyped")
    else:
        options += _capabilities(recipe)
    limit = recipe.workspace_limit(None)
    if limit is not None:
        size = f"{limit}B" if limit % _MIB else f"{limit // _MIB}M"
        options.append(f"--memPoolSize=workspace:{size}")
    if recipe.optimization_level is not None:
        options.append(f"--builderOptimizationLevel={recipe.optimization_level}")
    if recipe.auxiliary_streams is not None:
        options.append(f"--maxAuxStreams={recipe.auxiliary_streams}")
    if recipe.hardware_compatibility != "none":
        level = _LEVELS[recipe.hardware_compatibility]
        options.append(f"--hardwareCompatibilityLevel={level}")
    if recipe.version_compatible:
        options.append("--versionCompatible")
    if recipe.weight_streaming:
        options.append("--allowWeightStreaming")
    if recipe.workspace_share:
        notes.append(
            f"workspace_share = {recipe.workspace_share} has no option; "
            + ("its ceiling is given" if limit else "the workspace has no limit")
        )
    if recipe.user_allocation:
        notes.append("user_allocation has no option; the plan allocates by itself")
    return options, notes


def _capabilities(recipe: EngineRecipe) -> list[str]:
    wanted = recipe.compute_capabilities
    if not wanted:
        return []
    if wanted == (CURRENT_GPU,):
        return ["--useGpu"]
    return [f"--computeCapabilities={','.join(c.replace('.', '') for c in wanted)}"]


def _shapes(recipe: EngineRecipe, inputs: Dimensions) -> list[str]:
    """Fewest, usual and most of each profile; its number where there are several."""
    words = []
    profiles = recipe.profiles
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        sizes = zip(profile.samples, profile.rows, strict=True)
        for kind, (samples, rows) in zip(("min", "opt", "max"), sizes, strict=True):
            text = ",".join(
                f"{name}:{_sizes(dimensions, samples, rows)}"
                for name, dimensions in inputs.items()
            )
            words.append(f"--{kind}Shapes={text}")
    return words


def _sizes(dimensions: tuple[int | str, ...], samples: int, rows: int) -> str:
    sizes = {"B": samples, "R": rows}
    return "x".join(str(sizes[d] if isinstance(d, str) else d) for d in dimensions)
