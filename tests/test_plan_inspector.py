"""What the inspector says of a plan, in the words of TensorRT 10 and 11.

The layers are written after the vendor's documentation and published dumps; nothing
here comes from a plan of ours, for want of a GPU.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from id3pm_deploy.builders.plan_inspector import (
    ask_for_details,
    inspect_plan,
    layer_type,
    plan_types,
)
from id3pm_deploy.builders.precision import NodeWork, type_shares

HIDDEN = "N/A due to dynamic shapes"
CHANNELS = "Channel major FP16 format where channel % 8 == 0"


def tensor(text: str, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "t", "Location": "Device", "Dimensions": [2, 8], key: text}


CONVOLUTION = {
    "Name": "body + node_relu",
    "LayerType": "CaskConvolution",
    "Inputs": [tensor(HIDDEN)],
    "Outputs": [tensor(HIDDEN)],
    "ParameterType": "Convolution",
    "Weights": {"Type": "Half", "Count": 576},
    "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc",
}
REFORMAT = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to body",
    "LayerType": "Reformat",
    "Inputs": [tensor("Row major linear FP32")],
    "Outputs": [tensor(CHANNELS)],
    "Metadata": "[ONNX Layer: body]",
}
FUSED = {
    "Name": "_gemm_mha_v2_myl0_4",
    "LayerType": "kgen",
    "Inputs": [tensor("Int32"), tensor("Half")],
    "Outputs": [tensor("Half")],
    "Metadata": "[ONNX Layer: qk]\x1f[ONNX Layer: softmax]\x1f[ONNX Layer: av]",
}
HEAD = {
    "Name": "__myl_head",
    "LayerType": "gemm",
    "Inputs": [tensor("Float", "Datatype"), tensor("Float", "DataType")],
    "Outputs": [{"Format": "Row major linear FP32 format (kLINEAR)"}],
    "Metadata": "[ONNX Layer: head]",
    "TacticName": "sm80_xmma_gemm_f32f32_f32f32_f32",
}
WORK = (
    NodeWork("body", "CONVOLUTION", "HALF", 800),
    NodeWork("qk", "MATRIX_MULTIPLY", "HALF", 100),
    NodeWork("av", "MATRIX_MULTIPLY", "HALF", 60),
    NodeWork("head", "MATRIX_MULTIPLY", "FLOAT", 40),
)


def test_layers_and_work_by_type() -> None:
    found = plan_types({"Layers": [REFORMAT, CONVOLUTION, FUSED, HEAD]}, WORK)
    assert found == {
        "source": "plan",
        "profile": 0,
        "layers": {
            "CaskConvolution": {"HALF": 1},
            "Reformat": {"FLOAT": 1},
            "gemm": {"FLOAT": 1},
            "kgen": {"HALF": 1},
        },
        "multiply_accumulates": {
            "CONVOLUTION": {"HALF": 800},
            "MATRIX_MULTIPLY": {"HALF": 160, "FLOAT": 40},
        },
    }
    assert json.loads(json.dumps(found)) == found
    assert type_shares(found) == {"HALF": 0.96, "FLOAT": 0.04}


def test_a_float32_kernel_in_a_float16_network_shows() -> None:
    slow = {**CONVOLUTION, "Weights": {"Type": "Float", "Count": 576}}
    found = plan_types({"Layers": [slow, FUSED, HEAD]}, WORK)
    assert type_shares(found)["HALF"] == 0.16


def test_a_node_that_no_layer_names_is_unknown() -> None:
    found = plan_types({"Layers": [REFORMAT, FUSED]}, WORK)
    assert found["multiply_accumulates"] == {
        "CONVOLUTION": {"UNKNOWN": 800},
        "MATRIX_MULTIPLY": {"HALF": 160, "UNKNOWN": 40},
    }


def test_a_name_is_not_found_within_another() -> None:
    work = (NodeWork("bod", "CONVOLUTION", "HALF", 5),)
    found = plan_types({"Layers": [CONVOLUTION]}, work)
    assert found["multiply_accumulates"] == {"CONVOLUTION": {"UNKNOWN": 5}}


def test_only_the_layers_of_one_profile_count() -> None:
    second = {**CONVOLUTION, "Name": "body + node_relu [profile 1]"}
    second["Weights"] = {"Type": "Float"}
    layers = {"Layers": [CONVOLUTION, second]}
    first, other = (plan_types(layers, WORK[:1], profile) for profile in (0, 1))
    assert first["multiply_accumulates"] == {"CONVOLUTION": {"HALF": 800}}
    assert other["multiply_accumulates"] == {"CONVOLUTION": {"FLOAT": 800}}
    assert (first["profile"], other["profile"]) == (0, 1)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Half", "HALF"),
        (CHANNELS, "HALF"),
        ("FP16", "HALF"),
        ("Float", "FLOAT"),
        ("Row major linear FP32", "FLOAT"),
        ("BFloat16", "BF16"),
        ("BF16", "BF16"),
        ("Row major linear BF16 format", "BF16"),
        ("FP8", "FP8"),
        ("Int8", "INT8"),
        ("Int32", "INT32"),
        ("Row major Int64 format", "INT64"),
        ("Bool", "BOOL"),
        (HIDDEN, "UNKNOWN"),
        ("", "UNKNOWN"),
        ("something new", "UNKNOWN"),
    ],
)
@pytest.mark.parametrize("key", ["Format/Datatype", "Datatype", "DataType"])
def test_words_for_a_type(text: str, name: str, key: str) -> None:
    assert layer_type({"Inputs": [tensor(text, key)]}) == name
    assert layer_type({"Inputs": [], "Outputs": [tensor(text, key)]}) == name


def test_weights_come_first_then_inputs_that_are_no_index() -> None:
    half, whole, index = tensor("Half"), tensor("Float"), tensor("Int32")
    assert layer_type({"Weights": {"Type": "Half"}, "Inputs": [whole]}) == "HALF"
    assert layer_type({"Inputs": [index, half], "Outputs": [whole]}) == "HALF"
    assert layer_type({"Inputs": [tensor(HIDDEN)], "Outputs": [whole]}) == "FLOAT"
    assert layer_type({"Inputs": [index], "Outputs": [index]}) == "INT32"
    assert layer_type({"Inputs": ["?"], "Weights": "none"}) == "UNKNOWN"


def test_a_tf32_kernel_is_no_float32() -> None:
    layer = {**HEAD, "TacticName": "sm80_xmma_gemm_tf32tf32_tf32f32_f32"}
    assert layer_type(layer) == "TF32"
    assert layer_type(HEAD) == "FLOAT"


def runtime(information: str, **changes: Any) -> tuple[Any, list[Any]]:
    """A module whose plans can be loaded, and what was asked of it."""
    asked: list[Any] = []
    context = SimpleNamespace(
        set_optimization_profile_async=lambda *a: asked.append(a),
        set_input_shape=lambda *a: asked.append(a),
    )
    inspector = SimpleNamespace(get_engine_information=lambda kind: information)

    def make_context(strategy: Any) -> Any:
        asked.append(strategy)
        return context

    engine = SimpleNamespace(
        create_engine_inspector=lambda: inspector,
        create_execution_context=make_context,
    )
    loader = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine)
    names: dict[str, Any] = {
        "Runtime": lambda logger: loader,
        "ExecutionContextAllocationStrategy": SimpleNamespace(USER_MANAGED="none"),
        "LayerInformationFormat": SimpleNamespace(JSON="json"),
        **changes,
    }
    return SimpleNamespace(**names), asked


def look(trt: Any) -> dict[str, Any]:
    logger: Any = None
    return inspect_plan(trt, logger, b"plan", 1, {"x": (2, 8)}, WORK[:1])


def test_a_plan_is_looked_at_in_the_profile_and_shapes_asked_for() -> None:
    layer = {**CONVOLUTION, "Name": "body [profile 1]"}
    trt, asked = runtime(json.dumps({"Layers": [layer], "Bindings": ["x"]}))
    found = look(trt)
    assert found["multiply_accumulates"] == {"CONVOLUTION": {"HALF": 800}}
    assert "not_counted" not in found
    assert asked == ["none", (1, 0), ("x", (2, 8))]


def test_a_plan_that_cannot_be_loaded_has_a_reason_instead() -> None:
    nothing = SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    trt, _ = runtime("", Runtime=lambda logger: nothing)
    why = "the plan cannot be loaded here"
    assert look(trt) == {"source": "plan", "not_counted": why}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"Layers": ["body", "head"]}', "only the names"),
        ('{"Layers": []}', "only the names"),
        ("no JSON", "Expecting value"),
        ("[]", "has no attribute"),
    ],
)
def test_an_account_that_cannot_be_read_has_a_reason_instead(
    text: str, reason: str
) -> None:
    found = look(runtime(text)[0])
    assert found.keys() == {"source", "not_counted"}
    assert reason in found["not_counted"]


def test_a_library_without_an_inspector() -> None:
    found = look(SimpleNamespace(Runtime=lambda logger: None))
    assert found["not_counted"] == "no runtime can be made"


def test_details_are_asked_for_where_a_library_has_them() -> None:
    config: Any = SimpleNamespace(profiling_verbosity="names")
    ask_for_details(SimpleNamespace(), config)
    assert config.profiling_verbosity == "names"
    trt = SimpleNamespace(ProfilingVerbosity=SimpleNamespace(DETAILED="all"))
    ask_for_details(trt, config)
    assert config.profiling_verbosity == "all"
    ask_for_details(trt, SimpleNamespace())  # type: ignore[arg-type]
