"""What the machine can do at most: a large product and a large copy, timed.

On a CPU the product is ONNX Runtime's, on as many threads as the engine's: a matrix
product and a 3×3 convolution, of which the faster counts. On a GPU it is PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..optional import require
from .machine import usable_cores

SIDE = 1536
"""Of the matrices, on a CPU; the convolution takes about as many operations."""
CHANNELS, PICTURE = 256, 56
COPIED = 128 << 20
"""Bytes of the array that is copied on a CPU; a copy reads and writes them."""
GPU_SIDE, GPU_COPIED = 8192, 1 << 30
_RUNS = 5
_FLOAT, _INT64 = 1, 7


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second, and by what they were measured; None for what
    could not be.

    ``seconds`` holds the fastest run of everything that was timed.
    """

    device: str
    operations: float | None
    bytes: float | None
    method: str
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The fields, as they are."""
        return dict(vars(self))


def cpu_rates(threads: int) -> Rates:
    """Rates of ONNX Runtime and of copies in memory.

    Args:
        threads: 0 takes every usable core.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
    """
    threads = threads or usable_cores()
    rng = np.random.default_rng(0)
    square = rng.standard_normal((SIDE, SIDE), dtype=np.float32)
    picture = rng.standard_normal((1, CHANNELS, PICTURE, PICTURE), dtype=np.float32)
    kernel = rng.standard_normal((CHANNELS, CHANNELS, 3, 3), dtype=np.float32)
    seconds = {
        "matrix product": _node_seconds("MatMul", {"a": square, "b": square}, threads),
        "convolution": _node_seconds("Conv", {"a": picture, "b": kernel}, threads),
        "copy": _copy_seconds(threads),
    }
    operations = max(
        2 * SIDE**3 / seconds["matrix product"],
        2 * 9 * CHANNELS**2 * PICTURE**2 / seconds["convolution"],
    )
    method = (
        f"ONNX Runtime, float32, {threads} threads: the faster of a matrix product "
    )
    method += f"of side {SIDE} and a 3x3 convolution; copies of {COPIED >> 20} MiB"
    return Rates("CPU", operations, 2 * COPIED / seconds["copy"], method, seconds)


def gpu_rates(device: str, precision: str) -> Rates:
    """Rates of PyTorch on a GPU, in the precision of the body.

    Raises:
        MissingPackageError: There is no PyTorch.
    """
    torch = require("torch", extra="export")
    dtype = getattr(torch, precision)
    a = torch.randn((GPU_SIDE, GPU_SIDE), device=device, dtype=dtype)
    out = torch.empty_like(a)
    one = torch.empty(GPU_COPIED, device=device, dtype=torch.uint8)
    other = torch.empty_like(one)

    def timed(function: Callable[[], object]) -> float:
        def run() -> None:
            function()
            torch.cuda.synchronize(device)

        return _fastest(run)

    seconds = {
        "matrix product": timed(lambda: torch.matmul(a, a, out=out)),
        "copy": timed(lambda: other.copy_(one)),
    }
    method = f"PyTorch, {precision}: a matrix product of side {GPU_SIDE}; a copy of "
    method += f"{GPU_COPIED >> 20} MiB"
    operations = 2 * GPU_SIDE**3 / seconds["matrix product"]
    name = torch.cuda.get_device_name(device)
    return Rates(name, operations, 2 * GPU_COPIED / seconds["copy"], method, seconds)


def _fastest(run: Callable[[], object]) -> float:
    run()
    found = []
    for _ in range(_RUNS):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)


def _copy_seconds(threads: int) -> float:
    source = np.ones(COPIED // 8)
    target = np.zeros_like(source)
    sources, targets = (np.array_split(one, threads) for one in (source, target))
    with ThreadPoolExecutor(threads) as pool:
        return _fastest(lambda: list(pool.map(np.copyto, targets, sources)))


def _node_seconds(kind: str, inputs: dict[str, Any], threads: int) -> float:
    """Seconds of a graph of one node in a session of ONNX Runtime; the second input
    is a constant, as weights are."""
    runtime = require("onnxruntime", extra="cpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        one_node(kind, inputs), options, providers=["CPUExecutionProvider"]
    )
    return _fastest(lambda: session.run(None, {"a": inputs["a"]}))


def one_node(kind: str, inputs: dict[str, Any]) -> bytes:
    """A serialised ONNX model of one node with an input ``a`` and a constant ``b``,
    written by hand: a device has no onnx package. A convolution keeps the size.

    Args:
        kind: ``MatMul`` or ``Conv``.
        inputs: The float32 arrays ``a`` and ``b``.
    """
    node = _text(1, "a") + _text(1, "b") + _text(2, "c") + _text(4, kind)
    if kind == "Conv":
        pads = b"".join(_number(8, 1) for _ in range(4))
        node += _inner(5, _text(1, "pads") + pads + _number(20, _INT64))
    b = inputs["b"]
    dims = b"".join(_number(1, size) for size in b.shape)
    constant = dims + _number(2, _FLOAT) + _text(8, "b") + _inner(9, b.tobytes())
    graph = _inner(1, node) + _text(2, kind) + _inner(5, constant)
    shape = inputs["a"].shape
    made = (
        (shape[0], b.shape[0], *shape[2:]) if kind == "Conv" else (shape[0], b.shape[1])
    )
    graph += _inner(11, _value("a", shape)) + _inner(12, _value("c", made))
    return _number(1, 9) + _inner(7, graph) + _inner(8, _number(2, 17))


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    tensor = _number(1, _FLOAT)
    tensor += _inner(2, b"".join(_inner(1, _number(1, size)) for size in shape))
    return _text(1, name) + _inner(2, _inner(1, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _inner(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _inner(field, text.encode())
