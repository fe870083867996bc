"""What an ONNX graph may hold before a runtime is given it; needs no onnx package.

Whoever wrote a bundle's manifest wrote the graph's hash as well, so a right hash says
nothing about the graph. The file is walked as protocol buffers, without decoding its
tensors, and refused if it

- takes weights from other files: a runtime would read them from the working folder;
- has loops, branches or functions of its own, which take unlimited time or unfold to
  unlimited size; our exporter writes none;
- uses operators of another domain than ONNX's own, where those are not wanted;
- has tensors that are larger than the data they come with, or very many nodes.

How much memory the rest may take is not for this module; see ``memory_limit``.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

from ..errors import EngineError
from .protobuf import BYTES, VARINT, fields, inner, varint

MAX_NODES = 20_000
"""A UNet of 300 M parameters has some 3,000."""

_MAX_DIMS = 16
_STRING = 8
_STANDARD = ("", "ai.onnx")


def check_graph(data: bytes | memoryview, *, standard_only: bool = True) -> None:
    """Refuse a serialised ONNX model that holds what the module names.

    Args:
        data: The file.
        standard_only: Refuse operators of other domains than ONNX's.

    Raises:
        EngineError: It does, or it is no ONNX file.
    """
    try:
        _check_model(memoryview(data), standard_only)
    except ValueError as error:
        raise EngineError(
            "the ONNX graph is not one that this tool runs",
            why=str(error),
            fix="do not use this file, or export it again",
        ) from error


def check_graph_file(path: Path, *, standard_only: bool = True) -> None:
    """:func:`check_graph` of a file; of its weights nothing is read.

    Raises:
        EngineError: As there, or it cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            # It is unmapped when nothing looks at it any more.
            pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise EngineError(f"cannot read {path}", why=str(error)) from error
    check_graph(memoryview(pages), standard_only=standard_only)


def _check_model(model: memoryview, standard_only: bool) -> None:
    graphs = 0
    for number, kind, value, _ in fields(model):
        if number == 7:
            graphs += 1
            _check_graph(inner(kind, value), standard_only)
        elif number == 20:
            raise ValueError("it holds instructions for training")
        elif number == 25:
            raise ValueError("it holds functions of its own")
    if graphs != 1:
        raise ValueError("it holds no graph" if not graphs else "it holds two graphs")


def _check_graph(graph: memoryview, standard_only: bool) -> None:
    nodes = 0
    for number, kind, value, _ in fields(graph):
        if number == 1:
            nodes += 1
            if nodes > MAX_NODES:
                raise ValueError(f"it has more than {MAX_NODES} nodes")
            _check_node(inner(kind, value), standard_only)
        elif number == 5:
            _check_tensor(inner(kind, value))
        elif number == 15:
            raise ValueError("it holds sparse weights")


def _check_node(node: memoryview, standard_only: bool) -> None:
    for number, kind, value, _ in fields(node):
        if number == 5:
            _check_attribute(inner(kind, value))
        elif number == 7 and standard_only:
            domain = bytes(inner(kind, value))
            if domain.decode("utf-8", "replace") not in _STANDARD:
                raise ValueError(f"it uses operators of the domain {domain!r:.60}")


def _check_attribute(attribute: memoryview) -> None:
    for number, kind, value, _ in fields(attribute):
        if number in (5, 10):
            _check_tensor(inner(kind, value))
        elif number in (6, 11):
            raise ValueError("it has loops or branches")
        elif number in (22, 23):
            raise ValueError("it holds sparse weights")


def _check_tensor(tensor: memoryview) -> None:
    """Refuse external data, text, and more elements than there can be data for.

    An element takes half a byte at least: 4-bit numbers are the smallest there are.
    """
    dims: list[int] = []
    held = 0
    for number, kind, value, item in fields(tensor):
        if number == 1:
            dims += _numbers(kind, value, item)
            if len(dims) > _MAX_DIMS:
                raise ValueError(f"it holds a tensor of over {_MAX_DIMS} dimensions")
        elif number == 6 or (number == 2 and item == _STRING):
            raise ValueError("it holds text")
        elif number == 13 or (number == 14 and item):
            raise ValueError("it takes weights from another file")
        elif number in (4, 5, 7, 9, 10, 11):
            held += len(value) if kind == BYTES else 8
    if any(size >= 1 << 63 for size in dims):
        raise ValueError("it holds a tensor of negative size")
    if math.prod(dims) > 2 * held:
        raise ValueError(f"it holds a tensor of shape {dims} in {held} bytes")


def _numbers(kind: int, value: memoryview, item: int) -> list[int]:
    """The numbers of a repeated field, packed or not."""
    if kind == VARINT:
        return [item]
    found: list[int] = []
    at, packed = 0, inner(kind, value)
    while at < len(packed) and len(found) <= _MAX_DIMS:
        number, at = varint(packed, at)
        found.append(number)
    return found
