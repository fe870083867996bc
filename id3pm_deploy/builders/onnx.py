"""CHECKPOINT to ONNX: the step graph (or the bare UNet), checked before it is kept."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..backends.base import STEP_OUTPUTS
from ..backends.onnxruntime import make_session
from ..compare import Comparison, compare
from ..errors import ParityError
from ..files import ScratchFile
from ..reference.half_products import ProductsInFloat32
from ..reference.precision import body_in, exported_body
from ..reference.unet import IdentityUNet
from ..solvers import CLIP_COLUMN, NO_CLIP
from ..spec import DiffusionSpec
from .check_sizes import LARGE, TRACED, Size, checked_sizes, row_flops
from .export_recipe import ExportRecipe
from .graph_inputs import Arrays, dynamic_shapes, example_inputs, module_and_names
from .onnx_graph import check_size, traced, write_checked
from .widened import widened

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

    data: bytes | ScratchFile
    golden: Arrays
    nodes: int
    worst_error: float
    checked: tuple[Size, ...]

    def read(self) -> bytes:
        """The serialised ONNX model, in memory."""
        return self.data if isinstance(self.data, bytes) else self.data.read()


@dataclass(frozen=True)
class _Case:
    """What PyTorch made of random inputs."""

    size: Size
    inputs: Arrays
    expected: Arrays


def export_graph(
    network: IdentityUNet,
    spec: DiffusionSpec,
    recipe: ExportRecipe,
    near: Path | None = None,
) -> ExportedGraph:
    """Export, check and compare a graph.

    The result passes onnx's full checker and agrees with PyTorch under ONNX Runtime
    on several (B, R), most of which were not traced; on fewer where a UNet row is a
    matter of seconds. The weights are in memory once, and the graph is in a file.

    Args:
        network: In float32.
        spec: Facts of the model.
        recipe: How to export.
        near: A path on the disk that is to hold the file; None: temporary files'.

    Raises:
        BuildError: The exporter or the checker refuses the model, or it is too large.
        ParityError: The graph computes something else than PyTorch.
        OutputError: The disk is full.
    """
    body = body_in(network, recipe.form)
    # In float32 the oracle is the network as it is, and what is traced a form of it.
    form = body if body is not network else exported_body(network, recipe.form)
    check_size(form)
    flops = row_flops(spec)
    file = ScratchFile(near or Path(tempfile.gettempdir()))
    nodes = _write_graph(form, spec, recipe, file)
    del form
    oracle = _Remembering(body, in_float32=flops > LARGE)
    cases, golden = _run_oracle(oracle, spec, recipe, checked_sizes(flops))
    del body, oracle
    worst = _compared(file, cases, recipe)
    sizes = tuple(case.size for case in cases)
    return ExportedGraph(file, golden, nodes, worst, sizes)


def _write_graph(
    body: IdentityUNet, spec: DiffusionSpec, recipe: ExportRecipe, file: ScratchFile
) -> int:
    """Write the graph of a network; returns its number of operators."""
    module, inputs, outputs = module_and_names(body, recipe)
    example = example_inputs(spec, recipe, TRACED)
    arguments = tuple(torch.from_numpy(example[name]) for name in inputs)
    dynamic = dynamic_shapes(recipe, inputs)
    model = traced(module, arguments, inputs, outputs, dynamic, recipe.opset)
    return write_checked(model, file)


class _Remembering(nn.Module):
    """A network that is not run again for the inputs it was run for last: cases that
    differ in the solver's part alone cost one run.

    Args:
        network: Any that :func:`module_and_names` takes.
        in_float32: Let half precision be computed as :class:`ProductsInFloat32` does.
    """

    def __init__(self, network: IdentityUNet, *, in_float32: bool) -> None:
        super().__init__()
        self.network = network
        self.spec, self.identity_dim = network.spec, network.identity_dim
        kinds = {weight.dtype for weight in network.parameters()}
        half = bool(kinds - {torch.float32})
        self.in_float32 = in_float32 and half
        self.last: tuple[tuple[Tensor | None, ...], Tensor] | None = None
        if half:  # their convolutions are a hundred times slower otherwise
            cast(Any, network).to(memory_format=torch.channels_last)

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """As the network's."""
        if self.last is not None and _equal(self.last[0], inputs):
            return self.last[1]
        if self.in_float32:
            with ProductsInFloat32():  # type: ignore[no-untyped-call]
                out = self.network(*inputs)
        else:
            out = self.network(*inputs)
        self.last = (inputs, out)
        return cast(Tensor, out)


def _equal(one: tuple[Tensor | None, ...], other: tuple[Tensor | None, ...]) -> bool:
    return len(one) == len(other) and all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def _run_oracle(
    oracle: _Remembering,
    spec: DiffusionSpec,
    recipe: ExportRecipe,
    sizes: tuple[Size, ...],
) -> tuple[list[_Case], Arrays]:
    """What PyTorch makes at these sizes, and golden data of one of them."""
    body = cast(IdentityUNet, oracle)
    module, _, outputs = module_and_names(body, recipe)
    chosen = _GOLDEN if _GOLDEN in sizes else sizes[0]
    cases, golden = [], {}
    for size in sizes:
        example = example_inputs(spec, recipe, size)
        if recipe.graph == "step" and size[0] > 1:
            example["step"][:, CLIP_COLUMN] = NO_CLIP
        elif recipe.graph == "step":
            _clamp_at_half(module, example)
        cases.append(_Case(size, example, _run_torch(module, example, outputs)))
        if size == chosen:
            golden = _golden(module, example, outputs, recipe)
    return cases, golden


def _golden(
    module: nn.Module, inputs: Arrays, outputs: tuple[str, ...], recipe: ExportRecipe
) -> Arrays:
    """Golden data on these inputs; x0 of a step is clamped in it."""
    made = {name: array.copy() for name, array in inputs.items()}
    if recipe.graph == "step":
        _clamp_at_half(module, made)
    expected = _run_torch(module, made, outputs)
    return made | {f"expected.{name}": value for name, value in expected.items()}


def _run_torch(
    module: nn.Module, inputs: Mapping[str, Any], outputs: tuple[str, ...]
) -> Arrays:
    with torch.inference_mode():
        made = module(*(torch.from_numpy(np.array(v)) for v in inputs.values()))
    tensors = made if isinstance(made, tuple) else (made,)
    return {n: t.numpy() for n, t in zip(outputs, tensors, strict=True)}


def _compared(file: ScratchFile, cases: list[_Case], recipe: ExportRecipe) -> float:
    """The largest error of a graph under ONNX Runtime.

    Raises:
        ParityError: It is past the recipe's tolerance.
    """
    bfloat16 = recipe.precision == "bfloat16"
    session = make_session(widened(file.path) if bfloat16 else file.path, threads=0)
    names = [item.name for item in session.get_inputs()]
    worst = 0.0
    for case in cases:
        made = session.run(None, {name: case.inputs[name] for name in names})
        for (name, expected), actual in zip(case.expected.items(), made, strict=True):
            found = _worst_sample(name, actual, expected)
            if not found.passes(recipe.tolerance_step):
                raise ParityError(
                    f"the exported graph differs from PyTorch in {name} at "
                    f"B={case.size[0]}, R={case.size[1]}",
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
