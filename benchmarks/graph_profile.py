"""What the step graph consists of, and where ONNX Runtime spends its time in it.

    python benchmarks/graph_profile.py [--samples B] [--rows R] [--threads N] [--static]

The same function is exported in several forms: as diffusers' modules write it, as the
recipe `float32` does, and with one setting changed at a time. Operators and TensorRT's
layers are counted, whole runs are timed in turns, and the time of each operator is its
fastest of several profiled runs.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import graph_counts
import harness
import machine
import numpy as np
import torch
from random_model import (
    Arrays,
    inputs,
    load_model,
    parameter_count,
    random_network,
    refuse_trivial,
)

from id3pm_deploy.body_form import FLOAT32
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.builders.graph_inputs import (
    dynamic_shapes,
    example_inputs,
    module_and_names,
)
from id3pm_deploy.builders.onnx_graph import traced, write_checked
from id3pm_deploy.files import ScratchFile
from id3pm_deploy.optional import require
from id3pm_deploy.recipes import load_recipe
from id3pm_deploy.reference.precision import exported_body
from id3pm_deploy.reference.step import step_module
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.spec import DiffusionSpec

BEFORE = "as diffusers writes it"
RECIPE = "recipe float32"
CHANGES: dict[str, dict[str, Any]] = {
    BEFORE: {},
    RECIPE: {},
    "embeddings apart": {"embeddings": "apart"},
    "upsampling by resize": {"upsampling": "resize"},
    "native GroupNormalization": {"normalisation": "native", "opset": 21},
    "native, and Attention": {
        "normalisation": "native",
        "attention": "native",
        "opset": 23,
    },
}
_MOST_OPERATORS = 14
_OUTPUTS = ("state_next", "x0")


def graph(
    network: IdentityUNet,
    spec: DiffusionSpec,
    recipe: ExportRecipe,
    size: tuple[int, int],
    *,
    static: bool,
) -> bytes:
    """The step graph of a network that is in its form already.

    Args:
        network: What to trace.
        spec: Facts of the model.
        recipe: Gives the opset.
        size: B and R to trace with, and to fix where ``static``.
        static: Whether the graph takes this size only.
    """
    module, names, outputs = module_and_names(network, recipe)
    example = example_inputs(spec, recipe, size if static else (2, 3))
    arguments = tuple(torch.from_numpy(example[name]) for name in names)
    axes = None if static else dynamic_shapes(recipe, names)
    model = traced(module, arguments, names, outputs, axes, recipe.opset)
    file = ScratchFile(Path(tempfile.gettempdir()))
    write_checked(model, file)
    return file.read()


def session(data: bytes, threads: int, profile: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU; with ``profile``, a file's beginning, it
    notes how long each operator takes."""
    runtime = require("onnxruntime", extra="cpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers = ["CPUExecutionProvider"]
    return runtime.InferenceSession(data, options, providers=providers)


def operator_times(
    data: bytes, feeds: Arrays, threads: int, runs: int
) -> dict[str, dict[str, float]]:
    """Milliseconds and number of the operators that ONNX Runtime runs, by type, the
    slowest first; each operator's time is its fastest of ``runs``."""
    with tempfile.TemporaryDirectory() as folder:
        running = session(data, threads, Path(folder) / "profile")
        for _ in range(runs):
            running.run(None, feeds)
        events = json.loads(Path(running.end_profiling()).read_text())
    fastest: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            fastest[key] = min(fastest.get(key, float("inf")), event["dur"] / 1e3)
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for (kind, _), milliseconds in fastest.items():
        total[kind] += milliseconds  # type: ignore[assignment]
        count[kind] += 1
    return {
        kind: {"milliseconds": round(float(value), 3), "count": count[kind]}
        for kind, value in total.most_common()
    }


def summary_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The forms for people."""
    rows = []
    for name, values in found.items():
        times = harness.Interval(**values["milliseconds"])
        ratio = harness.Interval(**values["times_before"])
        counts = (values[key] for key in ("nodes", "moves", "layers", "arithmetic"))
        shown = ["" if number is None else str(number) for number in counts]
        rows.append([name, times.text(), ratio.text(3), *shown])
    return rows


def operator_rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Operators of the forms before and after, for people."""
    before, after = (found[name]["operator_times"] for name in (BEFORE, RECIPE))
    kinds = [*before, *(kind for kind in after if kind not in before)]
    rows = []
    for kind in kinds[:_MOST_OPERATORS]:
        cells = []
        for times in (before, after):
            one = times.get(kind, {"count": 0, "milliseconds": 0.0})
            cells += [str(one["count"]), f"{one['milliseconds']:.1f}"]
        rows.append([kind, *cells])
    return rows


@click.command()
@click.option("--model", default="identity64", show_default=True, help="In models/.")
@click.option("--samples", default=1, show_default=True, help="B.")
@click.option("--rows", default=0, help="R.  [default: 2B, which is guided]")
@click.option("--threads", default=0, help="[default: as many as usable cores]")
@click.option("--static", is_flag=True, help="Fix B and R in the graphs.")
@click.option("--cpu-time", is_flag=True, help="Processor time; wants --threads 1.")
@click.option("--only", multiple=True, help="A form; before and recipe are always in.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--runs", default=20, show_default=True, help="Profiled runs.")
@click.option("--seed", default=0, show_default=True)
@click.option("--name", default="", help="[default: graph-profile-BxR]")
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(
    model: str,
    samples: int,
    rows: int,
    threads: int,
    static: bool,
    cpu_time: bool,
    only: tuple[str, ...],
    rounds: int,
    runs: int,
    seed: int,
    name: str,
    results: Path,
) -> None:
    """Count and time the forms of the step graph of a model with random weights."""
    spec = load_model(model)
    rows, threads = rows or 2 * samples, threads or machine.usable_cores()
    torch.set_num_threads(threads)
    network = random_network(spec, seed)
    feeds = inputs(spec, samples, rows, seed)
    with torch.no_grad():
        tensors = (torch.from_numpy(value) for value in feeds.values())
        made = step_module(network, FLOAT32)(*tensors)
    expected = {k: v.numpy() for k, v in zip(_OUTPUTS, made[:2], strict=True)}
    refuse_trivial(expected)
    recipe = load_recipe("export", "float32", ExportRecipe)
    found: dict[str, dict[str, Any]] = {}
    variants = []
    for form, changes in CHANGES.items():
        if only and form not in (BEFORE, RECIPE, *only):
            continue
        click.echo(f"exporting: {form}", err=True)
        own = dataclasses.replace(recipe, **changes)
        if found and own == recipe and form != RECIPE:
            continue
        body = network if form == BEFORE else exported_body(network, own.form)
        data = graph(body, spec, own, (samples, rows), static=static)
        running = session(data, threads)
        known = {item.name for item in running.get_inputs()}
        given = {key: value for key, value in feeds.items() if key in known}
        outputs = dict(zip(_OUTPUTS, running.run(list(_OUTPUTS), given), strict=True))
        found[form] = {
            "relative_error": harness.checked(form, outputs, expected, 1e-5),
            "bytes": len(data),
            **graph_counts.graph_counts(data).to_json(),
            "operator_times": operator_times(data, given, threads, runs),
        }
        variants.append(
            harness.Variant(form, lambda r=running, g=given: r.run(None, g))  # type: ignore[misc]
        )
    watch = machine.Watch()
    plan = harness.Plan(rounds=rounds, seed=seed)
    clock = time.process_time if cpu_time else time.perf_counter
    seconds = harness.interleaved(variants, plan, clock=clock)
    for form, values in seconds.items():
        before = harness.ratio_interval(values, seconds[BEFORE])
        found[form] |= {
            "milliseconds": harness.median_interval(values).scaled(1e3).to_json(),
            "fastest_milliseconds": round(float(np.min(values)) * 1e3, 3),
            "times_before": before.to_json(),
            "seconds": harness.rounded(values),
        }
    kind = "processor ms" if cpu_time else "ms"
    head = [f"one step, B={samples}, R={rows}, {threads} threads: {kind}"]
    head += ["median (95 %)", "times before", "nodes", "moves", "layers", "integer"]
    harness.print_table(head, summary_rows(found))
    harness.print_table(
        ["operator", "before: number", "ms", "recipe: number", "ms"],
        operator_rows(found),
    )
    settings = {
        "model": spec.to_json(),
        "parameters": parameter_count(spec),
        "samples": samples,
        "unet_rows": rows,
        "threads": threads,
        "static": static,
        "processor_time": cpu_time,
        "profiled_runs": runs,
        **vars(plan),
    }
    packages = ("numpy", "onnxruntime", "torch", "diffusers", "tensorrt_rtx_cu13")
    result = harness.result(
        "graph_profile", rounds, settings, watch.stop(), packages, found
    )
    shape = "-static" if static else ""
    harness.publish(result, name or f"graph-profile-{samples}x{rows}{shape}", results)


if __name__ == "__main__":
    harness.run(main)
