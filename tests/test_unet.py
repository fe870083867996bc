"""The identity-conditioned UNet against diffusers' own forward pass and arithmetic."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
)
from diffusers.models.unets.unet_2d import UNet2DModel
from models import random_identity, tiny_model, tiny_network, tiny_spec
from torch import Tensor

from id3pm_deploy.errors import CheckpointError
from id3pm_deploy.reference.unet import (
    IdentityUNet,
    embedding_frequencies,
    sinusoidal_embedding,
)
from id3pm_deploy.spec import NO_IDENTITY, DiffusionSpec, ModelSpec


def inputs(spec: DiffusionSpec, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(4)
    size = spec.model.image_size
    x = rng.normal(size=(rows, spec.model.image_channels, size, size))
    times = torch.tensor([0.0, 417.0, 999.0, 31.5])[:rows]
    identity = random_identity(rows, spec)
    identity[-1] = 0.0
    return torch.from_numpy(x.astype(np.float32)), times, torch.from_numpy(identity)


SHAPES: list[dict[str, Any]] = [
    {},
    {"learned_variance": True},
    {"num_heads": 4},
    {"scale_shift_norm": False, "resblock_updown": False},
    {"channel_multipliers": (1, 2, 2), "attention_resolutions": (8, 4)},
    {"residual_blocks": 2, "attention_resolutions": ()},
    {"image_channels": 1, "norm_groups": 16, "learned_variance": True},
]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_forward_is_diffusers_bit_for_bit(changes: dict[str, Any]) -> None:
    spec = tiny_spec(**changes)
    network = tiny_network(spec)
    x, times, identity = inputs(spec)
    with torch.inference_mode():
        found = network(x, times, identity)
        labels = network.identity_projection(identity)
        expected = network.unet(x, times, class_labels=labels).sample
    planes = 2 if spec.model.learned_variance else 1
    assert found.shape == (3, planes * spec.model.image_channels, 16, 16)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert found.std() > 0.05


def test_every_input_matters() -> None:
    spec = tiny_spec()
    network = tiny_network(spec)
    x, times, identity = inputs(spec)
    with torch.inference_mode():
        found = network(x, times, identity)
        others = [
            network(x + 0.1, times, identity),
            network(x, times + 10.0, identity),
            network(x, times, identity + 0.5),
        ]
    for other in others:
        assert (found - other).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_the_null_identity_keeps_the_projections_bias() -> None:
    network = tiny_network(tiny_spec())
    times = torch.tensor([100.0])
    with torch.inference_mode():
        found = network.embed(times, torch.zeros(1, 16))
        plain = network.unet.time_embedding(
            sinusoidal_embedding(times, embedding_frequencies(32))
        )
    assert torch.equal(found, plain + network.identity_projection.bias)
    assert network.identity_projection.bias.abs().max() > 0


def test_sinusoids_in_guided_diffusions_order() -> None:
    times = [0.0, 1.0, 250.0, 999.0]
    frequencies = embedding_frequencies(32)
    found = sinusoidal_embedding(torch.tensor(times), frequencies).double().numpy()
    for i, t in enumerate(times):
        angles = [t * math.exp(-math.log(10_000) * k / 16) for k in range(16)]
        wanted = [*map(math.cos, angles), *map(math.sin, angles)]
        np.testing.assert_allclose(found[i], wanted, atol=1e-4)


def attention_by_hand(module: Any, x: Tensor, heads: int) -> Tensor:
    """Residual self-attention over pixels, in float64 and head by head."""
    with torch.no_grad():
        double = x.double()
        norm, (batch, channels) = module.group_norm, x.shape[:2]
        h = torch.nn.functional.group_norm(
            double, norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps
        )
        h = h.flatten(2).transpose(1, 2)
        q, k, v = (
            h @ part.weight.double().T + part.bias.double()
            for part in (module.to_q, module.to_k, module.to_v)
        )
        width = channels // heads
        out = torch.empty_like(h)
        for b in range(batch):
            for i in range(heads):
                own = slice(i * width, (i + 1) * width)
                scores = q[b, :, own] @ k[b, :, own].T / math.sqrt(width)
                weights = torch.softmax(scores, dim=-1)
                out[b, :, own] = weights @ v[b, :, own]
        projected = module.to_out[0]
        out = out @ projected.weight.double().T + projected.bias.double()
        after: Tensor = out.transpose(1, 2).reshape(x.shape) + double
    return after


HEADS: list[tuple[dict[str, Any], dict[int, int]]] = [
    # What is set, and the number of heads that follows at 64 and 128 channels.
    ({"num_heads": 2}, {64: 2, 128: 2}),
    ({"num_heads": 1}, {64: 1, 128: 1}),
    ({"num_head_channels": 32}, {64: 2, 128: 4}),
    ({"num_head_channels": 64}, {64: 1, 128: 2}),
]


@pytest.mark.parametrize(("mode", "heads"), HEADS, ids=str)
def test_attention_against_a_computation_by_hand(
    mode: dict[str, Any], heads: dict[int, int]
) -> None:
    spec = tiny_spec(
        channel_multipliers=(1, 2, 4), attention_resolutions=(8, 4), **mode
    )
    network = tiny_network(spec)
    modules = [m for m in network.unet.modules() if isinstance(m, Attention)]
    # One at the way down of both levels, one in the middle, two at the ways up.
    assert len(modules) == 1 + 1 + 1 + 2 + 2
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        attention = cast(Any, module)
        channels = attention.to_q.in_features
        x = torch.randn(2, channels, 4, 4, generator=generator)
        expected = attention_by_hand(attention, x, heads[channels])
        # The fused kernel has its own scale; the plain one takes the module's.
        for kind in (AttnProcessor, AttnProcessor2_0):
            attention.set_processor(cast(Any, kind)())
            with torch.inference_mode():
                found = attention(x).double()
            error = (found - expected).abs().max() / expected.abs().max()
            assert error < 1e-6
        wrong = attention_by_hand(attention, x, 2 * heads[channels])
        assert (found - wrong).abs().max() > 1e-4


def test_head_modes_share_weights_and_differ_in_function() -> None:
    """The trap: either choice loads the same file without a word."""
    changes = {"channel_multipliers": (1, 2, 4), "attention_resolutions": (8, 4)}
    by_number = tiny_spec(num_heads=2, **changes)
    by_width = tiny_spec(num_head_channels=32, **changes)
    first = tiny_network(by_number)
    second = IdentityUNet(by_width.model, 16).eval()
    second.load_state_dict(first.state_dict())
    x, times, identity = inputs(by_number)
    with torch.inference_mode():
        difference = first(x, times, identity) - second(x, times, identity)
    assert difference.abs().max() > 1e-4


def test_head_modes_agree_where_they_mean_the_same() -> None:
    by_number, by_width = tiny_spec(num_heads=4), tiny_spec(num_head_channels=16)
    first = tiny_network(by_number)
    second = IdentityUNet(by_width.model, 16).eval()
    second.load_state_dict(first.state_dict())
    x, times, identity = inputs(by_number)
    with torch.inference_mode():
        assert torch.equal(first(x, times, identity), second(x, times, identity))


def test_the_full_size_model_has_the_papers_parameters() -> None:
    """295.5 M, counted from guided-diffusion's layers; on the meta device no memory
    is used."""
    full = ModelSpec(
        image_size=64,
        base_channels=192,
        channel_multipliers=(1, 2, 3, 4),
        residual_blocks=3,
        attention_resolutions=(32, 16, 8),
        num_heads=3,
        learned_variance=True,
        dropout=0.1,
    )
    with torch.device("meta"):
        network = IdentityUNet(full, 512)
    tensors = network.state_dict()
    assert sum(t.numel() for t in tensors.values()) == 295_530_438
    # guided-diffusion keeps q, k and v in one tensor: 542 of them.
    split = sum(name.endswith(("to_k.weight", "to_v.weight")) for name in tensors)
    assert len(tensors) - 2 * split == 542
    attention = [m for m in network.unet.modules() if isinstance(m, Attention)]
    assert {cast(Any, m).heads for m in attention} == {3}
    # 3 levels of 3 blocks down and 4 up, and the middle.
    assert len(attention) == 3 * 3 + 3 * 4 + 1


def test_attention_sits_at_the_resolutions_asked_for() -> None:
    spec = tiny_model(
        image_size=32, channel_multipliers=(1, 1, 2), attention_resolutions=(16,)
    )
    with torch.device("meta"):
        unet = cast(Any, IdentityUNet(spec, 16).unet)
    down = [hasattr(block, "attentions") for block in unet.down_blocks]
    up = [hasattr(block, "attentions") for block in unet.up_blocks]
    assert down == [False, True, False]
    assert up == [False, True, False]


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    spec = tiny_spec(dropout=0.5)
    network = tiny_network(spec)
    x, times, identity = inputs(spec)
    with torch.inference_mode():
        assert torch.equal(network(x, times, identity), network(x, times, identity))
        network.train()
        assert not torch.equal(network(x, times, identity), network(x, times, identity))


def test_rows_do_not_see_each_other() -> None:
    spec = tiny_spec()
    network = tiny_network(spec)
    x, times, identity = inputs(spec)
    with torch.inference_mode():
        together = network(x, times, identity)
        for i in range(3):
            own = slice(i, i + 1)
            alone = network(x[own], times[own], identity[own])
            assert (together[own] - alone).abs().max() < 1e-5


def test_the_first_multiplier_widens_all_but_the_sinusoids() -> None:
    spec = tiny_spec(channel_multipliers=(2, 4))
    network = tiny_network(spec)
    assert network.unet.conv_in.out_channels == 64
    assert network.unet.time_embedding.linear_1.weight.shape == (128, 32)
    assert network(*inputs(spec)).shape == (3, 3, 16, 16)


def test_without_identity_there_is_no_projection() -> None:
    spec = tiny_spec(identity=NO_IDENTITY)
    network = tiny_network(spec)
    assert not [name for name in network.state_dict() if "identity" in name]
    x, times, _ = inputs(tiny_spec())
    with torch.inference_mode():
        found = network(x, times)
        zeros = torch.zeros(3, spec.model.embedding_dim)
        expected = network.unet(x, times, class_labels=zeros).sample
    assert torch.equal(found, expected)


def test_super_resolution_sees_both_pictures() -> None:
    spec = tiny_spec(low_res_size=4)
    network = tiny_network(spec)
    x, times, identity = inputs(spec)
    both = torch.cat([x, x.flip(0)], dim=1)
    with torch.inference_mode():
        found = network(both, times, identity)
        both[0, 3:] += 1.0
        other = network(both, times, identity)
    assert found.shape == x.shape
    assert not torch.equal(found[0], other[0])
    assert torch.equal(found[1:], other[1:])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 3, "num_head_channels": 16}, "exactly one of num_heads"),
    ({"num_head_channels": None}, "exactly one of num_heads"),
    ({"num_heads": 0}, "must be from 1 to 16384"),
    ({"base_channels": 0}, "base_channels must be from 1"),
    ({"channel_multipliers": ()}, "channel_multipliers must be from 1"),
    ({"channel_multipliers": (1, 0)}, "channel_multipliers must be from 1"),
    ({"residual_blocks": 20_000}, "residual_blocks must be from 1"),
    ({"dropout": 1.0}, "dropout must be in"),
    ({"dropout": math.nan}, "dropout must be in"),
    ({"image_size": 15}, "cannot be halved 1 times"),
    ({"channel_multipliers": (1,) * 6}, "cannot be halved 5 times"),
    ({"base_channels": 48}, "48 channels do not split into 32 groups"),
    ({"num_head_channels": 48}, "64 channels do not split into heads by 48"),
    ({"num_heads": 3, "attention_resolutions": ()}, "do not split into heads by 3"),
    ({"base_channels": 33, "norm_groups": 1, "num_heads": 1}, "must be even"),
    ({"low_res_size": 0}, "low_res_size must be from 1 to its image_size"),
    ({"low_res_size": 17}, "low_res_size must be from 1 to its image_size"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=str)
def test_models_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tiny_model(**changes)


def test_heads_need_not_divide_levels_without_attention() -> None:
    """Level 0 has 32 channels and no attention."""
    spec = tiny_spec(num_head_channels=64)
    network = tiny_network(spec)
    with torch.inference_mode():
        assert torch.isfinite(network(*inputs(spec))).all()
    assert [spec.model.attends(level) for level in (0, 1)] == [False, True]


def test_a_unet2dmodel_is_inside() -> None:
    assert isinstance(tiny_network(tiny_spec()).unet, UNet2DModel)
