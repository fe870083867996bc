"""guided-diffusion's weights as ours.

Covers guided-diffusion's UNet (Dhariwal & Nichol 2021) without a condition, with the
linear layer of Kansy et al. (ID3PM) in the place of the class embedding, and as its
super-resolution model. ``guided_flags`` reads the facts that weights do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, some_of
from ..spec import DiffusionSpec, IdentitySpec, ModelSpec
from .guided_flags import legacy_order, spec_from_flags
from .unet import IdentityUNet

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
_FIX = "check that flags and weights belong together"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MadeTensors(Mapping[str, Tensor]):
    """Tensors that are made when they are asked for, so that a large model is never in
    memory a second time.

    Args:
        makers: A function for each name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Converted:
    """Another model as ours: what ``save_checkpoint`` takes.

    ``tensors`` is the state dict of an :class:`IdentityUNet`, in float32; each is made
    when it is taken, and is a part of its source where nothing has to be changed.
    """

    spec: DiffusionSpec
    tensors: Mapping[str, Tensor]


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
        identity: Which FR model's vectors condition it, and how they are scaled;
            ``NO_IDENTITY`` for a model without.
        title: What the model is called.

    Raises:
        CheckpointError: A flag is missing, unknown or cannot be represented, or the
            tensors are not those that the flags describe; each is named.
    """
    classes = tensors.get("label_emb.weight")
    if classes is not None:
        raise CheckpointError(
            "a class-conditional model cannot be converted",
            why=f"its label_emb.weight, of shape {tuple(classes.shape)}, stands for "
            "the numbers of classes",
            fix="take a model without condition, or one with identity (image_emb)",
        )
    spec = spec_from_flags(flags, identity, title)
    order = _ByHead(spec.model) if legacy_order(flags) else None
    places = dict(_block_names(spec.model))
    return convert_tensors(spec, tensors, lambda ours: _their_name(ours, places), order)


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


def convert_tensors(
    spec: DiffusionSpec,
    tensors: Mapping[str, Tensor],
    their_name: Callable[[str], tuple[str, int | None]],
    order: _ByHead | None = None,
) -> Converted:
    """Give ``tensors`` our names, after every one was held against ``spec``.

    Args:
        spec: The facts of the model.
        tensors: All of its tensors under the names of where it comes from.
        their_name: That name of one of ours, and which third of it ours is (None: all).
        order: How a joint projection's rows have to be sorted; None is our order.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape or type;
            each is named.
    """
    blocks = spec.model.residual_blocks * len(spec.model.channel_multipliers)
    if blocks > len(tensors):  # the network is made to know the names: not a vast one
        raise CheckpointError(
            f"the flags describe {blocks} residual blocks on the way down",
            why=f"there are {len(tensors)} tensors",
            fix=_FIX,
        )
    with torch.device("meta"):
        wanted = IdentityUNet(spec.model, spec.condition_dim).state_dict()
    sources = {ours: their_name(ours) for ours in wanted}
    missing = sorted({theirs for theirs, _ in sources.values()} - set(tensors))
    unexpected = sorted(set(tensors) - {theirs for theirs, _ in sources.values()})
    if missing or unexpected:
        raise CheckpointError(
            "the tensors are not those that the flags describe",
            why=f"missing: {some_of(missing) or 'none'}; "
            f"unexpected: {some_of(unexpected) or 'none'}",
            fix=_FIX,
        )
    makers = {}
    for ours, (theirs, part) in sources.items():
        shape = wanted[ours].shape
        tensor = _checked(theirs, tensors[theirs], shape, part is not None)
        makers[ours] = _maker(tensor, shape, part, order)
    return Converted(spec, MadeTensors(makers))


def _maker(
    tensor: Tensor, shape: torch.Size, part: int | None, order: _ByHead | None
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        own = tensor
        if part is not None:
            own = own if order is None else order.sorted(own)
            own = own.chunk(3)[part]
        return own.reshape(shape).to(torch.float32)

    return make


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
    if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES:
        raise CheckpointError(
            f"tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}",
            why="the flags ask for float32, float16 or bfloat16 numbers of shape "
            f"{shape}",
            fix=_FIX,
        )
    return tensor
