"""Version and enumerations of the fake TensorRT."""

from __future__ import annotations

import enum
from typing import Any

VERSION = "10.3.0"
EARLY = VERSION.startswith("10.")


def enumeration(name: str, *members: str) -> Any:
    return enum.IntEnum(name, {member: i for i, member in enumerate(members)})


DataType = enumeration(
    "DataType",
    "FLOAT",
    "HALF",
    "INT8",
    "INT32",
    "BOOL",
    "UINT8",
    "FP8",
    "BF16",
    "INT64",
)
LayerType = enumeration(
    "LayerType", "CONVOLUTION", "CAST", "ELEMENTWISE", "MATRIX_MULTIPLY", "GATHER"
)
BuilderFlag = enumeration(
    "BuilderFlag",
    *(("FP16", "BF16", "INT8") if EARLY else ()),
    "DEBUG",
    "REFIT",
    "DISABLE_TIMING_CACHE",
    "TF32",
    "SPARSE_WEIGHTS",
    "VERSION_COMPATIBLE",
    "EXCLUDE_LEAN_RUNTIME",
    "STRIP_PLAN",
    "WEIGHT_STREAMING",
)
NetworkDefinitionCreationFlag = enumeration(
    "NetworkDefinitionCreationFlag",
    *(
        ("EXPLICIT_BATCH", "STRONGLY_TYPED")
        if EARLY
        else ("PREFER_JIT_PYTHON_PLUGINS",)
    ),
)
MemoryPoolType = enumeration(
    "MemoryPoolType", "WORKSPACE", "DLA_MANAGED_SRAM", "TACTIC_DRAM"
)
HardwareCompatibilityLevel = enumeration(
    "HardwareCompatibilityLevel",
    "NONE",
    "AMPERE_PLUS",
    *(() if EARLY else ("SAME_COMPUTE_CAPABILITY",)),
)
ProfilingVerbosity = enumeration(
    "ProfilingVerbosity", "LAYER_NAMES_ONLY", "NONE", "DETAILED"
)
MatrixOperation = enumeration("MatrixOperation", "NONE", "TRANSPOSE", "VECTOR")
ExecutionContextAllocationStrategy = enumeration(
    "ExecutionContextAllocationStrategy", "STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"
)
LayerInformationFormat = enumeration("LayerInformationFormat", "ONELINE", "JSON")
