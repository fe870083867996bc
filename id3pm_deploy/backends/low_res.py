"""The CUDA kernel that makes a super-resolution model's input of a base's pictures.

``low_res.cu`` is its source, ``low_res.ptx`` what was made of it; the driver compiles
that for its GPU. It has been compiled, and not been run on a GPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from .cuda import Cuda, Stream

_PTX = Path(__file__).with_name("low_res.ptx")
_NAME = "low_res_from_pictures"


class LowResKernel:
    """Quantises pictures to 8-bit levels and scales those, bit for bit as the host.

    Args:
        cuda: The device, entered.

    Raises:
        EngineError: The driver does not take the PTX.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._kernel = cuda.kernel(_PTX.read_text(encoding="ascii"), _NAME)

    def queue(self, stream: Stream, source: int, target: int, count: int) -> None:
        """Queue it over ``count`` float32 numbers at two addresses."""
        pointers = ctypes.c_void_p(source), ctypes.c_void_p(target)
        stream.run(self._kernel, count, *pointers, ctypes.c_size_t(count))
