"""How long `id3pm-deploy sample` takes from its start to one finished picture.

    python benchmarks/cold_start.py [--bundle BUNDLE] [--steps N]

Every run is a new process. Three kinds take turns: as a user runs it, with all files in
memory; the same with its files put out of the page cache before; and one that takes
its own time, for the split.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import harness
import machine
import page_cache

from id3pm_deploy.errors import EngineError, InputError
from id3pm_deploy.progress import progress
from id3pm_deploy.shipped import shipped_checkpoint, shipped_identities

GOAL_SECONDS = 1.0
WARM, EVICTED, SPLIT = "warm", "evicted", "split"
_PACKAGES = ("click", "numpy", "onnxruntime", "pillow")
_CHILD = Path(__file__).resolve().parent / "cold_start_child.py"
_BUILD = "import sys; from id3pm_deploy.cli import main; main(sys.argv[1:])"
_ONE_PERSON = """
import sys
from pathlib import Path
from id3pm_deploy.identity.vectors import identity_file, load_identities
from id3pm_deploy.identity.vectors import save_identities
whole = load_identities(Path(sys.argv[1]))
one = identity_file(whole.vectors[:1], whole.model_name, whole.model_sha256)
save_identities(Path(sys.argv[2]), one)
"""


@dataclass
class Runs:
    """Fresh processes of one command, and what they took.

    Attributes:
        arguments: Of `id3pm-deploy`, without ``--out``.
        folder: Scratch folder for pictures and traces.
        files: What the command reads; put out of the page cache for EVICTED.
        written: Seconds until the pictures were in place, by kind.
        processor: Processor seconds of whole runs, all threads together, by kind.
        traces: Of the SPLIT runs.
        resident: Share of ``files`` still in memory after each eviction.
    """

    arguments: Sequence[str]
    folder: Path
    files: list[Path] = field(default_factory=list)
    written: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)
    traces: list[dict[str, Any]] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where the pictures go."""
        return self.folder / "pictures"

    @property
    def trace(self) -> Path:
        """Where a SPLIT run writes its times."""
        return self.folder / "trace.json"

    @property
    def _environment(self) -> dict[str, str]:
        """As after an installation: compiled Python is kept, here in the scratch
        folder, which has the user's cache as well."""
        left_out = "PYTHONDONTWRITEBYTECODE"
        kept = {k: v for k, v in os.environ.items() if k != left_out}
        compiled, cache = self.folder / "compiled", self.folder / "cache"
        return kept | {
            "PYTHONPYCACHEPREFIX": str(compiled),
            "XDG_CACHE_HOME": str(cache),
        }

    def prepare(self, kind: str) -> None:
        """Remove the last run's pictures; put files out of memory for EVICTED."""
        shutil.rmtree(self.out, ignore_errors=True)
        if kind == EVICTED:
            page_cache.evict(self.files)
            self.resident.append(page_cache.resident_share(self.files))

    def run(self, kind: str) -> None:
        """One process, from its start to its end.

        Raises:
            EngineError: It failed or made no picture.
        """
        python = [sys.executable, "-m", "id3pm_deploy"]
        if kind == SPLIT:
            python = [sys.executable, str(_CHILD), str(self.trace)]
        command = [*python, *self.arguments, "--out", str(self.out)]
        used = _children_seconds()
        spawned, wall = time.monotonic(), time.time()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self._environment
        )
        ended = time.monotonic()
        if done.returncode or len(list(self.out.glob("sample-*.png"))) != 1:
            raise EngineError(
                "the command did not make its one picture",
                why=done.stderr.strip()[-500:] or done.stdout.strip()[-500:],
            )
        # The folder is renamed into place when all is written: that sets its ctime.
        in_place = self.out.stat().st_ctime - wall
        self.written.setdefault(kind, []).append(in_place)
        self.processor.setdefault(kind, []).append(_children_seconds() - used)
        if kind == SPLIT:
            found = json.loads(self.trace.read_text(encoding="utf-8"))
            self.traces.append(found | {"spawned": spawned, "ended": ended})

    def variant(self, kind: str) -> harness.Variant:
        """The kind as the harness takes it."""
        return harness.Variant(kind, lambda: self.run(kind), lambda: self.prepare(kind))


def _children_seconds() -> float:
    """Processor seconds of all children that have ended."""
    return sum(os.times()[2:4])


def split(trace: dict[str, Any]) -> dict[str, float]:
    """The parts of a run, in seconds, in the order in which they begin; they add up to
    its whole time."""
    spent = trace["seconds"]
    imports = {k: v for k, v in spent.items() if k.startswith("import ")}
    parts = {k: v for k, v in spent.items() if k not in imports}
    inside = trace["finished"] - trace["begun"]
    return {
        "starting Python": trace["begun"] - trace["spawned"],
        "imports": sum(imports.values()),
        **parts,
        "the rest of the command": inside - sum(spent.values()),
        "ending the process": trace["ended"] - trace["finished"],
    }


def imports_of(trace: dict[str, Any]) -> dict[str, float]:
    """Seconds of the imports, by package, each without what it imports."""
    spent = trace["seconds"].items()
    return {k.removeprefix("import "): v for k, v in spent if k.startswith("import ")}


def measured_files(runs: Runs, bundle: Path) -> list[Path]:
    """Everything that a run reads: code, libraries, and the bundle."""
    runs.prepare(SPLIT)
    runs.run(SPLIT)
    code = [Path(name) for name in runs.traces.pop()["files"]]
    runs.written.clear()
    runs.processor.clear()
    return [*code, *(path for path in bundle.rglob("*") if path.is_file())]


