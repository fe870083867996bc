"""The process in which TensorRT parses a graph and builds a plan.

``tensorrt.build_plan`` starts it and speaks to it: a request as one line of JSON on
standard input, events as lines of JSON on standard output. Standard input stays open;
when it closes, the parent is gone and so is this process. One code path serves
``tensorrt`` 10.3 to 11.4 and ``tensorrt_rtx``: what they do not share is looked for by
name, and no version number is compared.

A build is stopped by ending this process. A progress monitor that returns False stops
TensorRT too, but is asked between two steps only, of which the longest lasts as long as
the kernels of a whole profile. Of an 85 MB network with TensorRT-RTX 1.7.1 on two
cores, builds ended 0.05 to 0.25 s after such a request, 0.03 to 0.07 s after a kill;
the steps grow with the network, the other does not. The process holds nothing that
would have to be put away: the plan is written where the parent removes it, and locks go
with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..doctor.flavours import require_flavour
from ..errors import BuildError, Id3pmError, some_of
from ..files import output_error
from ..recipes import dataclass_from_mapping
from .device_memory import Device, PeakMemory, find_device
from .plan_inspector import ask_for_details, inspect_plan, not_counted
from .precision import check_precision, count_network, node_work
from .recipe import CURRENT_GPU, EngineRecipe
from .tensorrt_config import add_profile, input_shapes, set_options
from .tensorrt_events import (
    Channel,
    Limits,
    Messages,
    Phases,
    Watch,
    make_logger,
    make_monitor,
    send_error,
)
from .timing_cache import TimingCache, timing_cache_path

if TYPE_CHECKING:
    import tensorrt


def check_gpu(recipe: EngineRecipe, device: Device | None) -> None:
    """Refuse to build with plain TensorRT for a GPU that is not the one here.

    Where no GPU is found TensorRT itself says so, when its builder is made.

    Raises:
        BuildError: The GPU is not one of the recipe's.
    """
    wanted = recipe.compute_capabilities
    if recipe.flavour != "tensorrt" or not wanted or device is None:
        return
    found = device.facts["compute_capability"]
    if found not in wanted and CURRENT_GPU not in wanted:
        raise BuildError(
            f"the recipe is for GPUs of compute capability {', '.join(wanted)}",
            why=f"{recipe.flavour} builds for the GPU of the machine it runs on, and "
            f"this one's is {device.facts['name']} with {found}",
            fix="build on the machine that will run the plan, or use the recipe of "
            "this one; id3pm-deploy doctor names it",
        )


def make_builder(
    trt: Any, logger: tensorrt.ILogger, messages: Messages
) -> tensorrt.Builder:
    """A ``Builder``.

    Raises:
        BuildError: TensorRT refuses; plain TensorRT does so without a GPU.
    """
    builder: tensorrt.Builder | None = None
    try:
        builder = trt.Builder(logger)
    except (TypeError, RuntimeError) as error:
        messages.errors.append(str(error))
    if builder is None:
        raise messages.error(
            f"{trt.__name__} {trt.__version__} cannot make a builder here",
            "plain TensorRT builds only on a machine with the GPU it builds for",
        )
    return builder


def make_network(trt: Any, builder: tensorrt.Builder) -> tensorrt.INetworkDefinition:
    """An empty, strongly typed network.

    A library without the flag has no other kind of network.
    """
    kinds = getattr(trt, "NetworkDefinitionCreationFlag", None)
    typed = getattr(kinds, "STRONGLY_TYPED", None)
    return builder.create_network(0 if typed is None else 1 << int(typed))


def parse_graph(
    trt: Any,
    network: tensorrt.INetworkDefinition,
    logger: tensorrt.ILogger,
    graph: Path,
    messages: Messages,
) -> tensorrt.OnnxParser:
    """Parse ``graph`` into ``network``; returns the parser, which must stay alive.

    The file is read by its path, so that weights in files beside it are found.

    Raises:
        BuildError: TensorRT refuses a node, or the file; every refusal is named.
    """
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    refusals = [parser.get_error(index) for index in range(parser.num_errors)]
    if parsed and not refusals and network.num_outputs:
        return parser
    texts = dict.fromkeys(_refusal(error) for error in refusals)
    memory = messages.limits.memory_error(
        "; ".join(dict.fromkeys([*texts, *messages.errors]))
    )
    if memory is not None:
        raise memory
    named = dict.fromkeys(filter(None, (error.node_name() for error in refusals)))
    raise BuildError(
        f"{trt.__name__} {trt.__version__} cannot parse the graph"
        + (f": {some_of(list(named))}" if named else ""),
        why="; ".join([*texts] or messages.errors) or "it has no output",
        fix="export the graph again with an opset and operators that this TensorRT "
        "takes",
    )


def _refusal(error: tensorrt.ParserError) -> str:
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

    The event is sent again after the plan has been inspected, which loads it: should
    that crash, the plan is there all the same.

    Raises:
        BuildError: Anything TensorRT refuses.
        MissingPackageError: The TensorRT of the recipe is not installed.
        OutputError: ``plan`` cannot be written.
    """
    trt = require_flavour(recipe.flavour)
    device: Device | None = find_device()
    check_gpu(recipe, device)
    began = time.monotonic()
    messages = Messages(channel, _limits(recipe))
    logger = make_logger(trt, messages)
    opt = recipe.profiles[-1]
    with PeakMemory(device) as memory:
        builder = make_builder(trt, logger, messages)
        network = make_network(trt, builder)
        parser = parse_graph(trt, network, logger, graph, messages)
        shapes = input_shapes(network, opt.samples[1], opt.rows[1])
        work = node_work(trt, network, shapes)
        counts = count_network(network, work, opt)
        check_precision(counts, recipe.precision, recipe.export)
        config = _config(trt, builder, network, recipe, device, messages)
        data = _build(trt, builder, network, config, device, messages)
        del parser
    _write(plan, data)
    event: dict[str, Any] = {
        "version": str(trt.__version__),
        "layer_types": counts,
        "plan_types": not_counted("no GPU is here to load the plan"),
        "warnings": list(messages.warnings),
        "build_seconds": time.monotonic() - began,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": memory.bytes or None,
        "gpu": device.facts if device is not None else None,
    }
    if device is not None:
        event["plan_types"] = not_counted("the process ended while it was loaded")
    channel.send("built", **event)
    if device is not None:
        last = len(recipe.profiles) - 1
        found = inspect_plan(trt, logger, data, last, shapes, work)
        channel.send("built", **event | {"plan_types": found})


