"""guided-diffusion's UNet once more, written from its description and tensor names.

Nothing of the product is used here: it is what imports are held against. The network is
a function of flags and named tensors; random tensors are made when they are first asked
for, each from its name and a seed alone, through raw bits of a counter-based generator,
so that they are the same everywhere and need not be kept.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 32


class RandomWeights(dict[str, Tensor]):
    """A state dict that fills itself."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def of(self, name: str, *shape: int) -> Tensor:
        """The tensor called ``name``, [shape] float32."""
        if name not in self:
            self[name] = torch.from_numpy(self._made(name, shape))
        assert self[name].shape == shape, name
        return self[name]

    def _made(self, name: str, shape: tuple[int, ...]) -> Any:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        raw = bits.random_raw(math.prod(shape)) >> np.uint64(40)
        # Uniform in [-1, 1), exact in float32.
        uniform = (raw.astype(np.float32) / np.float32(1 << 23) - 1).reshape(shape)
        if len(shape) == 1:
            gain = ".norm." in name or name.endswith("layers.0.weight")
            gain |= name == "out.0.weight"
            return uniform * np.float32(0.2) + np.float32(gain and "weight" in name)
        # Sharp attention, so that its heads and the order of its rows matter.
        scale = 2.0 if ".qkv." in name else 1.2
        return uniform * np.float32(scale / math.sqrt(math.prod(shape[1:])))


