"""Noise is drawn while the engine works on the rows before it.

An engine on a device, and ONNX Runtime and PyTorch on a CPU, leave Python free while
they run; the draws are NumPy's, which does, too. What is drawn does not depend on when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class NoiseAhead:
    """The noise of chunks of table rows, drawn one chunk ahead by a thread.

    Use it as a context manager. At most two chunks are alive, the one that was taken
    last and the next, if the caller lets go of one before it takes the next. Without
    chunks there is no thread.

    Args:
        draw: Makes the noise of table row j, [B, C, H, W]; called by the thread, in
            order.
        chunks: The table rows of each chunk that needs noise.
    """

    def __init__(self, draw: Callable[[int], Float32], chunks: Sequence[range]) -> None:
        self._draw = draw
        self._chunks = iter(chunks)
        self._worker: ThreadPoolExecutor | None = None
        self._next: Future[list[Float32]] | None = None

    def __enter__(self) -> NoiseAhead:
        self._begin_next()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the thread; a chunk that is being drawn is waited for."""
        self._next = None
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _begin_next(self) -> None:
        rows = next(self._chunks, None)
        if rows is None:
            self._next = None
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="id3pm-noise")
        self._next = self._worker.submit(self._drawn, rows)

    def _drawn(self, rows: range) -> list[Float32]:
        return [self._draw(j) for j in rows]

    def take(self) -> list[Float32]:
        """The next chunk's noise, one array a table row; the one after it is begun.

        Raises:
            Exception: What the draw raised.
        """
        assert self._next is not None, "there is no further chunk"
        taken = self._next.result()
        self._begin_next()
        return taken
