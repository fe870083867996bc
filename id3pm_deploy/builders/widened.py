"""A bfloat16 graph as one that ONNX Runtime's CPU provider can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

_NARROW, _WIDE = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def widened(path: Path) -> bytes:
    """The same graph with float32 wherever it has bfloat16.

    The weights keep the values that bfloat16 gave them, and what is computed is not
    rounded any more. This is what ONNX Runtime does with float16 by itself; of
    bfloat16 its CPU provider has next to no operators.

    Args:
        path: An ONNX file without external data.
    """
    model = onnx.load(str(path), load_external_data=False)
    for tensor in _tensors(model.graph):
        if tensor.data_type == _NARROW:
            values = onnx.numpy_helper.to_array(tensor)
            name = tensor.name
            wide = onnx.numpy_helper.from_array(values.astype(np.float32), name)
            tensor.CopyFrom(wide)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = _WIDE if attribute.i == _NARROW else attribute.i
    data: bytes = model.SerializeToString()
    return data


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initialisers, and constants among the operators."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
