"""guided-diffusion's flags and weights as ours.

Names, facts and refusals; ``test_import_golden`` compares what is computed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import tiny_network
from torch import Tensor

from id3pm_deploy.errors import CheckpointError
from id3pm_deploy.reference import guided_diffusion
from id3pm_deploy.reference.guided_diffusion import convert_guided_diffusion
from id3pm_deploy.reference.guided_flags import spec_from_flags, with_defaults
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.spec import NO_IDENTITY, DiffusionSpec, IdentitySpec

IDENTITY = IdentitySpec(16, "a test", None, "raw")
FLAGS: dict[str, Any] = {
    "attention_resolutions": "8",
    "channel_mult": "1,2",
    "class_cond": True,
    "diffusion_steps": 1000,
    "dropout": 0.1,
    "embedding_size": 16,
    "image_size": 16,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "num_channels": 32,
    "num_head_channels": -1,
    "num_heads": 4,
    "num_res_blocks": 1,
    "predict_xstart": False,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "use_scale_shift_norm": True,
}


def theirs_from_ours(
    spec: DiffusionSpec, tensors: dict[str, Tensor], legacy_heads: int | None = None
) -> dict[str, Tensor]:
    """A state dict under guided-diffusion's names: the conversion, backwards."""
    places = dict(guided_diffusion._block_names(spec.model))
    made: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for ours, tensor in tensors.items():
        name, part = guided_diffusion._their_name(ours, places)
        if part is not None:
            thirds.setdefault(name, {})[part] = tensor
        elif name.endswith("proj_out.weight"):
            made[name] = tensor[..., None]
        else:
            made[name] = tensor
    for name, parts in thirds.items():
        three = [parts[part] for part in range(3)]
        if legacy_heads is None:
            joint = torch.cat(three)
        else:
            split = [part.chunk(legacy_heads) for part in three]
            joint = torch.cat([torch.cat(head) for head in zip(*split, strict=True)])
        made[name] = joint[..., None] if name.endswith("weight") else joint
    return made


def sources(**flags: Any) -> tuple[dict[str, Any], DiffusionSpec, dict[str, Tensor]]:
    """Flags, what they mean, and random weights of that network under our names."""
    known = {**FLAGS, **flags}
    spec = spec_from_flags(known, IDENTITY)
    return known, spec, dict(tiny_network(spec).state_dict())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"num_head_channels": 16},
        {"use_new_attention_order": False},
        {"use_new_attention_order": False, "num_head_channels": 16},
        {"resblock_updown": False},
        {"attention_resolutions": "16,8", "resblock_updown": False},
        {"attention_resolutions": ""},
        {"num_res_blocks": 2, "channel_mult": "1,1,2", "attention_resolutions": "8,4"},
        {"learn_sigma": False, "use_scale_shift_norm": False},
    ],
)
def test_every_tensor_finds_its_place(flags: dict[str, Any]) -> None:
    known, spec, ours = sources(**flags)
    heads = None
    if not known["use_new_attention_order"]:
        heads = 4  # 64 channels at the attention: by 16 channels they are 4, too
    theirs = theirs_from_ours(spec, ours, heads)
    assert len(theirs) < len(ours)
    made = convert_guided_diffusion(known, theirs, IDENTITY, "a title")
    assert (made.spec.title, made.spec.model) == ("a title", spec.model)
    assert set(made.tensors) == set(ours)
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=0)
    network = IdentityUNet(made.spec.model, 16)
    network.load_state_dict(made.tensors)


def their_attention(qkv: Tensor, heads: int, *, legacy: bool) -> Tensor:
    """guided-diffusion's attention over [B, 3·C, L], in either order of rows."""
    batch, width, length = qkv.shape
    each = width // 3 // heads
    if legacy:
        joint = qkv.reshape(batch * heads, 3 * each, length)
        q, k, v = torch.split(joint, each, dim=1)
    else:
        q, k, v = (
            part.reshape(batch * heads, each, length) for part in qkv.chunk(3, dim=1)
        )
    scale = 1 / math.sqrt(math.sqrt(each))
    weights = torch.softmax((q * scale).transpose(1, 2) @ (k * scale), dim=-1)
    mixed: Tensor = (weights @ v.transpose(1, 2)).transpose(1, 2)
    return mixed.reshape(batch, -1, length)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mode", [{"num_heads": 2}, {"num_head_channels": 8}])
