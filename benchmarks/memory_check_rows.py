"""What sequential guidance rows save and cost: memory and time of one batch of 8.

Both ways take turns; a run is a process of its own. Time is that of the sampling alone.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import harness
import machine
from memory_check import PACKAGES, make_bundle, measured

from id3pm_deploy.bundle import BASE, open_bundle
from id3pm_deploy.defaults import GUIDANCE_ROWS
from id3pm_deploy.files import make_folder, write_json
from id3pm_deploy.memory import graph_memory, rows_at_once

MODELS = ("faces32", "identity64")
SAMPLES = 8
PRECISION = "float32"
HEAD = ("model", "rows", "R", "predicted MiB", "measured MiB", "seconds")
_MIB = 1 << 20


def compare(name: str, bundle: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to run guided rows."""
    opened = open_bundle(bundle)
    spec = opened.manifest.diffusion
    graph = opened.graph("step", PRECISION, BASE)
    assert graph is not None
    found: dict[str, list[tuple[int, float]]] = {ways: [] for ways in GUIDANCE_ROWS}
    for _ in range(rounds):
        for ways, runs in found.items():
            more = ["--guidance-rows", ways]
            runs.append(measured(bundle, spec, SAMPLES, PRECISION, more))
    rows = []
    for ways, runs in found.items():
        unet_rows = rows_at_once(spec, SAMPLES, parallel=ways == "parallel")
        predicted = graph_memory(opened, graph, SAMPLES, unet_rows)
        rows.append(
            {
                "model": name,
                "guidance_rows": ways,
                "unet_rows": unet_rows,
                "predicted_bytes": predicted.total,
                "measured_bytes": [held for held, _ in runs],
                "seconds": [seconds for _, seconds in runs],
                "median_bytes": statistics.median_low([held for held, _ in runs]),
                "median_seconds": statistics.median([took for _, took in runs]),
            }
        )
    return rows


def table_rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table for people."""
    return [
        [
            one["model"],
            one["guidance_rows"],
            str(one["unet_rows"]),
            f"{one['predicted_bytes'] / _MIB:.0f}",
            f"{one['median_bytes'] / _MIB:.0f}",
            f"{one['median_seconds']:.2f}",
        ]
        for one in found
    ]


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--results", type=click.Path(path_type=Path), default=harness.RESULTS)
def command(rounds: int, work: Path, results: Path) -> None:
    """Measure; bundles are made in WORK and stay there."""
    work = make_folder(Path(os.path.abspath(work)))
    bundles = {name: make_bundle(name, work) for name in MODELS}
    watch = machine.Watch()
    rows: list[dict[str, Any]] = []
    for name, bundle in bundles.items():
        rows += compare(name, bundle, rounds)
    settings = {
        "backend": "onnxruntime",
        "precision": PRECISION,
        "samples": SAMPLES,
        "threads": 2,
        "solver": "ddim",
        "steps": 3,
    }
    told = {"rows": rows}
    found = harness.result(
        "memory_check_rows", rounds, settings, watch.stop(), PACKAGES, told
    )
    harness.print_table(HEAD, table_rows(rows))
    write_json(make_folder(results) / "guidance-rows.json", found)
    click.echo(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    harness.run(command)
