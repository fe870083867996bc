"""A plan's key: whatever determines a plan changes it, and nothing else does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from id3pm_deploy import preflight
from id3pm_deploy.builders import plan_key as module
from id3pm_deploy.builders.graph_facts import graph_facts
from id3pm_deploy.builders.plan_key import (
    NOT_BUILT_IN,
    Builder,
    GpuFacts,
    builder_here,
    plan_key,
)
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.errors import BuildError, MissingPackageError
from id3pm_deploy.preflight import Gpu, Here

RECIPE = EngineRecipe(
    summary="a test",
    backend="tensorrt",
    flavour="tensorrt_rtx",
    export="float16",
    precision="float16",
    dynamic_samples=(1, 2, 3),
    compute_capabilities=("8.6", "12.0"),
)
PLAIN = dataclasses.replace(RECIPE, flavour="tensorrt", compute_capabilities=())
CURRENT = dataclasses.replace(RECIPE, compute_capabilities=("current",))
SAME = dataclasses.replace(PLAIN, hardware_compatibility="same_compute_capability")
AMPERE = dataclasses.replace(PLAIN, hardware_compatibility="ampere_plus")
GPU = GpuFacts("a GPU", "8.6", 82, "13.0")
OTHER_GPUS = {
    "name": dataclasses.replace(GPU, name="another"),
    "compute_capability": dataclasses.replace(GPU, compute_capability="8.9"),
    "multiprocessors": dataclasses.replace(GPU, multiprocessors=84),
    "cuda": dataclasses.replace(GPU, cuda="12.9"),
}

CHANGES: dict[str, Any] = {
    "flavour": "tensorrt",
    "precision": "bfloat16",
    "static_samples": (1,),
    "static_guided_samples": (1,),
    "dynamic_samples": (1, 2, 4),
    "dynamic_rows_per_sample": (1, 1, 2),
    "compute_capabilities": ("8.6",),
    "workspace_share": 0.5,
    "workspace_bytes": 1 << 30,
    "optimization_level": 2,
    "auxiliary_streams": 0,
    "hardware_compatibility": "ampere_plus",
    "version_compatible": True,
    "weight_streaming": True,
    "user_allocation": True,
}
"""Another value of each key of a recipe that reaches TensorRT."""

SAME_PLAN: dict[str, Any] = {
    "summary": "other words",
    "export": "float16-turing",
    "max_opset": 21,
    "operators_refused": ("Attention",),
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "step.onnx"
    path.write_bytes(b"a graph, or nearly")
    return path


def key(graph: Path, recipe: EngineRecipe = RECIPE, **builder: Any) -> str:
    return plan_key(graph, recipe, Builder(**{"version": "1.7.1.116", **builder}))


def test_every_key_of_a_recipe_is_looked_at_here() -> None:
    """A new key of recipes has to be added to one of the tables above."""
    names = {field.name for field in dataclasses.fields(EngineRecipe)}
    assert names == {*CHANGES, *NOT_BUILT_IN, "backend"}
    assert {*SAME_PLAN, "threads"} == {*NOT_BUILT_IN}


@pytest.mark.parametrize("name", CHANGES)
def test_what_reaches_the_builder_changes_the_key(graph: Path, name: str) -> None:
    other = dataclasses.replace(RECIPE, **{name: CHANGES[name]})
    assert getattr(other, name) != getattr(RECIPE, name)
    assert key(graph, other) != key(graph)


@pytest.mark.parametrize("name", SAME_PLAN)
def test_what_does_not_reach_it_does_not(graph: Path, name: str) -> None:
    other = dataclasses.replace(RECIPE, **{name: SAME_PLAN[name]})
    assert key(graph, other) == key(graph)


def test_the_same_is_the_same_from_anywhere(graph: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "other.onnx"
    copy.parent.mkdir()
    copy.write_bytes(graph.read_bytes())
    assert key(copy) == key(graph)
    assert key(graph, dataclasses.replace(RECIPE)) == key(graph)
    assert len(key(graph)) == 64


def test_the_key_of_a_format_is_fixed(graph: Path) -> None:
    """It changes with KEY_VERSION, not by accident; all kept plans would be lost."""
    digits = "e71e7b90d27a60de43551c6c8d0bbbb8b61711458ec53fafe365bba087b060b6"
    assert key(graph) == digits


def test_library_and_graph_change_the_key(graph: Path) -> None:
    found = {key(graph), key(graph, version="1.7.1.117")}
    graph.write_bytes(b"a graph, or nearlz")
    found.add(key(graph))
    assert len(found) == 3


@pytest.mark.parametrize("changed", OTHER_GPUS)
@pytest.mark.parametrize(
    ("recipe", "bound_by"),
    [
        (RECIPE, ()),
        (dataclasses.replace(RECIPE, compute_capabilities=()), ()),
        (AMPERE, ()),
        (SAME, ("compute_capability",)),
        (CURRENT, tuple(OTHER_GPUS)),
        (PLAIN, tuple(OTHER_GPUS)),
    ],
    ids=["rtx", "rtx-default", "ampere_plus", "same", "rtx-current", "plain"],
)
def test_a_gpu_changes_the_key_of_plans_that_are_bound_to_it(
    graph: Path, recipe: EngineRecipe, bound_by: tuple[str, ...], changed: str
) -> None:
    one, other = (key(graph, recipe, gpu=gpu) for gpu in (GPU, OTHER_GPUS[changed]))
    assert (one != other) == (changed in bound_by)


def test_weights_in_other_files_change_the_key(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    numpy = pytest.importorskip("numpy")
    make = onnx.helper
    weights = {
        name: onnx.numpy_helper.from_array(numpy.ones(600, numpy.float32), name)
        for name in ("first", "second")
    }
    constant = make.make_node("Constant", [], ["c"], value=weights["second"])
    nodes = [constant, make.make_node("Add", ["first", "c"], ["y"])]
    out = make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [600])
    body = make.make_graph(nodes, "g", [], [out], [weights["first"]])
    opsets = [make.make_opsetid("", 20), make.make_opsetid("com.example", 77)]
    path = tmp_path / "step.onnx"
    onnx.save(
        make.make_model(body, opset_imports=opsets),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=False,
        size_threshold=0,
        convert_attribute=True,
    )
    facts = graph_facts(path)
    assert facts.opset == 20
    assert facts.operators == {"Constant", "Add"}
    assert len(facts.external) == 2
    found = {key(path)}
    for name in facts.external:
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
        found.add(key(path))
    (tmp_path / facts.external[0]).unlink()
    found.add(key(path))
    assert len(found) == 4


@pytest.mark.parametrize("data", [b"", b"\x3a\xff", b"\x3a\x02\x0a\x7f"])
def test_what_is_no_graph_has_no_facts(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "g").write_bytes(data)
    with pytest.raises(BuildError, match="not an ONNX graph"):
        graph_facts(tmp_path / "g")


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A portable plan's key asks no driver; another's needs one and its GPU."""
    asked: list[str] = []

    def version(flavour: str) -> str:
        asked.append(flavour)
        return "1.2"

    gpus: tuple[Gpu, ...] = (Gpu("a GPU", "8.6", 82), Gpu("a second one", "8.9", 10))

    def here(flavours: tuple[str, ...]) -> Here:
        return Here(gpus, "13.0", versions=dict.fromkeys(flavours, "1.3"))

    monkeypatch.setattr(preflight, "library_version", version)
    monkeypatch.setattr(preflight, "here", here)
    assert builder_here(RECIPE) == Builder("1.2")
    assert asked == ["tensorrt_rtx"]
    for recipe in (CURRENT, PLAIN, SAME):
        assert builder_here(recipe) == Builder("1.3", GPU)
    gpus = ()
    assert builder_here(PLAIN) is None

    def missing(flavour: str) -> str:
        raise MissingPackageError(flavour)

    monkeypatch.setattr(preflight, "library_version", missing)
    assert builder_here(RECIPE) is None
    assert module.KEY_VERSION == 1
