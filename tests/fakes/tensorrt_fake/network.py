"""The fake TensorRT's logger, network and ONNX parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .names import EARLY, DataType, LayerType, MatrixOperation, enumeration
from .protobuf import every, numbers, text

_ONNX_TYPES = {1: 0, 2: 5, 3: 2, 6: 3, 7: 8, 9: 4, 10: 1, 16: 7}
"""ONNX's number of a data type to that of ``DataType``."""
_REFUSED = ("GroupNormalization", "Attention") if EARLY else ()
_MOVING = {"Gather": "GATHER", "Cast": "CAST", "MatMul": "MATRIX_MULTIPLY"}
_DYNAMIC = -1


class ILogger:
    Severity = enumeration(
        "Severity", "INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"
    )

    def __init__(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class ITensor:
    __slots__ = ("_names", "dtype", "name", "shape")

    def __init__(self, name: str, dtype: Any, shape: tuple[Any, ...]) -> None:
        self.name, self.dtype = name, dtype
        self._names = [size if isinstance(size, str) else "" for size in shape]
        self.shape = tuple(s if isinstance(s, int) else _DYNAMIC for s in shape)

    def get_dimension_name(self, index: int) -> str:
        return self._names[index]


class ILayer:
    def __init__(
        self, kind: str, name: str, inputs: list[ITensor], output: ITensor, **more: Any
    ) -> None:
        self.type, self.name = LayerType[kind], name
        self._inputs, self._output = inputs, output
        self.__dict__.update(more)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return 1

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._output


class IConvolutionLayer(ILayer):
    num_groups: int
    kernel_size_nd: tuple[int, ...]


class IMatrixMultiplyLayer(ILayer):
    op0: Any


class INetworkDefinition:
    __slots__ = ("_inputs", "_layers", "_outputs", "flags", "logger")

    def __init__(self, flags: int, logger: ILogger) -> None:
        self.flags, self.logger = flags, logger
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self._layers: list[ILayer] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class ParserError:
    def __init__(self, node: str, operator: str, why: str) -> None:
        self._node, self._operator, self._why = node, operator, why

    def desc(self) -> str:
        return self._why

    def node_name(self) -> str:
        return self._node

    def node_operator(self) -> str:
        return self._operator


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, list[ParserError]()
        self._tensors: dict[str, ITensor] = {}

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        try:
            data = memoryview(Path(model).read_bytes())
            (graph,) = every(data, 7)
        except (OSError, ValueError, IndexError, KeyError):
            self._errors.append(ParserError("", "", f"cannot read {model}"))
            return False
        for tensor in every(graph, 5):
            self._add_weights(tensor)
        for value in every(graph, 11):
            self._network._inputs.append(self._add_value(value))
        for node in every(graph, 1):
            self._add_node(node)
        for value in every(graph, 12):
            self._network._outputs.append(self._tensors[text(value, 1)])
        return not self._errors

    def _add_weights(self, tensor: memoryview) -> None:
        shape: list[int] = []
        for value in every(tensor, 1):
            shape += [value] if isinstance(value, int) else numbers(value)
        (kind,) = every(tensor, 2)
        self._add(text(tensor, 8), _dtype(kind), tuple(shape))

    def _add_value(self, value: memoryview) -> ITensor:
        (kind,) = every(every(value, 2)[0], 1)
        shape: list[Any] = []
        for size in every(every(kind, 2)[0], 1):
            number = every(size, 1)
            shape.append(number[0] if number else text(size, 2))
        return self._add(text(value, 1), _dtype(every(kind, 1)[0]), tuple(shape))

    def _add(self, name: str, dtype: Any, shape: tuple[Any, ...]) -> ITensor:
        self._tensors[name] = ITensor(name, dtype, shape)
        return self._tensors[name]

    def _add_node(self, node: memoryview) -> None:
        name, operator = text(node, 3), text(node, 4)
        names = [bytes(value).decode() for value in every(node, 1)]
        inputs = [self._tensors[one] for one in names if one in self._tensors]
        if operator in _REFUSED:
            why = f"no importer for operator {operator}"
            self._errors.append(ParserError(name, operator, why))
        dtype = inputs[0].dtype if inputs else DataType.FLOAT
        attributes = {text(one, 1): one for one in every(node, 5)}
        if operator == "Cast":
            dtype = _dtype(every(attributes["to"], 3)[0])
        kind, more = _MOVING.get(operator, "ELEMENTWISE"), {"op0": MatrixOperation.NONE}
        shape: tuple[int, ...] = inputs[0].shape if inputs else ()
        if operator == "Conv":
            kind, shape, more = self._convolution(inputs, attributes)
        if kind == "MATRIX_MULTIPLY":  # sizes of no meaning, but known ones
            inputs = [ITensor(name, dtype, (1, 1)), *inputs[1:]]
            shape = (1, 1)
        made = [self._add(bytes(out).decode(), dtype, shape) for out in every(node, 2)]
        self._network._layers.append(ILayer(kind, name, inputs, made[0], **more))

    def _convolution(
        self, inputs: list[ITensor], attributes: dict[str, memoryview]
    ) -> tuple[str, tuple[int, ...], dict[str, Any]]:
        outputs, channels, *kernel = inputs[1].shape
        groups = [n for a in [attributes.get("group")] if a for n in every(a, 3)]
        inputs[0] = ITensor(inputs[0].name, inputs[0].dtype, (1, channels, 1, 1))
        more = {"num_groups": (groups or [1])[0], "kernel_size_nd": tuple(kernel)}
        return "CONVOLUTION", (1, outputs, 1, 1), more


def _dtype(number: int) -> Any:
    return DataType(_ONNX_TYPES[number])