def figures(runs: Runs, seconds: dict[str, list[float]], warmup: int) -> dict[str, Any]:
    """What the runs say, as JSON values; the first ``warmup`` of each are left out."""

    def milliseconds(values: Sequence[float]) -> dict[str, float]:
        return harness.median_interval(values).scaled(1e3).to_json()

    def parts(of: list[dict[str, float]]) -> dict[str, dict[str, float]]:
        names = dict.fromkeys(name for one in of for name in one)
        return {
            name: milliseconds([one.get(name, 0.0) for one in of]) for name in names
        }

    traces = runs.traces[warmup:]
    warm = harness.median_interval(runs.written[WARM][warmup:])
    return {
        "goal_seconds": GOAL_SECONDS,
        "verdict": harness.verdict(warm, GOAL_SECONDS),
        "to_exit_milliseconds": {k: milliseconds(v) for k, v in seconds.items()},
        "to_picture_milliseconds": {
            k: milliseconds(v[warmup:]) for k, v in runs.written.items()
        },
        "processor_milliseconds": {
            k: milliseconds(v[warmup:]) for k, v in runs.processor.items()
        },
        "resident_after_eviction": max(runs.resident[warmup:]),
        "split_milliseconds": parts([split(one) for one in traces]),
        "imports_milliseconds": parts([imports_of(one) for one in traces]),
        "seconds": {k: harness.rounded(v) for k, v in seconds.items()},
    }


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures for people."""

    def text(values: dict[str, float]) -> str:
        return harness.Interval(**values).text(0)

    exits, pictures = found["to_exit_milliseconds"], found["to_picture_milliseconds"]
    processor = text(found["processor_milliseconds"][WARM])
    goal = f"goal {GOAL_SECONDS:g} s: {found['verdict']}"
    left = f"{found['resident_after_eviction']:.0%} of the files were still in memory"
    rows = [
        ["warm, to the picture", text(pictures[WARM]), goal],
        ["warm, to the end of the process", text(exits[WARM]), ""],
        ["warm, processor time of all threads", processor, ""],
        ["evicted, to the picture", text(pictures[EVICTED]), left],
        ["evicted, to the end of the process", text(exits[EVICTED]), ""],
        ["split, to the end of the process", text(exits[SPLIT]), "takes its own time"],
    ]
    rows += [[f"- {k}", text(v), ""] for k, v in found["split_milliseconds"].items()]
    imports = found["imports_milliseconds"].items()
    costly = sorted(imports, key=lambda item: -item[1]["value"])[:6]
    return rows + [[f"- import {k}", text(v), "without others"] for k, v in costly]


def _in_a_process(*command: str) -> None:
    """Run Python on the side: this process must not hold the measured one's files."""
    done = subprocess.run(
        [sys.executable, "-c", *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError("the benchmark cannot be set up", why=done.stderr.strip())


def sample_arguments(bundle: Path, person: Path, steps: int, threads: int) -> list[str]:
    """Arguments of `id3pm-deploy` for one picture of one person in few steps."""
    words = ["sample", str(bundle), "--identity", str(person), "--count", "1"]
    words += ["--solver", "dpmpp-2m", "--steps", str(steps)]
    return [*words, "--threads", str(threads)]


@click.command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="[default: built from the shipped checkpoint, as the demo does]",
)
@click.option("--steps", default=10, show_default=True, help="Of dpmpp-2m.")
@click.option("--threads", default=0, help="[default: the runtime's choice]")
@click.option("--rounds", default=30, show_default=True, help="Runs of each kind.")
@click.option("--seed", default=0, show_default=True, help="Of the order.")
@click.option("--name", default="cold-start", show_default=True)
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(
    bundle: Path | None,
    steps: int,
    threads: int,
    rounds: int,
    seed: int,
    name: str,
    results: Path,
) -> None:
    """Measure the cold start of `sample` on the demo's bundle."""
    plan = harness.Plan(rounds, repeats=1, settle=0, pause=0.1, warmup=2, seed=seed)
    with tempfile.TemporaryDirectory(prefix="cold-start-") as scratch:
        folder = Path(scratch)
        if bundle is None:
            bundle = folder / "bundle"
            checkpoint, out = str(shipped_checkpoint()), str(bundle)
            words = ("build-engine", checkpoint, "--target", "cpu", "--out", out)
            _in_a_process(_BUILD, *words)
        person = folder / "person.npz"
        _in_a_process(_ONE_PERSON, str(shipped_identities()), str(person))
        runs = Runs(sample_arguments(bundle, person, steps, threads), folder)
        runs.files = measured_files(runs, bundle)
        watch = machine.Watch()
        kinds = [runs.variant(kind) for kind in (WARM, EVICTED, SPLIT)]
        with progress(rounds * len(kinds), "processes") as tick:
            seconds = harness.interleaved(kinds, plan, tick)
        load = watch.stop()
        found = figures(runs, seconds, plan.warmup)
    harness.print_table(["one picture", "ms (95 %)", ""], table_rows(found))
    settings = {
        "command": "sample --count 1 --solver dpmpp-2m",
        "steps": steps,
        "threads": threads,
        "files": len(runs.files),
        **vars(plan),
    }
    made = harness.result("cold_start", rounds, settings, load, _PACKAGES, found)
    harness.publish(made, name, results)


if __name__ == "__main__":
    harness.run(main)
