"""guided-diffusion's flags and weights as ours.

Covers the identity-conditioned form of guided-diffusion's UNet (Dhariwal & Nichol 2021,
with the linear layer of Kansy et al., ID3PM, in the place of the class embedding). Two
facts that tensor shapes do not tell come from the flags and must be stated there: the
head mode, and the order of the rows in the joint query, key and value projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..spec import DiffusionSpec, IdentitySpec, ModelSpec, ScheduleSpec
from .unet import IdentityUNet

_NEEDED: dict[str, type] = {
    "image_size": int,
    "num_channels": int,
    "num_res_blocks": int,
    "channel_mult": str,
    "attention_resolutions": str,
    "num_heads": int,
    "num_head_channels": int,
    "use_new_attention_order": bool,
    "class_cond": bool,
    "embedding_size": int,
    "learn_sigma": bool,
    "use_scale_shift_norm": bool,
    "resblock_updown": bool,
    "noise_schedule": str,
    "diffusion_steps": int,
    "predict_xstart": bool,
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "dropout": (int, float),
    "num_heads_upsample": int,
    "rescale_timesteps": bool,
    "identity_scale": type(None),
    # These change training, memory or sampling, not the network's function.
    "rescale_learned_sigmas": bool,
    "sigma_small": bool,
    "timestep_respacing": str,
    "use_checkpoint": bool,
    "use_fp16": bool,
    "use_kl": bool,
}
_MULTIPLIERS = {128: "1,1,2,3,4", 64: "1,2,3,4"}
"""What an empty channel_mult means at an image size; at 256 and 512, with their own
first multipliers, it has to be stated."""
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "identity_projection": "image_emb.0",
    "unet.time_embedding.linear_1": "time_embed.0",
    "unet.time_embedding.linear_2": "time_embed.2",
    "unet.conv_in": "input_blocks.0.0",
    "unet.conv_norm_out": "out.0",
    "unet.conv_out": "out.2",
}
_QKV = ("to_q", "to_k", "to_v")
_NAMED = 4


@dataclass(frozen=True)
class Converted:
    """A guided-diffusion model as ours: what ``save_checkpoint`` takes.

    ``tensors`` is the state dict of an :class:`IdentityUNet`, in float32.
    """

    spec: DiffusionSpec
    tensors: dict[str, Tensor]


def convert_guided_diffusion(
    flags: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    identity: IdentitySpec,
    title: str = "",
) -> Converted:
    """Convert guided-diffusion's flags and state dict.

    Args:
        flags: The options the model was trained with, under guided-diffusion's names.
        tensors: Its state dict; take the EMA one for deployment.
        identity: Which FR model's vectors condition it, and how they are scaled.
        title: What the model is called.

    Raises:
        CheckpointError: A flag is missing, unknown or cannot be represented, or the
            tensors are not those that the flags describe; each is named.
    """
    spec = spec_from_flags(flags, identity, title)
    order = _ByHead(spec.model) if not flags["use_new_attention_order"] else None
    return Converted(spec, _converted_tensors(spec, tensors, order))


def spec_from_flags(
    flags: Mapping[str, Any], identity: IdentitySpec, title: str = ""
) -> DiffusionSpec:
    """The facts in guided-diffusion's flags.

    Raises:
        CheckpointError: See :func:`convert_guided_diffusion`.
    """
    _check_flags(flags, identity)
    size = flags["image_size"]
    multipliers = flags["channel_mult"] or _MULTIPLIERS.get(size, "")
    if not multipliers:
        raise _refused("channel_mult", flags, "it has to be stated at this image size")
    levels = _numbers("channel_mult", multipliers)
    # guided-diffusion compares downsampling factors, rounded down, not resolutions.
    factors = {
        size // r for r in _numbers("attention_resolutions", flags) if 0 < r <= size
    }
    per_head = flags["num_head_channels"]
    model = ModelSpec(
        image_size=size,
        base_channels=flags["num_channels"],
        channel_multipliers=levels,
        residual_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(
            size >> level for level in range(len(levels)) if 1 << level in factors
        ),
        num_heads=flags["num_heads"] if per_head == -1 else None,
        num_head_channels=None if per_head == -1 else per_head,
        learned_variance=flags["learn_sigma"],
        scale_shift_norm=flags["use_scale_shift_norm"],
        resblock_updown=flags["resblock_updown"],
        dropout=float(flags.get("dropout", 0.0)),
    )
    return DiffusionSpec(
        model=model,
        identity=identity,
        schedule=ScheduleSpec(flags["noise_schedule"], flags["diffusion_steps"]),
        prediction_type="x0" if flags["predict_xstart"] else "epsilon",
        title=title,
        origin={"converted_from": "guided-diffusion"},
    )


def _check_flags(flags: Mapping[str, Any], identity: IdentitySpec) -> None:
    if "large_size" in flags or "small_size" in flags:
        raise CheckpointError(
            "super-resolution models cannot be converted by this release",
            why="the flags hold large_size or small_size",
        )
    unknown = sorted(set(flags) - set(_NEEDED) - set(_OPTIONAL))
    missing = sorted(set(_NEEDED) - set(flags))
    if unknown or missing:
        raise CheckpointError(
            "these are not the flags of an identity-conditioned guided-diffusion model",
            why=f"missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(map(repr, unknown)) or 'none'}",
            fix="state every flag the model was trained with, under guided-diffusion's "
            "name; head mode and query-key-value order cannot be seen in the weights",
        )
    for name, value in flags.items():
        wanted = _NEEDED.get(name) or _OPTIONAL[name]
        # A bool is an int to Python.
        if not isinstance(value, wanted) or (
            isinstance(value, bool) and wanted is not bool
        ):
            raise _refused(name, flags, "that value cannot be represented")
    heads, upsample = flags["num_heads"], flags.get("num_heads_upsample", -1)
    steps = flags["diffusion_steps"]
    for bad, name, why in (
        (not flags["class_cond"], "class_cond", "a model without identity"),
        (flags["noise_schedule"] not in ("linear", "cosine"), "noise_schedule", ""),
        (upsample not in (-1, heads), "num_heads_upsample", f"num_heads is {heads}"),
        (
            flags.get("rescale_timesteps", False) and steps != 1000,
            "rescale_timesteps",
            f"of {steps} timesteps; timesteps are not rescaled here",
        ),
        (
            flags["embedding_size"] != identity.dim,
            "embedding_size",
            f"the FR model {identity.model_name!r} has {identity.dim} numbers",
        ),
    ):
        if bad:
            raise _refused(name, flags, why)


def _refused(name: str, flags: Mapping[str, Any], why: str) -> CheckpointError:
    return CheckpointError(
        f"the flag {name} = {flags[name]!r:.60} cannot be represented", why=why
    )


def _numbers(name: str, values: str | Mapping[str, Any]) -> tuple[int, ...]:
    text = values if isinstance(values, str) else values[name]
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise _refused(name, {name: text}, "it is no list of whole numbers") from None


@dataclass(frozen=True)
class _ByHead:
    """guided-diffusion's legacy order of a joint projection's rows: head by head,
    (query, key, value) in each. The new order is all queries, all keys, all values."""

    model: ModelSpec

    def sorted(self, rows: Tensor) -> Tensor:
        """Rows [3·C, ...] in the new order."""
        channels = len(rows) // 3
        heads = self.model.num_heads
        if heads is None:
            assert self.model.num_head_channels is not None
            heads = channels // self.model.num_head_channels
        by_head = rows.reshape(heads, 3, channels // heads, *rows.shape[1:])
        return by_head.transpose(0, 1).reshape(rows.shape)


def _converted_tensors(
    spec: DiffusionSpec, tensors: Mapping[str, Tensor], order: _ByHead | None
) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = IdentityUNet(spec.model, spec.identity.dim).state_dict()
    places = dict(_block_names(spec.model))
    sources = {ours: _their_name(ours, places) for ours in wanted}
    missing = sorted({theirs for theirs, _ in sources.values()} - set(tensors))
    unexpected = sorted(set(tensors) - {theirs for theirs, _ in sources.values()})
    if missing or unexpected:
        raise CheckpointError(
            "the tensors are not those that the flags describe",
            why=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
            fix="check that flags and weights belong together",
        )
    made = {}
    for ours, (theirs, part) in sources.items():
        target = wanted[ours]
        tensor = _checked(theirs, tensors[theirs], target.shape, part is not None)
        if part is not None:
            tensor = tensor if order is None else order.sorted(tensor)
            tensor = tensor.chunk(3)[part]
        made[ours] = tensor.reshape(target.shape).to(torch.float32, copy=True)
    return made


def _block_names(model: ModelSpec) -> Iterator[tuple[str, str]]:
    """Our blocks and theirs: residual blocks, attention and resampling in the order in
    which guided-diffusion numbers them."""
    last = len(model.channel_multipliers) - 1
    attends = [model.image_size >> n in model.attention_resolutions for n in range(9)]
    index = 1
    for level in range(last + 1):
        for block in range(model.residual_blocks):
            ours, theirs = f"unet.down_blocks.{level}", f"input_blocks.{index}"
            yield f"{ours}.resnets.{block}", f"{theirs}.0"
            yield f"{ours}.attentions.{block}", f"{theirs}.1"
            index += 1
        if level != last:
            yield f"unet.down_blocks.{level}.downsamplers.0", f"input_blocks.{index}.0"
            index += 1
    for block, kind in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"unet.mid_block.{kind}", f"middle_block.{block}"
    index = 0
    for level in range(last, -1, -1):
        ours = f"unet.up_blocks.{last - level}"
        for block in range(model.residual_blocks + 1):
            yield f"{ours}.resnets.{block}", f"output_blocks.{index}.0"
            yield f"{ours}.attentions.{block}", f"output_blocks.{index}.1"
            index += 1
        place = 2 if attends[level] else 1
        yield f"{ours}.upsamplers.0", f"output_blocks.{index - 1}.{place}"


def _their_name(ours: str, places: Mapping[str, str]) -> tuple[str, int | None]:
    """guided-diffusion's name of one of our tensors, and which third of it ours is
    (None: all of it)."""
    module, kind = ours.rsplit(".", 1)
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}", None
    block = next(place for place in places if module.startswith(f"{place}."))
    theirs, inner = places[block], module[len(block) + 1 :]
    if inner in _QKV:
        return f"{theirs}.qkv.{kind}", _QKV.index(inner)
    names = {**_RESNET, "group_norm": "norm", "to_out.0": "proj_out"}
    # Resampling without a residual block is a single convolution.
    names["conv"] = "op" if "downsamplers" in block else "conv"
    return f"{theirs}.{names[inner]}.{kind}", None


def _checked(name: str, tensor: Tensor, ours: torch.Size, joint: bool) -> Tensor:
    """``tensor`` if it is of the shape that ours has there. Their attention projections
    are convolutions of width 1, three in one where ``joint``."""
    rows, *rest = ours
    shape = (3 * rows if joint else rows, *rest)
    if name.rsplit(".", 2)[-2] in ("qkv", "proj_out") and name.endswith(".weight"):
        shape = (*shape, 1)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}",
            why=f"the flags ask for floating-point numbers of shape {shape}",
            fix="check that flags and weights belong together",
        )
    return tensor


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
