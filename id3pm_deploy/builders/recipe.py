"""How an engine is built: the recipes in ``engines/``. Nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..body_form import Precision
from ..errors import BuildError, RecipeError
from .export_recipe import ExportRecipe

FLAVOURS = {
    "onnxruntime": ("cpu", "cuda"),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
}
"""Backend to the flavours it has; TensorRT's are the names of the Python modules."""

MAX_SAMPLES = 2048
MAX_ROWS = 4096
"""Bounds of B and R in an exported step graph."""

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]

CURRENT_GPU = "current"
MOST_SHARE = 0.9
"""Most of the free memory that a workspace may have; the plan needs some, too."""

LEAST_WORKSPACE = 16 << 20
"""Fewest bytes of a workspace. With 4 MiB TensorRT-RTX 1.7.1 finds no kernels for two
convolutions, and for a UNet of 0.8 M parameters 8 MiB are too little."""

_CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_OPERATOR = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TENSORRT_ONLY = (
    "static_samples",
    "static_guided_samples",
    "dynamic_samples",
    "dynamic_rows_per_sample",
    "compute_capabilities",
    "workspace_share",
    "workspace_bytes",
    "optimization_level",
    "auxiliary_streams",
    "hardware_compatibility",
    "version_compatible",
    "weight_streaming",
    "user_allocation",
    "max_opset",
    "operators_refused",
)


@dataclass(frozen=True)
class Profile:
    """The sizes that a plan is built for.

    Attributes:
        samples: Fewest, usual and most samples B.
        rows: Fewest, usual and most UNet rows R.
    """

    samples: tuple[int, int, int]
    rows: tuple[int, int, int]

    def __post_init__(self) -> None:
        for name, sizes, most in (
            ("samples", self.samples, MAX_SAMPLES),
            ("UNet rows", self.rows, MAX_ROWS),
        ):
            if not 1 <= sizes[0] <= sizes[1] <= sizes[2] <= most:
                raise RecipeError(
                    f"a profile's {name} must satisfy 1 <= min <= opt <= max <= {most}",
                    why=f"they are {list(sizes)}",
                    fix="give the fewest, the usual and the most, in this order",
                )

    def to_json(self) -> dict[str, Any]:
        """``{"samples": [min, opt, max], "rows": [min, opt, max]}``."""
        return {"samples": list(self.samples), "rows": list(self.rows)}


