"""What a parsed network computes in which precision, counted and checked.

The network is strongly typed, so a layer's type is the type it will run in. Counting
is done on TensorRT's own network, not on the ONNX file: it is what gets built.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..errors import BuildError
from .recipe import Profile

SOURCE = "parsed network"
"""Where the counts come from, as written beside them."""

DATA_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
"""Precision of a recipe to TensorRT's name of the data type."""

LEAST_SHARE = {"float32": 1.0, "float16": 0.9, "bfloat16": 0.9}
"""Least share of the convolutions' multiply-accumulates in the recipe's precision.

A graph in half precision keeps a few islands in float32, the output head's convolution
among them, which is 0.15 % of a small model.
"""

InputShapes = dict[str, tuple[int, ...]]


def count_network(
    trt: Any, network: Any, shapes: InputShapes, opt: Profile
) -> dict[str, Any]:
    """Count layers by type and output type, and multiply-accumulates by input type.

    Args:
        trt: The TensorRT module.
        network: A parsed ``INetworkDefinition``; its shapes are the same afterwards.
        shapes: Shapes of the inputs at the sizes to count for.
        opt: The profile whose usual sizes those are, to be written beside the counts.

    Returns:
        JSON values: ``source``; ``layers``, a number for each type and data type;
        ``multiply_accumulates``, the sizes they are for and the number for each data
        type, of convolutions (``CONVOLUTION``) and of matrix products
        (``MATRIX_MULTIPLY``).
    """
    layers: dict[str, Counter[str]] = {}
    work: dict[str, Counter[str]] = {}
    with _FixedShapes(network, shapes):
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            kind = layer.type.name
            layers.setdefault(kind, Counter())[_type_name(layer.get_output(0))] += 1
            count = _COUNTS.get(kind)
            if count:
                done = work.setdefault(kind, Counter())
                done[_type_name(layer.get_input(0))] += count(trt, layer)
    return {
        "source": SOURCE,
        "layers": {kind: dict(found) for kind, found in sorted(layers.items())},
        "multiply_accumulates": {
            "samples": opt.samples[1],
            "rows": opt.rows[1],
            **{kind: dict(found) for kind, found in sorted(work.items())},
        },
    }


def share_of(counts: dict[str, Any], precision: str, kind: str) -> float | None:
    """Share of the multiply-accumulates of ``kind`` that are in ``precision``.

    Args:
        counts: What :func:`count_network` returned.
        precision: ``float32``, ``float16`` or ``bfloat16``.
        kind: ``CONVOLUTION`` or ``MATRIX_MULTIPLY``.

    Returns:
        A number from 0 to 1, or None where the network has no layer of that kind.
    """
    found = counts["multiply_accumulates"].get(kind, {})
    total = sum(found.values())
    return found.get(DATA_TYPES[precision], 0) / total if total else None


def check_precision(counts: dict[str, Any], precision: str, export: str) -> None:
    """Refuse a network that is not of the precision its recipe promises.

    Args:
        counts: What :func:`count_network` returned.
        precision: What the recipe says.
        export: The recipe's export recipe, for the message.

    Raises:
        BuildError: Too few convolutions (or matrix products, if there are no
            convolutions) are in that precision, or there is neither.
    """
    for kind in ("CONVOLUTION", "MATRIX_MULTIPLY"):
        share = share_of(counts, precision, kind)
        if share is None:
            continue
        if share >= LEAST_SHARE[precision]:
            return
        found = ", ".join(counts["multiply_accumulates"][kind])
        raise BuildError(
            f"the recipe promises {precision}, but the graph is something else",
            why=f"{share:.1%} of the multiply-accumulates of its {kind} layers are "
            f"{DATA_TYPES[precision]}, and {LEAST_SHARE[precision]:.0%} must be; "
            f"the {SOURCE} has {found}",
            fix=f"build from the graph that the export recipe {export!r} makes",
        )
    raise BuildError(
        "the graph has no convolution and no matrix product",
        fix="build from a graph that id3pm-deploy exported",
    )


class _FixedShapes:
    """Give the network's inputs fixed shapes for a while, so that all are known."""

    def __init__(self, network: Any, shapes: InputShapes) -> None:
        self._inputs = [network.get_input(i) for i in range(network.num_inputs)]
        self._before = [tuple(tensor.shape) for tensor in self._inputs]
        self._shapes = shapes

    def __enter__(self) -> None:
        for tensor in self._inputs:
            tensor.shape = self._shapes[tensor.name]

    def __exit__(self, *_: object) -> None:
        for tensor, shape in zip(self._inputs, self._before, strict=True):
            tensor.shape = shape


def _type_name(tensor: Any) -> str:
    name: str = tensor.dtype.name
    return name


def _volume(tensor: Any) -> int:
    """Number of elements; 0 where TensorRT cannot tell."""
    sizes = [int(size) for size in tensor.shape]
    return math.prod(sizes) if all(size >= 0 for size in sizes) else 0


def _convolution(trt: Any, layer: Any) -> int:
    """Outputs times kernel size times input channels of a group."""
    layer.__class__ = trt.IConvolutionLayer  # the binding's way to cast down
    channels = int(layer.get_input(0).shape[1]) // int(layer.num_groups)
    kernel = math.prod(int(size) for size in layer.kernel_size_nd)
    return _volume(layer.get_output(0)) * kernel * channels


def _matrix_product(trt: Any, layer: Any) -> int:
    """Outputs times the length that is summed over."""
    layer.__class__ = trt.IMatrixMultiplyLayer
    shape = layer.get_input(0).shape
    summed = shape[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else shape[-1]
    return _volume(layer.get_output(0)) * max(0, int(summed))


_COUNTS: dict[str, Callable[[Any, Any], int]] = {
    "CONVOLUTION": _convolution,
    "MATRIX_MULTIPLY": _matrix_product,
}
