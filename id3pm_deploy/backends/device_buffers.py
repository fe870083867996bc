"""Memory that engines on a GPU work with, as addresses; nothing here calls CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 256
"""Of every buffer's address on the device, as TensorRT wants it."""

Release = Callable[[], None]
"""Releases something; does nothing if that was done before."""


def _nothing() -> None:
    """Releases nothing."""


class Buffer:
    """Memory on the device at a constant address.

    Attributes:
        address: Where it begins, a multiple of ALIGNMENT.
        size: Its length.
        close: Releases it before the end.
    """

    def __init__(self, address: int, size: int, close: Release = _nothing) -> None:
        self.address, self.size, self.close = address, size, close

    def at(self, offset: int, size: int) -> int:
        """The address of ``size`` bytes from ``offset`` on, which lie inside."""
        if min(offset, size) < 0 or offset + size > self.size:
            raise ValueError(f"{size} bytes from {offset} are not in {self.size}")
        return self.address + offset


class HostBuffer(Buffer):
    """Page-locked memory of the host, which the device copies to and from by itself."""

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The beginning of the buffer as an array; good as long as the buffer is.

        Args:
            shape: Its shape.
            dtype: Its type.
        """
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        self.at(0, size)
        raw = (ctypes.c_ubyte * self.size).from_address(self.address)
        return np.frombuffer(memoryview(raw), np.uint8, size).view(kind).reshape(shape)
