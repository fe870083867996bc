"""ONNX files that lie, in bundles whose hashes are right, and as FR models.

Whoever wrote the graph wrote the manifest as well: nothing but what the product itself
looks at stands between the file and the runtime.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from crafted_onnx import (
    DIM,
    PICTURE,
    SLOTS,
    WIDTH,
    elsewhere,
    step_model,
    write_bundle,
)
from onnx import ModelProto, TensorProto, helper
from sandbox import Sandbox, check_done, check_refused

GIGABYTE = 1 << 30
SAMPLE = ("--unconditional", "--steps", "2", "--count", "1", "--out", "out")
FLOAT = TensorProto.FLOAT


def with_weights(
    dims: Sequence[int], kind: int = FLOAT, *, packed: bool = True, **fields: Any
) -> ModelProto:
    """A step graph with one more weight, whose fields are set one by one."""
    model = step_model(helper.make_node("Identity", ["weight"], ["more"]))
    weight = model.graph.initializer.add()
    weight.name, weight.data_type = "weight", kind
    weight.dims.extend(dims)
    for name, value in fields.items():
        setattr(weight, name, value)
    return model


def elsewhere_in_a_constant(place: str) -> ModelProto:
    """The same, in the attribute of a node."""
    tensor = elsewhere(place).graph.initializer[-1]
    return step_model(helper.make_node("Constant", [], ["more"], value=tensor))


def branches(depth: int) -> ModelProto:
    """A step graph with ``If`` inside ``If``."""
    out = [helper.make_tensor_value_info("y", FLOAT, None)]
    leaf = [helper.make_node("Identity", ["first"], ["y"])]
    inner = helper.make_graph(leaf, "leaf", [], out)
    for _ in range(depth):
        node = helper.make_node("If", ["yes"], ["y"], then_branch=inner)
        node.attribute.append(helper.make_attribute("else_branch", inner_leaf(out)))
        inner = helper.make_graph([node], "inner", [], out)
    last = helper.make_node("If", ["yes"], ["more"], then_branch=inner)
    last.attribute.append(helper.make_attribute("else_branch", inner_leaf(out)))
    return step_model(last, x0="more", constants={"yes": np.bool_(True)})


def inner_leaf(out: Any) -> Any:
    """A branch of one node."""
    node = helper.make_node("Identity", ["first"], ["y"])
    return helper.make_graph([node], "leaf", [], out)


def endless() -> ModelProto:
    """A step graph that loops for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", FLOAT, None),
        ],
    )
    node = helper.make_node("Loop", ["", "yes", "first"], ["more"], body=body)
    return step_model(node, x0="more", constants={"yes": np.bool_(True)})


