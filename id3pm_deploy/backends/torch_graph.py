"""Graphs of PyTorch's, captured on a rig's queue."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import EngineError, first_line
from .torch_body import out_of_memory, torch_errors


def on_stream(cuda: Any, stream: Any) -> contextlib.AbstractContextManager[Any]:
    """``stream`` is the current one in here; None where there are none."""
    return contextlib.nullcontext() if stream is None else cuda.stream(stream)


class TorchGraph:
    """A captured graph of PyTorch's.

    Args:
        cuda: ``torch.cuda``, or what stands in for it in tests.
        queue: The stream it is captured on, and replayed.
        device: The GPU.
    """

    def __init__(self, cuda: Any, queue: Any, device: torch.device) -> None:
        self._cuda, self._queue, self._device = cuda, queue, device
        self._graph: Any = None
        self.nodes = 0
        self.bytes = 0

    @property
    def closed(self) -> bool:
        """Whether it was released."""
        return self._graph is None

    def capture(self, queue: Callable[[], None], pool: Any) -> None:
        """Fill the graph with what ``queue`` queues."""
        graph = _new_graph(self._cuda)
        self._cuda.empty_cache()
        before = self._cuda.memory_reserved(self._device)
        try:
            # Thread-local: other threads may go on using CUDA meanwhile.
            with self._cuda.graph(
                graph, pool, self._queue, capture_error_mode="thread_local"
            ):
                queue()
            self.nodes = _nodes(graph)
        except torch.OutOfMemoryError as error:
            raise out_of_memory("a captured graph", error) from error
        except RuntimeError as error:
            raise EngineError(
                "PyTorch cannot capture these table rows", why=first_line(error)
            ) from error
        self._graph = graph
        self.bytes = max(self._cuda.memory_reserved(self._device) - before, 0)

    def launch(self) -> None:
        """Queue the whole graph."""
        if self._graph is None:
            raise EngineError("a graph was launched after its release")
        with torch_errors("a replayed table row"), on_stream(self._cuda, self._queue):
            self._graph.replay()

    def close(self) -> None:
        """Release it once the device is done with it."""
        if self._graph is not None:
            with contextlib.suppress(RuntimeError):  # of a device that has failed
                self._queue.synchronize()
                self._graph.reset()
            self._graph = None


def _new_graph(cuda: Any) -> Any:
    """A CUDAGraph that keeps what it was made from, where PyTorch can, so that its
    nodes can be counted."""
    kind = cuda.CUDAGraph
    if hasattr(kind, "raw_cuda_graph") and hasattr(kind, "instantiate"):
        return kind(keep_graph=True)
    return kind()


def _nodes(graph: Any) -> int:
    """Nodes of a captured graph that was not made executable yet, and makes it so; 0
    where nobody can count them."""
    if not (hasattr(graph, "raw_cuda_graph") and hasattr(graph, "instantiate")):
        return 0
    count = 0
    with contextlib.suppress(ImportError, ValueError, TypeError):
        from cuda.bindings import driver

        raw = driver.CUgraph(graph.raw_cuda_graph())
        status, _, found = driver.cuGraphGetNodes(raw, 0)
        count = int(found) if int(status) == 0 else 0
    graph.instantiate()
    return count


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected in here: what a finaliser does to the device may not be
    done while something is captured."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
