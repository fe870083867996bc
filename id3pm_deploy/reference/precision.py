"""The UNet's body in half precision, with islands of float32.

Nothing of the network's arithmetic is repeated here: modules get a data type, and
where data enters or leaves an island, hooks cast it.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)
from torch import Tensor, nn

from ..body_form import KINDS, BodyForm
from ..errors import RecipeError
from .export_form import rewritten
from .unet import IdentityUNet

_BLOCKS = (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
    ResnetUpsampleBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
)

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def body_in(network: IdentityUNet, form: BodyForm) -> IdentityUNet:
    """``network`` itself where it runs in float32, or a copy in the form asked for.

    The copy's modules have the names of the original's, but for those that the form
    joins. Outputs are float32.

    Raises:
        RecipeError: An island is neither a kind nor the name of a module.
    """
    island_names(network, form)
    if form.precision == "float32":
        return network
    return exported_body(network, form)


def exported_body(network: IdentityUNet, form: BodyForm) -> IdentityUNet:
    """A copy of ``network`` in the form that is exported, in evaluation mode; in
    float32, too. Weights that are the same are shared, so do not train it.

    Raises:
        RecipeError: As in :func:`body_in`.
    """
    names = island_names(network, form)
    weights = {id(weight): weight for weight in network.parameters()}
    half = copy.deepcopy(network, weights).eval()
    islands = {half.get_submodule(name) for name in names}
    float32 = form.precision == "float32"
    islands = rewritten(half, form, set() if float32 else islands)
    if not float32:
        _cast_body(half, DTYPES[form.precision], islands)
    return half


def island_names(network: IdentityUNet, form: BodyForm) -> tuple[str, ...]:
    """Names of the modules that stay in float32; what they hold does, too.

    The softmax is no module, and not among them.

    Raises:
        RecipeError: An island is neither a kind nor the name of a module.
    """
    modules = dict(network.named_modules())
    del modules[""]
    kinds = _modules_of_kinds(network)
    found: dict[str, None] = {}
    for island in form.islands:
        if island in kinds:
            found |= dict.fromkeys(kinds[island])
        elif island in modules:
            found |= dict.fromkeys(_called(island, modules[island]))
        else:
            raise _unknown(island, [*kinds, *modules])
    return tuple(found)


def _modules_of_kinds(network: IdentityUNet) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, module in network.named_modules():
        last = name.rpartition(".")[2]
        if name in ("unet.time_embedding", "identity_projection"):
            found["embedding"].append(name)
        elif last == "time_emb_proj":
            found["projection"].append(name)
        elif name in ("unet.conv_norm_out", "unet.conv_act", "unet.conv_out"):
            found["head"].append(name)
        elif last == "conv_shortcut":
            found["skip"].append(name)
        elif isinstance(module, Attention):
            found["attention"].append(name)
        if isinstance(module, nn.GroupNorm):
            found["norm"].append(name)
    return found


def _called(name: str, module: nn.Module) -> Iterator[str]:
    """The module itself, or the modules of the residual stream that it consists of."""
    if not isinstance(module, (nn.ModuleList, UNet2DModel, *_BLOCKS)):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _called(f"{name}.{child_name}", child)


def _unknown(island: str, known: list[str]) -> RecipeError:
    near = difflib.get_close_matches(island, known, n=4, cutoff=0.5)
    return RecipeError(
        f"there is no island {island!r:.200}",
        why="it is neither a kind nor the name of a module of this network",
        fix=f"near names are {', '.join(near)}"
        if near
        else f"kinds are {', '.join(KINDS)}",
    )


class _CastInput:
    """Hook before a module: the first thing it is given becomes ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        return (args[0].to(self.dtype), *args[1:]), kwargs


class _CastOutput:
    """Hook behind a module: the tensor it gives becomes ``dtype``."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out.to(self.dtype)


def _cast_body(
    network: IdentityUNet, body: torch.dtype, islands: set[nn.Module]
) -> None:
    """Give every module its data type, in place, and the islands their borders.

    Modules along the residual stream cast what they take and hand on what they have,
    so that between two islands nothing is rounded. Islands within a module of the
    stream also cast back.
    """
    borders = list(_cast_weights(network, body, islands))
    stream = list(_stream(network))
    for module in stream:
        own = torch.float32 if module in borders else body
        module.register_forward_pre_hook(_CastInput(own), with_kwargs=True)
    for module in _projections(network):
        own = next(module.parameters()).dtype
        module.register_forward_pre_hook(_CastInput(own), with_kwargs=True)
        if module in borders:
            module.register_forward_hook(_CastOutput(body))
    done = [*stream, *_projections(network)]
    for module in borders:
        if module not in done:
            cast_up = _CastInput(torch.float32)
            module.register_forward_pre_hook(cast_up, with_kwargs=True)
            module.register_forward_hook(_CastOutput(body))


def _cast_weights(
    module: nn.Module, body: torch.dtype, islands: set[nn.Module]
) -> Iterator[nn.Module]:
    """Cast all weights in place; yields the outermost modules of the islands."""
    if module in islands:
        module.float()
        yield module
        return
    for name, weight in module.named_parameters(recurse=False):
        own = nn.Parameter(weight.detach().to(body), requires_grad=False)
        setattr(module, name, own)
    for child in module.children():
        yield from _cast_weights(child, body, islands)


def _stream(network: IdentityUNet) -> Iterator[nn.Module]:
    """The modules that noisy images, sinusoids and identity vectors go through."""
    unet: Any = network.unet
    yield from (unet.time_embedding, unet.conv_in)
    if network.identity_dim:
        yield network.identity_projection
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for _, modules in block.named_children():
            yield from modules
    yield from (unet.conv_norm_out, unet.conv_act, unet.conv_out)


def _projections(network: IdentityUNet) -> Iterator[nn.Module]:
    """The linear layers that are given the embedding."""
    joined = cast(Any, network.conditioning).projection
    if joined is not None:
        yield joined
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".time_emb_proj" in name:
            yield module
