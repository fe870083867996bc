"""Staging slots of a TensorRT engine: table rows and noise go in, sentinels come out.

Rows are uploaded on a queue of their own, so that those of one slot arrive while the
GPU works on the other's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from .base import Float32
from .cuda import Cuda, Stream
from .device_memory_pool import HostPool, Pool, float32_bytes
from .rig import SLOTS


class _Slot:
    def __init__(self, cuda: Cuda) -> None:
        self.arrived, self.done = cuda.event(), cuda.event()
        self.in_use = self.finished = False


class Staging:
    """Two slots of table rows.

    Args:
        cuda: The device.
        stream: The queue that works.
        pool: Where the slots' buffers are kept.
    """

    def __init__(self, cuda: Cuda, stream: Stream, pool: Pool) -> None:
        self._stream, self._copies = stream, cuda.stream()
        self._pool, self._host = pool, HostPool(cuda)
        self._slots = [_Slot(cuda) for _ in range(SLOTS)]
        self._pending: deque[tuple[int, int, int]] = deque()
        self._read: list[Float32] = []

    def sizes(self, samples: int, rows: int, width: int, unet: int) -> dict[str, int]:
        """Bytes of the slots' buffers, but for noise, which not all tables use."""
        found = {}
        for slot in range(SLOTS):
            found[f"steps {slot}"] = float32_bytes(rows, samples, width)
            found[f"log {slot}"] = float32_bytes(rows, unet)
        return found

    def noise_sizes(self, rows: int, picture: tuple[int, ...]) -> dict[str, int]:
        """Bytes of the slots' noise."""
        size = float32_bytes(rows, *picture)
        return {f"noise {slot}": size for slot in range(SLOTS)}

    def stage(self, slot: int, steps: Float32, noise: Sequence[Float32] | None) -> None:
        """Upload rows to a slot; the host waits for the slot's last use."""
        one = self._slots[slot]
        self._wait_for(slot)
        one.in_use, one.finished = True, False
        self._upload(f"steps {slot}", [steps])
        if noise is not None:
            self._upload(f"noise {slot}", noise)
        self._copies.record(one.arrived)
        self._stream.wait(one.arrived)

    def _upload(self, name: str, parts: Sequence[Float32]) -> None:
        size = sum(part.nbytes for part in parts)
        host = self._host.room(name, size)
        whole = host.array((size // 4,), np.float32)
        at = 0
        for part in parts:
            whole[at : at + part.size] = part.ravel()
            at += part.size
        self._copies.upload(self._pool[name], host, size)

    def _wait_for(self, slot: int) -> None:
        one = self._slots[slot]
        if one.in_use and one.finished:
            one.done.synchronize()
            self._harvest(slot)
        elif one.in_use:  # an error came between
            self._copies.synchronize()
            self._stream.synchronize()
        one.in_use = False

    def finish(self, slot: int, n: int, unet: int) -> None:
        """Queue the download of n rows of R sentinels and mark the slot's end."""
        size = float32_bytes(n, unet)
        host = self._host.room(f"log {slot}", size)
        self._stream.download(host, self._pool[f"log {slot}"], size)
        self._stream.record(self._slots[slot].done)
        self._slots[slot].finished = True
        self._pending.append((slot, n, unet))

    def _harvest(self, until: int | None = None) -> None:
        """Read what has arrived: up to a slot's log, or all."""
        while self._pending:
            slot, n, unet = self._pending.popleft()
            host = self._host.room(f"log {slot}", float32_bytes(n, unet))
            self._read.append(host.array((n, unet), np.float32).copy())
            self._slots[slot].in_use = False
            if slot == until:
                return

    def settle(self) -> None:
        """Wait until nothing is under way."""
        self._copies.synchronize()
        self._stream.synchronize()
        self._harvest()
        for one in self._slots:
            one.in_use = False

    def logs(self) -> list[Float32]:
        """The sentinels read since the last call, [n, R] each; after ``settle``."""
        found, self._read = self._read, []
        return found
