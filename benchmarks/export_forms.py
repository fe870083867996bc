"""What a form of the exported body costs and how accurate it is.

    python benchmarks/export_forms.py [--checkpoint FOLDER | --model NAME]

Each form is run by PyTorch in half precision and held against PyTorch in float32 at an
early, a middle and a late timestep; its graph is run by ONNX Runtime, which widens half
precision to float32, and held against PyTorch in half precision; operators are counted
and a TensorRT-RTX plan is built where that is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
from pathlib import Path
from typing import Any

import click
import graph_counts
import harness
import machine
import numpy as np
import torch
from random_model import Arrays, load_model, parameter_count, random_network
from torch.nn import functional

from id3pm_deploy.backends.onnxruntime import make_session
from id3pm_deploy.body_form import FLOAT32, Precision
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.builders.graph_inputs import step_inputs
from id3pm_deploy.builders.onnx import export_graph
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.builders.tensorrt import build_plan
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import ParityError
from id3pm_deploy.recipes import load_recipe
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.reference.step import step_module
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.schedule import noise_schedule
from id3pm_deploy.solvers import NO_CLIP
from id3pm_deploy.spec import DiffusionSpec

_NATIVE: dict[str, Any] = {
    "attention": "native",
    "normalisation": "native",
    "opset": 23,
}
_BFLOAT16: dict[str, Any] = {
    "precision": "bfloat16",
    "opset": 22,
    "tolerance_step": 8e-2,
    "tolerance_trajectory": 1.6e-1,
}
FORMS: dict[str, dict[str, Any]] = {
    "float16": {},
    "islands of guided-diffusion": {
        "islands": ("embedding", "projection", "norm", "softmax", "head")
    },
    "no island but norm and head": {"islands": ("norm", "head")},
    "no islands": {"islands": ()},
    "no islands, product scaled": {"islands": (), "attention": "plain"},
    "native operators": _NATIVE,
    "native operators, no islands": {**_NATIVE, "islands": ()},
    "bfloat16": _BFLOAT16,
    "bfloat16, no islands": {**_BFLOAT16, "islands": ()},
}
TIMES = {"early": 0.98, "middle": 0.5, "late": 0.02}
"""Timesteps, as shares of all."""


def pictures_at(spec: DiffusionSpec, share: float, rows: int, seed: int) -> Arrays:
    """Inputs of a step whose x0 is the network's own prediction: noisy pictures at one
    timestep, made of smooth random ones."""
    made = step_inputs(spec, rows, rows, seed)
    timestep = round(share * (spec.schedule.timesteps - 1))
    generator = torch.Generator().manual_seed(seed)
    channels, size = spec.model.image_channels, spec.model.image_size
    small = torch.randn(rows, channels, 4, 4, generator=generator)
    smooth = functional.interpolate(small, (size, size), mode="bicubic").tanh().numpy()
    kept = float(noise_schedule(spec.schedule).alphas_cumprod[timestep])
    x = np.sqrt(kept) * smooth + np.sqrt(1 - kept) * made["state"][0]
    made["state"][0] = x.astype(np.float32)
    made["step"][:, :5] = [timestep, 1.0, 0.0, 1.0, NO_CLIP]
    made["mix"][:] = np.eye(rows, dtype=np.float32)
    return made


def predictions(network: IdentityUNet, form: Any, cases: dict[str, Arrays]) -> Arrays:
    """What PyTorch predicts in each case."""
    module = step_module(network, form)
    if form.precision != "float32":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        return {
            name: module(*(torch.from_numpy(v) for v in case.values())).x0.numpy()
            for name, case in cases.items()
        }


def errors(found: Arrays, expected: Arrays) -> dict[str, float]:
    """max|a-b|/max|b| of each case; infinite where it is not finite."""
    compared = {name: compare(found[name], expected[name]) for name in expected}
    return {
        name: one.max_rel if one.finite else math.inf for name, one in compared.items()
    }


def measured(
    network: IdentityUNet,
    spec: DiffusionSpec,
    recipe: ExportRecipe,
    cases: dict[str, Arrays],
    full: Arrays,
) -> dict[str, Any]:
    """Errors, counts and sizes of one form."""
    half = predictions(network, recipe.form, cases)
    exported = export_graph(network, spec, recipe)
    data = exported.read()
    found: dict[str, Any] = {
        "settings": {
            key: value
            for key, value in vars(recipe).items()
            if key not in ("summary", "graph")
        },
        "half_against_float32": errors(half, full),
        "export_check": exported.worst_error,
        "graph_bytes": len(data),
        **graph_counts.graph_counts(data).to_json(),
    }
    if recipe.precision != "bfloat16":
        session = make_session(data, threads=0)
        names = [item.name for item in session.get_inputs()]
        found["graph_against_half"] = {
            name: compare(
                session.run(["x0"], {k: case[k] for k in names})[0], half[name]
            ).max_rel
            for name, case in cases.items()
        }
    if importlib.util.find_spec("tensorrt_rtx"):
        found |= plan_facts(data, recipe.precision)
    return found


def plan_facts(data: bytes, precision: Precision) -> dict[str, Any]:
    """Size of a TensorRT-RTX plan of a graph and how long it took to build."""
    engine = load_recipe("engines", "rtx", EngineRecipe)
    engine = dataclasses.replace(engine, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        graph, plan = Path(folder) / "graph.onnx", Path(folder) / "plan"
        graph.write_bytes(data)
        built = build_plan(graph, engine, None, plan)
        size = plan.stat().st_size
    return {"plan_bytes": size, "build_seconds": round(built.build_seconds, 1)}


def table_row(name: str, found: dict[str, Any]) -> list[str]:
    """A form's figures for people."""
    half = found["half_against_float32"]
    cells = [name, *(f"{half[when]:.1e}" for when in TIMES)]
    if "status" in found:
        return [*cells, found["status"], *[""] * (len(HEAD) - len(cells) - 1)]
    graph = found.get("graph_against_half", {})
    plan = found.get("plan_bytes")
    return [
        *cells,
        *(f"{graph[when]:.1e}" if when in graph else "" for when in TIMES),
        str(found["nodes"]),
        str(found["layers"] or ""),
        str(found["arithmetic"] if found["layers"] else ""),
        f"{found['graph_bytes'] / 1e6:.1f}",
        f"{plan / 1e6:.1f}" if plan else "",
    ]


