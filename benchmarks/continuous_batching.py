"""Continuous batching against fixed batches: what a full queue gets, and latency.

    python benchmarks/continuous_batching.py [--rounds N] [--requests N]

Throughput is measured while the queue never runs empty: all requests of a round wait
from the start. They have unlike steps, as people ask for drafts and for good pictures;
every round shuffles them anew, for all variants alike. Fixed batches are of B requests
in order of arrival. In the plain form, that of a batched sampler, all UNet rows run to
the end of the longest; in the better one a sample that is done costs no more rows.
Latency is measured under arrivals at random, at a share of the capacity. All variants
use one engine, and their pictures are compared with those made alone first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import harness
import machine
import numpy as np
import numpy.typing as npt
from request_trace import SHARES, SOLVERS, Request, make_trace, mean_steps

from id3pm_deploy.backends.base import Engine
from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.errors import InputError, ParityError
from id3pm_deploy.guidance import GuidanceSettings, GuidanceTable, guidance_plan
from id3pm_deploy.identity.vectors import load_identities, normalise_identities
from id3pm_deploy.models import Model, open_engine, open_model
from id3pm_deploy.places import Places, Trajectory
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.serving import Front
from id3pm_deploy.shipped import shipped_checkpoint, shipped_identities
from id3pm_deploy.solvers import STEP_WIDTH, SolverSettings, solver_table
from id3pm_deploy.worker import Worker

Float32 = npt.NDArray[np.float32]

SCALE = 2.0
CONTINUOUS = "continuous batching"
PLAIN = "fixed batches"
BETTER = "fixed batches, finished rows dropped"
_PACKAGES = ("numpy", "onnxruntime")
_CHECKED = 6
_BUSY = 0.1


@dataclass(frozen=True)
class Subject:
    """The model and the people that requests are of."""

    model: Model
    vectors: Float32

    def trajectory(self, wanted: Request) -> Trajectory:
        """A request as the batch takes it."""
        settings = SolverSettings(wanted.solver, wanted.steps)
        table = solver_table(self.model.spec, settings)
        who = self.vectors[wanted.person][None]
        plan = guidance_plan(who, GuidanceSettings(SCALE), table.timesteps)
        return Trajectory(table, plan, SeededNoise(wanted.seed))


Served = Callable[[Sequence[Request]], tuple[list[float], list[Float32]]]
"""Latency and picture of every request."""


@dataclass(frozen=True)
class Way:
    """A variant: how it serves arrivals, and its pictures a second with a full queue,
    of requests that all wait from the start."""

    serve: Served
    saturated: Callable[[Sequence[Request]], float]


class Continuous:
    """The product's front, which ``Sampler.submit`` uses, over the shared engine."""

    def __init__(self, subject: Subject, engine: Engine, places: int) -> None:
        self._subject, self._places = subject, places
        self._worker = Worker()
        self._front = Front(lambda: engine, self._worker, places, waiting=4096)

    def close(self) -> None:
        """End its thread."""
        self._front.close()
        self._worker.close(lambda: None)

    def serve(self, trace: Sequence[Request]) -> tuple[list[float], list[Float32]]:
        """Submit every request when it arrives."""

        async def one(wanted: Request, start: float) -> tuple[float, Float32]:
            await asyncio.sleep(max(start + wanted.at - time.perf_counter(), 0))
            done = await self._front.submit(self._subject.trajectory(wanted))
            return time.perf_counter() - start - wanted.at, done.image

        async def main() -> list[tuple[float, Float32]]:
            start = time.perf_counter()
            return await asyncio.gather(*(one(wanted, start) for wanted in trace))

        done = asyncio.run(main())
        return [seconds for seconds, _ in done], [image for _, image in done]

    def saturated(self, trace: Sequence[Request]) -> float:
        """Up to the moment when the last of them gets a place; the rest is given up.

        What the batch did meanwhile is counted in table rows of its samples, also of
        those that are not done yet.
        """
        rows, seconds = asyncio.run(self._until_all_have_places(trace))
        self._worker.call(lambda _: None)  # the engine is at rest
        return rows / mean_steps(trace) / seconds

    async def _until_all_have_places(
        self, trace: Sequence[Request]
    ) -> tuple[int, float]:
        start = time.perf_counter()
        chosen = [self._subject.trajectory(one) for one in trace]
        tasks = [asyncio.ensure_future(self._front.submit(one)) for one in chosen]
        ended = asyncio.as_completed(tasks)
        for _ in range(len(trace) - self._places):
            await next(ended)
        found = sum(one.row for one in chosen), time.perf_counter() - start
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return found


def saturated_by(serve: Served) -> Callable[[Sequence[Request]], float]:
    """Pictures a second of a variant that ends with a batch that was full."""

    def rate(trace: Sequence[Request]) -> float:
        seconds, _ = serve(trace)
        return len(trace) / max(seconds)

    return rate


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
                    noise[i] = one.noise.row(j, [0], shape)[0]
        engine.run_row(step, noise)
        for i, one in enumerate(chosen):
            if j + 1 == len(one.rows):
                images[i] = engine.state()[0][i]
    yield from images.items()


def make_ways(
    subject: Subject, engine: Engine, front: Continuous, places: int, timeout: float
) -> dict[str, Way]:
    """The three variants, by name."""
    plain = fixed(subject, engine, places, timeout, drop=False)
    better = fixed(subject, engine, places, timeout, drop=True)
    return {
        CONTINUOUS: Way(front.serve, front.saturated),
        PLAIN: Way(plain, saturated_by(plain)),
        BETTER: Way(better, saturated_by(better)),
    }


