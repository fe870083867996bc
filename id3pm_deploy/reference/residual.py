"""Residual blocks as they are exported."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from ..body_form import BodyForm
from .normalisation import Normalise


class ResidualBlock(nn.Module):
    """guided-diffusion's ``ResBlock`` on diffusers' weights, [R, C, H, W] to
    [R, C', H', W'].

    The factors and summands of the second norm are in the weights that project the
    embedding: γ·n·(1+s) + β·(1+s) + t is one product and one sum for each number n.
    """

    def __init__(
        self, source: ResnetBlock2D, form: BodyForm, norms: tuple[Normalise, Normalise]
    ) -> None:
        super().__init__()
        block: Any = source
        assert block.output_scale_factor == 1.0
        self.norm1, self.norm2 = norms
        self.nonlinearity = block.nonlinearity
        self.conv1, self.conv2 = block.conv1, block.conv2
        self.conv_shortcut = block.conv_shortcut
        self.upsample, self.downsample = block.upsample, block.downsample
        self.time_emb_proj: nn.Module = block.time_emb_proj
        self.scale_shift = block.time_embedding_norm == "scale_shift"
        self.transposed = form.upsampling == "transposed" and block.upsample is not None
        if self.transposed:
            self.conv1 = enlarging(block.conv1)
        if self.scale_shift:
            affine = self.norm2.detach_affine()
            self.time_emb_proj = _with_affine(block.time_emb_proj, *affine)

    def forward(self, x: Tensor, temb: Any) -> Tensor:
        """``temb``: what the projection takes."""
        h = self.nonlinearity(self.norm1(x))
        if self.upsample is not None:
            x = self.upsample(x)
            h = h if self.transposed else self.upsample(h)
        elif self.downsample is not None:
            x, h = self.downsample(x), self.downsample(h)
        h = self.conv1(h)
        change = self.time_emb_proj(temb)
        if self.scale_shift:
            factor, summand = change
            h = self.norm2(h) * factor + summand
        else:
            h = self.norm2(h + change[0])
        h = self.conv2(self.nonlinearity(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: Tensor = x + h
        return out


def _with_affine(linear: nn.Linear, times: Tensor, plus: Tensor) -> nn.Linear:
    """The projection to (s, t) as one to γ·(1+s) and β·(1+s) + t."""
    weight, bias = linear.weight.detach(), linear.bias.detach()
    scale, shift = weight.chunk(2)
    more, summand = bias.chunk(2)
    more = more + 1
    made = nn.Linear(linear.in_features, linear.out_features, device="meta")
    rows = torch.cat([times[:, None] * scale, plus[:, None] * scale + shift])
    made.weight = nn.Parameter(rows, requires_grad=False)
    column = torch.cat([times * more, plus * more + summand])
    made.bias = nn.Parameter(column, requires_grad=False)
    return made


def enlarging(convolution: nn.Conv2d) -> nn.ConvTranspose2d:
    """The 3x3 convolution of a picture that was enlarged to the nearest pixel.

    Enlarging is a transposed convolution with 2x2 ones; with the 3x3 weights behind it
    that is one with 4x4 weights: 16 instead of 36 products for each input pixel.
    """
    weight = convolution.weight.detach()
    made = nn.ConvTranspose2d(
        convolution.in_channels,
        convolution.out_channels,
        kernel_size=4,
        stride=2,
        padding=1,
        device="meta",
    )
    flipped = weight.flip(2, 3).transpose(0, 1)
    kernel = sum(
        functional.pad(flipped, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)
    )
    assert isinstance(kernel, Tensor)
    made.weight = nn.Parameter(kernel.contiguous(), requires_grad=False)
    assert convolution.bias is not None
    made.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)
    return made