class Network:
    """The forward pass.

    Args:
        flags: Under guided-diffusion's names, with ``channel_mult`` written out.
        weights: Its tensors.
        identity_dim: D.
    """

    def __init__(
        self, flags: dict[str, Any], weights: RandomWeights, identity_dim: int
    ) -> None:
        self.flags, self.weights, self.identity_dim = flags, weights, identity_dim
        self.size: int = flags.get("large_size") or flags["image_size"]
        self.base: int = flags["num_channels"]
        self.widths = [
            self.base * int(part) for part in flags["channel_mult"].split(",")
        ]
        attended = flags["attention_resolutions"]
        self.factors = [self.size // int(r) for r in attended.split(",") if r]

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, low_res: Any = None
    ) -> Tensor:
        """[B, 3 or 6, H, W], of x [B, 3, H, W], t, y [B, D], low_res [B, 3, h, w]."""
        if low_res is not None:
            large = F.interpolate(low_res, x.shape[-2:], mode="bilinear")
            x = torch.cat([x, large], dim=1)
        condition = self._condition(t, y)
        levels = len(self.widths)
        h = self._conv("input_blocks.0.0", x, self.widths[0])
        kept = [h]
        for level, width in enumerate(self.widths):
            for _ in range(self.flags["num_res_blocks"]):
                place = f"input_blocks.{len(kept)}"
                h = self._residual(f"{place}.0", h, condition, width)
                if 1 << level in self.factors:
                    h = self._attention(f"{place}.1", h)
                kept.append(h)
            if level < levels - 1:
                h = self._down(f"input_blocks.{len(kept)}.0", h, condition)
                kept.append(h)
        h = self._residual("middle_block.0", h, condition, self.widths[-1])
        h = self._attention("middle_block.1", h)
        h = self._residual("middle_block.2", h, condition, self.widths[-1])
        index = 0
        for level in reversed(range(levels)):
            for block in range(self.flags["num_res_blocks"] + 1):
                h = torch.cat([h, kept.pop()], dim=1)
                place, inner = f"output_blocks.{index}", 1
                h = self._residual(f"{place}.0", h, condition, self.widths[level])
                if 1 << level in self.factors:
                    h = self._attention(f"{place}.1", h)
                    inner = 2
                if level and block == self.flags["num_res_blocks"]:
                    h = self._up(f"{place}.{inner}", h, condition)
                index += 1
        assert not kept
        h = F.silu(self._norm("out.0", h))
        return self._conv("out.2", h, 6 if self.flags["learn_sigma"] else 3)

    def _condition(self, t: Tensor, y: Tensor | None) -> Tensor:
        half = self.base // 2
        steps = torch.arange(half, dtype=torch.float32) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps)[None]
        wave = torch.cat([angles.cos(), angles.sin()], dim=1)
        width = 4 * self.base
        inner = F.silu(self._linear("time_embed.0", wave, width))
        made = self._linear("time_embed.2", inner, width)
        return made if y is None else made + self._linear("image_emb.0", y, width)

    def _residual(
        self, name: str, x: Tensor, condition: Tensor, width: int, resample: str = ""
    ) -> Tensor:
        h = F.silu(self._norm(f"{name}.in_layers.0", x))
        if resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif resample == "up":
            h, x = self._twice(h), self._twice(x)
        h = self._conv(f"{name}.in_layers.2", h, width)
        scaled = self.flags["use_scale_shift_norm"]
        both = 2 * width if scaled else width
        e = self._linear(f"{name}.emb_layers.1", F.silu(condition), both)[
            ..., None, None
        ]
        if scaled:
            scale, shift = e.chunk(2, dim=1)
            h = self._norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self._norm(f"{name}.out_layers.0", h + e)
        h = self._conv(f"{name}.out_layers.3", F.silu(h), width)
        if x.shape[1] != width:
            x = self._conv(f"{name}.skip_connection", x, width, kernel=1)
        return x + h

    def _down(self, name: str, h: Tensor, condition: Tensor) -> Tensor:
        if self.flags["resblock_updown"]:
            return self._residual(name, h, condition, h.shape[1], "down")
        return self._conv(f"{name}.op", h, h.shape[1], stride=2)

    def _up(self, name: str, h: Tensor, condition: Tensor) -> Tensor:
        if self.flags["resblock_updown"]:
            return self._residual(name, h, condition, h.shape[1], "up")
        return self._conv(f"{name}.conv", self._twice(h), h.shape[1])

    @staticmethod
    def _twice(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def _attention(self, name: str, x: Tensor) -> Tensor:
        width = x.shape[1]
        flat = x.flatten(2)
        heads = self.flags["num_heads"]
        if self.flags["num_head_channels"] != -1:
            heads = width // self.flags["num_head_channels"]
        each = width // heads
        normed = self._norm(f"{name}.norm", flat)
        weight = self.weights.of(f"{name}.qkv.weight", 3 * width, width, 1)
        bias = self.weights.of(f"{name}.qkv.bias", 3 * width)
        rows = F.conv1d(normed, weight, bias)
        if self.flags.get("use_new_attention_order", False):
            q, k, v = rows.reshape(len(x), 3, heads, each, -1).unbind(1)
        else:
            q, k, v = rows.reshape(len(x), heads, 3, each, -1).unbind(2)
        scores = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(each)
        mixed = torch.einsum("bhts,bhcs->bhct", scores.softmax(dim=-1), v)
        weight = self.weights.of(f"{name}.proj_out.weight", width, width, 1)
        bias = self.weights.of(f"{name}.proj_out.bias", width)
        out = F.conv1d(mixed.reshape(flat.shape), weight, bias)
        return (flat + out).reshape(x.shape)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        width = x.shape[1]
        weight = self.weights.of(f"{name}.weight", width)
        return F.group_norm(x, GROUPS, weight, self.weights.of(f"{name}.bias", width))

    def _conv(
        self, name: str, x: Tensor, width: int, kernel: int = 3, stride: int = 1
    ) -> Tensor:
        shape = (width, x.shape[1], kernel, kernel)
        weight = self.weights.of(f"{name}.weight", *shape)
        bias = self.weights.of(f"{name}.bias", width)
        return F.conv2d(x, weight, bias, stride=stride, padding=kernel // 2)

    def _linear(self, name: str, x: Tensor, width: int) -> Tensor:
        weight = self.weights.of(f"{name}.weight", width, x.shape[1])
        return F.linear(x, weight, self.weights.of(f"{name}.bias", width))
