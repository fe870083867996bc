"""Products in half precision on a CPU, as fast as those in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN: Any = torch.ops.aten
_PRODUCTS = (
    _ATEN.conv2d.default,
    _ATEN.convolution.default,
    _ATEN.linear.default,
    _ATEN.addmm.default,
    _ATEN.mm.default,
    _ATEN.bmm.default,
    _ATEN.matmul.default,
)
_TRANSPOSED = 6
"""Place of that argument of a convolution."""
_HALF = (torch.float16, torch.bfloat16)


class ProductsInFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, a convolution or matrix product of half-precision tensors on a CPU is
    summed in float32 and its result rounded.

    That is what PyTorch's own kernels for half precision do there, as the tests show,
    and what the tensor cores of GPUs do; but those kernels are dozens of times slower.
    Every result still goes through half precision, so what overflows, overflows.
    Transposed convolutions are left alone: PyTorch's own add up in half precision.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator."""
        given = kwargs or {}
        first = next((one for one in args if isinstance(one, Tensor)), None)
        transposed = func is _ATEN.convolution.default and args[_TRANSPOSED]
        if func not in _PRODUCTS or transposed or first is None or not _slow(first):
            return func(*args, **given)
        wide = tuple(_widened(one) for one in args)
        return func(*wide, **given).to(first.dtype)


def _slow(tensor: Tensor) -> bool:
    return tensor.dtype in _HALF and tensor.device.type == "cpu"


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
