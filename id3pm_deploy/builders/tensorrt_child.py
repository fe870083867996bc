"""The process in which TensorRT parses a graph and builds a plan.

``tensorrt.build_plan`` starts it and speaks to it: a request as one line of JSON on
standard input, events as lines of JSON on standard output. Standard input stays open;
when it closes, the parent is gone and so is this process. One code path serves
``tensorrt`` 10.3 to 11.4 and ``tensorrt_rtx``: what they do not share is looked for by
name, and no version number is compared.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import BuildError, Id3pmError
from ..files import output_error
from ..optional import require
from ..recipes import dataclass_from_mapping
from .precision import check_precision, count_network
from .recipe import EngineRecipe
from .tensorrt_config import add_profile, input_shapes, set_options
from .tensorrt_events import Channel, Messages, Phases, make_logger, make_monitor

EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""Module to the extra of this package that brings it."""


def make_builder(trt: Any, logger: Any, messages: Messages) -> Any:
    """A ``Builder``.

    Raises:
        BuildError: TensorRT refuses; plain TensorRT does so without a GPU.
    """
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        messages.errors.append(str(error))
        builder = None
    if builder is None:
        raise messages.error(
            f"{trt.__name__} {trt.__version__} cannot make a builder here",
            "plain TensorRT builds only on a machine with the GPU it builds for",
        )
    return builder


def make_network(trt: Any, builder: Any) -> Any:
    """An empty, strongly typed network.

    A library without the flag has no other kind of network.
    """
    kinds = getattr(trt, "NetworkDefinitionCreationFlag", None)
    typed = getattr(kinds, "STRONGLY_TYPED", None)
    return builder.create_network(0 if typed is None else 1 << int(typed))


def parse_graph(
    trt: Any, network: Any, logger: Any, graph: Path, messages: Messages
) -> Any:
    """Parse ``graph`` into ``network``; returns the parser, which must stay alive.

    Raises:
        BuildError: TensorRT refuses a node, or the file; every refusal is named.
    """
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    refusals = [parser.get_error(index) for index in range(parser.num_errors)]
    if parsed and not refusals and network.num_outputs:
        return parser
    texts = [_refusal(error) for error in refusals]
    named = [error.node_name() for error in refusals if error.node_name()]
    raise BuildError(
        f"{trt.__name__} cannot parse the graph"
        + (f": {', '.join(named[:3])}" if named else ""),
        why="; ".join(texts or messages.errors) or "it has no output",
        fix="export the graph again with an opset and operators that this TensorRT "
        "takes",
    )


def _refusal(error: Any) -> str:
    text = " ".join(str(error.desc()).split())
    name, operator = error.node_name(), error.node_operator()
    return f"node {name!r} ({operator}): {text}" if name or operator else text


def peak_memory_bytes() -> int:
    """Most memory that this process has held.

    ``ru_maxrss`` starts at the size of the process that forked this one, so it is only
    the second choice.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(recipe: EngineRecipe, graph: Path, plan: Path, channel: Channel) -> None:
    """Build ``plan`` from ``graph`` and send the event ``built``.

    Raises:
        BuildError: Anything TensorRT refuses.
        MissingPackageError: The TensorRT of the recipe is not installed.
        OutputError: ``plan`` cannot be written.
    """
    trt = require(recipe.flavour, extra=EXTRAS[recipe.flavour])
    began = time.monotonic()
    messages = Messages(channel)
    logger = make_logger(trt, messages)
    builder = make_builder(trt, logger, messages)
    network = make_network(trt, builder)
    parser = parse_graph(trt, network, logger, graph, messages)
    profiles = recipe.profiles
    opt = profiles[-1]
    shapes = input_shapes(network, opt.samples[1], opt.rows[1])
    counts = count_network(trt, network, shapes, opt)
    check_precision(counts, recipe.precision, recipe.export)
    config = builder.create_builder_config()
    set_options(trt, config, recipe, None)
    for profile in profiles:
        add_profile(builder, network, config, profile, messages)
    if hasattr(trt, "IProgressMonitor"):
        phases = Phases(channel, len(profiles))
        config.progress_monitor = make_monitor(trt, phases)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise messages.error(f"{trt.__name__} {trt.__version__} could not build a plan")
    _write(plan, data)
    channel.send(
        "built",
        version=str(trt.__version__),
        layer_types=counts,
        warnings=messages.warnings,
        build_seconds=time.monotonic() - began,
        peak_memory_bytes=peak_memory_bytes(),
    )
    del parser


def _write(plan: Path, data: Any) -> None:
    try:
        with open(plan, "wb") as handle:
            handle.write(memoryview(data))
    except OSError as error:
        raise output_error(plan, error) from error


def _end_with_parent(work: Path) -> None:
    """Wait for standard input to close, then tidy up and end."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(work, ignore_errors=True)
    os._exit(1)


def _read_line() -> bytes:
    """The request, read byte by byte so that nothing is buffered."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def main() -> None:
    """Serve one request and end the process.

    It ends without the interpreter's own tidying, in which a native library's objects
    may be destroyed in the wrong order.
    """
    channel = Channel()
    request = json.loads(_read_line())
    work = Path(request["work"])
    threading.Thread(target=_end_with_parent, args=(work,), daemon=True).start()
    try:
        recipe = dataclass_from_mapping(EngineRecipe, request["recipe"], "request")
        build(recipe, Path(request["graph"]), Path(request["plan"]), channel)
    except Id3pmError as error:
        kind = type(error).__name__
        texts = {"what": error.what, "why": error.why, "fix": error.fix}
        channel.send("error", kind=kind, **texts)
    sys.stderr.flush()
    os._exit(0)
