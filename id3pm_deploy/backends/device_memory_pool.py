"""Named buffers of an engine on a GPU, and how arrays get into and out of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .cuda import Cuda, Event, Stream
from .device_buffers import Buffer, HostBuffer

_RING = 8
"""Host copies of a small array, so that it can be replaced without a wait."""
_SMALL = 1 << 20


class Pool:
    """Buffers on the device, by name. One that is large enough stays where it is."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._buffers: dict[str, Buffer] = {}

    def __getitem__(self, name: str) -> Buffer:
        return self._buffers[name]

    def address(self, name: str) -> int:
        """Of a buffer's beginning."""
        return self._buffers[name].address

    def room(self, sizes: dict[str, int]) -> bool:
        """Make the buffers at least so large; new ones are zeroed.

        All work on the old ones has to be done. Returns whether one was replaced.

        Raises:
            DeviceMemoryError: The memory is not enough; some are gone then.
        """
        moved = False
        for name, size in sizes.items():
            held = self._buffers.get(name)
            if held is not None and held.size >= size:
                continue
            if held is not None:
                moved = True
                del self._buffers[name]
                held.close()
            self._buffers[name] = self._cuda.buffer(size)
        return moved


class HostPool:
    """The same in page-locked memory of the host, for copies that do not wait."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._buffers: dict[str, HostBuffer] = {}

    def room(self, name: str, size: int) -> HostBuffer:
        """A buffer of at least this size; no copy from or to it may be under way."""
        held = self._buffers.pop(name, None)
        if held is not None and held.size < size:
            held.close()
            held = None
        if held is None:
            held = self._cuda.host_buffer(size)
        self._buffers[name] = held
        return held


class Uploads:
    """Arrays on their way to the device; each may change once ``put`` has returned.

    Small ones take turns in a few host buffers, so that the host waits for an earlier
    upload only if many are under way.
    """

    def __init__(self, cuda: Cuda, stream: Stream) -> None:
        self._cuda, self._stream = cuda, stream
        self._host = HostPool(cuda)
        self._marks: dict[str, Event] = {}
        self._turns: dict[str, int] = {}

    def put(self, name: str, target: Buffer, array: npt.NDArray[Any]) -> None:
        """Queue the upload of an array to the beginning of ``target``."""
        turn = self._turns.get(name, -1) + 1
        self._turns[name] = turn
        place = f"{name} {turn % (_RING if array.nbytes <= _SMALL else 1)}"
        mark = self._marks.get(place)
        if mark is None:
            mark = self._marks[place] = self._cuda.event()
        else:
            mark.synchronize()
        host = self._host.room(place, array.nbytes)
        host.array(array.shape, array.dtype)[...] = array
        self._stream.upload(target, host, array.nbytes)
        self._stream.record(mark)


def float32_bytes(*sizes: int) -> int:
    """Bytes of a float32 (or int32) array of that shape."""
    return 4 * int(np.prod(sizes, dtype=np.int64))
