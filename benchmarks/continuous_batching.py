"""Continuous batching against fixed batches, under requests that arrive at random.

    python benchmarks/continuous_batching.py [--requests N] [--load SHARE]

Requests of mixed steps arrive as a Poisson process, at a share of what the engine can
do with a full batch, measured first. Every variant gets the same trace. Fixed batches
are of what waits when the engine is free: up to B requests, or those of a time-out. In
the plain form all UNet rows run to the end of the longest; in the better one a sample
that is done runs no more rows and is handed out at once. Pictures are compared with
those made alone before anything is timed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import harness
import machine
import numpy as np
import numpy.typing as npt

import id3pm_deploy
from id3pm_deploy.backends.base import Engine
from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.errors import ParityError
from id3pm_deploy.guidance import GuidanceSettings, GuidanceTable, guidance_plan
from id3pm_deploy.identity.vectors import load_identities, normalise_identities
from id3pm_deploy.models import Model, open_engine, open_model
from id3pm_deploy.places import Places, Trajectory
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.shipped import shipped_checkpoint, shipped_identities
from id3pm_deploy.solvers import STEP_WIDTH, SolverSettings, solver_table

Float32 = npt.NDArray[np.float32]

STEPS = (10, 20, 30, 50)
SOLVERS = ("ddpm", "ddim", "dpmpp-2m")
SCALES = (1.0, 2.0)
CONTINUOUS = "continuous batching"
PLAIN = "fixed batches"
BETTER = "fixed batches, finished rows dropped"
_PACKAGES = ("numpy", "onnxruntime")
_CHECKED = 6


@dataclass(frozen=True)
class Request:
    """One picture that somebody wants at a moment (seconds from the start)."""

    at: float
    person: int
    steps: int
    solver: str
    scale: float
    seed: int


@dataclass(frozen=True)
class Subject:
    """The model and the people that requests are of."""

    model: Model
    path: Path
    raw: Float32
    vectors: Float32

    def trajectory(self, wanted: Request) -> Trajectory:
        """A request as the batch takes it."""
        settings = SolverSettings(wanted.solver, wanted.steps)
        table = solver_table(self.model.spec, settings)
        who = self.vectors[wanted.person][None]
        plan = guidance_plan(who, GuidanceSettings(wanted.scale), table.timesteps)
        return Trajectory(table, plan, (wanted.seed, 0, 0))


Served = Callable[[Sequence[Request]], tuple[list[float], list[Float32]]]
"""Latency and picture of every request."""


def unet_rows(wanted: Request) -> int:
    """UNet rows of a request; all solvers here take one table row a step."""
    return wanted.steps * (1 if wanted.scale == 1 else 2)


def make_trace(count: int, per_second: float, people: int, seed: int) -> list[Request]:
    """Requests of a Poisson process."""
    draw = np.random.default_rng(seed)
    times = np.cumsum(draw.exponential(1 / per_second, count))
    return [
        Request(
            float(at),
            int(draw.integers(people)),
            int(draw.choice(STEPS)),
            str(draw.choice(SOLVERS)),
            float(draw.choice(SCALES)),
            number,
        )
        for number, at in enumerate(times)
    ]


def capacity(subject: Subject, engine: Engine, places: int, seconds: float) -> float:
    """UNet rows a second with all places taken and guided."""
    batch, numbers = Places(engine, places), iter(range(10**6))
    rows, begun = 0, None
    while begun is None or time.perf_counter() - begun < seconds:
        new = [Request(0, 0, 50, "ddim", 2.0, next(numbers)) for _ in range(batch.free)]
        batch.admit([subject.trajectory(one) for one in new])
        batch.run()
        rows += 2 * places
        if begun is None and rows >= 6 * places:
            rows, begun = 0, time.perf_counter()
    return rows / (time.perf_counter() - begun)


def continuous(subject: Subject, places: int, threads: int) -> Served:
    """The product: ``Sampler.submit`` for every request when it arrives."""

    def serve(trace: Sequence[Request]) -> tuple[list[float], list[Float32]]:
        given: dict[str, Any] = {"places": places, "threads": threads}
        with id3pm_deploy.load(subject.path, **given, waiting=4096) as sampler:

            async def one(wanted: Request, start: float) -> tuple[float, Float32]:
                await asyncio.sleep(max(start + wanted.at - time.perf_counter(), 0))
                picture = await sampler.submit(
                    subject.raw[wanted.person][None],
                    steps=wanted.steps,
                    solver=wanted.solver,
                    guidance=wanted.scale,
                    seed=wanted.seed,
                )
                return time.perf_counter() - start - wanted.at, picture.image

            async def main() -> list[tuple[float, Float32]]:
                start = time.perf_counter()
                return await asyncio.gather(*(one(wanted, start) for wanted in trace))

            done = asyncio.run(main())
        return [seconds for seconds, _ in done], [image for _, image in done]

    return serve


def fixed(
    subject: Subject, engine: Engine, places: int, timeout: float, *, drop: bool
) -> Served:
    """Batches of what waits, each run to its end before the next begins."""
    run = _run_dropping if drop else _run_padded

    def serve(trace: Sequence[Request]) -> tuple[list[float], list[Float32]]:
        seconds, images = [0.0] * len(trace), [np.empty(0, np.float32)] * len(trace)
        start, first = time.perf_counter(), 0
        while first < len(trace):
            latest = trace[first].at + timeout
            full = trace[min(first + places, len(trace)) - 1].at
            wait = start + min(latest, full) - time.perf_counter()
            time.sleep(max(wait, 0))
            now = time.perf_counter() - start
            end = first + 1
            while end < len(trace) and end < first + places and trace[end].at <= now:
                end += 1
            chosen = [subject.trajectory(one) for one in trace[first:end]]
            for i, image in run(engine, chosen):
                at = time.perf_counter() - start
                seconds[first + i], images[first + i] = at - trace[first + i].at, image
            first = end
        return seconds, images

    return serve


def _run_dropping(engine: Engine, chosen: list[Trajectory]) -> Any:
    """Yield each picture when it is done."""
    batch = Places(engine, len(chosen))
    batch.admit(chosen)
    while batch.held:
        for done in batch.run():
            yield chosen.index(done.trajectory), done.image


def _run_padded(engine: Engine, chosen: list[Trajectory]) -> Any:
    """Yield all pictures at the end; every UNet row runs as long as the longest."""
    count, shape = len(chosen), engine.shapes.picture
    tables = [one.plan.tables[0] for one in chosen]
    row = np.repeat(np.arange(count), [t.unet_rows for t in tables]).astype(np.int32)
    mix = np.zeros((2, count, len(row)), np.float32)
    mix[:, row, np.arange(len(row))] = np.concatenate([t.mix[:, 0] for t in tables], 1)
    identity = np.concatenate([t.identity for t in tables])
    x_t = np.stack([one.start(shape) for one in chosen])
    engine.begin(x_t, GuidanceTable(row, identity, mix))
    images = {}
    for j in range(max(len(one.rows) for one in chosen)):
        step = np.zeros((count, STEP_WIDTH), np.float32)
        noise = np.zeros((count, *shape), np.float32)
        for i, one in enumerate(chosen):
            if j < len(one.rows):
                step[i] = one.rows[j]
                if one.table.stochastic[j]:
                    seed = SeededNoise(one.address[0])
                    noise[i] = seed.row(j, [0], shape)[0]
        engine.run_row(step, noise)
        for i, one in enumerate(chosen):
            if j + 1 == len(one.rows):
                images[i] = engine.state()[0][i]
    yield from images.items()


def check(subject: Subject, engine: Engine, ways: dict[str, Served]) -> None:
    """Hold every variant's pictures against those made alone.

    Raises:
        ParityError: One differs.
    """
    trace = make_trace(_CHECKED, 20.0, len(subject.vectors), 99)
    expected = []
    for one in trace:
        made = subject.trajectory(one)
        who, guidance = subject.vectors[one.person][None], GuidanceSettings(one.scale)
        job = SampleJob(who, made.table, guidance, SeededNoise(one.seed))
        expected.append(run_trajectory(engine, job, [0]).images[0])
    for name, serve in ways.items():
        _, images = serve(trace)
        same = [np.array_equal(a, b) for a, b in zip(images, expected, strict=True)]
        if not all(same):
            raise ParityError(f"{name}: pictures differ from those made alone")


def figures(trace: Sequence[Request], seconds: Sequence[float]) -> dict[str, float]:
    """Throughput and latency of a variant."""
    ends = [one.at + s for one, s in zip(trace, seconds, strict=True)]
    p50, p95 = np.percentile(seconds, [50, 95])
    found = {
        "pictures_per_second": len(trace) / (max(ends) - trace[0].at),
        "latency_p50_seconds": float(p50),
        "latency_p95_seconds": float(p95),
        "latency_mean_seconds": float(np.mean(seconds)),
    }
    return {name: float(f"{value:.5g}") for name, value in found.items()}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: faces32's]")
@click.option("--requests", default=120, show_default=True)
@click.option("--load", default=0.9, show_default=True, help="Share of the capacity.")
@click.option("--places", default=8, show_default=True, help="B.")
@click.option("--timeout", default=0.1, show_default=True, help="Seconds, to collect.")
@click.option("--threads", default=0, help="[default: as many as usable cores]")
@click.option("--rounds", default=1, show_default=True, help="Of the same trace.")
@click.option("--seed", default=0, show_default=True)
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(
    bundle: Path | None,
    requests: int,
    load: float,
    places: int,
    timeout: float,
    threads: int,
    rounds: int,
    seed: int,
    results: Path,
) -> None:
    """Serve one trace of requests in three ways."""
    threads = threads or machine.usable_cores()
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            build_engine(shipped_checkpoint(), "cpu", bundle)
        model = open_model(bundle)
        raw = load_identities(shipped_identities()).vectors
        vectors = normalise_identities(raw, model.spec.identity.normalisation)
        subject = Subject(model, bundle, raw, vectors)
        with open_engine(model, "onnxruntime", threads=threads) as engine:
            ways = {
                CONTINUOUS: continuous(subject, places, threads),
                PLAIN: fixed(subject, engine, places, timeout, drop=False),
                BETTER: fixed(subject, engine, places, timeout, drop=True),
            }
            check(subject, engine, ways)
            watch = machine.Watch()
            rate = capacity(subject, engine, places, 5.0)
            mean = np.mean([unet_rows(one) for one in make_trace(10**4, 1, 1, seed)])
            per_second = load * rate / float(mean)
            trace = make_trace(requests, per_second, len(vectors), seed)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
            for turn in range(rounds):
                for name in sorted(ways, reverse=bool(turn % 2)):
                    seconds, _ = ways[name](trace)
                    found[name].append(figures(trace, seconds))
    _show(found, per_second)
    settings = {
        "requests": requests,
        "load": load,
        "places": places,
        "timeout_seconds": timeout,
        "threads": threads,
        "seed": seed,
        "rounds": rounds,
        "steps": STEPS,
        "solvers": SOLVERS,
        "guidance": SCALES,
        "capacity_unet_rows_per_second": round(rate, 2),
        "arrivals_per_second": round(per_second, 4),
    }
    made = harness.result(
        "continuous_batching", requests, settings, watch.stop(), _PACKAGES, found
    )
    harness.publish(made, "continuous-batching", results)


def _show(found: dict[str, list[dict[str, float]]], per_second: float) -> None:
    head = [f"{per_second:.2f} requests/s", "pictures/s", "p50 s", "p95 s", "mean s"]
    rows = []
    for name, rounds in found.items():
        middle = [np.median([one[key] for one in rounds]) for key in rounds[0]]
        rows.append([name, *(f"{value:.3g}" for value in middle)])
    harness.print_table(head, rows)


if __name__ == "__main__":
    harness.run(main)
