"""What a parsed network computes in which precision, counted and checked.

The network is strongly typed, so a layer's type is the type it will run in. Counting
is done on TensorRT's own network, not on the ONNX file: it is what gets built.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import BuildError
from .recipe import Profile

if TYPE_CHECKING:
    import tensorrt

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


@dataclass(frozen=True)
class NodeWork:
    """A convolution or a matrix product of the network.

    Attributes:
        name: The ONNX node's.
        kind: ``CONVOLUTION`` or ``MATRIX_MULTIPLY``.
        data_type: TensorRT's name of its first input's.
        multiply_accumulates: How many, at the sizes it was counted for.
    """

    name: str
    kind: str
    data_type: str
    multiply_accumulates: int


def node_work(
    trt: Any, network: tensorrt.INetworkDefinition, shapes: InputShapes
) -> tuple[NodeWork, ...]:
    """Multiply-accumulates of each convolution and matrix product.

    Args:
        trt: The TensorRT module.
        network: A parsed network; its shapes are the same afterwards.
        shapes: Shapes of the inputs at the sizes to count for.
    """
    found = []
    with _FixedShapes(network, shapes):
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            kind, name = layer.type.name, layer.name
            if kind in _COUNTS:
                data_type = _type_name(layer.get_input(0))
                count = _COUNTS[kind](trt, layer)
                found.append(NodeWork(name, kind, data_type, count))
    return tuple(found)


def count_network(
    network: tensorrt.INetworkDefinition, work: Iterable[NodeWork], opt: Profile
) -> dict[str, Any]:
    """Count layers by type and output type, and multiply-accumulates by input type.

    Args:
        network: A parsed network.
        work: What :func:`node_work` found in it.
        opt: The profile whose usual sizes it is for, to be written beside the counts.

    Returns:
        JSON values: ``source``; ``layers``, a number for each type and data type;
        ``multiply_accumulates``, the sizes they are for and the number for each data
        type, of convolutions (``CONVOLUTION``) and of matrix products
        (``MATRIX_MULTIPLY``).
    """
    layers: dict[str, Counter[str]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        name = _type_name(layer.get_output(0))
        layers.setdefault(layer.type.name, Counter())[name] += 1
    done: dict[str, Counter[str]] = {}
    for node in work:
        kind = done.setdefault(node.kind, Counter())
        kind[node.data_type] += node.multiply_accumulates
    return {
        "source": SOURCE,
        "layers": {kind: dict(found) for kind, found in sorted(layers.items())},
        "multiply_accumulates": {
            "samples": opt.samples[1],
            "rows": opt.rows[1],
            **{kind: dict(found) for kind, found in sorted(done.items())},
        },
    }


def type_shares(counts: dict[str, Any]) -> dict[str, float]:
    """Share of all multiply-accumulates for each data type, largest first.

    Args:
        counts: What :func:`count_network` or ``plan_inspector.plan_types`` returned.

    Returns:
        TensorRT's names of data types to numbers from 0 to 1; empty without any work.
    """
    total: Counter[str] = Counter()
    for found in counts.get("multiply_accumulates", {}).values():
        total.update(found if isinstance(found, dict) else {})
    every = sum(total.values())
    return {name: count / every for name, count in total.most_common() if every}


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

    def __init__(
        self, network: tensorrt.INetworkDefinition, shapes: InputShapes
    ) -> None:
        self._inputs = [network.get_input(i) for i in range(network.num_inputs)]
        self._before = [tuple(tensor.shape) for tensor in self._inputs]
        self._shapes = shapes

    def __enter__(self) -> None:
        for tensor in self._inputs:
            tensor.shape = self._shapes[tensor.name]

    def __exit__(self, *_: object) -> None:
        for tensor, shape in zip(self._inputs, self._before, strict=True):
            tensor.shape = shape


def _type_name(tensor: tensorrt.ITensor) -> str:
    name: str = tensor.dtype.name
    return name


def _volume(tensor: tensorrt.ITensor) -> int:
    """Number of elements; 0 where TensorRT cannot tell."""
    sizes = [int(size) for size in tensor.shape]
    return math.prod(sizes) if all(size >= 0 for size in sizes) else 0


def _convolution(trt: Any, found: tensorrt.ILayer) -> int:
    """Outputs times kernel size times input channels of a group."""
    found.__class__ = trt.IConvolutionLayer  # the binding's way to cast down
    layer = cast("tensorrt.IConvolutionLayer", found)
    channels = int(layer.get_input(0).shape[1]) // int(layer.num_groups)
    kernel = math.prod(int(size) for size in layer.kernel_size_nd)
    return _volume(layer.get_output(0)) * kernel * channels


def _matrix_product(trt: Any, found: tensorrt.ILayer) -> int:
    """Outputs times the length that is summed over."""
    found.__class__ = trt.IMatrixMultiplyLayer
    layer = cast("tensorrt.IMatrixMultiplyLayer", found)
    shape = layer.get_input(0).shape
    summed = shape[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else shape[-1]
    return _volume(layer.get_output(0)) * max(0, int(summed))


_COUNTS: dict[str, Callable[[Any, Any], int]] = {
    "CONVOLUTION": _convolution,
    "MATRIX_MULTIPLY": _matrix_product,
}
