"""Take a full-size model with random weights through import, export, engines and
parity; prints time and peak memory of each stage, measured in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import harness
import machine
import process_tree

from id3pm_deploy.errors import InputError
from id3pm_deploy.files import make_folder, write_json

SCRIPT = Path(__file__).resolve().parent / "full_size_child.py"
PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "safetensors")
RTX = "tensorrt-rtx-cu13"

MOST_MEMORY = 8 << 30
"""Bytes of any stage, with all processes it starts."""
MOST_SECONDS = 120.0
"""For an export."""
_LIMIT = 3600.0


@dataclass(frozen=True)
class Place:
    """Where a model's files lie: what came from outside, CHECKPOINT, BUNDLE, report."""

    work: Path

    @property
    def source(self) -> Path:
        """The guided-diffusion state dict; its flags lie beside it."""
        return self.work / "source" / "ema_0.9999_000000.pt"

    @property
    def flags(self) -> Path:
        """The flags as JSON."""
        return self.work / "source" / "flags.json"

    @property
    def checkpoint(self) -> Path:
        """The CHECKPOINT folder."""
        return self.work / "checkpoint"

    @property
    def bundle(self) -> Path:
        """The BUNDLE folder."""
        return self.work / "bundle"


@dataclass(frozen=True)
class Stage:
    """A command of the product.

    Attributes:
        name: For the table.
        needs: What has to be there.
        makes: Files whose size is of interest, as a pattern below the work folder; an
            engine for CPUs is its graph.
        arguments: Behind ``id3pm-deploy``; or of the child script, for ``make``.
    """

    name: str
    needs: Callable[[Place], Path | None]
    makes: str
    arguments: Callable[[Place, int], list[str]]


def _import(place: Place, _: int) -> list[str]:
    given = ["import", str(place.source), "--flags", str(place.flags)]
    flags = json.loads(place.flags.read_text("utf-8"))
    if "embedding_size" in flags:
        given += ["--identity-model", "random vectors", "--normalisation", "raw"]
    return [*given, "--out", str(place.checkpoint), "--force"]


def _export(recipe: str) -> Callable[[Place, int], list[str]]:
    def arguments(place: Place, _: int) -> list[str]:
        out = ["--out", str(place.bundle)]
        return ["export", str(place.checkpoint), "--recipe", recipe, *out]

    return arguments


def _build(target: str) -> Callable[[Place, int], list[str]]:
    def arguments(place: Place, _: int) -> list[str]:
        return ["build-engine", str(place.bundle), "--target", target, "--no-cache"]

    return arguments


def _parity(place: Place, steps: int) -> list[str]:
    given = ["parity", str(place.bundle), "--against", str(place.checkpoint)]
    settings = ["--solver", "ddim", "--steps", str(steps), "--count", "1"]
    return [*given, *settings, "--out", str(place.work / "report")]


STAGES = (
    Stage("import", lambda place: place.source, "checkpoint/*.safetensors", _import),
    Stage(
        "export float32",
        lambda place: place.checkpoint,
        "bundle/step-float32-*.onnx",
        _export("float32"),
    ),
    Stage(
        "export float16",
        lambda place: place.checkpoint,
        "bundle/step-float16-*.onnx",
        _export("float16"),
    ),
    Stage("build cpu", lambda place: place.bundle, "-", _build("cpu")),
    Stage("build rtx", lambda place: place.bundle, "bundle/*.plan", _build("rtx")),
    Stage("parity", lambda place: place.bundle, "report/report.json", _parity),
)


def run_stage(stage: Stage, place: Place, steps: int) -> dict[str, Any]:
    """Run one stage; what stands in its way is its status."""
    needed = stage.needs(place)
    if needed is not None and not needed.exists():
        return {"status": f"not run: there is no {needed.relative_to(place.work)}"}
    command = [sys.executable, "-m", "id3pm_deploy", *stage.arguments(place, steps)]
    log = place.work / f"{stage.name.replace(' ', '-')}.log"
    ran = process_tree.run_measured(command, log, machine.ROOT, _LIMIT)
    sizes = [path.stat().st_size for path in place.work.glob(stage.makes)]
    found: dict[str, Any] = asdict(ran) | {"bytes_made": sum(sizes)}
    output = found.pop("output").strip().splitlines()
    found["status"] = "ok" if ran.status == 0 else f"exit status {ran.status}"
    if ran.status:
        found["said"] = _without_paths(output[-1] if output else "", place)
    return found | {"goal": goal(stage.name, found)}


