"""What an ONNX file says of itself, read without the onnx package and its weights."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..backends.protobuf import fields, inner
from ..errors import BuildError

_DOMAINS = (b"", b"ai.onnx")


@dataclass(frozen=True)
class GraphFacts:
    """Facts of a graph.

    Attributes:
        opset: Of ONNX's own operators; 0 if it has none.
        operators: Their names.
        external: Where weights lie that are not in the file, as it names the files,
            sorted.
    """

    opset: int
    operators: frozenset[str]
    external: tuple[str, ...]


def graph_facts(graph: Path) -> GraphFacts:
    """Read the facts of an ONNX file.

    Raises:
        BuildError: It cannot be read, or is no ONNX file.
    """
    try:
        with open(graph, "rb") as handle:
            # It is unmapped when nothing looks at it any more.
            pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return _facts(memoryview(pages))
    except (OSError, ValueError, RecursionError) as error:
        raise BuildError(
            f"{graph} is not an ONNX graph", why=str(error), fix="export it again"
        ) from error


def _facts(model: memoryview) -> GraphFacts:
    opset, operators, external = 0, set[str](), set[str]()
    for number, kind, value, _ in fields(model):
        if number == 7:
            for node in _nodes(inner(kind, value), external):
                operators.add(node)
        elif number == 8:
            opset = _opset(inner(kind, value)) or opset
    return GraphFacts(opset, frozenset(operators), tuple(sorted(external)))


def _opset(entry: memoryview) -> int:
    """Version of ONNX's own operators; 0 for those of another domain."""
    domain, version = b"", 0
    for number, kind, value, item in fields(entry):
        if number == 1:
            domain = bytes(inner(kind, value))
        elif number == 2:
            version = item
    return version if domain in _DOMAINS else 0


def _nodes(graph: memoryview, external: set[str]) -> Iterator[str]:
    """Names of the operators, those of inner graphs included."""
    for number, kind, value, _ in fields(graph):
        if number == 1:
            yield from _node(inner(kind, value), external)
        elif number == 5:
            _locations(inner(kind, value), external)


def _node(node: memoryview, external: set[str]) -> Iterator[str]:
    name, domain = b"", b""
    for number, kind, value, _ in fields(node):
        if number == 4:
            name = bytes(inner(kind, value))
        elif number == 7:
            domain = bytes(inner(kind, value))
        elif number == 5:
            yield from _attribute(inner(kind, value), external)
    if domain in _DOMAINS:
        yield name.decode("utf-8", "replace")


def _attribute(attribute: memoryview, external: set[str]) -> Iterator[str]:
    for number, kind, value, _ in fields(attribute):
        if number in (5, 10):
            _locations(inner(kind, value), external)
        elif number in (6, 11):
            yield from _nodes(inner(kind, value), external)


def _locations(tensor: memoryview, external: set[str]) -> None:
    """Add the file that a tensor's data lies in, if it is another one."""
    for number, kind, value, _ in fields(tensor):
        if number == 13:
            entry = fields(inner(kind, value))
            pair = {key: bytes(inner(of, text)) for key, of, text, _ in entry}
            if pair.get(1) == b"location":
                external.add(pair.get(2, b"").decode("utf-8", "surrogateescape"))
