"""The columns: the product's engines and what they are compared with.

Each is a name, what it is, and how it is opened. One that cannot run here raises our
own error when it is opened, which becomes its reason in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EngineError, InputError, MissingPackageError
from ..models import open_engine, open_model
from ..optional import require
from .case import Case
from .column import EngineRunner, Runner

Opener = Callable[[Case], Runner]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: How it is chosen, and its key in a result.
        title: What it is, for people.
        open: Makes its runner.
        ours: One of the product's engines, no baseline.
        gpu: It cannot run without an NVIDIA GPU.
    """

    name: str
    title: str
    open: Opener
    ours: bool = True
    gpu: bool = False


def check_gpu() -> None:
    """Raise :class:`EngineError` where there is no driver to ask for a GPU."""
    from ..doctor.cuda_driver import DriverError, cuda_facts, load_library

    try:
        found = cuda_facts(load_library("cuda"))
    except OSError as error:
        raise EngineError("no NVIDIA driver") from error
    except DriverError as error:
        raise EngineError("no NVIDIA GPU", why=str(error)) from error
    if not found["devices"]:
        raise EngineError("no NVIDIA GPU")


def _need_provider(name: str) -> None:
    runtime = require("onnxruntime", extra="cuda")
    if name not in runtime.get_available_providers():
        raise MissingPackageError(
            "onnxruntime-gpu is not installed", why=f"ONNX Runtime has no {name}"
        )


def _engine(backend: str, **own: Any) -> Opener:
    """Opens an engine of the bundle."""

    def open_it(case: Case) -> Runner:
        settings = case.settings
        if backend == "onnxruntime-cuda":
            _need_provider("CUDAExecutionProvider")
        if backend == "onnxruntime-tensorrt":
            _need_provider("TensorrtExecutionProvider")
        engine = open_engine(
            case.model,
            backend,
            precision=settings.precision,
            threads=settings.threads,
            trust=settings.trust,
            **_replay(case, own),
        )
        return EngineRunner(case, engine)

    return open_it


def _replay(case: Case, own: dict[str, Any]) -> dict[str, Any]:
    """What an engine is told about replay; nothing where nothing is."""
    told = dict(own)
    if told.pop("replayed", False):
        told["replay_rows"] = case.settings.replay_rows
    return told


def torch_device(case: Case) -> str:
    """The device of what runs in PyTorch: a GPU where PyTorch sees one.

    Raises:
        MissingPackageError: There is no PyTorch.
        EngineError: There is no checkpoint to take weights from.
    """
    if case.checkpoint is None:
        raise EngineError("it needs PyTorch weights: give --checkpoint")
    torch = require("torch", extra="export")
    require("diffusers", extra="export")
    if case.settings.device != "auto":
        return case.settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_engine(replayed: bool = False, compiled: bool = False) -> Opener:
    """Opens the torch backend on the checkpoint."""

    def open_it(case: Case) -> Runner:
        device = torch_device(case)
        on_gpu = device.startswith("cuda")
        if replayed and not on_gpu:
            raise EngineError("nothing is replayed on a CPU")
        own: dict[str, Any] = {"replay_rows": -1} if on_gpu else {}
        if replayed:
            own["replay_rows"] = case.settings.replay_rows
        if compiled:
            own["compiled"] = True
        assert case.checkpoint is not None
        engine = open_engine(
            open_model(case.checkpoint),
            "torch",
            precision=case.graph.precision if on_gpu else "float32",
            threads=case.settings.threads,
            device=device,
            **own,
        )
        return EngineRunner(case, engine)

    return open_it


def _plain(case: Case) -> Runner:
    from .plain_runtime import PlainRuntimeRunner

    return PlainRuntimeRunner(case)


def _loop(mode: str, precision: str) -> Opener:
    def open_it(case: Case) -> Runner:
        device = torch_device(case)
        from .torch_loop import step_loop

        return step_loop(case, device, mode, precision)

    return open_it


def _diffusers(precision: str) -> Opener:
    def open_it(case: Case) -> Runner:
        device = torch_device(case)
        from .diffusers_loop import DiffusersRunner

        return DiffusersRunner(case, device, precision)

    return open_it


_ROWS, _REPLAYED = {"replay_rows": -1}, {"replayed": True}

COLUMNS: tuple[Column, ...] = (
    Column("onnxruntime", "engine, ONNX Runtime on the CPU", _engine("onnxruntime")),
    Column(
        "onnxruntime-cuda",
        "engine, ONNX Runtime on CUDA, row by row",
        _engine("onnxruntime-cuda", **_ROWS),
        gpu=True,
    ),
    Column(
        "onnxruntime-cuda-replayed",
        "engine, ONNX Runtime on CUDA, replayed",
        _engine("onnxruntime-cuda", **_REPLAYED),
        gpu=True,
    ),
    Column(
        "onnxruntime-tensorrt",
        "engine, ONNX Runtime on TensorRT, row by row",
        _engine("onnxruntime-tensorrt", **_ROWS),
        gpu=True,
    ),
    Column(
        "onnxruntime-tensorrt-replayed",
        "engine, ONNX Runtime on TensorRT, replayed",
        _engine("onnxruntime-tensorrt", **_REPLAYED),
        gpu=True,
    ),
    Column(
        "tensorrt",
        "engine, TensorRT, row by row",
        _engine("tensorrt", **_ROWS),
        gpu=True,
    ),
    Column(
        "tensorrt-replayed",
        "engine, TensorRT, replayed",
        _engine("tensorrt", **_REPLAYED),
        gpu=True,
    ),
    Column("torch", "engine, PyTorch, row by row", _torch_engine()),
    Column(
        "torch-replayed",
        "engine, PyTorch, replayed",
        _torch_engine(replayed=True),
        gpu=True,
    ),
    Column(
        "torch-compiled-replayed",
        "engine, PyTorch compiled, replayed",
        _torch_engine(replayed=True, compiled=True),
        gpu=True,
    ),
    Column("plain-onnxruntime", "plain ONNX Runtime on the CPU", _plain, ours=False),
    Column(
        "eager-float32",
        "PyTorch eager, float32, channels_last",
        _loop("eager", "float32"),
        ours=False,
    ),
    Column(
        "eager-float16",
        "PyTorch eager, float16, channels_last",
        _loop("eager", "float16"),
        ours=False,
        gpu=True,
    ),
    Column(
        "compiled",
        "torch.compile, max-autotune",
        _loop("max-autotune", ""),
        ours=False,
    ),
    Column(
        "compiled-graphs",
        "torch.compile with CUDA graphs (reduce-overhead)",
        _loop("reduce-overhead", ""),
        ours=False,
        gpu=True,
    ),
    Column(
        "diffusers-float32",
        "diffusers' own loop, float32",
        _diffusers("float32"),
        ours=False,
    ),
    Column(
        "diffusers-float16",
        "diffusers' own loop, float16",
        _diffusers("float16"),
        ours=False,
        gpu=True,
    ),
)

BY_NAME = {column.name: column for column in COLUMNS}


def chosen_columns(names: Sequence[str] | None) -> tuple[Column, ...]:
    """The columns of these names, in the table's order; None takes all.

    Raises:
        InputError: There is no such column.
    """
    if names is None:
        return COLUMNS
    unknown = [name for name in names if name not in BY_NAME]
    if unknown or not names:
        raise InputError(
            f"there is no column {', '.join(map(repr, unknown)) or 'to measure'}",
            fix=f"the columns are {', '.join(BY_NAME)}",
        )
    return tuple(column for column in COLUMNS if column.name in names)
