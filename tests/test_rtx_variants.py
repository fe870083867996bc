"""Plans of every kind that TensorRT-RTX builds without a GPU, really built here.

What each claims is read back in the process that builds it, at the moment of the build:
a module that stands before TensorRT-RTX writes down what the network, the builder's
configuration and its profiles say.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_network, tiny_spec

from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.builders.precision import share_of
from id3pm_deploy.builders.recipe import LEAST_WORKSPACE, EngineRecipe
from id3pm_deploy.builders.tensorrt import BuiltPlan, build_plan
from id3pm_deploy.errors import BuildError
from id3pm_deploy.recipes import load_recipe
from id3pm_deploy.reference.checkpoint import save_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs tensorrt_rtx (x86-64 Linux)",
)

MIB = 1 << 20
CHANNELS, SIZE = 8, 16
HEAD = CHANNELS / (CHANNELS * CHANNELS * 9 + CHANNELS)
"""Share of the head's convolution in the multiply-accumulates of ``step_graph``."""

WITNESS = """
import json, sys
from pathlib import Path

here = Path(__file__).parent
sys.path.remove(str(here))
del sys.modules["tensorrt_rtx"]
import tensorrt_rtx as real

made = []


def sizes(profile, network):
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    return {n: [list(s) for s in profile.get_shape(n)] for n in names}


class Builder(real.Builder):
    def create_optimization_profile(self):
        made.append(super().create_optimization_profile())
        return made[-1]

    def build_serialized_network(self, network, config):
        flags = real.BuilderFlag.__members__
        count = config.num_compute_capabilities
        typed = real.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        facts = {
            "strongly_typed": network.get_flag(typed),
            "flags": [name for name, flag in flags.items() if config.get_flag(flag)],
            "workspace": config.get_memory_pool_limit(real.MemoryPoolType.WORKSPACE),
            "level": config.builder_optimization_level,
            "streams": config.max_aux_streams,
            "capabilities": [config.get_compute_capability(i).name
                             for i in range(count)],
            "profiles": [sizes(one, network) for one in made],
            "taken": config.num_optimization_profiles,
        }
        (here / "facts.json").write_text(json.dumps(facts))
        return super().build_serialized_network(network, config)


real.Builder = Builder
sys.modules["tensorrt_rtx"] = real
"""


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``facts.json`` is written by each build."""
    folder = tmp_path / "witness"
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(WITNESS)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def step_graph(precision: str, product: str = "") -> bytes:
    """A step-like ONNX model: B pictures dealt to R rows, two convolutions.

    Args:
        precision: Of the first convolution; the second, the head, is in float32.
        product: Precision of a matrix product before the first; empty for none.
    """
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    types = {
        "float32": kinds.FLOAT,
        "float16": kinds.FLOAT16,
        "bfloat16": kinds.BFLOAT16,
    }
    body, picture = types[precision], (CHANNELS, SIZE, SIZE)
    weights: dict[str, tuple[Any, tuple[int, ...]]] = {
        "weights": (body, (CHANNELS, CHANNELS, 3, 3)),
        "head_weights": (kinds.FLOAT, (1, CHANNELS, 1, 1)),
    }
    nodes = [make.make_node("Gather", ["state", "row"], ["rows"], name="deal")]
    last = "rows"
    if product:
        weights["factor"] = (types[product], (SIZE, SIZE))
        nodes += [
            make.make_node("Cast", [last], ["p"], name="to_p", to=types[product]),
            make.make_node("MatMul", ["p", "factor"], ["q"], name="product"),
        ]
        last = "q"
    nodes += [
        make.make_node("Cast", [last], ["x"], name="to_body", to=body),
        make.make_node("Conv", ["x", "weights"], ["c"], name="body", pads=[1] * 4),
        make.make_node("Cast", ["c"], ["y"], name="to_head", to=kinds.FLOAT),
        make.make_node("Conv", ["y", "head_weights"], ["out"], name="head"),
    ]
    random = np.random.default_rng(0)
    tensors = [
        make.make_tensor(name, kind, shape, random.normal(size=shape).ravel().tolist())
        for name, (kind, shape) in weights.items()
    ]
    inputs = [
        make.make_tensor_value_info("state", kinds.FLOAT, ["B", *picture]),
        make.make_tensor_value_info("row", kinds.INT32, ["R"]),
    ]
    out = make.make_tensor_value_info("out", kinds.FLOAT, ["R", 1, SIZE, SIZE])
    graph = make.make_graph(nodes, "step", inputs, [out], tensors)
    opset = 22 if precision == "bfloat16" else 20
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", opset)])
    data: bytes = model.SerializeToString()
    return data


class Variants:
    """Builds plans of ``step_graph`` and says what was seen of them."""

    def __init__(self, folder: Path, witness: Path) -> None:
        self.folder, self.witness = folder, witness
        self.plan = folder / "a.plan"

    def build(
        self, target: str, *settings: str, product: str = ""
    ) -> tuple[BuiltPlan, dict[str, Any]]:
        """The plan's facts, and what was read back when it was built."""
        recipe = load_recipe("engines", target, EngineRecipe, settings)
        graph = self.folder / "step.onnx"
        graph.write_bytes(step_graph(recipe.precision, product))
        plan = build_plan(graph, recipe, None, self.plan)
        with open(self.plan, "rb") as handle:
            assert handle.read(4) == b"vtrt"
        assert self.plan.stat().st_size > 10_000
        seen = json.loads((self.witness / "facts.json").read_text())
        assert seen["strongly_typed"]
        assert "TF32" not in seen["flags"]
        assert seen["taken"] == len(recipe.profiles) == len(seen["profiles"])
        return plan, seen