def functions() -> ModelProto:
    """A step graph with functions that double each other: 2**40 nodes unfolded."""
    model = step_model(
        helper.make_node("f40", ["first"], ["more"], domain="mine"), x0="more"
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    for number in range(41):
        kind, domain = ("Neg", "") if not number else (f"f{number - 1}", "mine")
        nodes = [
            helper.make_node(kind, ["x"], ["m"], domain=domain),
            helper.make_node(kind, ["m"], ["y"], domain=domain),
        ]
        model.functions.append(
            helper.make_function("mine", f"f{number}", ["x"], ["y"], nodes, opsets)
        )
    model.opset_import.append(opsets[1])
    return model


def trained() -> ModelProto:
    """A step graph with instructions for training."""
    model = step_model()
    model.training_info.add().algorithm.name = "x"
    return model


def twice() -> bytes:
    """Two graphs in one model, which a parser may merge."""
    data: bytes = step_model().SerializeToString()
    return data + data


def long_chain(count: int) -> ModelProto:
    """A step graph of many nodes."""
    names = ["first", *(f"n{i}" for i in range(count))]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
    return step_model(*nodes, x0=names[-1])


REFUSED: dict[str, tuple[Callable[[], ModelProto | bytes], str]] = {
    "weights at an absolute path": (
        lambda: elsewhere("/etc/passwd"),
        "takes weights from another file",
    ),
    "weights above": (lambda: elsewhere("../../../../etc/passwd"), "another file"),
    "weights in the working folder": (lambda: elsewhere("secret.bin"), "another file"),
    "weights behind a link": (lambda: elsewhere("link.bin"), "another file"),
    "weights at an offset": (
        lambda: elsewhere("secret.bin", offset="4", length="64"),
        "another file",
    ),
    "weights of a constant": (
        lambda: elsewhere_in_a_constant("secret.bin"),
        "another file",
    ),
    "a location without a flag": (
        lambda: with_weights([16], raw_data=bytes(64), data_location=1),
        "another file",
    ),
    "a weight of terabytes": (
        lambda: with_weights([1 << 40], raw_data=b"1234"),
        "in 4 bytes",
    ),
    "a weight of terabytes and nothing": (
        lambda: with_weights([1 << 20, 1 << 20]),
        "in 0 bytes",
    ),
    "a weight of 2**64 elements": (
        lambda: with_weights([1 << 32, 1 << 32], raw_data=b"1234"),
        "in 4 bytes",
    ),
    "a weight of 10**400 elements": (
        lambda: with_weights([1 << 62] * 70, raw_data=b"1234"),
        "dimensions",
    ),
    "a weight of negative size": (
        lambda: with_weights([-1], raw_data=b"1234"),
        "negative size",
    ),
    "text": (lambda: step_model(constants={"words": np.array(["a"])}), "text"),
    "If in If, 20 levels": (lambda: branches(20), "loops or branches"),
    "an endless loop": (endless, "loops or branches"),
    "functions of 2**40 nodes": (functions, ""),
    "another domain": (
        lambda: step_model(
            helper.make_node("FusedMatMul", ["mix"], ["q"], domain="com.microsoft")
        ),
        "domain",
    ),
    "training": (trained, "training"),
    "two graphs": (twice, "two graphs"),
    "no graph": (lambda: b"\x08\x0a", "no graph"),
    "nothing": (lambda: b"", "no graph"),
    "noise": (lambda: b"\xff" * 1000, "damaged"),
    "HTML": (lambda: b"<html><body>404</body></html>" * 3, ""),
    "a file that is cut": (
        lambda: step_model().SerializeToString()[:-40],
        "is cut short",
    ),
    "25,000 nodes": (lambda: long_chain(25_000), "more than 20000 nodes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_no_runtime_sees(
    secret: Sandbox, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    make, words = REFUSED[case]
    bundle = write_bundle(secret.work / "b", make())
    before = secret.files()
    found = secret.run("sample", bundle, *SAMPLE)
    check_refused(
        found, "not one that this tool runs", words, peak=GIGABYTE // 4, seconds=5
    )
    assert secret.files() == before


def sized(kind: str, *inputs: str, **constants: Any) -> ModelProto:
    """A step graph with a node that makes something large and lets x0 depend on it."""
    attributes = constants.pop("attributes", {})
    return step_model(
        helper.make_node(kind, list(inputs), ["large"], **attributes),
        helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0),
        helper.make_node("Mul", ["first", "most"], ["more"]),
        x0="more",
        constants=constants,
    )


def computed() -> ModelProto:
    """A step graph that computes the terabytes it asks for."""
    return step_model(
        helper.make_node("Mul", ["root", "root"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0),
        helper.make_node("Mul", ["first", "most"], ["more"]),
        x0="more",
        constants={"root": np.array([1 << 20])},
    )


def folded() -> ModelProto:
    """A step graph of sixteen constants of 1 GiB that could be made at loading."""
    names = [f"large{number}" for number in range(16)]
    return step_model(
        *(helper.make_node("ConstantOfShape", ["size"], [name]) for name in names),
        helper.make_node("Sum", names, ["sum"]),
        helper.make_node("ReduceMax", ["sum"], ["most"], keepdims=0),
        helper.make_node("Mul", ["first", "most"], ["more"]),
        x0="more",
        constants={"size": np.array([1 << 28])},
    )


def product() -> ModelProto:
    """A step graph that multiplies a column by a row: 150,000 numbers squared."""
    return step_model(
        helper.make_node("Expand", ["one", "column"], ["a"]),
        helper.make_node("Expand", ["one", "line"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0),
        helper.make_node("Mul", ["first", "most"], ["more"]),
        x0="more",
        constants={"column": np.array([150_000, 1]), "line": np.array([1, 150_000])},
    )


def large(value: int) -> Any:
    """A shape of one dimension."""
    return np.array([value], np.int64)


GREEDY: dict[str, Callable[[], ModelProto]] = {
    "ConstantOfShape, terabytes": lambda: sized(
        "ConstantOfShape", "size", size=large(1 << 40)
    ),
    "ConstantOfShape, 2**66 bytes": lambda: sized(
        "ConstantOfShape", "size", size=np.array([1 << 62, 4])
    ),
    "ConstantOfShape, negative": lambda: sized(
        "ConstantOfShape", "size", size=large(-5)
    ),
    "ConstantOfShape, 16 times 1 GiB": folded,
    "ConstantOfShape, computed": computed,
    "Expand": lambda: sized("Expand", "one", "size", size=large(1 << 36)),
    "Tile": lambda: sized(
        "Tile", "first", "size", size=np.array([1, 1 << 14, 1 << 14, 1])
    ),
    "Range": lambda: sized(
        "Range", "zero", "end", "by", end=np.int64(1 << 40), by=np.int64(1)
    ),
    "Resize": lambda: sized(
        "Resize", "first", "", "by", by=np.array([1, 1, 1e4, 1e4], np.float32)
    ),
    "Pad": lambda: sized(
        "Pad", "first", "by", by=np.array([0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20])
    ),
    "RandomNormal": lambda: sized("RandomNormal", attributes={"shape": [1 << 40]}),
    "a product": product,
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_graph_that_asks_for_gigabytes(device: Sandbox, case: str) -> None:
    """The system gives no more than 2 GiB; the message is ours."""
    bundle = write_bundle(device.work / "b", GREEDY[case]())
    before = device.files()
    check_refused(device.run("sample", bundle, *SAMPLE), "ONNX Runtime")
    assert device.files() == before


@pytest.mark.parametrize(
    "case", ["ConstantOfShape, 16 times 1 GiB", "Pad", "a product", "Tile"]
)
def test_memory_is_bounded_where_the_system_gives_all(
    device: Sandbox, case: str
) -> None:
    """Without a limit of the system: the runtime's own is three quarters of 512 MiB."""
    bundle = write_bundle(device.work / "b", GREEDY[case]())
    device.limits["memory"] = None
    device.before = ("makers:little_memory",)
    found = device.run("sample", bundle, *SAMPLE)
    check_refused(found, "ONNX Runtime", peak=GIGABYTE // 2)


WRONG: dict[str, Callable[[], ModelProto]] = {
    "an unknown operator": lambda: step_model(
        helper.make_node("Bogus", ["first"], ["more"]), x0="more"
    ),
    "a cycle": lambda: step_model(
        helper.make_node("Add", ["first", "b"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        x0="a",
    ),
    "a value that nobody makes": lambda: step_model(x0="nowhere"),
    "a larger state": lambda: step_model(
        helper.make_node("Concat", ["state", "state"], ["more"], axis=0),
        state_next="more",
    ),
    "a larger x0": lambda: step_model(
        helper.make_node("Concat", ["first", "first"], ["more"], axis=1), x0="more"
    ),
    "x0 as a scalar": lambda: step_model(x0="one"),
    "more sentinels than rows": lambda: step_model(
        helper.make_node("Concat", ["ones", "ones"], ["more"], axis=0), finite="more"
    ),
    "x0 in float64": lambda: step_model(
        helper.make_node("Cast", ["first"], ["more"], to=TensorProto.DOUBLE),
        x0="more",
        types=(FLOAT, TensorProto.DOUBLE, FLOAT),
    ),
    "sentinels in int64": lambda: step_model(
        helper.make_node("Cast", ["row"], ["more"], to=TensorProto.INT64),
        finite="more",
        types=(FLOAT, FLOAT, TensorProto.INT64),
    ),
    "pictures of another size": lambda: step_model(
        inputs={"state": (FLOAT, (SLOTS, "B", 3, 32, 32))}
    ),
    "five slots": lambda: step_model(inputs={"state": (FLOAT, (5, "B", *PICTURE))}),
    "vectors of another length": lambda: step_model(
        inputs={"identity": (FLOAT, ("R", DIM + 1))}
    ),
    "table rows of another length": lambda: step_model(
        inputs={"step": (FLOAT, ("B", WIDTH + 9))}
    ),
    "rows in int64": lambda: step_model(inputs={"row": (TensorProto.INT64, ("R",))}),
    "an index outside": lambda: step_model(
        helper.make_node("Gather", ["state", "past"], ["more"], axis=0),
        x0="more",
        constants={"past": np.int64(1 << 40)},
    ),
    "not a number": lambda: step_model(
        helper.make_node("Div", ["none", "none"], ["more"]),
        helper.make_node("ReduceMax", ["more"], ["nan"], keepdims=0),
        helper.make_node("Mul", ["state", "nan"], ["bad"]),
        state_next="bad",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_graph_that_is_no_step_graph(device: Sandbox, case: str) -> None:
    bundle = write_bundle(device.work / "b", WRONG[case]())
    found = device.run("sample", bundle, *SAMPLE)
    check_refused(found, peak=GIGABYTE // 4, seconds=5)
    assert not list(device.work.glob("out/sample-*.png"))


def test_a_valid_graph_of_the_same_making(secret: Sandbox) -> None:
    """Nodes, weights and constants of the kinds above, in sizes that are sensible."""
    size = np.array([1, 3, 1, 1])
    model = step_model(
        helper.make_node("Constant", [], ["few"], value_ints=[1, 3, 1, 1]),
        helper.make_node("ConstantOfShape", ["few"], ["zeros"]),
        helper.make_node("Tile", ["zeros", "size"], ["wide"]),
        helper.make_node("ReduceMax", ["wide"], ["most"], keepdims=0),
        helper.make_node("Add", ["first", "most"], ["more"]),
        helper.make_node("Mul", ["more", "weight"], ["last"]),
        x0="last",
        constants={"size": size, "weight": np.ones(16, np.float32)},
    )
    bundle = write_bundle(secret.work / "b", model)
    check_done(secret.run("inspect", bundle, "--self-test"))
    check_done(secret.run("sample", bundle, *SAMPLE))
    assert (secret.work / "out" / "sample-00000.png").is_file()
    chain = write_bundle(secret.work / "c", long_chain(5_000))
    check_done(secret.run("inspect", chain, "--self-test"))
