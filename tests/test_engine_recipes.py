"""Recipes of engines: what they may say, and the profiles they stand for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from id3pm_deploy.builders.recipe import EngineRecipe, Profile
from id3pm_deploy.errors import RecipeError
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
        {"workspace_bytes": 1},
        {"optimization_level": 0},
        {"auxiliary_streams": 0},
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