def test_attention_is_theirs(mode: dict[str, int], legacy: bool) -> None:
    """The same joint projection, read in its own order, gives the same output."""
    order = {"use_new_attention_order": not legacy}
    known, spec, ours = sources(**mode, **order)
    theirs = theirs_from_ours(spec, ours)
    name = "middle_block.1"
    generator = torch.Generator().manual_seed(3)
    for part in ("qkv.weight", "qkv.bias", "proj_out.weight", "proj_out.bias"):
        shape = theirs[f"{name}.{part}"].shape
        theirs[f"{name}.{part}"] = torch.randn(shape, generator=generator) / 6
    network = IdentityUNet(spec.model, 16)
    network.load_state_dict(convert_guided_diffusion(known, theirs, IDENTITY).tensors)
    x = torch.randn(2, 64, 8, 8, generator=generator)
    block: Any = network.unet.mid_block
    with torch.inference_mode():
        found = block.attentions[0](x)
        flat = x.reshape(2, 64, 64)
        norm = block.attentions[0].group_norm
        normed = torch.nn.functional.group_norm(flat, 32, norm.weight, norm.bias, 1e-5)
        conv = torch.nn.functional.conv1d
        qkv = conv(normed, theirs[f"{name}.qkv.weight"], theirs[f"{name}.qkv.bias"])
        heads = mode.get("num_heads") or 64 // mode["num_head_channels"]
        inner = their_attention(qkv, heads, legacy=legacy)
        out = conv(
            inner, theirs[f"{name}.proj_out.weight"], theirs[f"{name}.proj_out.bias"]
        )
        expected = (flat + out).reshape(x.shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (out.abs().max() > 0.1).item()


def test_facts_that_shapes_do_not_tell() -> None:
    spec = spec_from_flags(FLAGS, IDENTITY)
    assert (spec.model.num_heads, spec.model.num_head_channels) == (4, None)
    assert spec.model.learned_variance
    assert spec.prediction_type == "epsilon"
    by_width = spec_from_flags({**FLAGS, "num_head_channels": 16}, IDENTITY).model
    assert (by_width.num_heads, by_width.num_head_channels) == (None, 16)
    other = {"predict_xstart": True, "noise_schedule": "linear", "learn_sigma": False}
    changed = spec_from_flags({**FLAGS, **other}, IDENTITY)
    assert changed.prediction_type == "x0"
    assert changed.schedule.name == "linear"
    assert not changed.model.learned_variance
    wide = {"image_size": 64, "channel_mult": "", "attention_resolutions": "32,16,8"}
    large = spec_from_flags({**FLAGS, **wide}, IDENTITY).model
    assert large.channel_multipliers == (1, 2, 3, 4)
    assert large.attention_resolutions == (32, 16, 8)


def test_attention_is_placed_by_factor_as_there() -> None:
    """They compare downsampling factors, rounded down: 12 of 16 pixels is factor 1."""
    found = spec_from_flags({**FLAGS, "attention_resolutions": "12"}, IDENTITY)
    assert found.model.attention_resolutions == (16,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"large_size": 64, "small_size": 16}, "unknown: 'image_size'"),
        ({"colour": True}, "unknown: 'colour'"),
        ({"num_heads": None}, "num_heads"),
        ({"num_heads": True}, "num_heads"),
        ({"class_cond": False}, "class_cond"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule"),
        ({"num_heads_upsample": 2}, "num_heads_upsample"),
        ({"rescale_timesteps": True, "diffusion_steps": 4000}, "rescale_timesteps"),
        ({"identity_scale": 2.0}, "identity_scale"),
        ({"embedding_size": 17}, "embedding_size"),
        ({"channel_mult": "0.5,1"}, "channel_mult"),
        ({"channel_mult": "", "image_size": 32}, "channel_mult"),
        ({"channel_mult": "", "image_size": 512}, "0.5,1,1,2,2,4,4"),
        ({"attention_resolutions": "a"}, "attention_resolutions"),
    ],
)
def test_flags_that_cannot_be_represented_are_named(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_from_flags({**FLAGS, **change}, IDENTITY)
    assert message in f"{caught.value.what} {caught.value.why}"


@pytest.mark.parametrize(
    "name", ["num_heads", "num_head_channels", "use_new_attention_order", "learn_sigma"]
)
def test_facts_that_shapes_do_not_tell_have_to_be_stated(name: str) -> None:
    flags = {key: value for key, value in FLAGS.items() if key != name}
    with pytest.raises(CheckpointError) as caught:
        spec_from_flags(flags, IDENTITY)
    assert f"missing: {name}" in caught.value.why


def test_harmless_flags_are_accepted() -> None:
    flags = {
        "num_heads_upsample": -1,
        "identity_scale": None,
        "rescale_timesteps": True,
        "timestep_respacing": "250",
        "use_fp16": True,
        "use_kl": False,
        "use_checkpoint": True,
        "rescale_learned_sigmas": False,
        "sigma_small": True,
    }
    assert spec_from_flags({**FLAGS, **flags}, IDENTITY) == spec_from_flags(
        FLAGS, IDENTITY
    )


def test_wrong_tensors_are_named() -> None:
    known, spec, ours = sources()
    good = theirs_from_ours(spec, ours)
    name = "middle_block.1.qkv.weight"
    without = {key: value for key, value in good.items() if key != name}
    cases: list[tuple[dict[str, Tensor], str]] = [
        (without, f"missing: {name}"),
        ({**good, "other.weight": torch.zeros(1)}, "unexpected: other.weight"),
        ({**good, "label_emb.weight": torch.zeros(9, 128)}, "label_emb.weight"),
        ({}, "0 tensors"),
        ({**good, name: good[name][:-1]}, "(192, 64, 1)"),
        ({**good, name: good[name].to(torch.int64)}, "int64"),
        ({**good, name: good[name][..., 0]}, "(192, 64, 1)"),
    ]
    for tensors, message in cases:
        with pytest.raises(CheckpointError) as caught:
            convert_guided_diffusion(known, tensors, IDENTITY)
        assert message in f"{caught.value.what} {caught.value.why}"


def test_half_precision_weights_become_float32() -> None:
    known, spec, ours = sources()
    half = {name: t.half() for name, t in theirs_from_ours(spec, ours).items()}
    made = convert_guided_diffusion(known, half, IDENTITY).tensors
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    assert not any(
        tensor.data_ptr() in {t.data_ptr() for t in half.values()}
        for tensor in made.values()
    )


SUPER_RESOLUTION: dict[str, Any] = {
    **{k: v for k, v in FLAGS.items() if k not in ("image_size", "embedding_size")},
    "large_size": 64,
    "small_size": 16,
    "class_cond": False,
}
del SUPER_RESOLUTION["use_new_attention_order"], SUPER_RESOLUTION["channel_mult"]


def test_super_resolution_has_flags_of_its_own() -> None:
    """guided-diffusion fixes its multipliers by size and has no flag for the order."""
    spec = spec_from_flags(SUPER_RESOLUTION, NO_IDENTITY)
    assert (spec.model.image_size, spec.model.low_res_size) == (64, 16)
    assert spec.model.channel_multipliers == (1, 2, 3, 4)
    assert spec.identity == NO_IDENTITY
    large = spec_from_flags(
        {**SUPER_RESOLUTION, "large_size": 256, "small_size": 64}, NO_IDENTITY
    )
    assert large.model.channel_multipliers == (1, 1, 2, 2, 4, 4)


def test_defaults_are_taken_when_the_user_says_so() -> None:
    """guided-diffusion's model_and_diffusion_defaults."""
    given = {"image_size": 64, "num_channels": 64, "num_heads": 2}
    with pytest.raises(CheckpointError) as caught:
        spec_from_flags(given, NO_IDENTITY)
    assert "use_new_attention_order (default False)" in caught.value.why
    spec = spec_from_flags(with_defaults(given), NO_IDENTITY)
    model = spec.model
    assert (model.num_heads, model.num_head_channels, model.base_channels) == (
        2,
        None,
        64,
    )
    assert (model.residual_blocks, model.attention_resolutions) == (2, (16, 8))
    assert model.scale_shift_norm
    assert not model.resblock_updown
    assert (spec.schedule.name, spec.schedule.timesteps) == ("linear", 1000)


def test_heads_need_not_be_counted_where_their_width_is_given() -> None:
    flags = {**FLAGS, "num_head_channels": 16, "num_heads_upsample": 7}
    del flags["num_heads"]
    assert spec_from_flags(flags, IDENTITY).model.num_head_channels == 16


@pytest.mark.parametrize(
    ("flags", "identity", "message"),
    [
        ({"class_cond": False}, IDENTITY, "class_cond = False"),
        ({"class_cond": True}, NO_IDENTITY, "class_cond = True"),
    ],
)
def test_the_condition_is_that_of_the_weights(
    flags: dict[str, Any], identity: IdentitySpec, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        spec_from_flags({**FLAGS, **flags}, identity)
