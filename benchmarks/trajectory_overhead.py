"""What the sampler adds to the bare runs of the graph that a trajectory needs.

    python benchmarks/trajectory_overhead.py [--samples B] [--steps N] [--threads T]

Row by row, the product's own trajectory alternates with bare bound runs of the same
session, so that each difference is between neighbours in time. A second series of bare
runs is held against the first in the same way: it shows what this comparison can see.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import harness
import machine
import numpy as np
import numpy.typing as npt
import torch
from bare_runs import BareRuns
from random_model import (
    Arrays,
    channels_last,
    exported,
    load_model,
    parameter_count,
    random_network,
    refuse_trivial,
)

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.guidance import GuidanceSettings, guidance_plan
from id3pm_deploy.noise import batch_normals
from id3pm_deploy.progress import progress
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.sampler import (
    NoiseSource,
    SampleJob,
    SeededNoise,
    run_trajectory,
    step_rows,
)
from id3pm_deploy.solvers import STATE_SLOTS, SolverSettings, solver_table
from id3pm_deploy.spec import DiffusionSpec

Float32 = npt.NDArray[np.float32]

GOAL = 0.01
_PACKAGES = ("numpy", "onnxruntime", "torch", "diffusers")
_PARTS = ("product", "bare", "control")


class Replayed:
    """Noise drawn beforehand: what a trajectory costs without drawing it.

    Args:
        source: Where it is drawn from.
        rows: Table rows N.
        samples: Numbers of the samples that will be asked for.
        shape: (C, H, W).
    """

    def __init__(
        self,
        source: NoiseSource,
        rows: int,
        samples: Sequence[int],
        shape: tuple[int, ...],
    ) -> None:
        self._first = source.start(samples, shape)
        self._rows = [source.row(j, samples, shape) for j in range(rows)]

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """x_T: [B, C, H, W] float32."""
        return self._first

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Noise of table row j: [B, C, H, W] float32."""
        return self._rows[j]


@dataclass
class Trajectory:
    """Seconds of one trajectory and of the bare runs between its rows.

    Attributes:
        rows: By part (product, bare, control), one value for each table row; the
            product's first one holds what comes before the first row, too.
        inside: The product's, spent inside ONNX Runtime.
        finish: The product's, after the last row.
        noise: Drawing the noise of one table row, which the rows do not contain.
    """

    rows: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in _PARTS}
    )
    inside: list[float] = field(default_factory=list)
    finish: float = 0.0
    noise: float = 0.0

    @property
    def bare(self) -> float:
        """A bare row."""
        return statistics.median(self.rows["bare"])

    def overhead(self) -> float:
        """What the product adds, as a share of as many bare runs.

        The median over the rows after the first keeps a hiccup of the machine out.
        """
        product, bare = self.rows["product"], self.rows["bare"]
        each = [p - b for p, b in zip(product, bare, strict=True)]
        added = each[0] + statistics.median(each[1:]) * len(each[1:]) + self.finish
        return added / (self.bare * len(each))

    def control(self) -> float:
        """The same difference between bare rows and bare rows."""
        pairs = zip(self.rows["control"], self.rows["bare"], strict=True)
        return statistics.median(c - b for c, b in pairs) / self.bare

    def own_row(self) -> float:
        """Seconds a row outside ONNX Runtime, of the rows after the first."""
        pairs = zip(self.rows["product"][1:], self.inside[1:], strict=True)
        return statistics.median(whole - inside for whole, inside in pairs)

    def own_ends(self) -> float:
        """Seconds outside ONNX Runtime before the first row and after the last."""
        return self.rows["product"][0] - self.inside[0] + self.finish


