"""The UNet in the precision it is exported and run in."""

from __future__ import annotations

import copy
from typing import cast

from torch import Tensor, nn

from ..body_form import BodyForm
from .unet import IdentityUNet


class _Float32GroupNorm(nn.Module):
    """GroupNorm with float32 statistics inside a half-precision body, as
    guided-diffusion's GroupNorm32."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm.float()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x.float())).to(x.dtype)


def _with_float32_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, _Float32GroupNorm(child))
        else:
            _with_float32_norms(child)


def body_in(network: IdentityUNet, form: BodyForm) -> IdentityUNet:
    """``network`` itself where it runs in float32, or a copy in the form asked for."""
    if form.precision == "float32":
        return network
    half = copy.deepcopy(network)
    unet = half.unet
    for part in (unet.conv_in, unet.down_blocks, unet.mid_block, unet.up_blocks):
        assert part is not None, "UNet2DModel was built without a middle block"
        part.half()
        _with_float32_norms(part)
    return half