def _without_paths(text: str, place: Place) -> str:
    return text.replace(str(place.work), ".").replace(str(machine.ROOT), ".")[:500]


def goal(name: str, found: dict[str, Any]) -> str:
    """Whether a stage kept within memory and, if it is an export, within time."""
    missed = []
    if found["status"] != "ok":
        missed.append("failed")
    if found["peak_bytes"] > MOST_MEMORY:
        missed.append("memory")
    if name.startswith("export") and found["seconds"] > MOST_SECONDS:
        missed.append("time")
    return "missed: " + ", ".join(missed) if missed else "met"


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The table, a row for each stage."""
    rows = []
    for name, stage in found.items():
        if "seconds" not in stage:
            rows.append([name, stage["status"], "", "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{stage['seconds']:.1f}",
                f"{stage['processor_seconds']:.1f}",
                f"{stage['peak_bytes'] / 2**30:.2f}",
                f"{stage['bytes_made'] / 1e6:.0f}",
                stage["goal"],
            ]
        )
    return rows


HEAD = ("stage", "seconds", "processor seconds", "peak GiB", "MB made", "goal")


def make_source(model: str, place: Place) -> None:
    """Write the random weights and their flags, in a process that ends with it.

    Raises:
        InputError: It failed.
    """
    make_folder(place.source.parent)
    name = os.path.abspath(model) if model.endswith(".toml") else model
    command = [sys.executable, str(SCRIPT), name, str(place.source), str(place.flags)]
    ran = process_tree.run_measured(command, place.work / "make.log", place.work)
    if ran.status:
        raise InputError("cannot make the random weights", why=ran.output[-500:])


def chosen_stages(names: Sequence[str]) -> list[Stage]:
    """Stages by name, in their order; none named means all.

    Raises:
        InputError: There is no such stage.
    """
    known = [stage.name for stage in STAGES]
    for name in names:
        if name not in known:
            raise InputError(f"there is no stage {name!r}", fix=f"use {known}")
    return [stage for stage in STAGES if not names or stage.name in names]


@click.command()
@click.option("--model", default="identity64-full", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--stage", "stages", multiple=True, help="Only these.  [default: all]")
@click.option("--steps", default=2, show_default=True, help="Of parity.")
@click.option("--results", type=click.Path(path_type=Path), default=harness.RESULTS)
@click.option("--keep", is_flag=True, help="Leave the work folder.")
def command(
    model: str,
    work: Path,
    stages: tuple[str, ...],
    steps: int,
    results: Path,
    keep: bool,
) -> None:
    """Measure a model of models/ in the folder WORK, which should have 10 GB."""
    wanted, name = chosen_stages(stages), Path(model).stem
    place = Place(Path(os.path.abspath(work)))
    make_folder(place.work)
    watch = machine.Watch()
    if not place.source.exists():
        make_source(model, place)
    measured: dict[str, Any] = {}
    for stage in wanted:
        click.echo(f"{stage.name} ...", err=True)
        measured[stage.name] = run_stage(stage, place, steps)
        found = harness.result(
            "full_size",
            1,
            {"model": name, "steps": steps, "memory": process_tree.METHOD},
            watch.stop(),
            (*PACKAGES, RTX),
            measured,
        )
        write_json(make_folder(results) / f"full-size-{name}.json", found)
    harness.print_table(HEAD, table_rows(measured))
    click.echo(json.dumps(found, allow_nan=False))
    if not keep:
        shutil.rmtree(place.work)
    if any(one["status"] != "ok" for one in measured.values()):
        sys.exit(1)


if __name__ == "__main__":
    harness.run(command)