@dataclass(frozen=True)
class Bench:
    """An engine with a job, and bare runs of the engine's own session.

    It has to be the same session: two sessions of one graph keep their weights in
    different places, which alone can make one faster than the other.
    """

    engine: OnnxRuntimeEngine
    job: SampleJob
    samples: range
    bare: BareRuns
    control: BareRuns
    noise: NoiseSource

    def trajectory(self, seed: int) -> Trajectory:
        """Run one trajectory, with a bare and a control run after each row, in an order
        that follows from ``seed``."""
        order = random.Random(seed)  # noqa: S311 - nothing secret
        found = Trajectory()
        session = self.engine._session
        run_bound = session.run_with_iobinding
        mark = 0.0

        def timed(binding: Any) -> None:
            begun = time.perf_counter()
            run_bound(binding)
            found.inside.append(time.perf_counter() - begun)

        def after_row(j: int) -> None:
            nonlocal mark
            found.rows["product"].append(time.perf_counter() - mark)
            session.run_with_iobinding = run_bound
            for name in order.sample(_PARTS[1:], 2):
                bare = self.bare if name == "bare" else self.control
                begun = time.perf_counter()
                bare.run()
                found.rows[name].append(time.perf_counter() - begun)
            session.run_with_iobinding = timed
            mark = time.perf_counter()

        session.run_with_iobinding = timed
        try:
            mark = time.perf_counter()
            run_trajectory(self.engine, self.job, self.samples, after_row)
            found.finish = time.perf_counter() - mark
        finally:
            del session.run_with_iobinding
        begun = time.perf_counter()
        shape = self.engine.shapes.picture
        self.noise.row(0, self.samples, shape)
        found.noise = time.perf_counter() - begun
        return found


def make_bench(
    spec: DiffusionSpec, graph: bytes, samples: int, steps: int, threads: int, seed: int
) -> Bench:
    """An engine, a job of ``samples`` guided pictures, and bare runs of one size."""
    shapes = step_shapes(spec)
    engine = OnnxRuntimeEngine(graph, shapes, "float32", threads)
    table = solver_table(spec, SolverSettings(solver="ddpm", steps=steps))
    numbers = range(samples)
    noise = SeededNoise(seed)
    replayed = Replayed(noise, len(table), numbers, shapes.picture)
    identity = batch_normals(seed, numbers, 1, 0, (spec.identity.dim,))
    job = SampleJob(identity, table, GuidanceSettings(scale=2.0), replayed)
    plan = guidance_plan(identity, job.guidance, table.timesteps)
    guided = plan.tables[0]
    state = np.zeros((STATE_SLOTS, samples, *shapes.picture), np.float32)
    state[0] = replayed.start(numbers, shapes.picture) * np.float32(table.x_scale)
    arrays: Arrays = {
        "state": state,
        "noise": replayed.row(0, numbers, shapes.picture),
        "identity": guided.identity,
        "row": guided.row,
        "mix": guided.mix,
        "step": np.repeat(step_rows(table, plan)[:1], samples, axis=0),
    }
    session = engine._session
    bare, control = (BareRuns(session, arrays) for _ in range(2))
    return Bench(engine, job, numbers, bare, control, noise)


def check(bench: Bench, network: IdentityUNet, tolerance: float) -> dict[str, float]:
    """Hold bare runs against the product, to the bit, and that against PyTorch.

    Returns:
        Both errors, max|a-b|/max|b| of the images.

    Raises:
        ParityError: They compute different things.
    """
    table, numbers = bench.job.table, bench.samples
    made = run_trajectory(bench.engine, bench.job, numbers)
    shapes = bench.engine.shapes
    twin = BareRuns(bench.engine._session, _inputs_of(bench.bare))
    plan = guidance_plan(bench.job.identity, bench.job.guidance, table.timesteps)
    for j, row in enumerate(step_rows(table, plan)):
        twin.arrays["step"][...] = row
        if table.stochastic[j]:
            noise = bench.job.noise.row(j, numbers, shapes.picture)
            twin.arrays["noise"][...] = noise
        twin.run()
    images = {"images": made.images}
    refuse_trivial(images)
    exact = harness.checked("a bare run", {"images": twin.state[0]}, images, 0.0)
    with TorchEngine(network, shapes) as reference:
        expected = run_trajectory(reference, bench.job, numbers)
    wanted = {"images": expected.images}
    error = harness.checked("the trajectory", images, wanted, tolerance)
    return {"bare_against_product": exact, "product_against_pytorch": error}


def _inputs_of(runs: BareRuns) -> Arrays:
    return {**runs.arrays, "state": runs.states[0]}


