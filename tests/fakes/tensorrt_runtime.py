"""A stand-in for what runs plans: TensorRT's runtime over the fake driver.

A "plan" is a step graph in ONNX with profiles before it; ONNX Runtime computes it on
the fake driver's memory when somebody waits, no earlier. It comes with the names of
10.3, of 11.4 or of TensorRT-RTX. As in the library, a refusal is None or False and a
message in the log; what would be undefined on a GPU is refused too: an address that is
not set or not aligned, sizes outside the profile, a capture of a context that never
ran, two queues over one scratch memory, a context that a graph holds and somebody
else uses.
"""

from __future__ import annotations

import enum
import json
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from fakes.cuda_driver import FakeDriver

MAGIC = b"fake plan\n"
SCRATCH = 4096
"""Bytes that a context needs for each UNet row of its profile."""

DataType = enum.Enum("DataType", "FLOAT HALF INT32 INT64")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
Strategy = enum.Enum("Strategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
_KINDS = {"tensor(float)": DataType.FLOAT, "tensor(int32)": DataType.INT32}
_KINDS |= {"tensor(float16)": DataType.HALF, "tensor(int64)": DataType.INT64}


def fake_plan(graph: bytes, *profiles: tuple[Any, Any], streamable: int = 0) -> bytes:
    """A plan of a graph.

    Args:
        graph: ONNX, its free sizes called B and R.
        profiles: [min, opt, max] of B and of R for each.
        streamable: Bytes of weights that may stay with the host.
    """
    head = json.dumps({"profiles": profiles, "streamable": streamable}).encode()
    return MAGIC + head + b"\n" + graph


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Made:
    """Objects that are alive, to see that all go."""

    def __init__(self) -> None:
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.engines: weakref.WeakSet[Any] = weakref.WeakSet()
        self.count = 0


def make_enum(name: str, members: list[str]) -> Any:
    """An enum as a binding has it; mypy follows none that is made from variables."""
    make: Any = enum.Enum
    return make(name, members)


def make_library(driver: FakeDriver, variant: str) -> Any:
    """The module ``tensorrt`` (``10.3``, ``11.4``) or ``tensorrt_rtx`` (``rtx``)."""
    library = SimpleNamespace(
        __name__="tensorrt_rtx" if variant == "rtx" else "tensorrt",
        __version__="1.7" if variant == "rtx" else f"{variant}.0",
        ILogger=ILogger,
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        made=Made(),
        variant=variant,
        driver=driver,
        capturable=True,
        free=1 << 20,
        caches=[],
        fail_at="",
    )
    library.Runtime = lambda logger: Runtime(library, logger)
    if variant == "rtx":
        name = "DynamicShapesKernelSpecializationStrategy"
        setattr(library, name, make_enum(name, ["NONE", "LAZY", "EAGER"]))
        graphs = make_enum("Graphs", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
        library.CudaGraphStrategy = graphs
    return library


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, library: Any, logger: Any) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        assert self._library.driver.current, "no context is current"
        assert not self.engine_host_code_allowed
        if not data.startswith(MAGIC):
            text = "Serialization assertion header.magicTag failed"
            self._logger.log(Severity.ERROR, text)
            return None
        head, _, graph = data[len(MAGIC) :].partition(b"\n")
        kind = RtxEngine if self._library.variant == "rtx" else ICudaEngine
        if self._library.variant == "11.4":
            kind = LateEngine
        return kind(self._library, self._logger, json.loads(head), graph)


class ICudaEngine:
    def __init__(self, library: Any, logger: Any, told: Any, graph: bytes) -> None:
        self._library, self._logger, self._profiles = library, logger, told["profiles"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._inputs = [item.name for item in inputs]
        self._items = {item.name: item for item in (*inputs, *outputs)}
        self.num_io_tensors = len(self._items)
        self.num_optimization_profiles = len(self._profiles)
        self.streamable_weights_size = told["streamable"]
        self._budget = self.streamable_weights_size
        library.made.engines.add(self)

    def _refuse(self, text: str, severity: Severity = Severity.ERROR) -> bool:
        self._logger.log(severity, text)
        return False

    def get_weight_streaming_automatic_budget(self) -> int:
        return min(int(self._library.free), int(self.streamable_weights_size))

    @property
    def weight_streaming_budget_v2(self) -> int:
        return int(self._budget)

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        assert not self._library.made.contexts, "a context was made before"
        self._budget = value

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._items)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _KINDS[self._items[name].type]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._named(name)]

    def _named(self, name: str) -> list[Any]:
        return list(self._items[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        found = []
        for b, r in zip(*self._profiles[index], strict=True):
            sizes = {"B": b, "R": r}
            found.append([sizes.get(size, size) for size in self._named(name)])
        return found

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return int(SCRATCH * self._profiles[index][1][2])

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> Any:
        assert not self._library.driver._forbidden(), "a context made in a capture"
        assert strategy is Strategy.USER_MANAGED
        return IExecutionContext(self)


class LateEngine(ICudaEngine):
    def create_runtime_config(self) -> Any:
        raise AssertionError("of no use in plain TensorRT")


class RuntimeConfig:
    def __init__(self, library: Any) -> None:
        self._library = library
        self.strategy = Strategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cuda_graph_strategy: Any = None
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        self._library.caches.append(cache)
        return True


class RuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.loaded = False

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob.startswith(b"kernels ")
        if self.loaded:
            self.kernels = set(json.loads(blob[8:]))
        return self.loaded

    def serialize(self) -> bytes:
        return b"kernels " + json.dumps(sorted(self.kernels)).encode()


class RtxEngine(ICudaEngine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self._library)

    def create_execution_context(self, strategy: Any = None) -> Any:
        kernels = self._library.DynamicShapesKernelSpecializationStrategy
        assert strategy.dynamic_shapes_kernel_specialization_strategy is kernels.EAGER
        assert strategy.cuda_graph_strategy is self._library.CudaGraphStrategy.DISABLED
        context = super().create_execution_context(strategy.strategy)
        return RtxContext(self, strategy.cache) if context else None


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._driver: FakeDriver = engine._library.driver
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._ran: Any = None
        self._captured = False
        engine._library.made.contexts.add(self)
        engine._library.made.count += 1

    def set_optimization_profile_async(self, profile_index: int, stream: int) -> bool:
        if stream not in self._driver.streams:
            return self._engine._refuse("no such stream")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if self._profile is None or name not in self._engine._inputs:
            return self._engine._refuse(f"{name}: no profile is set, or no input")
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if any(not a <= x <= b for a, x, b in zip(low, shape, high, strict=True)):
            return self._engine._refuse(f"{name}: {shape} is not in the profile")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._items or memory % 256:
            return self._engine._refuse(f"{name}: not aligned, or no tensor")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        needed = self._engine.get_device_memory_size_for_profile_v2(self._profile or 0)
        if memory % 256 or size < needed:
            self._engine._refuse(f"{size} bytes of memory, {needed} are needed")
        self._scratch = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        problem = self._problem(stream_handle)
        if problem:
            self._driver._forbidden()  # a capture of it is lost
            return self._engine._refuse(problem)
        capturing = self._driver._capture is not None
        self._captured = self._captured or capturing
        self._ran = self._shapes
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        queued = self._driver._queue(
            stream_handle, lambda: self._compute(addresses, shapes)
        )
        if not capturing:
            held = self._driver.streams[stream_handle]
            users = self._driver.__dict__.setdefault("scratch_users", {})
            users[self._scratch[0]] = stream_handle, len(held.work)
        return int(queued[0]) == 0

    def _problem(self, stream: int) -> str:
        engine, driver = self._engine, self._driver
        if engine._library.fail_at == "execute":
            return "Error Code 1: Cuda Runtime (an illegal memory access)"
        if set(self._shapes) != set(engine._inputs):
            return "input shapes are not all set"
        if set(self._addresses) != set(engine._items):
            return "tensor addresses are not all set"
        if not self._scratch[0]:
            return "no device memory was given"
        if stream not in driver.streams:
            return "this is the default stream, or none"
        capturing = driver._capture is not None
        if capturing and self._ran != self._shapes:
            return "captured before it ran with these shapes"
        if not capturing and self._captured:
            return "a graph holds this context"
        if engine._budget < engine.streamable_weights_size and capturing:
            return "weights are streamed: no capture"
        other = driver.__dict__.get("scratch_users", {}).get(self._scratch[0])
        if other and other[0] != stream and driver.streams[other[0]].done < other[1]:
            return "another queue works in this memory"
        return ""

    def _compute(
        self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        if self._engine._library.fail_at == "compute":
            self._engine._refuse("Error Code 1: Myelin (kernel failed)")
            return
        feeds = {}
        for name, shape in shapes.items():
            kind = np.int32 if name == "row" else np.float32
            raw = self._driver.read(addresses[name], 4 * int(np.prod(shape)))
            feeds[name] = np.frombuffer(raw, kind).reshape(shape)
        names = [name for name in addresses if name not in shapes]
        found = self._engine._session.run(names, feeds)
        for name, value in zip(names, found, strict=True):
            self._driver._write(addresses[name], np.ascontiguousarray(value).tobytes())


class RtxContext(IExecutionContext):
    def __init__(self, engine: ICudaEngine, cache: RuntimeCache) -> None:
        super().__init__(engine)
        self._cache = cache

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self._engine._library.capturable)

    def execute_async_v3(self, stream_handle: int) -> bool:
        self._cache.kernels.add(str(sorted(self._shapes.items())))
        return super().execute_async_v3(stream_handle)
