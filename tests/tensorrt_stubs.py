"""Types of what the code calls of TensorRT, for mypy.

Run as ``python tests/tensorrt_stubs.py`` after a change to what the code calls. Takes
the classes that annotations in the package name, with the members that the code uses,
from the wheel of ``tensorrt-stubs`` (MIT licence, Copyright (c) sync.dev), and writes
them to ``stubs/tensorrt``, where mypy looks. So a call that is misspelt, or that the
code did not make before, fails in ``make types``.

The package itself is of no use to mypy: it asks for ``tensorrt`` 10.13, which only its
vendor's index has, and five of its lines are no Python. It also puts a folder
``tensorrt`` without code into site-packages, which could then be imported.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tensorrt_names import ROOT, fetch, names_used, sources

WHEEL = "tensorrt-stubs==10.13.0.35.1"
RESULT = ROOT / "tests" / "stubs" / "tensorrt" / "__init__.pyi"
HEADER = f'''"""What the code uses of TensorRT, written by tensorrt_stubs.py.

Taken from {WHEEL},
MIT licence, Copyright (c) sync.dev. Changed: what is not used is left out, and what the
documentation says and the bindings' signatures do not: where None comes back, and that
sequences of integers are taken for Dims and bytes for host memory.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence

from typing_extensions import Buffer

'''

_SIZES = "Dims | Sequence[int]"
_SPECIAL = {
    "Dims": (
        "def __iter__(self) -> Iterator[int]: ...",
        "def __len__(self) -> int: ...",
        "def __getitem__(self, index: int) -> int: ...",
    ),
    "IHostMemory": ("def __buffer__(self, flags: int, /) -> memoryview: ...",),
    "ILayer": ("name: str",),
    "ICudaEngine": (
        "def create_execution_context(\n"
        "    self, strategy: ExecutionContextAllocationStrategy = ...\n"
        ") -> IExecutionContext | None: ...",
    ),
    "IExecutionContext": (
        f"def set_input_shape(self, name: str, shape: {_SIZES}) -> bool: ...",
    ),
    "Runtime": (
        "def deserialize_cuda_engine(self, serialized_engine: Buffer)"
        " -> ICudaEngine | None: ...",
    ),
    "OnnxParser": ("def get_error(self, index: int) -> ParserError: ...",),
}
"""Members that stand in for, or beside, those of the wheel."""

_OPTIONAL = {
    "build_serialized_network",
    "create_engine_inspector",
    "create_execution_context",
    "create_timing_cache",
    "deserialize_cuda_engine",
    "get_timing_cache",
}
"""What returns None when it fails."""


def _class_bodies(text: str) -> dict[str, ast.ClassDef]:
    """The classes of a stub file; a line that is no Python loses its arguments."""
    lines = text.splitlines()
    while True:
        try:
            tree = ast.parse("\n".join(lines))
        except SyntaxError as error:
            index = (error.lineno or 0) - 1
            mended = re.sub(r"\(.*\).*", "(self):", lines[index])
            if mended == lines[index]:
                raise
            lines[index] = mended
        else:
            return {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}


def _annotated() -> set[str]:
    """Classes that the package's annotations name."""
    text = "\n".join(path.read_text() for path in sources())
    return set(re.findall(r"\btensorrt\.([A-Z]\w*)", text))


def _member_name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return node.name if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else ""


def _members(node: ast.ClassDef, used: set[str]) -> list[str]:
    """Source of the members of a class that the code uses."""
    special = _SPECIAL.get(node.name, ())
    found = list(special)
    for each in node.body:
        name = _member_name(each)
        if isinstance(each, ast.ClassDef):
            found.append(_class(each, used))
        elif name in used and not any(
            re.match(rf"(def )?{name}\b", s) for s in special
        ):
            found.append(_member(each))
    return [re.sub(r"(->|:) \.\.\.(?=[,):])", r"\1 typing.Any", text) for text in found]


def _member(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef):
        node.body = [ast.Expr(ast.Constant(...))]
        for argument in node.args.args:
            if argument.annotation is not None:
                text = ast.unparse(argument.annotation)
                if text in ("Dims", "list[int]"):
                    argument.annotation = ast.Name(_SIZES)
                if text == "typing_extensions.Buffer":
                    argument.annotation = ast.Name("Buffer")
        if node.name in _OPTIONAL and node.returns is not None:
            node.returns = ast.Name(f"{ast.unparse(node.returns)} | None")
        return ast.unparse(node)
    text = ast.unparse(node)
    name, _, kind = text.partition(": ")
    if kind == "Dims":
        return (
            f"@property\ndef {name}(self) -> Dims: ...\n"
            f"@{name}.setter\ndef {name}(self, value: {_SIZES}) -> None: ..."
        )
    return re.sub(r" = .*", "", text)


def _class(node: ast.ClassDef, used: set[str]) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {node.name}" + (f"({bases})" if bases else "") + ":"
    body = _members(node, used) or ["..."]
    lines = "\n".join(body).splitlines()
    return "\n".join([head, *(f"    {line}" for line in lines)])


def extract(text: str) -> str:
    """The part of a stub file that the code needs."""
    classes = _class_bodies(text)
    used, _ = names_used()
    done: dict[str, str] = {}
    waiting = sorted(_annotated())
    while waiting:
        name = waiting.pop()
        if name in done or name not in classes:
            continue
        done[name] = _class(classes[name], used)
        waiting += re.findall(r"\b[A-Z]\w+", done[name])
    order = [name for name in classes if name in done]
    return HEADER + "\n\n".join(done[name] for name in order) + "\n"


def main() -> None:
    """Rewrite the result."""
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(fetch(WHEEL, Path(folder))) as wheel,
    ):
        text = wheel.read("tensorrt_bindings/tensorrt.pyi").decode()
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(extract(text))
    subprocess.run([sys.executable, "-m", "ruff", "format", RESULT], check=True)


if __name__ == "__main__":
    main()
