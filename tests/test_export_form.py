"""The form that is exported: the same function, in float32 and with islands."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from models import tiny_network, tiny_spec
from torch import Tensor, nn

from id3pm_deploy.body_form import KINDS, BodyForm
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.errors import RecipeError
from id3pm_deploy.reference.attention import SelfAttention
from id3pm_deploy.reference.normalisation import Normalise
from id3pm_deploy.reference.precision import body_in, exported_body, island_names
from id3pm_deploy.reference.residual import ResidualBlock, enlarging
from id3pm_deploy.reference.unet import IdentityUNet

MODELS: list[dict[str, Any]] = [
    {"learned_variance": True, "residual_blocks": 2},
    {"scale_shift_norm": False, "resblock_updown": False},
    {"channel_multipliers": (1, 2, 2), "attention_resolutions": (8, 4), "num_heads": 2},
]
FORMS: list[dict[str, Any]] = [
    {},
    {"attention": "plain"},
    {"attention": "native"},
    {"normalisation": "native"},
    {"embeddings": "apart"},
    {"upsampling": "transposed"},
]


def inputs(rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 3, 16, 16, generator=generator)
    times = torch.tensor([3.0, 500.0, 999.0])[:rows]
    return x, times, torch.randn(rows, 16, generator=generator)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def network() -> IdentityUNet:
    return tiny_network(tiny_spec(learned_variance=True))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_every_form_is_the_same_function(model: dict[str, Any]) -> None:
    """Against the unmodified network in float64, so that only one side is rounded."""
    network = tiny_network(tiny_spec(**model))
    arguments = inputs()
    with torch.inference_mode():
        plain = network(*arguments)
        double = _in_float64(network)(*arguments)
        assert error(plain, double) < 3e-6
        for changes in FORMS:
            form = exported_body(network, BodyForm(**changes))
            assert error(form(*arguments), double) < 3e-6, changes


def _in_float64(network: IdentityUNet) -> Any:
    """The network's own modules in float64; the embedding's sinusoids stay float32."""
    import copy

    wide = copy.deepcopy(network).double()

    def run(x: Tensor, times: Tensor, identity: Tensor) -> Tensor:
        wide.frequencies = network.frequencies
        hook = wide.unet.time_embedding.register_forward_pre_hook(
            lambda _, args: (args[0].double(),)
        )
        found = wide(x.double(), times, identity.double())
        hook.remove()
        return cast(Tensor, found)

    return run


def test_the_forms_do_what_they_say(network: IdentityUNet) -> None:
    def modules(kind: type, **changes: Any) -> list[Any]:
        form = exported_body(network, BodyForm(**changes))
        return [module for module in form.modules() if isinstance(module, kind)]

    assert not modules(nn.GroupNorm)
    assert all(norm.native for norm in modules(Normalise, normalisation="native"))
    for kind in ("scaled", "plain", "native"):
        assert {one.kind for one in modules(SelfAttention, attention=kind)} == {kind}
    blocks = len(modules(ResidualBlock))
    linears = len(modules(nn.Linear))
    assert len(modules(nn.Linear, embeddings="apart")) == linears + blocks - 1
    assert not modules(nn.ConvTranspose2d)
    assert len(modules(nn.ConvTranspose2d, upsampling="transposed")) == 1


def test_scaled_attention_scales_before_the_product(network: IdentityUNet) -> None:
    """Scores of queries and keys that are far too large for the product's type."""
    loud = tiny_network(tiny_spec(learned_variance=True))
    attention: Any = loud.unet.mid_block.attentions[0]  # type: ignore[union-attr]
    with torch.no_grad():
        for part in (attention.to_q, attention.to_k):
            part.weight.mul_(150)
    h = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    for kind, fits in (("scaled", True), ("plain", False)):
        form = BodyForm("float16", attention=cast(Any, kind))
        body: Any = body_in(loud, form)
        with torch.inference_mode():
            out = body.unet.mid_block.attentions[0](h)
        assert bool(torch.isfinite(out).all()) is fits


@pytest.mark.parametrize(("height", "channels"), [(4, 8), (7, 3)])
def test_enlarging_and_convolving_at_once(height: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, height, 5, generator=generator).double()
    convolution = nn.Conv2d(channels, 6, 3, padding=1).double()
    with torch.no_grad():
        large = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        assert torch.allclose(enlarging(convolution)(x), convolution(large))


def test_the_original_keeps_its_weights(network: IdentityUNet) -> None:
    before = {name: t.clone() for name, t in network.state_dict().items()}
    modules = [name for name, _ in network.named_modules()]
    for precision in ("float32", "float16", "bfloat16"):
        exported_body(network, BodyForm(cast(Any, precision), upsampling="transposed"))
    assert [name for name, _ in network.named_modules()] == modules
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name])


def test_in_float32_the_network_itself_runs(network: IdentityUNet) -> None:
    assert body_in(network, BodyForm(embeddings="apart", islands=())) is network


