"""The identity-conditioned UNet on diffusers' UNet2DModel.

The identity vector goes through one linear layer to the width of the timestep
embedding and is added to it (Kansy et al., ID3PM). The null identity is the zero
vector, so the projection's bias remains in the unconditional model.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from ..spec import ModelSpec


def _block_types(spec: ModelSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    if not spec.resblock_updown:
        plain = ("DownBlock2D", "UpBlock2D")
    down, up = [], []
    for attends in spec.attended_levels:
        down.append("AttnDownBlock2D" if attends else plain[0])
        up.append("AttnUpBlock2D" if attends else plain[1])
    return tuple(down), tuple(reversed(up))


def _diffusers_unet(spec: ModelSpec) -> UNet2DModel:
    down, up = _block_types(spec)
    resampling = "resnet" if spec.resblock_updown else "conv"
    variance = spec.image_channels if spec.learned_variance else 0
    head_dim = spec.num_head_channels or spec.norm_groups
    pictures = 1 if spec.low_res_size is None else 2
    unet: UNet2DModel = UNet2DModel(
        sample_size=spec.image_size,
        in_channels=pictures * spec.image_channels,
        out_channels=spec.image_channels + variance,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=spec.level_channels,
        layers_per_block=spec.residual_blocks,
        downsample_type=resampling,
        upsample_type=resampling,
        dropout=spec.dropout,
        attention_head_dim=head_dim,
        norm_num_groups=spec.norm_groups,
        attn_norm_num_groups=spec.norm_groups,
        resnet_time_scale_shift="scale_shift" if spec.scale_shift_norm else "default",
        time_embedding_dim=spec.embedding_dim,
        class_embed_type="identity",
    )
    # UNet2DModel ties the width of the sinusoids to that of the first level.
    unet.time_embedding = TimestepEmbedding(spec.base_channels, spec.embedding_dim)
    return unet


def _set_heads(unet: UNet2DModel, num_heads: int) -> None:
    """Give every attention block ``num_heads`` heads, whatever its width.

    UNet2DModel knows one head width for all levels; the projections have the same
    shapes either way, so only the split changes.
    """
    for module in unet.modules():
        if isinstance(module, Attention):
            attention = cast(Any, module)
            attention.heads = num_heads
            attention.scale = (attention.inner_dim // num_heads) ** -0.5


def embedding_frequencies(dim: int) -> Tensor:
    """Frequencies [dim // 2] float32 of the timestep embedding (Vaswani et al. 2017,
    sec. 3.5, as guided-diffusion and diffusers compute them)."""
    half = dim // 2
    # Always on the CPU: the same bits everywhere, and there in a network whose weights
    # are still on the meta device.
    numbers = torch.arange(half, dtype=torch.float32, device="cpu")
    exponents = -math.log(10_000.0) * numbers
    return torch.exp(exponents / half)


def sinusoidal_embedding(timesteps: Tensor, frequencies: Tensor) -> Tensor:
    """Timestep embedding [R, 2·F] float32: cosines, then sines.

    The frequencies are constants made once: an exported graph that took their
    exponential itself would be off by 1e-4 rad at t = 999.

    Args:
        timesteps: [R], in units of training timesteps.
        frequencies: [F] float32.
    """
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class IdentityUNet(nn.Module):
    """UNet2DModel with the identity projection.

    The forward pass is UNet2DModel's own, written out so that an export can put the
    embeddings in another form (:mod:`.export_form`). It has no opinion on data types:
    where the body is not float32, hooks of :mod:`.precision` cast.

    Args:
        spec: Its shape.
        identity_dim: Numbers D of a condition: an identity vector and the columns of
            attributes behind it, which share the projection. 0: it has none.
    """

    def __init__(self, spec: ModelSpec, identity_dim: int) -> None:
        super().__init__()
        self.spec = spec
        self.identity_dim = identity_dim
        self.unet = _diffusers_unet(spec)
        if identity_dim:
            self.identity_projection = nn.Linear(identity_dim, spec.embedding_dim)
        self.frequencies: Tensor
        frequencies = embedding_frequencies(spec.base_channels)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.conditioning: nn.Module | None = None
        if spec.num_heads is not None:
            _set_heads(self.unet, spec.num_heads)

    def embed(self, timesteps: Tensor, identity: Tensor | None) -> Tensor:
        """Conditioning [R, 4·base_channels] float32 of timesteps [R] and identity
        vectors [R, D]."""
        sinusoids = sinusoidal_embedding(timesteps, self.frequencies)
        embedding = self.unet.time_embedding(sinusoids)
        if not self.identity_dim:
            return cast(Tensor, embedding)
        return cast(Tensor, embedding + self.identity_projection(identity))

    def forward(
        self, x: Tensor, timesteps: Tensor, identity: Tensor | None = None
    ) -> Tensor:
        """Predict from noisy images.

        Args:
            x: [R, C, H, W], noisy images; [R, 2C, H, W] of a super-resolution model,
                whose enlarged pictures are the second half.
            timesteps: [R], may be fractional.
            identity: [R, D], normalised identity vectors, each with its attributes
                behind it; zeros for the null one. Not used by a model without either.

        Returns:
            [R, C or 2C, H, W] float32: the prediction and, with learned variance, the
            variance channels in guided-diffusion's [-1, 1] convention behind it.
        """
        unet: Any = self.unet
        embedding: Any = self.embed(timesteps, identity)
        if self.conditioning is not None:
            embedding = self.conditioning(embedding)
        h = unet.conv_in(x)
        skips = (h,)
        for block in unet.down_blocks:
            h, outputs = block(hidden_states=h, temb=embedding)
            skips += outputs
        h = unet.mid_block(h, embedding)
        for block in unet.up_blocks:
            count = len(block.resnets)
            used, skips = skips[-count:], skips[:-count]
            h = block(h, used, embedding)
        h = unet.conv_act(unet.conv_norm_out(h))
        return cast(Tensor, unet.conv_out(h).float())
