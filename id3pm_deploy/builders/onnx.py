"""CHECKPOINT to ONNX: the step graph (or the bare UNet), checked before it is kept."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ..backends.base import STEP_OUTPUTS
from ..backends.onnxruntime import make_session
from ..compare import Comparison, compare
from ..errors import BuildError, ParityError, first_line
from ..reference.unet import IdentityUNet
from ..solvers import CLIP_COLUMN, NO_CLIP
from ..spec import DiffusionSpec
from .export_recipe import ExportRecipe
from .graph_inputs import Arrays, dynamic_shapes, example_inputs, module_and_names

_TRACED = (2, 3)
_CHECKED = ((1, 1), (1, 2), (2, 3), (3, 6), (5, 5))
_GOLDEN = (2, 3)


@dataclass(frozen=True)
class ExportedGraph:
    """A checked graph.

    Attributes:
        data: The serialised ONNX model.
        golden: Inputs by name, and what PyTorch makes of them as ``expected.NAME``.
        nodes: Number of operators.
        worst_error: Largest max|a-b|/max|b| over outputs and sizes that were checked.
        checked: The (B, R) that were run under ONNX Runtime.
    """

    data: bytes
    golden: Arrays
    nodes: int
    worst_error: float
    checked: tuple[tuple[int, int], ...]


def export_graph(
    network: IdentityUNet, spec: DiffusionSpec, recipe: ExportRecipe
) -> ExportedGraph:
    """Export, check and compare a graph.

    The result passes onnx's full checker and agrees with PyTorch under ONNX Runtime
    on several (B, R), most of which were not traced.

    Raises:
        BuildError: The exporter or the checker refuses the model.
        ParityError: The graph computes something else than PyTorch.
    """
    module, inputs, outputs = module_and_names(network, recipe)
    proto = _traced(
        module, example_inputs(spec, recipe, _TRACED), recipe, inputs, outputs
    )
    _strip_origin(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError("the exported graph is not valid", why=str(error)) from error
    data = proto.SerializeToString()
    worst = _checked_against(module, data, spec, recipe, outputs)
    golden = example_inputs(spec, recipe, _GOLDEN)
    if recipe.graph == "step":
        _clamp_at_half(module, golden)
    expected = _run_torch(module, golden, outputs)
    golden |= {f"expected.{name}": value for name, value in expected.items()}
    return ExportedGraph(data, golden, len(proto.graph.node), worst, _CHECKED)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter speaks of packages we do not need and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _traced(
    module: nn.Module,
    example: Arrays,
    recipe: ExportRecipe,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> Any:
    arguments = tuple(torch.from_numpy(example[name]) for name in inputs)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=recipe.opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes(recipe),
                verbose=False,
            )
    except Exception as error:  # torch's exporter wraps failures of many kinds
        raise BuildError(
            "PyTorch cannot export this model to ONNX",
            why=first_line(error),
            fix="report it with the checkpoint's config.json",
        ) from error
    assert program is not None
    return program.model_proto


def _strip_origin(proto: Any) -> None:
    """Remove what the exporter notes of the source code: stack traces with paths."""
    del proto.metadata_props[:]
    proto.doc_string = ""
    graph = proto.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info):
        del item.metadata_props[:]
        item.doc_string = ""
    for item in graph.initializer:
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]


def _run_torch(
    module: nn.Module, inputs: Mapping[str, Any], outputs: tuple[str, ...]
) -> Arrays:
    with torch.inference_mode():
        made = module(*(torch.from_numpy(np.array(v)) for v in inputs.values()))
    tensors = made if isinstance(made, tuple) else (made,)
    return {n: t.numpy() for n, t in zip(outputs, tensors, strict=True)}


def _checked_against(
    module: nn.Module,
    data: bytes,
    spec: DiffusionSpec,
    recipe: ExportRecipe,
    outputs: tuple[str, ...],
) -> float:
    session = make_session(data, threads=0)
    names = [item.name for item in session.get_inputs()]
    worst = 0.0
    for size in _CHECKED:
        example = example_inputs(spec, recipe, size)
        if recipe.graph == "step" and size[0] > 1:
            example["step"][:, CLIP_COLUMN] = NO_CLIP
        elif recipe.graph == "step":
            _clamp_at_half(module, example)
        expected = _run_torch(module, example, outputs)
        made = session.run(None, {name: example[name] for name in names})
        for name, actual in zip(outputs, made, strict=True):
            found = _worst_sample(name, actual, expected[name])
            if not found.passes(recipe.tolerance_step):
                raise ParityError(
                    f"the exported graph differs from PyTorch in {name} at "
                    f"B={size[0]}, R={size[1]}",
                    why=f"relative error {found.max_rel:.2e}, "
                    f"tolerance {recipe.tolerance_step:.0e}",
                    fix="report it with the checkpoint's config.json",
                )
            worst = max(worst, found.max_rel)
    return worst


def _clamp_at_half(module: nn.Module, example: Arrays) -> None:
    """Clamp each sample's x0 at half of its largest number, in place.

    The table's own clip would make the comparison unfair: an ε model's x0 is a number
    of up to 20,000 at the last timestep of the cosine schedule, and its rounding
    counted in full against the 1 that it is clamped to.
    """
    example["step"][:, CLIP_COLUMN] = NO_CLIP
    x0 = _run_torch(module, example, STEP_OUTPUTS)["x0"]
    largest = np.abs(x0).max(axis=(1, 2, 3))
    example["step"][:, CLIP_COLUMN] = np.where(np.isfinite(largest), largest / 2, 1)


def _worst_sample(name: str, actual: Any, expected: Any) -> Comparison:
    """The comparison of the sample that is farthest off, so that one with large
    numbers cannot hide another's errors."""
    axis = {"state_next": 1, "x0": 0, "out": 0}.get(name)
    if axis is None:
        return compare(actual, expected)
    pairs = zip(
        np.moveaxis(actual, axis, 0), np.moveaxis(expected, axis, 0), strict=True
    )
    found = [compare(a, b) for a, b in pairs]
    return max(found, key=lambda one: one.max_rel if one.finite else math.inf)