PATHS = (
    "unet.conv_in",
    "unet.down_blocks.1",
    "unet.down_blocks.1.resnets.0",
    "unet.down_blocks.1.resnets.0.conv1",
    "unet.down_blocks.1.resnets.0.time_emb_proj",
    "unet.down_blocks.1.attentions.0",
    "unet.down_blocks.1.attentions.0.to_q",
    "unet.mid_block.attentions.0.to_out.0",
    "unet.mid_block.resnets.1.norm1",
    "unet.up_blocks.0.upsamplers.0",
    "unet.up_blocks.0.upsamplers.0.conv1",
    "unet.up_blocks.1.resnets.1.conv_shortcut",
    "unet.conv_norm_out",
    "unet.conv_out",
    "unet.time_embedding.linear_1",
    "identity_projection",
)


class _Watch:
    """Types of what float modules were given and gave, by name."""

    def __init__(self, network: IdentityUNet) -> None:
        self.seen: dict[str, set[torch.dtype]] = {}
        for name, module in network.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(self._note(name))

    def _note(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            found = {p.dtype for p in module.parameters()}
            self.seen[name] = found | {args[0].dtype}

        return note


@pytest.mark.parametrize("island", PATHS)
@pytest.mark.parametrize("upsampling", ["resize", "transposed"])
def test_a_module_by_its_name(
    network: IdentityUNet, island: str, upsampling: str
) -> None:
    """It, and what it holds, computes in float32, everything else in half."""
    islands = (island,)
    form = BodyForm("float16", islands, upsampling=cast(Any, upsampling))
    body = body_in(network, form)
    watch = _Watch(body)
    with torch.inference_mode():
        found = body(*inputs())
        expected = network(*inputs())
    assert found.dtype == torch.float32
    assert 1e-6 < error(found, expected) < 1e-2
    wide = {name for name, kinds in watch.seen.items() if torch.float32 in kinds}
    assert wide, "something runs in float32"
    for name in wide:
        assert name.startswith(island), name
        assert watch.seen[name] == {torch.float32}


def test_kinds(network: IdentityUNet) -> None:
    names = {
        kind: island_names(network, BodyForm("float16", (kind,))) for kind in KINDS
    }
    assert set(names["embedding"]) == {"identity_projection", "unet.time_embedding"}
    assert names["softmax"] == ()
    assert set(names["head"]) == {
        "unet.conv_norm_out",
        "unet.conv_act",
        "unet.conv_out",
    }
    counts = {kind: len(found) for kind, found in names.items()}
    blocks = [m for n, m in network.named_modules() if n.endswith("time_emb_proj")]
    assert counts["projection"] == len(blocks)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert counts["norm"] == len(norms)
    assert counts["attention"] == 4
    assert 0 < counts["skip"] < len(blocks)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_all_islands_leave_nothing_to_round(
    network: IdentityUNet, precision: Any
) -> None:
    """Between neighbouring islands nothing is cast down and up again."""
    with torch.inference_mode():
        expected = network(*inputs())
        islands = ("unet", "identity_projection")
        found = body_in(network, BodyForm(precision, islands))(*inputs())
        assert error(found, expected) < 3e-6
        rounded = body_in(network, BodyForm(precision, ()))(*inputs())
        assert error(rounded, expected) > 1e-4


def test_the_softmax_in_float32(
    network: IdentityUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    original = torch.softmax

    def noting(x: Tensor, dim: int) -> Tensor:
        seen.append(x.dtype)
        return original(x, dim=dim)

    monkeypatch.setattr(torch, "softmax", noting)
    for islands, wanted in ((("softmax",), torch.float32), ((), torch.float16)):
        seen.clear()
        with torch.inference_mode():
            body_in(network, BodyForm("float16", islands))(*inputs())
        assert seen == [wanted] * 4


def test_unknown_islands_name_near_ones(network: IdentityUNet) -> None:
    for island, near in (
        ("unet.mid_block.attention.0", "unet.mid_block.attentions.0"),
        ("softmx", "softmax"),
        ("?", "embedding"),
    ):
        for precision in ("float16", "float32"):
            with pytest.raises(RecipeError, match="no island") as caught:
                body_in(network, BodyForm(cast(Any, precision), (island,)))
            assert near in caught.value.fix
    for islands in (("norm", "norm"), ("",)):
        with pytest.raises(RecipeError, match="named, and once"):
            BodyForm("float16", islands)
        with pytest.raises(RecipeError, match="named, and once"):
            ExportRecipe("test", islands=islands)


def test_native_operators_need_their_opset() -> None:
    assert ExportRecipe("test", normalisation="native", opset=21).form.normalisation
    with pytest.raises(RecipeError, match="needs opset 21"):
        ExportRecipe("test", normalisation="native")
    with pytest.raises(RecipeError, match="bfloat16' needs opset 22"):
        ExportRecipe("test", precision="bfloat16")
    with pytest.raises(RecipeError, match="needs opset 23"):
        ExportRecipe("test", attention="native", opset=22)
