"""Recipes of engines: what they may say, and the profiles they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest

from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.builders.recipe import (
    EngineRecipe,
    HardwareCompatibility,
    Profile,
    check_export_fits,
    check_graph_fits,
)
from id3pm_deploy.bundle.manifest import HARDWARE_COMPATIBILITY
from id3pm_deploy.errors import BuildError, RecipeError
from id3pm_deploy.recipes import load_recipe, recipe_folder, recipe_names

CPU: dict[str, Any] = {
    "summary": "a test",
    "backend": "onnxruntime",
    "flavour": "cpu",
    "export": "float32",
    "precision": "float32",
}
RTX: dict[str, Any] = {
    **CPU,
    "backend": "tensorrt",
    "flavour": "tensorrt_rtx",
    "dynamic_samples": (1, 2, 4),
}


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names("engines"))
def test_shipped_recipes_load_and_name_an_export_of_their_precision(name: str) -> None:
    recipe = load_recipe("engines", name, EngineRecipe)
    assert recipe.summary
    assert recipe.export in recipe_names("export")
    export = (recipe_folder("export") / f"{recipe.export}.toml").read_text()
    assert f'precision = "{recipe.precision}"' in export


def test_cpu_and_rtx_are_what_they_are_called() -> None:
    cpu = load_recipe("engines", "cpu", EngineRecipe)
    assert (cpu.backend, cpu.flavour, cpu.profiles) == ("onnxruntime", "cpu", ())
    rtx = load_recipe("engines", "rtx", EngineRecipe)
    assert (rtx.backend, rtx.flavour) == ("tensorrt", "tensorrt_rtx")
    assert rtx.precision == "float16"
    assert rtx.profiles == (Profile((1, 4, 8), (1, 8, 16)),)
    assert "current" not in rtx.compute_capabilities


JETSONS = {"orin-agx": "8.7", "orin-nano": "8.7", "thor": "11.0"}
SERVERS = {"h100": "9.0", "a100": "8.0", "l4": "8.9"}


def test_there_are_recipes_for_these_machines() -> None:
    known = {"cpu", "rtx", "rtx-turing", *SERVERS, *JETSONS}
    assert set(recipe_names("engines")) == known


@pytest.mark.parametrize("name", [*SERVERS, *JETSONS])
def test_plain_tensorrt_has_static_profiles_for_one_gpu(name: str) -> None:
    recipe = load_recipe("engines", name, EngineRecipe)
    assert recipe.flavour == "tensorrt"
    assert recipe.compute_capabilities == ({**SERVERS, **JETSONS}[name],)
    assert not recipe.dynamic_samples, "dynamic sizes are on request"
    assert recipe.profiles
    for profile in recipe.profiles:
        assert profile.samples[0] == profile.samples[2]
        assert profile.rows[0] == profile.rows[2]
    assert {p.rows[0] // p.samples[0] for p in recipe.profiles} == {1, 2}
    assert 0 < recipe.workspace_share <= 0.5
    assert recipe.workspace_bytes
    assert recipe.hardware_compatibility == "none"
    given = load_recipe("engines", name, EngineRecipe, ["dynamic_samples=[1, 2, 4]"])
    assert given.profiles[-1] == Profile((1, 2, 4), (1, 4, 8))


@pytest.mark.parametrize("name", ["orin-agx", "orin-nano"])
def test_orin_has_the_parser_of_tensorrt_10_3(name: str) -> None:
    recipe = load_recipe("engines", name, EngineRecipe)
    assert recipe.max_opset == 20
    assert set(recipe.operators_refused) == {"GroupNormalization", "Attention"}


def test_orin_nano_is_careful_with_memory() -> None:
    """8 GB are host and GPU in one."""
    nano = load_recipe("engines", "orin-nano", EngineRecipe)
    assert {p.samples for p in nano.profiles} == {(1, 1, 1)}
    assert nano.workspace_limit(6 << 30) == 512 << 20
    assert nano.workspace_limit(1 << 30) == 256 << 20
    assert nano.auxiliary_streams == 0
    agx = load_recipe("engines", "orin-agx", EngineRecipe)
    assert nano.workspace_bytes < agx.workspace_bytes


def test_turing_has_an_export_without_float32_matrix_products() -> None:
    recipe = load_recipe("engines", "rtx-turing", EngineRecipe)
    assert recipe.compute_capabilities == ("7.5",)
    assert recipe.export == "float16-turing"
    rtx = load_recipe("engines", "rtx", EngineRecipe)
    assert recipe.profiles == rtx.profiles


@pytest.mark.parametrize("name", recipe_names("engines"))
def test_every_choice_of_a_shipped_recipe_has_its_reason(name: str) -> None:
    """Every key has a comment above it, or follows one of the same group."""
    lines = (recipe_folder("engines") / f"{name}.toml").read_text().splitlines()
    plain = {"summary", "backend", "flavour"}
    groups = {"precision": "export", "dynamic_rows_per_sample": "dynamic_samples"}
    groups["operators_refused"] = "max_opset"
    for before, line in zip(["", *lines], lines, strict=False):
        key = line.split(" ")[0]
        if line.startswith("#") or key in plain:
            continue
        reason = before.startswith(("# ", groups.get(key, "#")))
        assert reason, f"{name}: {key}"
    assert all(len(line) < 89 for line in lines)


@pytest.mark.parametrize("name", recipe_names("engines"))
def test_shipped_recipes_fit_their_export_recipes(name: str) -> None:
    recipe = load_recipe("engines", name, EngineRecipe)
    check_export_fits(recipe, load_recipe("export", recipe.export, ExportRecipe))


ORIN = EngineRecipe(
    **{**RTX, "flavour": "tensorrt"},
    max_opset=20,
    operators_refused=("GroupNormalization", "Attention"),
)


def test_a_graph_that_the_parser_takes() -> None:
    check_graph_fits(ORIN, 20, {"Conv", "InstanceNormalization"})
    check_graph_fits(EngineRecipe(**RTX), 24, {"Attention"})


@pytest.mark.parametrize(
    ("opset", "operators", "why"),
    [
        (21, {"Conv"}, "the graph has opset 21, the parser takes 20"),
        (20, {"Conv", "Attention"}, "the parser has no operator Attention"),
        (
            23,
            {"GroupNormalization", "Attention"},
            "the graph has opset 23, the parser takes 20; "
            "the parser has no operator Attention, GroupNormalization",
        ),
    ],
)
def test_a_graph_that_the_parser_refuses(
    opset: int, operators: set[str], why: str
) -> None:
    with pytest.raises(BuildError) as caught:
        check_graph_fits(ORIN, opset, operators)
    assert caught.value.why == why
    assert "--recipe float32" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"opset": 22}, "opset 22"),
        ({"opset": 21, "normalisation": "native"}, "operator GroupNormalization"),
        ({"opset": 23, "attention": "native"}, "operator Attention"),
    ],
)
def test_an_export_recipe_that_the_parser_refuses(
    change: dict[str, Any], why: str
) -> None:
    export = ExportRecipe("a test", **change)
    with pytest.raises(RecipeError, match="export recipe float32") as caught:
        check_export_fits(ORIN, export)
    assert why in caught.value.why
    check_export_fits(EngineRecipe(**RTX), export)


def test_the_readme_explains_every_key_and_recipe(root: Path) -> None:
    text = (root / "engines" / "README.md").read_text()
    names = [field.name for field in dataclasses.fields(EngineRecipe)]
    for name in [*names, *recipe_names("engines")]:
        assert f"| `{name}` |" in text, name


def test_profiles_are_static_then_guided_then_dynamic() -> None:
    recipe = EngineRecipe(
        **{**RTX, "static_samples": (1, 3), "static_guided_samples": (3,)}
    )
    assert recipe.profiles == (
        Profile((1, 1, 1), (1, 1, 1)),
        Profile((3, 3, 3), (3, 3, 3)),
        Profile((3, 3, 3), (6, 6, 6)),
        Profile((1, 2, 4), (1, 4, 8)),
    )
    assert recipe.profiles[2].to_json() == {"samples": [3, 3, 3], "rows": [6, 6, 6]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dynamic_samples": (1, 8, 4)}, "dynamic_samples must be three rising"),
        ({"dynamic_samples": (4, 2, 8)}, "fewest, usual and most"),
        ({"dynamic_samples": (0, 1, 4)}, "1 <= min"),
        ({"dynamic_samples": (1, 2, 4096)}, "max <= 2048"),
        ({"dynamic_rows_per_sample": (1, 2, 2048)}, "UNet rows"),
        ({"dynamic_rows_per_sample": (2, 1, 2)}, "sample must be three rising"),
        ({"dynamic_samples": (1, 4)}, "three rising numbers"),
        ({"dynamic_rows_per_sample": (2,)}, "three rising numbers"),
        ({"dynamic_samples": ()}, "no profile"),
        ({"static_samples": (2, 2)}, "same profile twice"),
        ({"static_samples": (0,)}, "samples"),
        ({"compute_capabilities": ("89",)}, "such as 8.6"),
        ({"compute_capabilities": ("8.9", "8.9")}, "different numbers"),
        ({"compute_capabilities": ("current", "8.9")}, "must stand alone"),
        ({"workspace_bytes": -1}, "workspace_bytes must be from 0"),
        ({"workspace_bytes": 1 << 20}, "raise it to 16777216 at least"),
        ({"workspace_bytes": (16 << 20) - 1}, "too small for any kernel"),
        ({"workspace_share": -0.1}, "workspace_share must be from 0 to 0.9"),
        ({"workspace_share": 0.95}, "workspace_share must be from 0 to 0.9"),
        ({"max_opset": -1}, "max_opset must be from 0"),
        ({"operators_refused": ("",)}, "names of ONNX operators"),
        ({"operators_refused": ("Group Norm",)}, "names of ONNX operators"),
        ({"operators_refused": ("Conv", "Conv")}, "different names"),
        ({"optimization_level": 6}, "optimization_level must be from 0 to 5"),
        ({"auxiliary_streams": -1}, "auxiliary_streams must be"),
        ({"threads": 2}, "setting of the onnxruntime backend"),
        ({"flavour": "cpu"}, "no flavour 'cpu'"),
        ({"export": ""}, "must name a recipe"),
    ],
)
def test_bad_tensorrt_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        EngineRecipe(**{**RTX, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"static_samples": (1,)},
        {"static_guided_samples": (1,)},
        {"dynamic_samples": (1, 2, 4)},
        {"compute_capabilities": ("8.9",)},
        {"workspace_share": 0.5},
        {"workspace_bytes": 1 << 30},
        {"optimization_level": 0},
        {"auxiliary_streams": 0},
        {"hardware_compatibility": "ampere_plus"},
        {"version_compatible": True},
        {"weight_streaming": True},
        {"user_allocation": True},
        {"max_opset": 20},
        {"operators_refused": ("Attention",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensorrt_settings_are_refused_for_onnxruntime(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="setting of the tensorrt backend"):
        EngineRecipe(**{**CPU, **change})


def test_onnxruntime_has_no_bfloat16() -> None:
    """Its CPU provider lacks the operators."""
    with pytest.raises(RecipeError, match="no engines in bfloat16"):
        EngineRecipe(**{**CPU, "precision": "bfloat16"})
    assert EngineRecipe(**{**RTX, "precision": "bfloat16"}).precision == "bfloat16"


@pytest.mark.parametrize("threads", [-1, 5000])
def test_threads_out_of_range_are_refused(threads: int) -> None:
    with pytest.raises(RecipeError, match="threads must be from 0"):
        EngineRecipe(**{**CPU, "threads": threads})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[1, 2, 4]", "[1, 2, 4]\nprofile = 1", "unknown keys: profile"),
        ("[1, 2, 4]", '"1"', "must be a list"),
        ("[1, 2, 4]", "[1.5, 2, 4]", "must be int"),
        ("[1, 2, 4]", "[1, 8, 4]", "dynamic_samples must be three rising"),
        ("[1, 2, 4]", "[1, 2, 4]\nhardware_compatibility = 'all'", "must be one of"),
        ('"float32"', '"int8"', "must be one of"),
        ('summary = "s"\n', "", "lacks summary"),
    ],
)
def test_bad_recipe_files_are_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (
        'summary = "s"\nbackend = "tensorrt"\nflavour = "tensorrt"\n'
        'export = "mine"\nprecision = "float32"\ndynamic_samples = [1, 2, 4]\n'
    )
    good = load_recipe("engines", _write(tmp_path / "good.toml", text), EngineRecipe)
    assert good.dynamic_samples == (1, 2, 4)
    bad = _write(tmp_path / "bad.toml", text.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe("engines", bad, EngineRecipe)
    assert message in str(caught.value)
    assert "bad.toml" in str(caught.value)


def test_a_bundle_takes_every_compatibility_that_a_recipe_can_have() -> None:
    """Else a plan would be refused after it was built."""
    assert get_args(HardwareCompatibility) == HARDWARE_COMPATIBILITY