def figures(found: Sequence[Trajectory]) -> dict[str, Any]:
    """What the trajectories say: intervals over trajectories, as JSON values."""

    def interval(values: Sequence[float], factor: float = 1.0) -> dict[str, float]:
        return harness.median_interval(values).scaled(factor).to_json()

    overhead = [one.overhead() for one in found]
    return {
        "goal": GOAL,
        "verdict": harness.verdict(harness.median_interval(overhead), GOAL),
        "overhead": interval(overhead),
        "control": interval([one.control() for one in found]),
        "bare_row_milliseconds": interval([one.bare for one in found], 1e3),
        "own_row_milliseconds": interval([one.own_row() for one in found], 1e3),
        "own_ends_milliseconds": interval([one.own_ends() for one in found], 1e3),
        "noise_row_milliseconds": interval([one.noise for one in found], 1e3),
        "noise_share_of_row": interval([one.noise / one.bare for one in found]),
        "overheads": harness.rounded(overhead),
        "bare_rows": harness.rounded([one.bare for one in found]),
    }


def table_rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures for people."""

    def text(name: str, factor: float, unit: str, digits: int) -> str:
        scaled = harness.Interval(**found[name]).scaled(factor)
        return f"{scaled.text(digits)} {unit}"

    goal = f"goal {GOAL:.0%}: {found['verdict']}"
    return [
        ["product over bare runs", text("overhead", 100, "%", 2), goal],
        ["control: bare over bare", text("control", 100, "%", 2), "0 if all is well"],
        ["a bare row", text("bare_row_milliseconds", 1, "ms", 2), ""],
        ["product's own code, a row", text("own_row_milliseconds", 1, "ms", 3), ""],
        ["its start and end", text("own_ends_milliseconds", 1, "ms", 3), "once"],
        [
            "drawing noise, a row",
            text("noise_row_milliseconds", 1, "ms", 3),
            f"apart: {found['noise_share_of_row']['value']:.2%} of a bare row",
        ],
    ]


def measure(bench: Bench, rounds: int, seed: int) -> list[Trajectory]:
    """Run a trajectory to warm up, then ``rounds`` that count."""
    bench.trajectory(seed)
    found = []
    with progress(rounds, "trajectories") as tick:
        for number in range(rounds):
            found.append(bench.trajectory(seed + 1 + number))
            tick()
    return found


@click.command()
@click.option("--model", default="identity64", show_default=True, help="In models/.")
@click.option("--samples", default=1, show_default=True, help="B; guided, so R = 2B.")
@click.option("--steps", default=10, show_default=True, help="N; at least 3.")
@click.option("--threads", default=0, help="[default: as many as usable cores]")
@click.option("--rounds", default=30, show_default=True, help="Trajectories.")
@click.option("--tolerance", default=1e-4, show_default=True, help="Of the images.")
@click.option("--seed", default=0, show_default=True)
@click.option("--name", default="", help="[default: trajectory-overhead-BxN]")
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(
    model: str,
    samples: int,
    steps: int,
    threads: int,
    rounds: int,
    tolerance: float,
    seed: int,
    name: str,
    results: Path,
) -> None:
    """Measure the sampler's overhead on a model with random weights."""
    spec = load_model(model)
    threads = threads or machine.usable_cores()
    torch.set_num_threads(threads)
    network = random_network(spec, seed)
    click.echo("exporting and checking the graph", err=True)
    graph = exported(network, spec, "float32")
    channels_last(network)
    bench = make_bench(spec, graph, samples, max(steps, 3), threads, seed)
    errors = check(bench, network, tolerance)
    watch = machine.Watch()
    found = figures(measure(bench, rounds, seed))
    settings = {
        "model": spec.to_json(),
        "parameters": parameter_count(spec),
        "samples": samples,
        "unet_rows": 2 * samples,
        "solver": "ddpm",
        "table_rows": len(bench.job.table),
        "threads": threads,
        "tolerance": tolerance,
        "seed": seed,
        "relative_errors": errors,
    }
    head = [f"{len(bench.job.table)} rows, B={samples}", "median (95 %)", ""]
    harness.print_table(head, table_rows(found))
    made = harness.result(
        "trajectory_overhead", rounds, settings, watch.stop(), _PACKAGES, found
    )
    harness.publish(made, name or f"trajectory-overhead-{samples}x{steps}", results)


if __name__ == "__main__":
    harness.run(main)