def check(subject: Subject, engine: Engine, ways: Mapping[str, Way]) -> None:
    """Hold every variant's pictures against those made alone.

    Raises:
        ParityError: One differs.
    """
    trace = make_trace(_CHECKED, 20.0, len(subject.vectors), 99)
    trace = [replace(one, steps=max(one.steps // 3, 3)) for one in trace]
    expected = []
    for one in trace:
        made = subject.trajectory(one)
        who, guidance = subject.vectors[one.person][None], GuidanceSettings(SCALE)
        job = SampleJob(who, made.table, guidance, SeededNoise(one.seed))
        expected.append(run_trajectory(engine, job, [0]).images[0])
    for name, way in ways.items():
        _, images = way.serve(trace)
        same = [np.array_equal(a, b) for a, b in zip(images, expected, strict=True)]
        if not all(same):
            raise ParityError(f"{name}: pictures differ from those made alone")


def rotated(ways: Mapping[str, Way], turn: int) -> Iterator[tuple[str, Way]]:
    """All variants, another one first in each turn."""
    names = list(ways)
    for i in range(len(names)):
        name = names[(turn + i) % len(names)]
        yield name, ways[name]


def throughput(
    ways: Mapping[str, Way], people: int, requests: int, rounds: int, seed: int
) -> dict[str, list[float]]:
    """Pictures a second of each variant with a full queue: one value a round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        trace = make_trace(requests, np.inf, people, seed + turn)
        for name, way in rotated(ways, turn):
            found[name].append(way.saturated(trace))
    return found


def latencies(
    ways: Mapping[str, Way], trace: Sequence[Request]
) -> dict[str, dict[str, float]]:
    """Seconds from arrival to picture, of one trace for all variants."""
    found = {}
    for name, way in ways.items():
        seconds, _ = way.serve(trace)
        p50, p90 = np.percentile(seconds, [50, 90])
        values = {"p50": p50, "p90": p90, "mean": np.mean(seconds)}
        found[name] = {
            f"{key}_seconds": float(f"{value:.4g}") for key, value in values.items()
        }
    return found


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: faces32's]")
@click.option("--requests", default=16, show_default=True, help="In a round.")
@click.option("--rounds", default=4, show_default=True, help="With a full queue.")
@click.option("--load", default=0.3, show_default=True, help="Share, for latency.")
@click.option("--arrivals", default=16, show_default=True, help="For latency.")
@click.option("--places", default=8, show_default=True, help="B.")
@click.option("--timeout", default=0.1, show_default=True, help="Seconds, to collect.")
@click.option("--threads", default=0, help="[default: as many as usable cores]")
@click.option("--seed", default=0, show_default=True)
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(bundle: Path | None, results: Path, **settings: Any) -> None:
    """Measure throughput with a full queue, then latency under arrivals."""
    places, requests = settings["places"], settings["requests"]
    if requests % places or requests <= places or settings["rounds"] < 2:
        raise InputError(
            "requests must be a multiple of places, twice them at least, and rounds 2",
            why="fixed batches must all be full, and an interval needs rounds",
        )
    settings["threads"] = settings["threads"] or machine.usable_cores()
    with TemporaryDirectory() as folder:
        if bundle is None:
            bundle = Path(folder) / "bundle"
            build_engine(shipped_checkpoint(), "cpu", bundle)
        model = open_model(bundle)
        raw = load_identities(shipped_identities()).vectors
        vectors = normalise_identities(raw, model.spec.identity.normalisation)
        subject = Subject(model, vectors)
        with (
            open_engine(model, "onnxruntime", threads=settings["threads"]) as engine,
            contextlib.closing(Continuous(subject, engine, places)) as front,
        ):
            ways = make_ways(subject, engine, front, places, settings["timeout"])
            check(subject, engine, ways)
            watch = machine.Watch()
            measured = _measured(ways, len(vectors), settings)
            load = watch.stop()
    settings = {**settings, "shares": SHARES, "solvers": SOLVERS, "scale": SCALE}
    pictures = settings["rounds"] * requests  # of each variant
    made = harness.result(
        "continuous_batching", pictures, settings, load, _PACKAGES, measured
    )
    others = made["load"]["others"]
    if others is not None and others > _BUSY:
        made["rounds"] = 0
        click.echo("figures of a busy machine say nothing: not kept")
    harness.publish(made, "continuous-batching", results)


def _measured(
    ways: Mapping[str, Way], people: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    seed = settings["seed"]
    rates = throughput(ways, people, settings["requests"], settings["rounds"], seed)
    ratios = {
        name: harness.ratio_interval(rates[CONTINUOUS], rates[name])
        for name in (PLAIN, BETTER)
    }
    rows = []
    for name, values in rates.items():
        times = ratios[name].text(2) if name in ratios else ""
        rows.append([name, harness.median_interval(values).text(2), times])
    harness.print_table(
        ["queue always full", "pictures/s", "continuous: times as many"], rows
    )
    arrivals = settings["load"] * float(np.median(rates[CONTINUOUS]))
    trace = make_trace(settings["arrivals"], arrivals, people, seed)
    seconds = latencies(ways, trace)
    click.echo()
    harness.print_table(
        [f"{arrivals:.2f} requests/s", "p50 s", "p90 s", "mean s"],
        [[name, *(f"{v:.3g}" for v in of.values())] for name, of in seconds.items()],
    )
    return {
        "pictures_per_second": {
            name: [float(f"{value:.5g}") for value in values]
            for name, values in rates.items()
        },
        "continuous_times_as_many": {
            name: found.to_json() for name, found in ratios.items()
        },
        "arrivals_per_second": float(f"{arrivals:.4g}"),
        "latency": seconds,
    }


if __name__ == "__main__":
    harness.run(main)
