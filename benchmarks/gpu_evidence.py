"""What a GPU makes of the torch backend and of ONNX Runtime's CUDA provider.

    python benchmarks/gpu_evidence.py --part parity --part replay --model identity64

For a machine that is there for minutes: it stops at its time budget and keeps what it
has after each measurement. Needs torch with CUDA and diffusers; onnx, onnxscript and
onnxruntime-gpu for the rows of ONNX Runtime. ``--dry-run --device cpu`` runs all of it
on a toy.

**Parity**: a short guided trajectory against the CPU's float32 reference,
max|a-b|/max|b| of the state after the first row and at the end.

**Replay**: the same trajectory row by row and with 1, 2, 4, ... N table rows in a
graph; its pictures have to be those of row by row, bit for bit, before it is timed.

**Host gap**: the share of a trajectory in which the device waited for the host. An
event is recorded on the engine's queue in front of each chunk of table rows, behind
the wait for its upload, and one behind the chunk. With begin b_i and end e_i of
chunk i,

    gap = Σ max(0, b_{i+1} - e_i) / (e_last - b_first)

A chunk that was queued before the one in front of it was done begins when that one
ends. Within a replayed chunk the host has nothing to do. Without graphs the device also
waits within a chunk, between kernels, which this does not see: a lower bound then.
On a CPU the events are the host's clock, and the figure says nothing.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import harness
import machine
import numpy as np
import numpy.typing as npt
import torch
from random_model import exported, load_model, parameter_count, random_network

from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.ort_device import OnnxDeviceEngine
from id3pm_deploy.backends.ort_providers import target_of
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.backends.torch_rig import TorchRig
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import Id3pmError, ParityError, first_line
from id3pm_deploy.files import make_folder, write_json
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.spec import DiffusionSpec

PARTS = ("parity", "replay")
_CUDA: Any = torch.cuda
_CUDNN: Any = torch.backends.cudnn
_PACKAGES = ("torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy")
_TOY = {"image_size": 16, "base_channels": 32, "channel_multipliers": (1, 2)}


@dataclass
class Run:
    """What all measurements share."""

    spec: DiffusionSpec
    network: Any
    device: str
    precisions: tuple[str, ...]
    compiled: tuple[str, ...]
    solver: str
    steps: int
    samples: int
    rounds: int
    ends: float
    keep: Callable[[dict[str, Any]], None]
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> SampleJob:
        """Guided samples of random identities."""
        dim = self.spec.identity.dim
        vectors = np.random.default_rng(0).normal(size=(self.samples, dim))
        table = solver_table(self.spec, SolverSettings(self.solver, self.steps))
        guidance = GuidanceSettings(2.0 if dim else 1.0)
        identity = np.asarray(vectors, dtype=np.float32)
        return SampleJob(identity, table, guidance, SeededNoise(0))

    def measure(self, name: str, one: Callable[[], dict[str, Any]]) -> None:
        """Measure and keep one thing, if there is time; its failure is its result."""
        if time.monotonic() > self.ends:
            self.found[name] = {"status": "not run: out of time"}
        else:
            click.echo(f"{name} ...", err=True)
            try:
                self.found[name] = {"status": "ok", **one()}
            except Id3pmError as error:
                reason = " ".join(filter(None, (error.what, error.why)))
                self.found[name] = {"status": f"failed: {reason}"[:500]}
            except Exception as error:  # the machine's time is worth more than a trace
                reason = f"{type(error).__name__}: {first_line(error)}"
                self.found[name] = {"status": f"broke: {reason}"[:500]}
        self.keep(self.found)

    def rig(self, precision: str, mode: str) -> TorchRig:
        """A rig over a copy of the network: it is moved to the device."""
        network = copy.deepcopy(self.network)
        form = BodyForm(precision)  # type: ignore[arg-type]
        shapes = step_shapes(self.spec)
        return TorchRig(network, shapes, form, self.device, compile_with=mode)


# Parity


def states(engine: Engine, job: SampleJob) -> list[npt.NDArray[np.float32]]:
    """The state after the first row and at the end.

    Raises:
        ParityError: A sample failed.
    """
    kept: list[npt.NDArray[np.float32]] = []

    def look(j: int) -> None:
        if not kept:
            kept.append(engine.state()[0])

    batch = run_trajectory(engine, job, range(len(job.identity)), look)
    if batch.failed.any():
        raise ParityError("a sample was not finite")
    return [kept[0], batch.images]


def parity(run: Run) -> None:
    """Hold every engine against the CPU's float32 reference."""
    with TorchEngine(copy.deepcopy(run.network), step_shapes(run.spec)) as engine:
        expected = states(engine, run.job)

    def against(make: Callable[[], Engine]) -> dict[str, Any]:
        with make() as engine:
            made = states(engine, run.job)
            errors = [compare(a, b) for a, b in zip(made, expected, strict=True)]
            return {
                "first_chunk_relative_error": errors[0].max_rel,
                "end_relative_error": errors[1].max_rel,
                "engine": vars(engine.info),
                "replay": engine.replay_note,
            }

    for precision in run.precisions:
        for mode in run.compiled:

            def rig(precision: str = precision, mode: str = mode) -> Engine:
                return ReplayEngine(run.rig(precision, mode), 1)

            name = f"torch {mode or 'eager'} {precision}"
            run.measure(f"parity: {name}", lambda rig=rig: against(rig))  # type: ignore[misc]

        def runtime(precision: str = precision) -> Engine:
            return runtime_engine(run, precision)

        name = f"parity: onnxruntime-cuda {precision}"
        run.measure(name, lambda made=runtime: against(made))  # type: ignore[misc]


