"""Self-attention as it is exported: channels first, few and large operators."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from ..body_form import BodyForm
from .normalisation import Normalise


class SelfAttention(nn.Module):
    """Residual self-attention over pixels, [R, C, H, W] to the same.

    Channels come before pixels, so that next to nothing is moved in memory. What the
    norm multiplies and adds is in the weights of queries, keys and values; with
    ``scaled`` so is 1/⁴√d for queries and keys, which guided-diffusion multiplies them
    with (``QKVAttention``).

    Scores are made and normalised in the body's precision, or the softmax in float32
    where the form says so; nothing but ``native`` is hidden in a fused kernel.
    """

    def __init__(self, source: Attention, form: BodyForm, norm: Normalise) -> None:
        super().__init__()
        attention: Any = source
        self.heads: int = attention.heads
        self.channels: int = attention.inner_dim
        self.kind = form.attention
        self.softmax_in_float32 = "softmax" in form.islands
        self.group_norm = norm
        width = self.channels // self.heads
        self.scale = width**-0.5 if self.kind == "plain" else 1.0
        each = width**-0.25 if self.kind == "scaled" else 1.0
        affine = norm.detach_affine()
        self.to_q = Projection(attention.to_q, each, affine)
        self.to_k = Projection(attention.to_k, each, affine)
        self.to_v = Projection(attention.to_v, 1.0, affine)
        self.to_out = nn.ModuleList([Projection(attention.to_out[0])])

    def forward(self, x: Tensor, temb: object = None) -> Tensor:
        """[R, C, H, W] to the same; diffusers' blocks pass an embedding as well."""
        channels, height, width = x.shape[1:]
        pixels = height * width
        h = self.group_norm(x).reshape(-1, channels, pixels)
        split = (-1, self.heads, channels // self.heads, pixels)
        parts = (self.to_q(h), self.to_k(h), self.to_v(h))
        q, k, v = (part.reshape(split) for part in parts)
        heads = self._attend(q, k, v).reshape(-1, channels, pixels)
        out: Tensor = x + self.to_out[0](heads).reshape(-1, channels, height, width)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each [R, heads, d, N], as is what it gives."""
        if self.kind == "native":
            q, k, v = (part.transpose(-1, -2) for part in (q, k, v))
            out = functional.scaled_dot_product_attention(q, k, v)
            return out.transpose(-1, -2)
        scores = q.transpose(-1, -2) @ k
        if self.kind == "plain":
            scores = scores * self.scale
        if self.softmax_in_float32:
            weights = torch.softmax(scores.float(), dim=-1).to(v.dtype)
        else:
            weights = torch.softmax(scores, dim=-1)
        return (weights @ v.transpose(-1, -2)).transpose(-1, -2)


class Projection(nn.Module):
    """A linear layer over channels that come before the pixels: [R, C, N]."""

    def __init__(
        self,
        linear: nn.Linear,
        scale: float = 1.0,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """The layer ``linear``.

        Args:
            linear: For channels that come last.
            scale: What its outputs are multiplied with.
            affine: What its inputs are multiplied with and have added, both [C].
        """
        super().__init__()
        weight, bias = linear.weight.detach() * scale, linear.bias.detach() * scale
        if affine is not None:
            times, plus = affine
            bias = bias + weight @ plus
            weight = weight * times
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, C, N] to [R, C', N]."""
        return self.weight @ x + self.bias
