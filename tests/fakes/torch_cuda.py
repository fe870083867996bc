"""Stands for ``torch.cuda`` on tensors of the CPU: streams, events, and graphs that
really are captured and replayed.

A capture records every operation with the tensors it was given and undoes what it wrote
outside; a replay runs the operations again on those very tensors. So a buffer that was
replaced instead of written to, or a number that was read on the host, gives a wrong
picture here as on a GPU. Work is done at once: nothing is said about its order on two
streams. What may not happen inside a capture raises what CUDA would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps operations, and what tensors from outside held before they wrote there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.inside: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            target = args[0]
            place = target.untyped_storage().data_ptr()
            if place not in self.inside:
                self.before.setdefault(target.data_ptr(), (target, target.clone()))
        made = func(*args, **kwargs)
        given = {_storage(one) for one in _tensors((args, kwargs))}
        fresh = {_storage(one) for one in _tensors(made)} - given
        self.inside |= fresh
        self.calls.append((func, args, kwargs, made if fresh else None))
        return made

    def undo(self) -> None:
        for target, held in self.before.values():
            target.copy_(held)

    def again(self) -> None:
        for func, args, kwargs, made in self.calls:
            result = func(*args, **kwargs)
            for old, new in zip(_tensors(made), _tensors(result), strict=False):
                old.copy_(new)


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    if not isinstance(nested, (list, tuple)):
        return []
    return [one for part in nested for one in _tensors(part)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class FakeCuda:
    """Put in place of ``torch_rig._CUDA``.

    Attributes:
        events: What happened, in order: waits, captures, replays.
        refuse: Why the next captures fail; empty lets them succeed.
        gpus: How many there are.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.refuse = ""
        self.gpus = 1
        self.capturing = False
        self.graphs = 0

        fake = self

        class Event:
            def synchronize(self) -> None:
                fake.wait("event")

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = device

            def synchronize(self) -> None:
                fake.wait("stream")

            def wait_event(self, event: Event) -> None:
                fake.forbid("a wait for another stream")

            def wait_stream(self, stream: Any) -> None:
                fake.forbid("a wait for another stream")

            def record_event(self) -> Event:
                fake.forbid("an event")
                return Event()

        class CUDAGraph:
            def __init__(self) -> None:
                self.recorder = _Recorder()
                self.alive = False

            def replay(self) -> None:
                assert self.alive
                fake.forbid("a launch")
                fake.events.append("replay")
                with torch.inference_mode():
                    self.recorder.again()

            def reset(self) -> None:
                if self.alive:
                    fake.graphs -= 1
                self.alive = False

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph

    def wait(self, what: str) -> None:
        self.forbid(f"a wait for a {what}")
        self.events.append(f"wait {what}")

    def forbid(self, what: str) -> None:
        if self.capturing:
            raise RuntimeError(f"operation not permitted when capturing: {what}")

    @contextlib.contextmanager
    def graph(
        self, graph: Any, pool: Any, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        if self.refuse:
            raise RuntimeError(self.refuse)
        self.events.append("capture")
        self.capturing = True
        try:
            with graph.recorder:
                yield
            graph.alive = True
            self.graphs += 1
        finally:
            self.capturing = False
            with torch.inference_mode():
                graph.recorder.undo()

    @staticmethod
    def stream(stream: Any) -> Any:
        return contextlib.nullcontext()

    def synchronize(self, device: Any = None) -> None:
        self.wait("device")

    def device_count(self) -> int:
        return self.gpus

    def is_available(self) -> bool:
        return self.gpus > 0

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_device_name(index: int) -> str:
        return f"a GPU, number {index}"

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def graph_pool_handle() -> object:
        return object()

    @staticmethod
    def empty_cache() -> None:
        pass

    def memory_reserved(self, device: Any) -> int:
        return 1000 * self.graphs