def runtime_engine(run: Run, precision: str) -> Engine:
    """ONNX Runtime's CUDA provider over the product's own export.

    Raises:
        EngineError: The provider is not there.
    """
    from id3pm_deploy.backends.ort_providers import check_available
    from id3pm_deploy.optional import require

    target = target_of("onnxruntime-cuda", run.device)
    check_available(require("onnxruntime", extra="cuda"), target)  # before the export
    graph = exported(copy.deepcopy(run.network).cpu(), run.spec, precision)
    return OnnxDeviceEngine(graph, step_shapes(run.spec), precision, target)


# Replay


class Watched:
    """Records an event before and behind each chunk of a rig's table rows."""

    def __init__(self, rig: TorchRig) -> None:
        self._rig, self._on_gpu = rig, rig._on_gpu
        self.chunks: list[tuple[Any, Any]] = []
        stage, finish = rig.stage, rig.finish

        def staged(slot: int, steps: Any, noise: Any) -> None:
            stage(slot, steps, noise)
            self.chunks.append((self._event(), None))

        def finished(slot: int, n: int) -> None:
            self.chunks[-1] = (self.chunks[-1][0], self._event())
            finish(slot, n)

        rig.stage = staged  # type: ignore[method-assign]
        rig.finish = finished  # type: ignore[method-assign]

    def _event(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = _CUDA.Event(enable_timing=True)
        event.record(self._rig._queue)
        return event

    def _between(self, a: Any, b: Any) -> float:
        return float(a.elapsed_time(b) / 1e3) if self._on_gpu else float(b - a)

    def take(self) -> tuple[float, float]:
        """Seconds on the device, and the host gap, of what was recorded; forgets it.
        The device must be done."""
        chunks, self.chunks = self.chunks, []
        whole = self._between(chunks[0][0], chunks[-1][1])
        waits = [
            max(0.0, self._between(before[1], after[0]))
            for before, after in itertools.pairwise(chunks)
        ]
        return whole, sum(waits) / whole


def rows_in_graphs(steps: int) -> list[int]:
    """1, 2, 4, ..., and all of them."""
    powers = [1 << k for k in range(steps.bit_length()) if 1 << k < steps]
    return [*powers, steps]


def replay(run: Run) -> None:
    """Time trajectories row by row and replayed, each checked first."""
    rows = run.job.table.rows.shape[0]
    for precision in run.precisions:
        for mode in run.compiled:
            expected: list[npt.NDArray[np.float32]] = []
            for m in (-1, *rows_in_graphs(rows)):

                def one(
                    precision: str = precision,
                    mode: str = mode,
                    m: int = m,
                    expected: list[Any] = expected,
                ) -> dict[str, Any]:
                    return replayed(run, run.rig(precision, mode), m, expected)

                how = "no graphs" if m < 0 else f"{m} rows a graph"
                run.measure(f"replay: torch {mode or 'eager'} {precision}, {how}", one)


def replayed(
    run: Run, rig: TorchRig, m: int, expected: list[npt.NDArray[np.float32]]
) -> dict[str, Any]:
    """Time one engine.

    Args:
        run: What is shared.
        rig: Not yet open.
        m: Table rows in a graph; -1 for none.
        expected: The pictures row by row; filled by the first engine that runs.

    Raises:
        ParityError: The pictures are others.
    """
    before, job = free_memory(rig), run.job
    watched = Watched(rig)
    engine = ReplayEngine(rig, m)
    with engine:
        begun = time.perf_counter()
        batch = run_trajectory(engine, job, range(run.samples))
        first = time.perf_counter() - begun
        if not expected:
            expected.append(batch.images)
        if batch.failed.any() or batch.images.tobytes() != expected[0].tobytes():
            raise ParityError("replayed pictures are not those of row by row")
        watched.take()
        walls, on_device, gaps = [], [], []
        for _ in range(run.rounds):
            begun = time.perf_counter()
            run_trajectory(engine, job, range(run.samples))
            walls.append(time.perf_counter() - begun)
            seconds, gap = watched.take()
            on_device.append(seconds)
            gaps.append(gap)
        graphs = list(engine._graphs._graphs.values())
        return {
            "first_trajectory_seconds": round(first, 4),
            "wall_seconds": harness.rounded(walls),
            "wall_median_ms_a_row": 1e3
            * statistics.median(walls)
            / len(job.table.rows),
            "device_median_ms_a_row": 1e3
            * statistics.median(on_device)
            / len(job.table.rows),
            "host_gap": [round(gap, 5) for gap in gaps],
            "host_gap_median": statistics.median(gaps),
            "bit_equal_to_row_by_row": True,
            "device_bytes_taken": max(before - free_memory(rig), 0),
            "graphs": len(graphs),
            "graph_nodes": [graph.nodes for graph in graphs],
            "graph_pool_bytes": [graph.bytes for graph in graphs],
            "replay": engine.replay_note,
        }


def free_memory(rig: TorchRig) -> int:
    """Free bytes of the device, with all that the driver keeps; 0 on a CPU."""
    if not rig._on_gpu:
        return 0
    _CUDA.synchronize()
    _CUDA.empty_cache()
    return int(_CUDA.mem_get_info()[0])


# The script


def toy() -> DiffusionSpec:
    """A model that any machine runs in a moment."""
    spec = load_model("identity64")
    sizes: dict[str, Any] = {**_TOY, "residual_blocks": 1, "num_head_channels": 16}
    model = dataclasses.replace(spec.model, attention_resolutions=(8,), **sizes)
    identity = dataclasses.replace(spec.identity, dim=16)
    return dataclasses.replace(
        spec, model=model, identity=identity, title="a toy, random weights"
    )


def gpu_facts(device: str) -> dict[str, Any]:
    """The GPU and what drives it; empty without one."""
    if not device.startswith("cuda") or not _CUDA.is_available():
        return {}
    found = _CUDA.get_device_properties(torch.device(device))
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": _CUDNN.version(),
    }


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """A line for each measurement."""
    lines = []
    for name, one in found.items():
        cells = [name, one["status"], "", "", ""]
        if "end_relative_error" in one:
            cells[2] = f"{one['end_relative_error']:.1e}"
        if "wall_median_ms_a_row" in one:
            cells[3] = f"{one['wall_median_ms_a_row']:.3f}"
            cells[4] = f"{one['host_gap_median']:.4f}"
        lines.append(cells)
    return lines


