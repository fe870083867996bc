"""Hold the memory that `inspect --memory` predicts against what `sample` really takes.

Every run is a process of its own, one batch of guided samples, both halves at once.
Memory does not depend on how busy the machine is. The estimate's constants were fitted
to runs of all models but those of `HELD_OUT`, which are judged apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import harness
import machine
import numpy as np

from id3pm_deploy.bundle import BASE, open_bundle
from id3pm_deploy.errors import EngineError
from id3pm_deploy.files import make_folder, write_json
from id3pm_deploy.memory import graph_memory, rows_at_once
from id3pm_deploy.spec import DiffusionSpec

CHILD = Path(__file__).resolve().with_name("memory_check_child.py")
SHIPPED = "faces32"
HELD_OUT = ("identity48",)
MODELS = ("tiny16", SHIPPED, "superres64-small", "identity64", *HELD_OUT)
BATCHES = (1, 4, 8, 16)
PACKAGES = ("numpy", "onnxruntime", "pillow")
HEAD = ("model", "precision", "B", "R", "predicted MiB", "measured MiB", "error")
GOAL = 0.2
"""Relative error of any row."""
_MIB = 1 << 20
_SECONDS = 1200


def make_bundle(name: str, work: Path) -> Path:
    """The BUNDLE of a model with the graphs float32 and float16, made once."""
    folder = work / name
    if folder.is_dir():
        return folder
    from id3pm_deploy.builders.build import build_engine, export_bundle

    checkpoint = machine.ROOT / "id3pm_deploy" / "assets" / name
    if name != SHIPPED:
        import random_model

        from id3pm_deploy.reference.checkpoint import save_checkpoint

        spec = random_model.load_model(name)
        checkpoint = work / f"{name}.checkpoint"
        weights = random_model.random_network(spec).state_dict()
        save_checkpoint(checkpoint, spec, weights)
    build_engine(checkpoint, "cpu", folder)
    export_bundle(checkpoint, "float16", folder)
    return folder


def given(spec: DiffusionSpec, samples: int, folder: Path) -> list[str]:
    """Options of `sample` that make it run one batch, with files for them in
    ``folder``; random identities or pictures."""
    from id3pm_deploy.identity.vectors import identity_file, save_identities
    from id3pm_deploy.images import PictureMark, save_png

    random = np.random.default_rng(0)
    options = ["--batch-size", str(samples)]
    size = spec.model.low_res_size
    if size is not None:
        mark = PictureMark("0", 0, 0, "ddim", 2, 1.0, "none", "float32", "random")
        for index in range(samples):
            pixels = random.integers(0, 256, (size, size, 3), np.uint8)
            save_png(make_folder(folder / "small") / f"{index:02}.png", pixels, mark)
        return [*options, "--low-res", str(folder / "small")]
    vectors = random.normal(size=(samples, spec.identity.dim))
    whose = spec.identity
    file = identity_file(vectors, whose.model_name, whose.model_sha256)
    save_identities(folder / "identities.npz", file)
    return [*options, "--identity", str(folder / "identities.npz"), "--guidance", "2"]


def measured(
    bundle: Path,
    spec: DiffusionSpec,
    samples: int,
    precision: str,
    more: Sequence[str] = (),
) -> tuple[int, float]:
    """The most memory that `sample` held, in bytes, and the seconds that it sampled.

    Args:
        bundle: The model.
        spec: What it is.
        samples: All of them in one batch.
        precision: Of the graph.
        more: Further options.

    Raises:
        EngineError: It failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, str(CHILD), "sample", str(bundle)]
        command += given(spec, samples, folder)
        command += ["--backend", "onnxruntime", "--precision", precision]
        command += ["--solver", "ddim", "--steps", "3", "--threads", "2"]
        command += [*more, "--out", str(folder / "out")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            raise EngineError("sample failed", why=done.stderr[-500:])
        record = json.loads((folder / "out" / "record.json").read_text("utf-8"))
    return int(done.stdout.split()[-1]), float(record["seconds"])


def check(bundle: Path, samples: int, precision: str) -> dict[str, Any]:
    """One row of the table."""
    opened = open_bundle(bundle)
    spec = opened.manifest.diffusion
    graph = opened.graph("step", precision, BASE)
    assert graph is not None
    rows = rows_at_once(spec, samples)
    found = graph_memory(opened, graph, samples, rows)
    held, _ = measured(bundle, spec, samples, precision)
    return {
        "precision": precision,
        "samples": samples,
        "unet_rows": rows,
        "weights_file_bytes": opened.manifest.file_entry(graph.file).size,
        "predicted": found.to_json(),
        "measured_bytes": held,
        "error": round(found.total / held - 1, 4),
    }


def worst_errors(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The largest relative error, of models that were fitted to and of the others."""
    fitted = [abs(row["error"]) for row in rows if row["model"] not in HELD_OUT]
    others = [abs(row["error"]) for row in rows if row["model"] in HELD_OUT]
    return {
        "worst_error": max(fitted, default=None),
        "worst_error_held_out": max(others, default=None),
    }


def table_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table for people."""
    return [
        [
            one["model"],
            one["precision"],
            str(one["samples"]),
            str(one["unet_rows"]),
            f"{one['predicted']['total'] / _MIB:.0f}",
            f"{one['measured_bytes'] / _MIB:.0f}",
            f"{one['error']:+.0%}",
        ]
        for one in found
    ]


@click.command()
@click.option("--model", "models", multiple=True, help="Only these.  [default: all]")
@click.option("--batch", "batches", multiple=True, type=int, help="Only these.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=harness.RESULTS)
def command(
    models: Sequence[str], batches: Sequence[int], work: Path, results: Path
) -> None:
    """Predict and measure; bundles are made in WORK and stay there."""
    work = make_folder(Path(os.path.abspath(work)))
    watch = machine.Watch()
    rows: list[dict[str, Any]] = []
    for name in models or MODELS:
        bundle = make_bundle(name, work)
        for precision in ("float32", "float16"):
            for samples in batches or BATCHES:
                click.echo(f"{name} {precision} B={samples} ...", err=True)
                rows.append({"model": name, **check(bundle, samples, precision)})
    settings = {"backend": "onnxruntime", "threads": 2, "solver": "ddim", "steps": 3}
    told = {"rows": rows, **worst_errors(rows), "goal": GOAL}
    found = harness.result("memory_check", 1, settings, watch.stop(), PACKAGES, told)
    harness.print_table(HEAD, table_rows(rows))
    write_json(make_folder(results) / "memory-check.json", found)
    click.echo(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    harness.run(command)
