"""GroupNorm as it is exported."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..body_form import BodyForm


class Normalise(nn.Module):
    """GroupNorm (Wu & He 2018, eq. 1 to 7) over [R, C, H, W].

    Without ``native`` each group is an instance of one channel, whose normalisation is
    an operator that every opset has; sizes are written out, so that no graph has to
    compute them. What is multiplied and added afterwards can be detached, for who puts
    it into the layer that follows.
    """

    def __init__(self, norm: nn.GroupNorm, form: BodyForm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.native = form.normalisation == "native"
        self.weight: nn.Parameter | None = _fixed(norm.weight)
        self.bias: nn.Parameter | None = _fixed(norm.bias)

    def detach_affine(self) -> tuple[Tensor, Tensor]:
        """The factors and summands of the channels, [C] each; from now on the module
        leaves them to its caller."""
        assert self.weight is not None
        assert self.bias is not None
        affine = self.weight.data.flatten(), self.bias.data.flatten()
        self.weight = self.bias = None
        return affine

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, H, W] to the same."""
        channels, height, width = x.shape[1:]
        if self.native:
            own = self.weight is not None
            weight = cast(Tensor, self.weight).flatten() if own else None
            bias = cast(Tensor, self.bias).flatten() if own else None
            return functional.group_norm(x, self.groups, weight, bias, self.eps)
        each = channels // self.groups * height * width
        flat = x.reshape(-1, self.groups, each)
        normal = functional.instance_norm(flat, eps=self.eps)
        normal = normal.reshape(-1, channels, height, width)
        if self.weight is None or self.bias is None:
            return normal
        return normal * self.weight + self.bias


def _fixed(weight: Tensor) -> nn.Parameter:
    values = weight.detach()[:, None, None]
    assert values.dtype == torch.float32
    return nn.Parameter(values, requires_grad=False)