HEAD = ("what", "status", "error at the end", "ms a row", "host gap")


@contextlib.contextmanager
def interrupted_is_fine() -> Iterator[None]:
    """What was kept before Ctrl-C stays."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted; what was measured is kept", err=True)


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS))
@click.option("--model", default="identity64", show_default=True, help="In models/.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--precision", "precisions", multiple=True, help="[default: both]")
@click.option("--compiled/--eager-only", default=True, show_default=True)
@click.option("--solver", default="ddpm", show_default=True)
@click.option("--steps", default=50, show_default=True)
@click.option("--samples", default=1, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--budget", default=540.0, show_default=True, help="Seconds.")
@click.option("--dry-run", is_flag=True, help="A toy, three steps, one round.")
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
@click.option("--name", default="", help="[default: gpu-evidence-MODEL]")
def command(
    parts: tuple[str, ...],
    model: str,
    device: str,
    precisions: tuple[str, ...],
    compiled: bool,
    solver: str,
    steps: int,
    samples: int,
    rounds: int,
    budget: float,
    dry_run: bool,
    results: Path,
    name: str,
) -> None:
    """Measure the torch backend and ONNX Runtime's CUDA provider on a GPU."""
    ends, watch = time.monotonic() + budget, machine.Watch()
    if dry_run:
        model, steps, rounds, compiled = "toy", 3, 1, False
    spec = toy() if model == "toy" else load_model(model)
    settings = {
        "model": spec.to_json(),
        "parameters": parameter_count(spec),
        "device": device,
        "solver": solver,
        "steps": steps,
        "samples": samples,
        "guidance": 2.0 if spec.identity.dim else 1.0,
        "budget": budget,
        "dry_run": dry_run,
        "gpu": gpu_facts(device),
    }
    title = name or f"gpu-evidence-{Path(model).stem}" + ("-dry" if dry_run else "")
    kept: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        kept.update(
            harness.result(
                "gpu_evidence", rounds, settings, watch.stop(), _PACKAGES, found
            )
        )
        write_json(make_folder(results) / f"{title}.json", kept)

    run = Run(
        spec,
        random_network(spec),
        device,
        precisions or ("float32", "float16"),
        ("", "default") if compiled else ("",),
        solver,
        steps,
        samples,
        rounds,
        ends,
        keep,
    )
    with interrupted_is_fine():
        for part in parts or PARTS:
            {"parity": parity, "replay": replay}[part](run)
    harness.print_table(HEAD, table_rows(run.found))
    click.echo(json.dumps(kept, allow_nan=False))


if __name__ == "__main__":
    harness.run(command)
