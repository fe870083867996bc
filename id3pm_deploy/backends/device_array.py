"""An array in a device's memory that other libraries take over by DLPack.

The structures are those of DLPack's ``dlpack.h`` before its version 1.0, which every
consumer takes. Nothing is copied; what is shared must not be written meanwhile.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

HOST, CUDA = 1, 2
"""kDLCPU and kDLCUDA."""
_FLOAT = 2
_NAME = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Memory:
    """Memory that goes when nobody refers to it any more."""

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close

    def __del__(self) -> None:
        self._close()


class DeviceArray:
    """A float32 array at an address, contiguous, complete when it is handed out.

    Args:
        address: Where it begins.
        shape: Its shape.
        device: As DLPack counts: (CUDA, 0) is the first GPU.
        close: Releases the memory; called once, when neither this nor any array that
            was made of it is left, by whatever thread that is.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        device: tuple[int, int],
        close: Callable[[], None],
    ) -> None:
        self.address, self.shape = address, shape
        self._device, self._memory = device, _Memory(close)

    def __len__(self) -> int:
        return self.shape[0]

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where it lies."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule that shares the memory.

        Args:
            stream: Of the consumer; the array is complete, so none has to wait.
            max_version: What the consumer understands; all understand this form.
            dl_device: Where it is wanted, which has to be where it lies.
            copy: Whether it shall be copied, which is left to the consumer.

        Raises:
            BufferError: It is wanted elsewhere, or copied.
        """
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError("the array is handed on where it is, and not copied")
        return _capsule(self.address, self.shape, self._device, self._memory)


_shared: dict[int, tuple[Any, ...]] = {}
"""By the address of what was handed out: all that has to stay meanwhile."""

_python = ctypes.PyDLL(None)
_new = _python.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = _python.PyCapsule_IsValid
_is_valid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_pointer = _python.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


def _let_go(managed: int) -> None:
    """Called by the consumer when it is done."""
    _shared.pop(managed, None)


def _drop_capsule(capsule: int) -> None:
    """A capsule goes; one that a consumer took has another name by then."""
    if _is_valid(capsule, _NAME):
        _shared.pop(_pointer(capsule, _NAME), None)


_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_delete, _drop = _callback(_let_go), _callback(_drop_capsule)


def _capsule(
    address: int, shape: tuple[int, ...], device: tuple[int, int], memory: _Memory
) -> Any:
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    strides = (ctypes.c_int64 * len(shape))(*steps)
    pointer = ctypes.POINTER(ctypes.c_int64)
    tensor = _Tensor(
        address,
        _Device(*device),
        len(shape),
        _Type(_FLOAT, 32, 1),
        ctypes.cast(sizes, pointer),
        ctypes.cast(strides, pointer),
        0,
    )
    deleter = ctypes.cast(_delete, ctypes.c_void_p)
    managed = _Managed(tensor, None, deleter)
    place = ctypes.addressof(managed)
    _shared[place] = (managed, sizes, strides, memory)
    return _new(place, _NAME, ctypes.cast(_drop, ctypes.c_void_p))
