"""FR models that lie, through `embed --model onnx:FILE`."""

from __future__ import annotations

import numpy as np
import pytest
from crafted_onnx import elsewhere
from faces import photo
from onnx import ModelProto, TensorProto, helper
from sandbox import Sandbox, check_done, check_refused

FLOAT = TensorProto.FLOAT


def fr_model(*, dim: int = 8, secret: bool = False) -> ModelProto:
    """An FR model of two nodes; ``dim`` past 8 asks for as many numbers."""
    weight = helper.make_tensor("w", FLOAT, [8], np.ones(8, np.float32))
    if secret:
        weight = elsewhere("secret.bin").graph.initializer[-1]
        weight.name = "w"
    size = helper.make_tensor("size", TensorProto.INT64, [1], [dim])
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["data"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "w"], ["few"]),
            helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
            helper.make_node("Concat", ["few", "zeros"], ["all"], axis=0),
        ],
        "fr",
        [helper.make_tensor_value_info("data", FLOAT, [1, 3, 112, 112])],
        [helper.make_tensor_value_info("all", FLOAT, None)],
        [weight, size],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


@pytest.mark.parametrize("case", ["weights elsewhere", "terabytes", "noise"])
def test_an_fr_model_that_lies(secret: Sandbox, case: str) -> None:
    path = secret.work / "fr.onnx"
    if case == "weights elsewhere":
        path.write_bytes(fr_model(secret=True).SerializeToString())
    elif case == "terabytes":
        path.write_bytes(fr_model(dim=1 << 40).SerializeToString())
    else:
        path.write_bytes(b"\xff" * 1000)
    arguments = ("embed", photo(), "--out", "who.npz", "--model", f"onnx:{path}")
    check_refused(secret.run(*arguments), "fr", seconds=10)
    assert not (secret.work / "who.npz").exists()


def test_a_valid_fr_model_of_the_same_making(secret: Sandbox) -> None:
    path = secret.work / "fr.onnx"
    path.write_bytes(fr_model().SerializeToString())
    arguments = ("embed", photo(), "--out", "who.npz", "--model", f"onnx:{path}")
    check_done(secret.run(*arguments))
