"""Which names of TensorRT the code uses, and which releases have them.

Run as ``python tests/tensorrt_names.py`` after a change to what the code calls. It
fetches three wheels of bindings with pip, about 1 MB each, reads the names out of their
shared objects and rewrites ``tensorrt-names.json`` beside it. Those wheels hold no
library and cannot be imported; TensorRT-RTX can, and is.

A shared object holds many strings that are no names of its API. Counted is a string
whose address the code loads (``lea``, x86-64), as it must to bind a name with it. Of
the 1,027 names that importing TensorRT-RTX 1.7.1 shows, this finds all but two: an
alias made by a template and a property added in Python.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tests" / "tensorrt-names.json"
WHEELS = (
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu13-bindings==10.16.1.11",
    "tensorrt-cu13-bindings==11.4.0.106",
)
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux_2_28_x86_64")

_NAME = re.compile(rb"[A-Za-z_]\w*")
_MEMBER = re.compile(r"[A-Z][A-Z0-9_]{2,}")
_ATTRIBUTE = re.compile(r"[a-z]+(_[a-z]+)+")
_IN_HAND = re.compile(r"\btrt\b|: tensorrt\.[A-Z]")
_LONGEST = 100
_LOADED, _EXECUTABLE = 1, 1
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_PLAIN = {
    "bool",
    "dict",
    "float",
    "hasattr",
    "int",
    "len",
    "open",
    "repr",
    "set",
    "str",
}
_PYTHON = {name for kind in (str, list, dict, set) for name in dir(kind)} - {"format"}
"""Functions that make a plain value, and what such values have."""


def sources() -> list[Path]:
    """Files of the package that have the library, always called `trt`, or its objects.

    Those are annotated with the library's own classes.
    """
    package = (ROOT / "id3pm_deploy").rglob("*.py")
    return sorted(path for path in package if _IN_HAND.search(path.read_text()))


def names_used() -> tuple[set[str], set[str]]:
    """Names the code takes from TensorRT, and those among them that it asks for first.

    Taken are attributes of everything that is not known to be something else, strings
    in ``getattr`` and ``hasattr``, and methods that override the library's.
    """
    used: set[str] = set()
    probed: set[str] = set()
    for path in sources():
        found = _Names(ast.parse(path.read_text()))
        used |= found.used
        probed |= found.probed
    return used | composed_names(), probed | composed_names()


def composed_names() -> set[str]:
    """Names that are put together from what recipes say, and then asked for."""
    kinds = get_type_hints(EngineRecipe)["hardware_compatibility"]
    found = {str(kind).upper() for kind in get_args(kinds) if kind != "none"}
    for path in sorted((ROOT / "engines").glob("*.toml")):
        recipe = load_recipe("engines", path.stem, EngineRecipe)
        if recipe.flavour == "tensorrt_rtx":
            numbers = (each.replace(".", "") for each in recipe.compute_capabilities)
            found |= {f"SM{number}" for number in numbers}
    return found


class _Names(ast.NodeVisitor):
    """The names that one file takes.

    ``_others`` are variables that are known to hold nothing of TensorRT's.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.used: set[str] = set()
        self.probed: set[str] = set()
        self._others: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = (alias.asname or alias.name for alias in node.names)
                self._others.update(name.partition(".")[0] for name in names)
        self._others.discard("tensorrt")
        self.visit(tree)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = set(self._others)
        arguments = node.args
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self._others.discard(each.arg)
            self._annotated(ast.Name(each.arg), each.annotation)
        self.generic_visit(node)
        self._others = before

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._annotated(node.target, node.annotation)
        self._looked_up(node.value)
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assigned(target, node.value)
        self._looked_up(node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._assigned(node.target, node.iter)
        self.generic_visit(node)

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> None:
        for each in node.generators:
            self._assigned(each.target, each.iter)
        self.generic_visit(node)

    visit_ListComp = _comprehension
    visit_SetComp = _comprehension
    visit_GeneratorExp = _comprehension
    visit_DictComp = _comprehension

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self._assigned(item.optional_vars, item.context_expr)
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self._others.add(node.name or "")
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(isinstance(b, ast.Attribute) and self._theirs(b) for b in node.bases):
            names = (each.name for each in node.body if isinstance(each, _FUNCTION))
            self._take(*names)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._theirs(node.value) and not _is_own(node.value):
            self._take(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _named(node)
        if name is not None and self._theirs(node.args[0]):
            self._take(name)
            if ast.unparse(node.func) != "setattr":
                self.probed.add(name)
        self.generic_visit(node)

    def _annotated(self, target: ast.expr, annotation: ast.expr | None) -> None:
        text = ast.unparse(annotation) if annotation is not None else "Any"
        if isinstance(target, ast.Name) and not re.search(r"\b(Any|tensorrt)\b", text):
            self._others.add(target.id)

    def _assigned(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Attribute, ast.Subscript)):
            return
        names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
        if self._theirs(value):
            self._others -= names
        else:
            self._others |= names

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and _MEMBER.fullmatch(node.value):
            self._take(node.value)
            self.probed.add(node.value)

    def _looked_up(self, value: ast.expr | None) -> None:
        """Strings that are kept to be looked up with ``getattr``."""
        values = value.values if isinstance(value, ast.Dict) else [value]
        for each in values:
            name = str(each.value) if isinstance(each, ast.Constant) else ""
            if _ATTRIBUTE.fullmatch(name):
                self._take(name)
                self.probed.add(name)

    def _take(self, *names: str) -> None:
        self.used.update(n for n in names if n[0] != "_" and n not in _PYTHON)

    def _theirs(self, node: ast.expr) -> bool:
        """Whether the value may come from TensorRT: nothing says that it does not."""
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._theirs(node.value)
        if isinstance(node, ast.Call):
            if _named(node) is not None:
                return self._theirs(node.args[0])
            if not isinstance(node.func, ast.Name):
                return self._theirs(node.func)
            makes_ours = node.func.id[0].isupper() and node.func.id in self._others
            return not makes_ours and node.func.id not in _PLAIN
        return isinstance(node, ast.Name) and node.id not in self._others


def _is_own(node: ast.expr) -> bool:
    """Whether it is ``self`` or reached through it."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def _named(node: ast.Call) -> str | None:
    """``x`` of ``hasattr(something, "x")``, of ``getattr`` and of ``setattr``."""
    if not isinstance(node.func, ast.Name) or len(node.args) < 2:
        return None
    name = node.args[1]
    if node.func.id in ("getattr", "hasattr", "setattr"):
        return str(name.value) if isinstance(name, ast.Constant) else None
    return None


def bound_names(data: bytes) -> set[str]:
    """Names in a shared object of bindings for x86-64 whose address its code loads."""
    segments = list(_segments(data))
    found = set()
    for address in _loaded_addresses(data, segments):
        for _, offset, start, size in segments:
            if start <= address < start + size:
                begin = offset + address - start
                end = data.find(b"\0", begin, begin + _LONGEST)
                if end > begin and _NAME.fullmatch(data, begin, end):
                    found.add(data[begin:end].decode())
    return found


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Flags, offset in the file, address and size of what an ELF file has loaded."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, flags, offset, address, _, in_file = struct.unpack_from(
            "<IIQQQQ", data, table + index * size
        )
        if kind == _LOADED:
            yield flags, offset, address, in_file


def _loaded_addresses(
    data: bytes, segments: list[tuple[int, int, int, int]]
) -> list[int]:
    """Targets of ``lea register, [rip + distance]``: REX.W, 8D, mod 00 and r/m 101."""
    found = []
    for flags, offset, start, size in segments:
        if not flags & _EXECUTABLE:
            continue
        code = np.frombuffer(data, np.uint8, size, offset)
        rex, operation, form = code[:-6], code[1:-5], code[2:-4]
        at = np.flatnonzero(
            ((rex & 0xFB) == 0x48) & (operation == 0x8D) & ((form & 0xC7) == 5)
        )
        digits = code[at[:, None] + np.arange(3, 7)]
        distance = np.ascontiguousarray(digits).view("<i4").ravel().astype(np.int64)
        found.append(start + at + 7 + distance)
    return [int(address) for address in np.unique(np.concatenate(found))]


def names_of_module(module: Any) -> set[str]:
    """What importing a library shows: its classes and what they have."""
    found = set()
    for name, value in vars(module).items():
        if isinstance(value, type):
            found |= {name, *dir(value)}
    return {name for name in found | set(dir(module)) if not name.startswith("_")}


def fetch(requirement: str, folder: Path, *options: str) -> Path:
    """A wheel from the package index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), *options, requirement]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _names_in_wheel(requirement: str) -> set[str]:
    platforms = (f"--platform={name}" for name in PLATFORMS)
    with tempfile.TemporaryDirectory() as folder:
        options = ("--python-version=3.11", "--abi=none", *platforms)
        with zipfile.ZipFile(fetch(requirement, Path(folder), *options)) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith("/tensorrt.so"))
            return bound_names(wheel.read(name))


def main() -> None:
    """Rewrite the result."""
    import tensorrt_rtx

    used, _ = names_used()
    libraries = {wheel.rpartition("==")[2]: _names_in_wheel(wheel) for wheel in WHEELS}
    version = f"tensorrt_rtx {tensorrt_rtx.__version__}"
    libraries[version] = names_of_module(tensorrt_rtx)
    lines = []
    for name in sorted(used):
        found = [version for version, names in libraries.items() if name in names]
        lines.append(f"  {json.dumps(name)}: {json.dumps(found)}")
    head = {"wheels": list(WHEELS), "libraries": list(libraries)}
    texts = [f' "{key}": {json.dumps(value)}' for key, value in head.items()]
    texts.append(' "names": {\n' + ",\n".join(lines) + "\n }")
    RESULT.write_text("{\n" + ",\n".join(texts) + "\n}\n")


if __name__ == "__main__":
    main()
