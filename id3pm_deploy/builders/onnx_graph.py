"""A PyTorch module as an ONNX file, with its weights in memory only once.

The weights are the exported program's own until they are written, one after the other,
into the file; the exporter's usual way holds them three to five times over.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir
import onnx_ir.passes.common as passes
import torch
from onnx_ir.passes import PassManager
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules
from torch import nn

from ..errors import BuildError, first_line
from ..files import ScratchFile

MAX_GRAPH_BYTES = (1 << 31) - (1 << 24)
"""Protobuf refuses a message of 2 GiB; the operators take a few megabytes."""

_LARGE = 1 << 12
"""Bytes from which on a tensor is written by itself."""

# onnxscript's own, without those for operators no UNet here has, and without
# slice_split_rule, which looks at every node for every node.
_RULES = (
    rules.mul_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
)


def check_size(module: nn.Module) -> None:
    """Refuse a module whose graph would not fit into one file, before any work.

    Raises:
        BuildError: Its weights are larger than a protocol buffer can hold.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > MAX_GRAPH_BYTES:
        raise BuildError(
            "the model is too large for an ONNX graph in one file",
            why=f"its weights take {size / 1e9:.2f} GB, and the file's format ends at "
            f"{MAX_GRAPH_BYTES / 1e9:.2f} GB",
            fix="export it with the recipe float16, which takes half of that",
        )


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


def traced(
    module: nn.Module,
    arguments: tuple[torch.Tensor, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    dynamic: tuple[dict[int, Any], ...] | None,
    opset: int,
) -> onnx_ir.Model:
    """The module as a graph whose tensors are still the module's.

    Args:
        module: In evaluation mode.
        arguments: An example.
        inputs: Names of the arguments.
        outputs: Names of what it gives.
        dynamic: Which axes of the arguments may have any size; None for none.
        opset: Of ONNX.

    Raises:
        BuildError: The exporter refuses the module.
    """
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            model: onnx_ir.Model = program.model
            _optimise(model)
    except Exception as error:  # torch's exporter wraps failures of many kinds
        raise BuildError(
            "PyTorch cannot export this model to ONNX",
            why=first_line(error),
            fix="report it with the checkpoint's config.json",
        ) from error
    return model


def _optimise(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes of the source code, stack traces with paths, and
    operators that have nothing to do."""
    passes.ClearMetadataAndDocStringPass()(model)
    passes.InlinePass()(model)
    for _ in range(2):
        fold_constants(model)
        changed = RewritePass(_RULES)(model).modified
        passes.RemoveUnusedNodesPass()(model)
        if not changed:
            break
    passes.RemoveUnusedOpsetsPass()(model)
    last = (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    )
    PassManager(last)(model)


def write_checked(model: onnx_ir.Model, file: ScratchFile) -> int:
    """Check a graph with onnx's full checker and write it, its weights one by one.

    Args:
        model: What :func:`traced` made; it loses its large weights.
        file: Where to.

    Returns:
        Number of operators.

    Raises:
        BuildError: The checker refuses it, or it is too large for one file.
        OutputError: The disk is full.
    """
    weights = _taken_weights(model)
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]
    _check(proto, weights)
    pieces, size = _pieces(proto, weights)
    if size > MAX_GRAPH_BYTES:
        raise BuildError(f"the graph takes {size} bytes, more than one file can hold")
    file.write(pieces)
    return len(proto.graph.node)


def _taken_weights(model: onnx_ir.Model) -> list[onnx_ir.TensorProtocol]:
    """The large weights of a graph, taken out of it."""
    held = model.graph.initializers
    taken = []
    for name, value in list(held.items()):
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= _LARGE:
            tensor.name = name
            taken.append(tensor)
            del held[name]
    return taken


def _check(proto: Any, weights: list[onnx_ir.TensorProtocol]) -> None:
    """onnx's full checker, with the large weights as inputs of the same shapes."""
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    for tensor in weights:
        made = onnx.helper.make_tensor_value_info(
            str(tensor.name), int(tensor.dtype), list(tensor.shape.numpy())
        )
        whole.graph.input.append(made)
    try:
        onnx.checker.check_model(whole, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildError("the exported graph is not valid", why=str(error)) from error


def _pieces(
    proto: Any, weights: list[onnx_ir.TensorProtocol]
) -> tuple[Iterator[bytes], int]:
    """The bytes of a model with these weights in its graph, and how many.

    A message of protobuf is the fields in it, in any order, each behind its key and
    its length; fields of a message that comes twice are joined.
    """
    graph = proto.graph.SerializeToString()
    rest = onnx.ModelProto()
    rest.CopyFrom(proto)
    rest.ClearField("graph")
    heads = [_tensor_head(tensor) for tensor in weights]
    fields = [
        _start(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + tensor.nbytes)
        + head
        for head, tensor in zip(heads, weights, strict=True)
    ]
    inner = len(graph) + sum(map(len, fields)) + sum(t.nbytes for t in weights)
    start = rest.SerializeToString()
    start += _start(onnx.ModelProto.GRAPH_FIELD_NUMBER, inner)

    def pieces() -> Iterator[bytes]:
        yield start
        yield graph
        for field, tensor in zip(fields, weights, strict=True):
            yield field
            yield tensor.tobytes()

    return pieces(), len(start) + inner


def _tensor_head(tensor: onnx_ir.TensorProtocol) -> bytes:
    """A tensor's message up to its numbers."""
    head = onnx.TensorProto(
        name=str(tensor.name), data_type=int(tensor.dtype), dims=tensor.shape.numpy()
    )
    numbers = _start(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
    return bytes(head.SerializeToString()) + numbers


def _start(number: int, length: int) -> bytes:
    """The key of a field with bytes, and their number as a varint."""
    made = bytearray()
    for value in (number << 3 | 2, length):
        left = value
        while left > 127:
            made.append(left & 127 | 128)
            left >>= 7
        made.append(left)
    return bytes(made)