HEAD = [
    "form",
    *(f"half, {when}" for when in TIMES),
    *(f"graph, {when}" for when in TIMES),
    "nodes",
    "layers",
    "integer layers",
    "graph MB",
    "plan MB",
]


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A CHECKPOINT.")
@click.option("--model", default="identity64", show_default=True, help="In models/.")
@click.option("--only", multiple=True, help="A form; several times for several.")
@click.option("--rows", default=2, show_default=True, help="Pictures a timestep.")
@click.option("--threads", default=0, help="[default: as many as usable cores]")
@click.option("--seed", default=0, show_default=True)
@click.option("--name", default="", help="[default: export-forms-MODEL]")
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(
    checkpoint: Path | None,
    model: str,
    only: tuple[str, ...],
    rows: int,
    threads: int,
    seed: int,
    name: str,
    results: Path,
) -> None:
    """Compare forms of the body that is exported in half precision."""
    torch.set_num_threads(threads or machine.usable_cores())
    if checkpoint is None:
        spec = load_model(model)
        network = random_network(spec, seed)
    else:
        loaded = load_checkpoint(checkpoint)
        spec, network, model = loaded.spec, loaded.network, checkpoint.name
    cases = {
        when: pictures_at(spec, share, rows, seed) for when, share in TIMES.items()
    }
    full = predictions(network, FLOAT32, cases)
    watch = machine.Watch()
    found = {}
    for form in only or FORMS:
        click.echo(form, err=True)
        values: dict[str, Any] = {"precision": "float16", "tolerance_step": 1e-2}
        values |= {"tolerance_trajectory": 2e-2} | FORMS[form]
        recipe = ExportRecipe(form, **values)
        try:
            found[form] = measured(network, spec, recipe, cases, full)
        except ParityError as error:
            half = predictions(network, recipe.form, cases)
            found[form] = {
                "status": f"refused: {error.why}",
                "half_against_float32": errors(half, full),
            }
        harness.print_table(HEAD, [table_row(form, found[form])])
    click.echo("max|a-b|/max|b| of the prediction; half: PyTorch in half precision")
    harness.print_table(HEAD, [table_row(*item) for item in found.items()])
    settings = {"model": spec.to_json(), "parameters": parameter_count(spec)}
    settings |= {"rows": rows, "times": TIMES, "seed": seed}
    packages = ("numpy", "onnxruntime", "torch", "tensorrt_rtx_cu13")
    # No rounds: nothing here is a time.
    made = harness.result(
        "export_forms", harness.MIN_ROUNDS, settings, watch.stop(), packages, found
    )
    harness.publish(made, name or f"export-forms-{model}", results)


if __name__ == "__main__":
    harness.run(main)
