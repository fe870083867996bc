"""How long one step takes: the engine against PyTorch, OpenVINO and plain ONNX Runtime.

    python benchmarks/step_latency.py [--samples B] [--rows R] [--threads N]

Every contender computes the same function, the whole step graph: gathering the UNet's
rows, the UNet, guidance, the solver's arithmetic and the check for NaN. Each is held
against the PyTorch reference before anything is timed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import harness
import machine
import numpy as np
import torch
from random_model import (
    Arrays,
    channels_last,
    exported,
    inputs,
    load_model,
    parameter_count,
    random_network,
    refuse_trivial,
)

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.errors import EngineError, MissingPackageError, first_line
from id3pm_deploy.guidance import GuidanceTable
from id3pm_deploy.optional import require
from id3pm_deploy.progress import progress
from id3pm_deploy.reference.step import step_module
from id3pm_deploy.spec import DiffusionSpec

ENGINE = "id3pm-deploy, onnxruntime engine"
_OUTPUTS = ("state_next", "x0")
_PACKAGES = ("numpy", "onnxruntime", "openvino", "torch", "diffusers")


@dataclass(frozen=True)
class Subject:
    """What every contender is given: one function, its inputs, a number of threads."""

    spec: DiffusionSpec
    module: Any
    graph: bytes
    inputs: Arrays
    threads: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The inputs for PyTorch, in the step module's order."""
        return tuple(torch.from_numpy(np.array(v)) for v in self.inputs.values())


@dataclass(frozen=True)
class Contender:
    """A variant to be timed, and what it computed when it ran last."""

    variant: harness.Variant
    outputs: Callable[[], Arrays]


def engine_contender(subject: Subject) -> Contender:
    """The product: what the sampler calls for a table row, buffers and checks included.

    The engine feeds its state back, so it is put in place anew before each turn.
    """
    given = subject.inputs
    guidance = GuidanceTable(given["row"], given["identity"], given["mix"])
    shapes = step_shapes(subject.spec)
    engine = OnnxRuntimeEngine(subject.graph, shapes, "float32", subject.threads)
    engine.begin(np.ascontiguousarray(given["state"][0]), guidance)

    def prepare() -> None:
        engine.load_state(given["state"])

    def run() -> None:
        engine.run_row(given["step"], given["noise"])

    def outputs() -> Arrays:
        if engine.failed_samples().any():
            raise EngineError("the engine reported a sample that is not finite")
        return {"state_next": engine.state(), "x0": engine.preview()}

    return Contender(harness.Variant(ENGINE, run, prepare), outputs)


def runtime_contender(subject: Subject) -> Contender:
    """The same graph under ONNX Runtime as its tutorial calls it: a session of its own
    defaults, and ``session.run``."""
    runtime = require("onnxruntime", extra="cpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    session = runtime.InferenceSession(
        subject.graph, options, providers=["CPUExecutionProvider"]
    )
    known = {item.name for item in session.get_inputs()}
    feeds = {name: value for name, value in subject.inputs.items() if name in known}
    names = [item.name for item in session.get_outputs()]
    made: list[Any] = []

    def run() -> None:
        made[:] = session.run(None, feeds)

    return Contender(
        harness.Variant("plain ONNX Runtime, session.run", run),
        lambda: dict(zip(names, made, strict=True)),
    )


def eager_contender(subject: Subject) -> Contender:
    """PyTorch as it is, with the weights in channels_last."""
    return _torch_contender(subject, "PyTorch eager, channels_last", subject.module)


def compiled_contender(subject: Subject) -> Contender:
    """torch.compile by inductor with its weights frozen (constant-folded and packed
    for the processor) and fixed shapes."""
    compiled = torch.compile(subject.module, dynamic=False, options={"freezing": True})
    name = "PyTorch torch.compile, frozen"
    found = _torch_contender(subject, name, compiled)
    try:
        found.variant.run()
    except Exception as error:  # the compiler's exceptions are of many kinds
        raise EngineError("torch.compile failed", why=first_line(error)) from error
    return found


def _torch_contender(subject: Subject, name: str, module: Any) -> Contender:
    tensors = subject.tensors
    made: list[Any] = []

    def run() -> None:
        # Freezing asks for no_grad; inference_mode is for eager no faster.
        with torch.no_grad():
            made[:] = module(*tensors)[:2]

    def outputs() -> Arrays:
        return {k: v.numpy() for k, v in zip(_OUTPUTS, made, strict=True)}

    return Contender(harness.Variant(name, run), outputs)


def openvino_contender(subject: Subject) -> Contender:
    """The same graph under OpenVINO: fixed shapes, float32, inputs bound once.

    Raises:
        MissingPackageError: OpenVINO is not installed.
    """
    if importlib.util.find_spec("openvino") is None:
        raise MissingPackageError("not installed", fix="pip install openvino")
    # Importing OpenVINO would count the import in the home folder and on a server.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    openvino = require("openvino", extra="bench")
    core = openvino.Core()
    model = core.read_model(model=subject.graph)
    known = {name for item in model.inputs for name in item.get_names()}
    feeds = {name: value for name, value in subject.inputs.items() if name in known}
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": subject.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    for name, value in feeds.items():
        data = np.ascontiguousarray(value)
        request.set_tensor(name, openvino.Tensor(data, shared_memory=True))
    return Contender(
        harness.Variant("OpenVINO", request.infer),
        lambda: {name: np.array(request.get_tensor(name).data) for name in _OUTPUTS},
    )


