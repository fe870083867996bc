"""Execution contexts of a plan: made for fixed sizes over fixed addresses.

Contexts need scratch memory on the GPU. All of an engine share one piece, since they
run on one queue and so never two at a time. ``trt`` is the module. What only
TensorRT-RTX has is used where the module has its
``DynamicShapesKernelSpecializationStrategy``.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError
from ..files import open_plain, write_bytes
from ..user_folders import make_private, why_not_ours
from .device_buffers import Buffer
from .tensorrt_plan import Heard, Plan, PlanProfile, Shapes

if TYPE_CHECKING:
    import tensorrt

_MOST_CACHE = 1 << 30
"""Bytes of a runtime cache that are read."""


class RuntimeCache:
    """Kernels that TensorRT-RTX compiled for this GPU, kept from run to run.

    Args:
        path: Where; None keeps nothing. A file that is not this user's alone is not
            read: it holds code.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._before = b""
        self._cache: Any = None

    def put_in(self, config: Any) -> None:
        """Have contexts of ``config`` use it. A cache is never worth an error."""
        self._cache = config.create_runtime_cache()
        if self._cache is None:
            return
        self._before = _private_bytes(self._path)
        if self._before and not self._cache.deserialize(self._before):
            self._before = b""  # of another release or driver: made anew
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled since it was read."""
        cache, self._cache = self._cache, None
        if cache is None or self._path is None:
            return
        made = cache.serialize()
        data = bytes(memoryview(made)) if made is not None else b""
        if data and data != self._before:
            with contextlib.suppress(OSError, OutputError):
                make_private(self._path.parent)
                write_bytes(self._path, data, 0o600)


def _private_bytes(path: Path | None) -> bytes:
    """What a file of this user's alone holds; empty for any other."""
    if path is None:
        return b""
    try:
        if why_not_ours(path.parent) or why_not_ours(path):
            return b""
        with open_plain(path) as handle:
            return handle.read(_MOST_CACHE)
    except OSError:
        return b""


class ReadyContext:
    """An execution context whose sizes, addresses and memory are set."""

    def __init__(self, context: Any, heard: Heard) -> None:
        self._context, self._heard = context, heard

    def enqueue(self, stream: int) -> None:
        """Queue the step on a stream.

        Raises:
            EngineError: TensorRT refuses.
        """
        context: tensorrt.IExecutionContext = self._context
        with self._heard.told("TensorRT failed to queue a table row"):
            queued = context.execute_async_v3(stream)
        if not queued:
            raise self._heard.error("TensorRT failed to queue a table row")

    def check_capturable(self, stream: int) -> None:
        """Raise :class:`EngineError` where TensorRT says that it cannot be captured."""
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(stream):
            raise self._heard.error(
                "TensorRT-RTX cannot capture this plan",
                why="is_stream_capturable says so; a plan has to be built with "
                "user_allocation",
                fix="build it again with `--set user_allocation=true`",
            )


class ContextMaker:
    """Makes the contexts of a plan.

    Args:
        trt: The TensorRT module.
        plan: What they run.
        heard: Its messages.
        cache: Compiled kernels, for a library that compiles when it runs.
    """

    def __init__(self, trt: Any, plan: Plan, heard: Heard, cache: RuntimeCache) -> None:
        self._plan, self._heard = plan, heard
        self._how = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            self._how = self._runtime_config(trt, cache)

    def _runtime_config(self, trt: Any, cache: RuntimeCache) -> Any:
        """TensorRT-RTX: all kernels compiled before they run, graphs are ours alone."""
        engine: Any = self._plan.engine
        config: Any = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._how)
        kernels = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = kernels.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        cache.put_in(config)
        return config

    def scratch_size(self, profile: PlanProfile) -> int:
        """Bytes of scratch memory that a context of a profile needs."""
        engine: tensorrt.ICudaEngine = self._plan.engine
        return int(engine.get_device_memory_size_for_profile_v2(profile.index))

    def make(
        self,
        profile: PlanProfile,
        shapes: Shapes,
        addresses: dict[str, int],
        scratch: Buffer,
        stream: int,
    ) -> ReadyContext:
        """A context for fixed sizes, at addresses that stay.

        Args:
            profile: Holds the sizes.
            shapes: Of the inputs.
            addresses: Of all tensors, multiples of 256.
            scratch: Shared by contexts that never run at once.
            stream: Where the profile's change is queued.

        Raises:
            EngineError, DeviceMemoryError: TensorRT refuses.
        """
        what = "TensorRT cannot prepare the plan for these sizes"
        engine: tensorrt.ICudaEngine = self._plan.engine
        with self._heard.told(what):
            context = engine.create_execution_context(self._how)
            if context is None:
                raise self._heard.error("TensorRT makes no execution context")
            if not context.set_optimization_profile_async(profile.index, stream):
                raise self._heard.error(what, why=f"profile {profile.index}")
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self._heard.error(what, why=f"{name} of {list(shape)}")
            for name, address in addresses.items():
                if not context.set_tensor_address(name, address):
                    raise self._heard.error(what, why=f"the address of {name}")
            if scratch.size:
                context.set_device_memory(scratch.address, scratch.size)
            self._heard.check(what)
        return ReadyContext(context, self._heard)
