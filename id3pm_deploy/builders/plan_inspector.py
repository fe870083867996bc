"""What a finished plan computes in which precision, as TensorRT's inspector tells it.

The parsed network says what was asked for; the plan says what was built: layers are
fused and moved, and one with a float32 kernel inside would not show in the network.
The inspector needs the plan to be loaded, which takes a GPU that it can run on, and
details in the plan, which are asked for before the build. On every other machine there
is no account of the plan, and the reason is kept in its place.

The JSON is read as the documentation of TensorRT 10 and 11 has it. A tensor has
``Format/Datatype`` (``Half``, ``Row major linear FP32``, or words that dynamic shapes
hide it) or, from 11 on, ``Datatype`` beside ``Format``; a layer with weights has their
type; ``Metadata`` names the ONNX nodes that a layer stands for. None of this has been
run on hardware.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from .precision import InputShapes, NodeWork

if TYPE_CHECKING:
    import tensorrt

SOURCE = "plan"
"""Where the counts come from, as written beside them."""

UNKNOWN = "UNKNOWN"
"""Stands for the data type of a layer of which the inspector tells none."""

_TYPES = (
    ("BF16", ("bfloat16", "bf16")),
    ("FP8", ("fp8",)),
    ("HALF", ("half", "fp16")),
    ("FLOAT", ("float", "fp32")),
    ("INT8", ("int8",)),
    ("INT64", ("int64",)),
    ("INT32", ("int32",)),
    ("BOOL", ("bool",)),
)
"""The network's name of a data type, and words in the inspector's; the first fits."""

_COMPUTING = ("BF16", "FP8", "HALF", "FLOAT", "INT8")
_MOVERS = frozenset(["Constant", "NoOp", "Reformat", "Signal", "Wait"])
"""Layers that compute nothing, whatever node they are named after."""

_PROFILE = re.compile(r"\[profile (\d+)\]")


def ask_for_details(trt: Any, config: tensorrt.IBuilderConfig) -> None:
    """Have the plan keep what the inspector tells of its layers."""
    verbosity = getattr(trt, "ProfilingVerbosity", None)
    detailed = getattr(verbosity, "DETAILED", None)
    if detailed is not None and hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = detailed


def inspect_plan(
    trt: Any,
    logger: tensorrt.ILogger,
    plan: Any,
    profile: int,
    shapes: InputShapes,
    work: Iterable[NodeWork],
) -> dict[str, Any]:
    """Load a plan that was just built and count what it computes in.

    Args:
        trt: The TensorRT module.
        logger: Its logger.
        plan: The serialised plan.
        profile: The optimisation profile to look at.
        shapes: Shapes of the inputs, which that profile admits.
        work: Multiply-accumulates of the network's nodes at these shapes.

    Returns:
        What :func:`plan_types` returns, or :func:`not_counted` where the plan cannot
        be loaded or inspected here.
    """
    try:
        text = _inspected(trt, logger, plan, profile, shapes)
        return plan_types(json.loads(text), work, profile)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return not_counted(first_line(error))


def not_counted(reason: str) -> dict[str, Any]:
    """What is known of a plan that nobody could look into."""
    return {"source": SOURCE, "not_counted": reason}


def _inspected(
    trt: Any, logger: tensorrt.ILogger, plan: Any, profile: int, shapes: InputShapes
) -> str:
    """The inspector's JSON for one profile at fixed shapes."""
    runtime: tensorrt.Runtime | None = trt.Runtime(logger)
    if runtime is None:
        raise RuntimeError("no runtime can be made")
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError("the plan cannot be loaded here")
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise RuntimeError("the library makes no inspector")
    # Without memory for activations: nothing is run.
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = engine.create_execution_context(strategy)
    if context is not None:
        context.set_optimization_profile_async(profile, 0)
        for name, shape in shapes.items():
            context.set_input_shape(name, shape)
        inspector.execution_context = context
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def plan_types(
    information: Mapping[str, Any], work: Iterable[NodeWork], profile: int = 0
) -> dict[str, Any]:
    """Count a plan's layers by kind and data type, and multiply-accumulates by type.

    A node's multiply-accumulates are counted to the layer whose metadata or name has
    it; a node that no layer names is counted as ``UNKNOWN``.

    Args:
        information: The inspector's JSON.
        work: Multiply-accumulates of the network's nodes.
        profile: Of a plan with several profiles, the one whose layers count.

    Raises:
        ValueError: The plan holds no details.
    """
    layers = [layer for layer in information.get("Layers", []) if _of(layer, profile)]
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError("the plan keeps only the names of its layers")
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        kind = str(layer.get("LayerType", UNKNOWN))
        kinds.setdefault(kind, Counter())[layer_type(layer)] += 1
    done: dict[str, Counter[str]] = {}
    for node in work:
        found = _layer_of(node, layers)
        name = layer_type(found) if found is not None else UNKNOWN
        done.setdefault(node.kind, Counter())[name] += node.multiply_accumulates
    return {
        "source": SOURCE,
        "profile": profile,
        "layers": {kind: dict(found) for kind, found in sorted(kinds.items())},
        "multiply_accumulates": {k: dict(found) for k, found in sorted(done.items())},
    }


def layer_type(layer: Mapping[str, Any]) -> str:
    """The data type that a layer of the inspector's JSON computes in.

    That is its weights', or else its first input's that is no index, or else its first
    output's. Of a float32 layer whose kernel is called tf32 it is ``TF32``.
    """
    weights = layer.get("Weights")
    texts = [str(weights.get("Type", ""))] if isinstance(weights, dict) else []
    for side in ("Inputs", "Outputs"):
        texts += [_tensor_text(tensor) for tensor in layer.get(side, [])]
    names = [_type_name(text) for text in texts]
    names = [name for name in names if name in _COMPUTING] or [
        name for name in names if name
    ]
    if not names:
        return UNKNOWN
    tf32 = names[0] == "FLOAT" and "tf32" in str(layer.get("TacticName", "")).lower()
    return "TF32" if tf32 else names[0]


def _tensor_text(tensor: Any) -> str:
    """What says the type of an input or output; the key is spelt in several ways."""
    if not isinstance(tensor, dict):
        return ""
    keys = {key.lower(): value for key, value in tensor.items()}
    return str(keys.get("datatype", keys.get("format/datatype", "")))


def _type_name(text: str) -> str:
    lower = text.lower()
    if lower.startswith("n/a"):
        return ""
    fitting = (name for name, words in _TYPES if any(word in lower for word in words))
    return next(fitting, "")


def _of(layer: Any, profile: int) -> bool:
    """Whether a layer belongs to ``profile``; those of the first bear no mark."""
    name = layer if isinstance(layer, str) else str(layer.get("Name", ""))
    found = _PROFILE.search(name)
    return (int(found[1]) if found else 0) == profile


def _layer_of(node: NodeWork, layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The layer that computes ``node``."""
    mark = f"[ONNX Layer: {node.name}]"
    for layer in layers:
        if layer.get("LayerType") in _MOVERS:
            continue
        names = _PROFILE.sub("", str(layer.get("Name", ""))).split(" + ")
        named = node.name in [name.strip() for name in names]
        if named or mark in str(layer.get("Metadata", "")):
            return layer
    return None
