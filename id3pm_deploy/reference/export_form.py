"""The form in which a network's modules are exported: the same function, written so
that a graph of it has few and large operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from ..body_form import BodyForm
from .attention import SelfAttention
from .normalisation import Normalise
from .residual import ResidualBlock
from .unet import IdentityUNet

Replaced = dict[nn.Module, nn.Module]


def rewritten(
    network: IdentityUNet, form: BodyForm, islands: set[nn.Module]
) -> set[nn.Module]:
    """Put a network's modules in the form asked for, in place.

    Args:
        network: A copy of the caller's own.
        form: What to do.
        islands: The modules that will stay in float32.

    Returns:
        The same of the modules that are there afterwards. A part of what is computed
        as one afterwards stands for the whole.
    """
    replaced: Replaced = {}
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.GroupNorm):
            replaced[module] = Normalise(module, form)
            _replace(network, name, replaced[module])
    for name, module in list(network.named_modules()):
        own: nn.Module
        if isinstance(module, Attention):
            own = _attention(module, form, replaced)
        elif isinstance(module, ResnetBlock2D):
            own = _residual(module, form, replaced)
        else:
            continue
        replaced[module] = own
        _replace(network, name, own)
    after = {replaced.get(module, module) for module in islands}
    return after | _project_embeddings(network, form, after)


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _attention(source: Attention, form: BodyForm, replaced: Replaced) -> SelfAttention:
    attention: Any = source
    own = SelfAttention(source, form, attention.group_norm)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        replaced[attention.get_submodule(name)] = own.get_submodule(name)
    return own


def _residual(
    source: ResnetBlock2D, form: BodyForm, replaced: Replaced
) -> ResidualBlock:
    block: Any = source
    own = ResidualBlock(source, form, (block.norm1, block.norm2))
    replaced[block.conv1] = own.conv1
    replaced[block.time_emb_proj] = own.time_emb_proj
    return own


class Conditioning(nn.Module):
    """What residual blocks add to their pictures, made of the embedding at once.

    It gives the joined projections, [R, c, 1, 1] each, and the activated embedding for
    blocks that have a projection of their own.
    """

    def __init__(self, linears: list[nn.Linear], sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.projection = _joined(linears) if linears else None

    def forward(self, embedding: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of [R, E]."""
        activated = functional.silu(embedding)
        if self.projection is None:
            return (), activated
        columns = self.projection(activated)[:, :, None, None]
        return columns.split(self.sizes, dim=1), activated


def _joined(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer whose outputs are those of ``linears``, one behind the other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = torch.cat([linear.bias.detach() for linear in linears])
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.bias = nn.Parameter(bias, requires_grad=False)
    return made


class _Part(nn.Module):
    """A residual block's part of the joined projections."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, conditioning: tuple[tuple[Tensor, ...], Tensor]) -> Any:
        return conditioning[0][self.start : self.stop]


class _Own(nn.Module):
    """A residual block's own projection."""

    def __init__(self, linear: nn.Linear, count: int) -> None:
        super().__init__()
        self.linear = linear
        self.count = count

    def forward(self, conditioning: tuple[tuple[Tensor, ...], Tensor]) -> Any:
        return self.linear(conditioning[1])[:, :, None, None].chunk(self.count, dim=1)


def _project_embeddings(
    network: IdentityUNet, form: BodyForm, islands: set[nn.Module]
) -> set[nn.Module]:
    """Join the projections of all residual blocks but those in islands, in place.

    Returns:
        The joined projection, where it is to stay in float32.
    """
    stays = "projection" in form.islands
    linears: list[nn.Linear] = []
    sizes: list[int] = []
    for block, inside in _residual_blocks(network, islands, inside=False):
        linear = block.time_emb_proj
        count = 2 if block.scale_shift else 1
        apart = inside or (linear in islands and not stays)
        if apart or form.embeddings == "apart":
            block.time_emb_proj = _Own(linear, count)
            continue
        block.time_emb_proj = _Part(len(sizes), len(sizes) + count)
        sizes += [linear.out_features // count] * count
        linears.append(linear)
    made = Conditioning(linears, sizes)
    network.conditioning = made
    joined = made.projection
    return {joined} if stays and joined is not None else set()


def _residual_blocks(
    module: nn.Module, islands: set[nn.Module], inside: bool
) -> Iterator[tuple[Any, bool]]:
    """Residual blocks, and whether each is in an island or one itself."""
    inside = inside or module in islands
    if isinstance(module, ResidualBlock):
        yield module, inside
    for child in module.children():
        yield from _residual_blocks(child, islands, inside)