@pytest.fixture
def variants(tmp_path: Path, witness: Path) -> Variants:
    return Variants(tmp_path, witness)


@pytest.mark.parametrize(
    ("precision", "name"),
    [("float32", "FLOAT"), ("float16", "HALF"), ("bfloat16", "BF16")],
)
def test_each_precision(variants: Variants, precision: str, name: str) -> None:
    settings = [f"export={precision}", f"precision={precision}"]
    plan, _ = variants.build("rtx", *settings)
    assert plan.precision == precision
    share = share_of(plan.layer_types, precision, "CONVOLUTION")
    assert share == pytest.approx(1 if precision == "float32" else 1 - HEAD)
    layers = plan.layer_types["layers"]["CONVOLUTION"]
    assert layers == ({name: 2} if name == "FLOAT" else {name: 1, "FLOAT": 1})


def sizes(samples: int, rows: int) -> tuple[list[int], list[int]]:
    return [samples, CHANNELS, SIZE, SIZE], [rows]


def shapes(seen: dict[str, Any]) -> list[list[tuple[list[int], list[int]]]]:
    """Of each profile the shapes of state and row: fewest, usual and most."""
    return [
        list(zip(profile["state"], profile["row"], strict=True))
        for profile in seen["profiles"]
    ]


def test_a_dynamic_profile(variants: Variants) -> None:
    plan, seen = variants.build("rtx")
    assert shapes(seen) == [[sizes(1, 1), sizes(4, 8), sizes(8, 16)]]
    assert plan.profiles == ({"samples": [1, 4, 8], "rows": [1, 8, 16]},)
    assert seen["capabilities"] == ["SM80", "SM86", "SM89", "SM120"]


def test_a_static_profile(variants: Variants) -> None:
    plan, seen = variants.build("rtx", "dynamic_samples=[]", "static_samples=[2]")
    assert shapes(seen) == [[sizes(2, 2)] * 3]
    assert plan.profiles == ({"samples": [2, 2, 2], "rows": [2, 2, 2]},)