@dataclass(frozen=True)
class EngineRecipe:
    """How an engine is built and run; files of this form lie in ``engines/``.

    Attributes:
        summary: One line for people.
        backend: Which backend runs the engine.
        flavour: ``cpu`` or ``cuda`` for ONNX Runtime; the Python module, ``tensorrt``
            or ``tensorrt_rtx``, for TensorRT.
        export: Recipe in ``export/`` that makes the graph.
        precision: What the graph's body must turn out to be when it is parsed.
        threads: Threads of ONNX Runtime on the CPU; 0 lets it decide.
        static_samples: Sample counts B with a profile of their own, with R = B.
        static_guided_samples: The same under classifier-free guidance, R = 2B.
        dynamic_samples: Fewest, usual and most samples of the one dynamic profile;
            empty for none.
        dynamic_rows_per_sample: Fewest, usual and most UNet rows a sample in the
            dynamic profile: 1 without guidance, 2 with it, more for blends.
        compute_capabilities: GPUs that the plan is for, as ``8.6``, or ``current``
            alone; empty leaves it to the library. TensorRT-RTX is told to build for
            them; plain TensorRT builds for the GPU that is there, which must be one
            of them.
        workspace_share: Share of the device's free memory that TensorRT's workspace
            may have; 0 leaves it to ``workspace_bytes``.
        workspace_bytes: Ceiling of that share, or the limit where there is no share
            or the free memory is unknown; 0 for none.
        optimization_level: TensorRT's, from 0 to 5; absent leaves it to the library.
        auxiliary_streams: Most streams beside the main one; absent as above.
        hardware_compatibility: Other GPUs that a plan of plain TensorRT runs on.
        version_compatible: Whether later releases of the library take the plan.
        weight_streaming: Whether weights may stay in the host's memory.
        user_allocation: Whether all memory comes from the caller, which capturing
            TensorRT-RTX into a CUDA graph needs.
        max_opset: Highest opset that the target's parser takes; 0 for no bound.
        operators_refused: ONNX operators that it does not take.
    """

    summary: str
    backend: Literal["onnxruntime", "tensorrt"]
    flavour: str
    export: str
    precision: Precision
    threads: int = 0
    static_samples: tuple[int, ...] = ()
    static_guided_samples: tuple[int, ...] = ()
    dynamic_samples: tuple[int, ...] = ()
    dynamic_rows_per_sample: tuple[int, ...] = (1, 2, 2)
    compute_capabilities: tuple[str, ...] = ()
    workspace_share: float = 0.0
    workspace_bytes: int = 0
    optimization_level: int | None = None
    auxiliary_streams: int | None = None
    hardware_compatibility: HardwareCompatibility = "none"
    version_compatible: bool = False
    weight_streaming: bool = False
    user_allocation: bool = False
    max_opset: int = 0
    operators_refused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = FLAVOURS[self.backend]
        if self.flavour not in known:
            raise RecipeError(
                f"{self.backend} has no flavour {self.flavour!r}",
                fix=f"use one of {', '.join(known)}",
            )
        if not self.export:
            raise RecipeError("export must name a recipe in export/")
        if self.backend == "tensorrt":
            self._check_tensorrt()
        else:
            self._check_onnxruntime()

    def _check_onnxruntime(self) -> None:
        if self.precision == "bfloat16":
            raise RecipeError(
                "the onnxruntime backend has no engines in bfloat16",
                why="ONNX Runtime's CPU provider lacks the operators",
                fix="use float32, which is as fast there, or the tensorrt backend",
            )
        _check_range("threads", self.threads, 0, 1024)
        defaults = type(self).__dataclass_fields__
        for name in _TENSORRT_ONLY:
            if getattr(self, name) != defaults[name].default:
                raise RecipeError(
                    f"{name} is a setting of the tensorrt backend",
                    fix="remove it from the recipe",
                )

    def _check_tensorrt(self) -> None:
        if self.threads:
            raise RecipeError(
                "threads is a setting of the onnxruntime backend",
                fix="remove it from the recipe",
            )
        if not 0 <= self.workspace_share <= MOST_SHARE:
            raise RecipeError(
                f"workspace_share must be from 0 to {MOST_SHARE}",
                why=f"it is {self.workspace_share}",
            )
        _check_range("workspace_bytes", self.workspace_bytes, 0, 1 << 50)
        if 0 < self.workspace_bytes < LEAST_WORKSPACE:
            raise RecipeError(
                "workspace_bytes is too small for any kernel",
                why=f"it is {self.workspace_bytes}",
                fix=f"raise it to {LEAST_WORKSPACE} at least, or leave it out",
            )
        _check_range("optimization_level", self.optimization_level, 0, 5)
        _check_range("auxiliary_streams", self.auxiliary_streams, 0, 64)
        self._check_capabilities()
        self._check_parser()
        if not self.profiles:
            raise RecipeError(
                "the recipe has no profile",
                why="a plan is built for sizes that are known beforehand",
                fix="set dynamic_samples, static_samples or static_guided_samples",
            )

    def _check_capabilities(self) -> None:
        wanted = self.compute_capabilities
        bad = [c for c in wanted if c != CURRENT_GPU and not _CAPABILITY.fullmatch(c)]
        if bad or len(set(wanted)) != len(wanted):
            raise RecipeError(
                "compute_capabilities must be different numbers such as 8.6",
                why=f"they are {', '.join(wanted)}",
            )
        if CURRENT_GPU in wanted and len(wanted) > 1:
            raise RecipeError(
                f"the compute capability {CURRENT_GPU!r} must stand alone",
                why="such a plan is for the GPU that builds it and no other",
            )

    def _check_parser(self) -> None:
        _check_range("max_opset", self.max_opset, 0, 100)
        refused = self.operators_refused
        bad = [name for name in refused if not _OPERATOR.fullmatch(name)]
        if bad or len(set(refused)) != len(refused):
            raise RecipeError(
                "operators_refused must be different names of ONNX operators",
                why=f"they are {', '.join(map(repr, refused))}",
            )

    def workspace_limit(self, free_bytes: int | None) -> int | None:
        """Bytes that the workspace may have; None leaves it to the library.

        Args:
            free_bytes: Free memory of the device that builds; None if unknown.

        Raises:
            BuildError: The share of it is too small for any kernel.
        """
        limits = [self.workspace_bytes] if self.workspace_bytes else []
        if self.workspace_share and free_bytes is not None:
            limits.append(int(self.workspace_share * free_bytes))
        limit = min(limits, default=None)
        if limit is not None and limit < LEAST_WORKSPACE:
            raise BuildError(
                "too little memory is free for TensorRT's workspace",
                why=f"of {free_bytes} bytes its share is {self.workspace_share}",
                fix="close other programs, or raise workspace_share in the recipe",
            )
        return limit

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Static profiles, then guided static ones, then the dynamic one.

        Raises:
            RecipeError: Sizes out of range or order, or the same profile twice.
        """
        found = [_static(b, b) for b in self.static_samples]
        found += [_static(b, 2 * b) for b in self.static_guided_samples]
        if self.dynamic_samples:
            found.append(self._dynamic())
        if len(set(found)) != len(found):
            raise RecipeError("the recipe has the same profile twice")
        return tuple(found)

    def _dynamic(self) -> Profile:
        samples, each = self.dynamic_samples, self.dynamic_rows_per_sample
        for name, sizes in (
            ("dynamic_samples", samples),
            ("dynamic_rows_per_sample", each),
        ):
            if len(sizes) != 3 or sorted(sizes) != list(sizes):
                raise RecipeError(
                    f"{name} must be three rising numbers: fewest, usual and most",
                    why=f"it is {list(sizes)}",
                )
        low, usual, high = (b * r for b, r in zip(samples, each, strict=True))
        return Profile((samples[0], samples[1], samples[2]), (low, usual, high))


class Travels(Protocol):
    """What a recipe and an engine's entry both say of where a plan runs."""

    @property
    def flavour(self) -> str:
        """The Python module."""

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """GPUs that a plan is for."""

    @property
    def hardware_compatibility(self) -> str:
        """Other GPUs that a plan of plain TensorRT runs on."""


