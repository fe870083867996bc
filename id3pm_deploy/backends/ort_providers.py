"""ONNX Runtime's providers for GPUs: their options, and whether they are really used.

ONNX Runtime runs on the CPU what a provider could not take, and says so in its log at
most. Here that is an error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineError, InputError
from ..user_folders import cache_folder, make_private
from .onnxruntime import CPU_PROVIDER, Provider

_LOG = logging.getLogger("id3pm_deploy")

CUDA, TENSORRT, CPU = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "CPUExecutionProvider",
)
BACKENDS = {"onnxruntime-cuda": CUDA, "onnxruntime-tensorrt": TENSORRT}

_CACHE = "onnxruntime-tensorrt"


@dataclass(frozen=True)
class Target:
    """Where a session runs.

    Attributes:
        provider: The one that must take the graph.
        kind: Where its arrays lie, as ONNX Runtime calls it: ``cuda``, or ``cpu``.
        device: Number of the GPU.
    """

    provider: str
    kind: str = "cuda"
    device: int = 0


def target_of(backend: str, device: str) -> Target:
    """The target of a backend.

    Args:
        backend: One of BACKENDS.
        device: ``cuda``, ``cuda:1``, or ``cpu``, which is nobody's choice here and
            stands for the first GPU.

    Raises:
        InputError: Another device.
    """
    kind, _, number = device.partition(":")
    known = device == "cpu" or (kind == "cuda" and (number or "0").isdecimal())
    if not known or device.endswith(":"):
        raise InputError(
            f"the backend {backend} has no device {device!r}", fix="use cuda or cuda:1"
        )
    return Target(BACKENDS[backend], "cuda", int(number or 0))


def providers(target: Target, precision: str, graphs: bool) -> list[Provider]:
    """What is asked of ONNX Runtime, the first choice first.

    Args:
        target: Where to run.
        precision: Of the graph. Graphs are strongly typed as they were exported, so no
            provider may choose a lower one: not FP16, nor TF32.
        graphs: Let the provider capture its work and replay it.

    Raises:
        EngineError: The provider's cache of engines could be written to by others.
    """
    if target.provider == CPU:
        return [CPU_PROVIDER]
    cuda = {
        "device_id": str(target.device),
        "use_tf32": "0",
        # Not by timing, which would pick other algorithms in other runs.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    if target.provider == CUDA:
        return [(CUDA, {**cuda, "enable_cuda_graph": str(int(graphs))}), CPU_PROVIDER]
    if precision == "float32":
        # The provider has no option for it. NVIDIA's libraries read this when they are
        # loaded; cuBLAS and cuDNN do without TF32 then, as they have to here anyway.
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    tensorrt = {
        "device_id": str(target.device),
        "trt_fp16_enable": "0",
        "trt_int8_enable": "0",
        "trt_cuda_graph_enable": str(int(graphs)),
        **_cache_options(precision),
    }
    # What TensorRT cannot take runs on the GPU all the same.
    return [(TENSORRT, tensorrt), (CUDA, cuda), CPU_PROVIDER]


def _cache_options(precision: str) -> dict[str, str]:
    """Engines are native code: they are kept where nobody else can put one."""
    home = cache_folder()
    if home is None:
        _LOG.warning("engines are built anew each time: there is no home folder")
        return {"trt_engine_cache_enable": "0"}
    # Apart by precision: an engine's name there says nothing of TF32.
    folder = home / _CACHE / precision
    _make_private(folder)
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _make_private(folder: Path) -> None:
    try:
        make_private(folder)
        folder.chmod(0o700)
    except OSError as error:
        raise EngineError(
            f"engines cannot be kept in {folder}",
            why=error.strerror or str(error),
            fix=f"have it belong to you alone: chmod 700 {folder}",
        ) from error


def check_available(runtime: Any, target: Target) -> None:
    """Whether this ONNX Runtime was built with the provider.

    Raises:
        EngineError: It was not; most likely it is the package for CPUs.
    """
    there = runtime.get_available_providers()
    if target.provider not in there:
        raise EngineError(
            f"this onnxruntime, {runtime.__version__}, has no {target.provider}",
            why=f"it has {', '.join(there)}; the packages onnxruntime and "
            "onnxruntime-gpu replace each other",
            fix="pip uninstall onnxruntime; pip install 'id3pm-deploy[cuda]'",
        )


def check_in_use(session: Any, target: Target) -> None:
    """Whether the provider took the session.

    Raises:
        EngineError: ONNX Runtime fell back to another one, silently.
    """
    used: Sequence[str] = session.get_providers()
    if not used or used[0] != target.provider:
        raise EngineError(
            f"ONNX Runtime could not start {target.provider} and would run on "
            f"{', '.join(used)}",
            why="a library that it needs is missing or of another version, or there "
            "is no such GPU",
            fix="id3pm-deploy doctor; the provider's own page lists the CUDA, cuDNN "
            "and TensorRT versions that it needs",
        )
