"""What the doctor tries in a child process: imports and calls that may crash or hang.

``probe.run_probe`` starts it. It prints one line of JSON on what was its standard
output; whatever a library prints goes nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from ..errors import MissingPackageError, first_line
from ..optional import require
from .cuda_driver import DriverError, cuda_facts, load_library, nvml_facts

_VARINT, _BYTES = 0, 2
_TASKS = "/proc/self/task"


def import_facts(*modules: str) -> dict[str, Any]:
    """Import modules; the version, if it is one module and has one."""
    version = None
    for name in modules:
        version = getattr(require(name, extra=""), "__version__", None)
    known = version is not None and len(modules) == 1
    return {"version": str(version) if known else None}


def onnxruntime_facts() -> dict[str, Any]:
    """Providers of ONNX Runtime, and the threads it takes when nobody says how many.

    A session is made as the product makes it and runs a graph of one node: threads are
    counted, not guessed.
    """
    runtime = require("onnxruntime", extra="cpu")
    numpy = require("numpy", extra="")
    before = _thread_count()
    options = runtime.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = runtime.InferenceSession(
        tiny_graph(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": numpy.array([-1.0], dtype="float32")})
    if found.tolist() != [0.0]:
        raise ArithmeticError(f"Relu(-1) came out as {found.tolist()}")
    after = _thread_count()
    return {
        "version": str(runtime.__version__),
        "providers": list(runtime.get_available_providers()),
        "threads": None if before is None or after is None else after - before + 1,
    }


def _thread_count() -> int | None:
    try:
        return len(os.listdir(_TASKS))
    except OSError:
        return None


def tiny_graph() -> bytes:
    """An ONNX model of one Relu over one float, x to y, as protocol buffer bytes."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3 | _VARINT, value])
        return bytes([number << 3 | _BYTES, len(value)]) + value

    one = field(1, field(1, 1))  # shape: one dimension of size 1
    tensor = field(1, field(1, 1) + field(2, one))  # float, and that shape
    node = field(1, b"x") + field(2, b"y") + field(4, b"Relu")
    values = [field(1, name) + field(2, tensor) for name in (b"x", b"y")]
    graph = field(1, node) + field(2, b"doctor")
    graph += field(11, values[0]) + field(12, values[1])
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "import": import_facts,
    "onnxruntime": onnxruntime_facts,
    "cuda": lambda: cuda_facts(load_library("cuda")),
    "nvml": lambda: nvml_facts(load_library("nvml")),
}


def answer(name: str, *arguments: str) -> dict[str, Any]:
    """Run a probe: ``facts``, or ``error`` and whether what it tries is ``absent``."""
    try:
        return {"facts": PROBES[name](*arguments)}
    except BaseException as raised:  # a module may raise SystemExit when it is imported
        error: BaseException = raised
        if isinstance(raised, MissingPackageError) and raised.__cause__ is not None:
            error = raised.__cause__
        absent = isinstance(error, FileNotFoundError) and name in ("cuda", "nvml")
        wanted = arguments or ("onnxruntime",)
        if isinstance(error, ModuleNotFoundError):
            absent = error.name in wanted
        said = first_line(error)
        kind = type(error).__name__
        plain = isinstance(error, DriverError) or said == kind
        return {"error": said if plain else f"{kind}: {said}", "absent": absent}


def main(name: str, *arguments: str) -> None:
    """Answer on standard output and end, before any native library tidies up."""
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with contextlib.suppress(ValueError, OSError):  # a crash leaves no core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    line = json.dumps(answer(name, *arguments)).encode() + b"\n"
    sys.stdout.flush()
    while line:
        line = line[os.write(out, line) :]
    os._exit(0)