def test_several_profiles(variants: Variants) -> None:
    settings = ["static_samples=[1, 2]", "static_guided_samples=[1]"]
    plan, seen = variants.build("rtx", *settings)
    assert shapes(seen) == [
        [sizes(1, 1)] * 3,
        [sizes(2, 2)] * 3,
        [sizes(1, 2)] * 3,
        [sizes(1, 1), sizes(4, 8), sizes(8, 16)],
    ]
    assert len(plan.profiles) == 4


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ("weight_streaming=true", "WEIGHT_STREAMING"),
        ("user_allocation=true", "REQUIRE_USER_ALLOCATION"),
    ],
)
def test_weight_streaming_and_capturable(
    variants: Variants, setting: str, flag: str
) -> None:
    _, seen = variants.build("rtx", setting)
    assert seen["flags"] == [flag]


def test_the_smallest_workspace(variants: Variants) -> None:
    """A quarter of it is too little for this graph."""
    _, seen = variants.build("rtx", f"workspace_bytes={LEAST_WORKSPACE}")
    assert seen["workspace"] == LEAST_WORKSPACE


def test_limits_and_levels(variants: Variants) -> None:
    _, seen = variants.build(
        "rtx",
        f"workspace_bytes={256 * MIB}",
        "optimization_level=1",
        "auxiliary_streams=0",
        'compute_capabilities=["12.0"]',
    )
    assert (seen["workspace"], seen["level"], seen["streams"]) == (256 * MIB, 1, 0)
    assert seen["capabilities"] == ["SM120"]
    assert seen["flags"] == []


def test_turing(variants: Variants) -> None:
    plan, seen = variants.build("rtx-turing", product="float16")
    assert seen["capabilities"] == ["SM75"]
    assert plan.compute_capabilities == ("7.5",)
    assert share_of(plan.layer_types, "float16", "MATRIX_MULTIPLY") == 1


def test_turing_refuses_float32_matrix_products(variants: Variants) -> None:
    with pytest.raises(BuildError, match="could not build a plan") as caught:
        variants.build("rtx-turing", product="float32")
    assert "7.5 has no float32 matrix products" in caught.value.fix


def test_a_version_compatible_plan_is_not_built_here(variants: Variants) -> None:
    """It carries a runtime of its own, which this installation lacks."""
    with pytest.raises(BuildError, match="could not build a plan") as caught:
        variants.build("rtx", "version_compatible=true")
    assert "libnvinfer_lean" in caught.value.why
    assert "leave out version_compatible" in caught.value.fix
    assert not variants.plan.exists()


def test_another_gpus_compatibility_is_not_taken(variants: Variants) -> None:
    with pytest.raises(BuildError, match="does not take hardware_compatibility"):
        variants.build("rtx", "hardware_compatibility=ampere_plus")


@pytest.mark.slow
def test_a_super_resolution_model(tmp_path: Path, witness: Path) -> None:
    """As a model of its own; in a chain both stages go the same way."""
    spec = tiny_spec(
        image_size=8,
        low_res_size=4,
        learned_variance=True,
        channel_multipliers=(1, 1),
        attention_resolutions=(4,),
    )
    save_checkpoint(tmp_path / "large", spec, tiny_network(spec).state_dict())
    built = build_engine(tmp_path / "large", "rtx", tmp_path / "bundle")
    built.bundle.verify()
    seen = json.loads((witness / "facts.json").read_text())
    (profile,) = seen["profiles"]
    assert profile["low_res"] == [[b, 3, 4, 4] for b in (1, 4, 8)]
    assert profile["identity"] == [[r, 16] for r in (1, 8, 16)]
    share = share_of(built.entry.layer_types, "float16", "CONVOLUTION")
    assert share is not None
    assert 0.9 < share < 1
    assert built.entry.settings["export"] == "float16"


@pytest.mark.slow
def test_the_turing_export(tmp_path: Path) -> None:
    spec = tiny_spec(
        image_size=8, channel_multipliers=(1, 1), attention_resolutions=(4,)
    )
    save_checkpoint(tmp_path / "a", spec, tiny_network(spec).state_dict())
    built = build_engine(tmp_path / "a", "rtx-turing", tmp_path / "bundle")
    assert built.graph.recipe == "float16-turing"
    assert built.entry.compute_capabilities == ("7.5",)
    assert share_of(built.entry.layer_types, "float16", "MATRIX_MULTIPLY") == 1