def _limits(recipe: EngineRecipe, workspace: int | None = None) -> Limits:
    samples = max(profile.samples[2] for profile in recipe.profiles)
    return Limits(samples, workspace, len(recipe.compute_capabilities))


def _config(
    trt: Any,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    recipe: EngineRecipe,
    device: Device | None,
    messages: Messages,
) -> tensorrt.IBuilderConfig:
    """The recipe's settings and profiles, and who is told of the progress."""
    config = builder.create_builder_config()
    free = device.free_bytes() if device is not None else None
    messages.limits = _limits(recipe, recipe.workspace_limit(free))
    set_options(trt, config, recipe, free)
    for profile in recipe.profiles:
        add_profile(builder, network, config, profile, messages)
    if device is not None:
        ask_for_details(trt, config)
    if hasattr(trt, "IProgressMonitor"):
        phases = Phases(messages.channel, len(recipe.profiles))
        config.progress_monitor = make_monitor(trt, phases)
    return config


def _build(
    trt: Any,
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    device: Device | None,
    messages: Messages,
) -> tensorrt.IHostMemory:
    """The serialised plan.

    Raises:
        BuildError: TensorRT could not make one.
    """
    gpu = device.facts if device is not None else None
    path = timing_cache_path(trt.__name__, str(trt.__version__), gpu)
    timings = TimingCache(path)
    timings.load(config)
    with contextlib.ExitStack() as stack:
        if device is None:
            stalled = messages.limits.host_error("TensorRT waits and does nothing")
            stack.enter_context(Watch(messages.channel, stalled))
        data = builder.build_serialized_network(network, config)
    if data is None:
        raise messages.error(f"{trt.__name__} {trt.__version__} could not build a plan")
    timings.save(config)
    if timings.problem:
        messages.add("WARNING", timings.problem)
    return data


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
        send_error(channel, error)
    except MemoryError:
        send_error(channel, Limits().host_error("an allocation in Python failed"))
    sys.stderr.flush()
    os._exit(0)