CONTENDERS: dict[str, Callable[[Subject], Contender]] = {
    ENGINE: engine_contender,
    "plain ONNX Runtime, session.run": runtime_contender,
    "PyTorch eager, channels_last": eager_contender,
    "PyTorch torch.compile, frozen": compiled_contender,
    "OpenVINO": openvino_contender,
}


def make_subject(
    spec: DiffusionSpec, samples: int, unet_rows: int, threads: int, seed: int
) -> tuple[Subject, Arrays]:
    """The function in every form that a contender needs, and what PyTorch makes of it.

    Raises:
        ParityError: The reference's outputs are trivial.
    """
    torch.set_num_threads(threads)
    network = random_network(spec, seed)
    graph = exported(network, spec, "float32")
    given = inputs(spec, samples, unet_rows, seed)
    module = step_module(network, BodyForm())
    subject = Subject(spec, module, graph, given, threads)
    with torch.no_grad():
        made = module(*subject.tensors)
    expected = {k: v.numpy() for k, v in zip(_OUTPUTS, made[:2], strict=True)}
    refuse_trivial(expected)
    channels_last(module)
    return subject, expected


def checked_contenders(
    subject: Subject, expected: Arrays, tolerance: float
) -> tuple[list[Contender], dict[str, dict[str, Any]]]:
    """Those that are there and compute the right thing.

    Returns:
        The contenders, and for every name its error, or why it is not there.

    Raises:
        ParityError: One computes something else.
    """
    ready: list[Contender] = []
    states: dict[str, dict[str, Any]] = {}
    for name, make in CONTENDERS.items():
        try:
            contender = make(subject)
        except MissingPackageError:
            states[name] = {"status": "not installed"}
            continue
        except EngineError as error:
            if name == ENGINE:
                raise
            states[name] = {"status": f"failed: {error.why or error.what}"}
            continue
        contender.variant.prepare()
        contender.variant.run()
        error_found = harness.checked(name, contender.outputs(), expected, tolerance)
        states[name] = {"status": "timed", "relative_error": error_found}
        ready.append(contender)
    return ready, states


def measure(
    ready: list[Contender], states: dict[str, dict[str, Any]], plan: harness.Plan
) -> dict[str, dict[str, Any]]:
    """Time the contenders; their figures join what is known of them."""
    variants = [contender.variant for contender in ready]
    with progress(plan.rounds * len(variants), "rounds") as tick:
        seconds = harness.interleaved(variants, plan, tick)
    found = {name: dict(state) for name, state in states.items()}
    for name, values in seconds.items():
        ratio = harness.ratio_interval(values, seconds[ENGINE])
        found[name] |= {
            "milliseconds": harness.median_interval(values).scaled(1e3).to_json(),
            "times_the_engine": ratio.to_json(),
            "seconds": harness.rounded(values),
        }
    return found


def table_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The figures for people, a row for every contender."""
    rows = []
    for name, values in found.items():
        if "milliseconds" not in values:
            rows.append([name, values["status"], "", ""])
            continue
        milliseconds = harness.Interval(**values["milliseconds"])
        ratio = harness.Interval(**values["times_the_engine"])
        error = f"{values['relative_error']:.1e}"
        rows.append([name, milliseconds.text(), ratio.text(3), error])
    return rows


@click.command()
@click.option("--model", default="identity64", show_default=True, help="In models/.")
@click.option("--samples", default=1, show_default=True, help="B.")
@click.option("--rows", default=0, help="R.  [default: 2B, which is guided]")
@click.option("--threads", default=0, help="[default: as many as usable cores]")
@click.option("--rounds", default=30, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Timed calls in a turn.")
@click.option("--tolerance", default=1e-5, show_default=True, help="max|a-b|/max|b|.")
@click.option("--seed", default=0, show_default=True)
@click.option("--name", default="", help="[default: step-latency-BxR]")
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(
    model: str,
    samples: int,
    rows: int,
    threads: int,
    rounds: int,
    repeats: int,
    tolerance: float,
    seed: int,
    name: str,
    results: Path,
) -> None:
    """Time one step of a model with random weights."""
    spec = load_model(model)
    rows, threads = rows or 2 * samples, threads or machine.usable_cores()
    plan = harness.Plan(rounds=rounds, repeats=repeats, seed=seed)
    click.echo("exporting and checking the graph", err=True)
    subject, expected = make_subject(spec, samples, rows, threads, seed)
    click.echo("loading the contenders, compiling where they do", err=True)
    ready, states = checked_contenders(subject, expected, tolerance)
    watch = machine.Watch()
    found = measure(ready, states, plan)
    settings = {
        "model": spec.to_json(),
        "parameters": parameter_count(spec),
        "function": "whole step graph",
        "samples": samples,
        "unet_rows": rows,
        "threads": threads,
        "tolerance": tolerance,
        **vars(plan),
    }
    title = f"one step, B={samples}, R={rows}, {threads} threads: ms"
    head = [title, "median (95 %)", "times the engine (95 %)", "relative error"]
    harness.print_table(head, table_rows(found))
    made = harness.result(
        "step_latency", rounds, settings, watch.stop(), _PACKAGES, found
    )
    harness.publish(made, name or f"step-latency-{samples}x{rows}", results)


if __name__ == "__main__":
    harness.run(main)
