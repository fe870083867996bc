"""What a graph consists of: ONNX operators, and layers of TensorRT's own network."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx

from id3pm_deploy.errors import BuildError

_MODULE = "tensorrt_rtx"
_INTEGERS = ("INT64", "INT32", "BOOL")
_MOVES = ("Reshape", "Transpose", "Shape", "Unsqueeze", "Squeeze", "Slice", "Split")


@dataclass(frozen=True)
class GraphCounts:
    """Numbers of operators and layers; those of TensorRT are None without it.

    Attributes:
        nodes: ONNX operators.
        operators: The same by type.
        layers: Of the parsed network.
        arithmetic: Layers that give whole numbers or flags: shapes, mostly.
        shuffles: Layers that reshape or transpose.
    """

    nodes: int
    operators: dict[str, int]
    layers: int | None
    arithmetic: int | None
    shuffles: int | None

    @property
    def moves(self) -> int:
        """ONNX operators that only move numbers or ask for sizes."""
        return sum(self.operators.get(kind, 0) for kind in _MOVES)

    def to_json(self) -> dict[str, Any]:
        """For a result file."""
        return {**vars(self), "moves": self.moves}


def graph_counts(data: bytes) -> GraphCounts:
    """Count what is in a serialised ONNX graph.

    Raises:
        BuildError: TensorRT-RTX is there and cannot parse it.
    """
    nodes = onnx.load_from_string(data).graph.node
    operators = dict(Counter(node.op_type for node in nodes).most_common())
    layers = _layers(data)
    return GraphCounts(len(nodes), operators, *layers)


def _layers(data: bytes) -> tuple[int | None, int | None, int | None]:
    if importlib.util.find_spec(_MODULE) is None:
        return None, None, None
    trt: Any = importlib.import_module(_MODULE)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse(data):
        raise BuildError(
            "TensorRT-RTX cannot parse the graph", why=parser.get_error(0).desc()
        )
    found = [network.get_layer(i) for i in range(network.num_layers)]
    whole = sum(one.get_output(0).dtype.name in _INTEGERS for one in found)
    shuffles = sum(one.type == trt.LayerType.SHUFFLE for one in found)
    return len(found), whole, shuffles
