"""A stand-in for plain TensorRT, after its documented Python interface.

``fakes.put_tensorrt`` copies this folder to where it is imported as ``tensorrt``. It
parses an ONNX file as far as names, types and sizes go, takes profiles and settings as
the library does, calls a progress monitor, and builds a "plan": what it was told, as
JSON. It stands for 10.3 (weak typing as an option, ``BuilderFlag.FP16``, a parser
without GroupNormalization) or for 11.x (strong typing only).

As in the library, an attribute that a class does not have cannot be set, errors come as
None or False and a message in the log, and enumerations are not plain numbers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from .names import (
    EARLY,
    VERSION,
    BuilderFlag,
    DataType,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    LayerInformationFormat,
    LayerType,
    MatrixOperation,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    ProfilingVerbosity,
)
from .network import (
    IConvolutionLayer,
    ILayer,
    ILogger,
    IMatrixMultiplyLayer,
    INetworkDefinition,
    ITensor,
    OnnxParser,
    ParserError,
)

__all__ = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IConvolutionLayer",
    "ILayer",
    "ILogger",
    "IMatrixMultiplyLayer",
    "INetworkDefinition",
    "IProgressMonitor",
    "ITensor",
    "LayerInformationFormat",
    "LayerType",
    "MatrixOperation",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
]

__version__ = VERSION
MAGIC = b"ftrt"


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class IOptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        if not len(min) == len(opt) == len(max):
            raise ValueError(f"{input}: dimensions differ in number")
        self._shapes[input] = [list(min), list(opt), list(max)]

    def get_shape(self, input: str) -> list[list[int]]:
        return self._shapes.get(input, [])


class ITimingCache:
    def __init__(self, seen: set[str]) -> None:
        self._seen = seen

    def serialize(self) -> IHostMemory:
        return IHostMemory(json.dumps([VERSION, sorted(self._seen)]).encode())

    def combine(self, input_cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._seen |= input_cache._seen
        return True


class IBuilderConfig:
    __slots__ = (
        "_cache",
        "_flags",
        "_pools",
        "_profiles",
        "builder_optimization_level",
        "hardware_compatibility_level",
        "max_aux_streams",
        "profiling_verbosity",
        "progress_monitor",
    )

    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._pools: dict[Any, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None
        self.builder_optimization_level = 3
        self.max_aux_streams = -1
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self.progress_monitor: Any = None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(BuilderFlag(flag))

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[MemoryPoolType(pool)] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, 1 << 33)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for low, usual, high in profile._shapes.values():
            for sizes in zip(low, usual, high, strict=True):
                if list(sizes) != sorted(sizes):
                    return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def create_timing_cache(
        self, serialized_timing_cache: bytes
    ) -> ITimingCache | None:
        if not serialized_timing_cache:
            return ITimingCache(set())
        try:
            version, seen = json.loads(bytes(serialized_timing_cache))
        except ValueError:
            return None
        return ITimingCache(set(seen)) if version == VERSION else None

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache

    def _told(self) -> dict[str, Any]:
        return {
            "flags": sorted(flag.name for flag in self._flags),
            "pools": {pool.name: size for pool, size in self._pools.items()},
            "optimization_level": self.builder_optimization_level,
            "auxiliary_streams": self.max_aux_streams,
            "hardware_compatibility": self.hardware_compatibility_level.name,
            "verbosity": self.profiling_verbosity.name,
            "profiles": [profile._shapes for profile in self._profiles],
        }


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags, self._logger)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> IHostMemory | None:
        problem = self._problem(network, config)
        if problem:
            self._logger.log(ILogger.Severity.ERROR, problem)
            return None
        monitor = config.progress_monitor
        if monitor is not None and not self._report(monitor, config):
            self._logger.log(ILogger.Severity.ERROR, "the build was cancelled")
            return None
        if config._cache is not None:
            config._cache._seen |= {layer.name for layer in network._layers}
        layers = [
            {"name": x.name, "type": x.type.name, "dtype": x.get_input(0).dtype.name}
            for x in network._layers
            if x.num_inputs
        ]
        told = {
            "version": VERSION,
            "network_flags": network.flags,
            "inputs": {t.name: [t.dtype.name, *t.shape] for t in network._inputs},
            "layers": layers,
            "modules": sorted({name.partition(".")[0] for name in sys.modules}),
            **config._told(),
        }
        return IHostMemory(MAGIC + json.dumps(told).encode())

    def _problem(self, network: INetworkDefinition, config: IBuilderConfig) -> str:
        if EARLY and network.flags & 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED:
            for name in ("FP16", "BF16", "INT8"):
                if config.get_flag(BuilderFlag[name]):
                    return (
                        f"BuilderFlag.{name} is set, but the network is strongly typed"
                    )
        if config.get_memory_pool_limit(MemoryPoolType.WORKSPACE) < 1 << 20:
            return "Could not find any implementation for node: out of workspace"
        if not config._profiles:
            return "Network has dynamic inputs, but no optimization profile is defined"
        return ""

    def _report(self, monitor: Any, config: IBuilderConfig) -> bool:
        profiles = len(config._profiles)
        monitor.phase_start("Building Engine", None, 2)
        monitor.phase_start("Computing profile costs", "Building Engine", profiles)
        going = all(
            monitor.step_complete("Computing profile costs", index)
            for index in range(profiles)
        )
        monitor.phase_finish("Computing profile costs")
        going = going and monitor.step_complete("Building Engine", 0)
        monitor.phase_finish("Building Engine")
        return bool(going)


class EngineInspector:
    execution_context: Any = None

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told

    def get_engine_information(self, format: Any) -> str:
        if self._told["verbosity"] != "DETAILED":
            return json.dumps({"Layers": [one["name"] for one in self._told["layers"]]})
        names = {"HALF": "FP16", "FLOAT": "FP32"}
        layers = []
        for number in range(len(self._told["profiles"])):
            mark = f" [profile {number}]" if number else ""
            for one in self._told["layers"]:
                kind = names.get(one["dtype"], one["dtype"])
                tensor = {"Format/Datatype": f"Row major linear {kind} format"}
                if not EARLY:
                    tensor = {"Format": "kLINEAR", "Datatype": one["dtype"]}
                layers.append(
                    {
                        "Name": one["name"] + mark,
                        "LayerType": "CaskConvolution",
                        "Inputs": [{"Name": "x", **tensor}],
                        "Outputs": [{"Name": "y", **tensor}],
                        "Metadata": f"[ONNX Layer: {one['name']}]",
                    }
                )
        return json.dumps({"Layers": layers})


class IExecutionContext:
    def set_optimization_profile_async(self, profile_index: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        return True


class ICudaEngine:
    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self._told)

    def create_execution_context(self, strategy: Any = None) -> IExecutionContext:
        return IExecutionContext()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        data = bytes(serialized_engine)
        told = json.loads(data[len(MAGIC) :]) if data.startswith(MAGIC) else {}
        if told.get("version") != VERSION:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion failed")
            return None
        return ICudaEngine(told)
