"""A step graph of three nodes, and what can be done to it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bundles import GRAPH, SHA, SPEC, new_engine
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from id3pm_deploy.bundle.writer import bundle_writer
from id3pm_deploy.spec import IdentitySpec

PICTURE: tuple[int | str, ...] = (3, 16, 16)
ROWS, DIM, WIDTH, SLOTS = 2, 16, 32, 4

_INPUTS: dict[str, tuple[int, Sequence[int | str]]] = {
    "state": (TensorProto.FLOAT, (SLOTS, "B", *PICTURE)),
    "noise": (TensorProto.FLOAT, ("B", *PICTURE)),
    "identity": (TensorProto.FLOAT, ("R", DIM)),
    "row": (TensorProto.INT32, ("R",)),
    "mix": (TensorProto.FLOAT, (2, "B", "R")),
    "step": (TensorProto.FLOAT, ("B", WIDTH)),
}


def step_model(
    *more: NodeProto,
    state_next: str = "state",
    x0: str = "first",
    finite: str = "ones",
    constants: dict[str, Any] | None = None,
    inputs: dict[str, tuple[int, Sequence[int | str]]] | None = None,
    types: Sequence[int] = (TensorProto.FLOAT,) * 3,
) -> ModelProto:
    """A step graph that does nothing: state' is the state and x0 its first slot.

    Args:
        more: Further nodes.
        state_next: Value that becomes the output of this name; the same for the next.
        x0: As above.
        finite: As above.
        constants: Further initialisers by name.
        inputs: Inputs of another type or shape.
        types: Element types of the outputs.
    """
    nodes = [
        helper.make_node("Gather", ["state", "zero"], ["first"], axis=0),
        helper.make_node("Cast", ["row"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["numbers", "numbers"], ["none"]),
        helper.make_node("Add", ["none", "one"], ["ones"]),
        *more,
        helper.make_node("Identity", [state_next], ["state_next"]),
        helper.make_node("Identity", [x0], ["x0"]),
        helper.make_node("Identity", [finite], ["finite"]),
    ]
    held = {"zero": np.int64(0), "one": np.float32(1), **(constants or {})}
    outputs = zip(("state_next", "x0", "finite"), types, strict=True)
    graph = helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, (kind, shape) in {**_INPUTS, **(inputs or {})}.items()
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in held.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


def golden_arrays() -> dict[str, npt.NDArray[Any]]:
    """Golden data that fits :func:`step_model`."""
    rng = np.random.default_rng(0)
    samples = 2
    state = rng.normal(size=(SLOTS, samples, 3, 16, 16)).astype(np.float32)
    return {
        "state": state,
        "noise": np.zeros((samples, 3, 16, 16), np.float32),
        "identity": np.ones((ROWS, DIM), np.float32),
        "row": np.arange(ROWS, dtype=np.int32),
        "mix": np.stack([np.eye(samples, ROWS, dtype=np.float32)] * 2),
        "step": np.zeros((samples, WIDTH), np.float32),
        "expected.state_next": state,
        "expected.x0": state[0],
        "expected.finite": np.ones(ROWS, np.float32),
    }


def golden_npz(**changes: npt.ArrayLike) -> bytes:
    """Golden data as a file, some arrays replaced; a dot is written as ``__``."""
    values: dict[str, Any] = dict(golden_arrays())
    values |= {name.replace("__", "."): np.asarray(v) for name, v in changes.items()}
    stream = io.BytesIO()
    np.savez(stream, **values)
    return stream.getvalue()


def write_bundle(
    folder: Path,
    graph: ModelProto | bytes,
    golden: bytes | None = None,
    identity: IdentitySpec = SPEC.identity,
) -> Path:
    """A BUNDLE whose hashes are all right, whatever the graph."""
    data = graph if isinstance(graph, bytes) else graph.SerializeToString()
    spec = dataclasses.replace(SPEC, identity=identity)
    writer = bundle_writer(folder, spec, SHA, "0")
    file = writer.add_file("step-float32", ".onnx", data)
    held = golden_npz() if golden is None else golden
    entry = dataclasses.replace(
        GRAPH, file=file, golden=writer.add_file("golden", ".npz", held)
    )
    writer.add_graph(entry)
    writer.add_engine(new_engine("cpu", file))
    writer.commit()
    return folder


def elsewhere(place: str, **more: str) -> ModelProto:
    """A step graph that takes a weight from another file and adds it to x0."""
    node = helper.make_node("Add", ["first", "weight"], ["more"])
    model = step_model(node, x0="more")
    weight = model.graph.initializer.add()
    weight.name, weight.data_type = "weight", TensorProto.FLOAT
    weight.dims.extend([16])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": place, **more}.items():
        weight.external_data.add(key=key, value=value)
    return model
