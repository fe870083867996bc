"""The vendor's command that builds what a recipe says."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest

from id3pm_deploy.backends.base import StepShapes
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.builders.trtexec import step_dimensions, trtexec_command
from id3pm_deploy.errors import InputError
from id3pm_deploy.recipes import load_recipe, recipe_names

PLAIN = EngineRecipe(
    summary="a test",
    backend="tensorrt",
    flavour="tensorrt",
    export="float16",
    precision="float16",
    static_guided_samples=(3,),
)
RTX = dataclasses.replace(PLAIN, flavour="tensorrt_rtx")
INPUTS = step_dimensions(StepShapes(3, 64, 512), 29)
SHAPES = "state:4x3x3x64x64,noise:3x3x64x64,identity:6x512,row:6,mix:2x3x6,step:3x29"


def words(recipe: EngineRecipe, **changes: Any) -> tuple[str, ...]:
    made = dataclasses.replace(recipe, **changes)
    return trtexec_command(made, Path("a.onnx"), Path("b.plan"), INPUTS).words


def test_one_profile_of_plain_tensorrt() -> None:
    assert words(PLAIN) == (
        "trtexec",
        "--onnx=a.onnx",
        "--saveEngine=b.plan",
        "--skipInference",
        "--noTF32",
        "--stronglyTyped",
        f"--minShapes={SHAPES}",
        f"--optShapes={SHAPES}",
        f"--maxShapes={SHAPES}",
    )


def test_several_profiles_are_numbered_and_in_the_plans_order() -> None:
    found = words(PLAIN, static_samples=(1,), dynamic_samples=(1, 2, 3))
    assert [w for w in found if w.startswith("--profile")] == [
        "--profile=0",
        "--profile=1",
        "--profile=2",
    ]
    last = found[found.index("--profile=2") + 1 :]
    assert [w.split("=")[0] for w in last] == [
        "--minShapes",
        "--optShapes",
        "--maxShapes",
    ]
    for word, samples, rows in zip(last, (1, 2, 3), (1, 4, 6), strict=True):
        assert f"mix:2x{samples}x{rows}," in word
        assert f"identity:{rows}x512" in word


@pytest.mark.parametrize(
    ("recipe", "change", "option"),
    [
        (PLAIN, {"workspace_bytes": 1 << 30}, "--memPoolSize=workspace:1024M"),
        (PLAIN, {"workspace_bytes": 20_000_000}, "--memPoolSize=workspace:20000000B"),
        (PLAIN, {"optimization_level": 0}, "--builderOptimizationLevel=0"),
        (PLAIN, {"auxiliary_streams": 0}, "--maxAuxStreams=0"),
        (PLAIN, {"version_compatible": True}, "--versionCompatible"),
        (PLAIN, {"weight_streaming": True}, "--allowWeightStreaming"),
        (
            PLAIN,
            {"hardware_compatibility": "ampere_plus"},
            "--hardwareCompatibilityLevel=ampere+",
        ),
        (
            PLAIN,
            {"hardware_compatibility": "same_compute_capability"},
            "--hardwareCompatibilityLevel=sameComputeCapability",
        ),
        (
            RTX,
            {"compute_capabilities": ("8.6", "12.0")},
            "--computeCapabilities=86,120",
        ),
        (RTX, {"compute_capabilities": ("current",)}, "--useGpu"),
    ],
)
def test_each_setting_has_its_option(
    recipe: EngineRecipe, change: dict[str, Any], option: str
) -> None:
    assert set(words(recipe, **change)) - set(words(recipe)) == {option}


def test_tensorrt_rtx_is_another_program() -> None:
    found = words(RTX)
    assert found[0] == "tensorrt_rtx"
    assert "--stronglyTyped" not in found


def test_plain_tensorrt_builds_for_the_gpu_that_is_there() -> None:
    assert words(PLAIN, compute_capabilities=("8.7",)) == words(PLAIN)


def test_what_has_no_option_is_said() -> None:
    recipe = dataclasses.replace(
        RTX, workspace_share=0.25, workspace_bytes=1 << 29, user_allocation=True
    )
    found = trtexec_command(recipe, Path("a.onnx"), Path("b.plan"), INPUTS)
    assert "--memPoolSize=workspace:512M" in found.words
    assert len(found.notes) == 2
    assert "workspace_share = 0.25" in found.notes[0]
    assert "ceiling is given" in found.notes[0]
    assert "user_allocation" in found.notes[1]
    recipe = dataclasses.replace(recipe, workspace_bytes=0)
    found = trtexec_command(recipe, Path("a.onnx"), Path("b.plan"), INPUTS)
    assert "no limit" in found.notes[0]


def test_words_are_quoted_for_a_shell() -> None:
    graph = Path("my bundle; rm -rf ~/$(x)/it's.onnx")
    found = trtexec_command(PLAIN, graph, Path("b.plan"), INPUTS)
    text = str(found)
    script = f"set -- {text}; printf '%s\\0' \"$@\""
    shown = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    assert tuple(shown.stdout.decode().split("\0")[:-1]) == found.words
    assert text.splitlines()[0] == "trtexec \\"


def test_inputs_are_the_models() -> None:
    assert step_dimensions(StepShapes(3, 256, 0, 64), 30) == {
        "state": (4, "B", 3, 256, 256),
        "noise": ("B", 3, 256, 256),
        "row": ("R",),
        "mix": (2, "B", "R"),
        "step": ("B", 30),
        "low_res": ("B", 3, 64, 64),
    }


def test_other_backends_make_no_plan() -> None:
    cpu = load_recipe("engines", "cpu", EngineRecipe)
    with pytest.raises(InputError, match="makes no plan"):
        trtexec_command(cpu, Path("a.onnx"), Path("b.plan"), INPUTS)


@pytest.mark.parametrize("name", sorted({*recipe_names("engines")} - {"cpu"}))
def test_every_shipped_recipe_has_a_command(name: str) -> None:
    recipe = load_recipe("engines", name, EngineRecipe)
    found = words(recipe)
    shapes = [w for w in found if "Shapes=" in w]
    assert len(shapes) == 3 * len(recipe.profiles)