def is_portable(made: Travels) -> bool:
    """Whether a plan is for more than the one GPU that it is built on."""
    if made.flavour == "tensorrt_rtx":
        return made.compute_capabilities != (CURRENT_GPU,)
    return made.hardware_compatibility != "none"


def _static(samples: int, rows: int) -> Profile:
    return Profile((samples,) * 3, (rows,) * 3)


def _check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise RecipeError(f"{name} must be from {low} to {high}", why=f"it is {value}")


def check_graph_fits(
    recipe: EngineRecipe, opset: int, operators: Collection[str]
) -> None:
    """Refuse a graph that the parser of the recipe's target does not take.

    Args:
        recipe: Recipe of the engine.
        opset: The graph's opset.
        operators: Names of the operators in it.

    Raises:
        BuildError: Its opset is too high, or an operator is refused.
    """
    problem = _misfit(recipe, opset, operators)
    if problem:
        raise BuildError(
            "the target's parser does not take the graph",
            why=problem,
            fix=f"export it with `--recipe {recipe.export}`, the recipe's own",
        )


def check_export_fits(recipe: EngineRecipe, export: ExportRecipe) -> None:
    """Refuse an engine's recipe whose export recipe makes what its parser refuses.

    Raises:
        RecipeError: As above, before anything is exported.
    """
    native = {
        "Attention": export.attention == "native",
        "GroupNormalization": export.normalisation == "native",
    }
    operators = [name for name, used in native.items() if used]
    problem = _misfit(recipe, export.opset, operators)
    if problem:
        raise RecipeError(
            f"the export recipe {recipe.export} makes a graph that the target's parser "
            "does not take",
            why=problem,
            fix="set `export` to a recipe without it, or change max_opset and "
            "operators_refused if the target's library is newer",
        )


def _misfit(recipe: EngineRecipe, opset: int, operators: Collection[str]) -> str:
    """What the target's parser does not take; empty if it takes all."""
    problems = []
    if recipe.max_opset and opset > recipe.max_opset:
        problems.append(
            f"the graph has opset {opset}, the parser takes {recipe.max_opset}"
        )
    refused = sorted(set(recipe.operators_refused) & set(operators))
    if refused:
        problems.append(f"the parser has no operator {', '.join(refused)}")
    return "; ".join(problems)
