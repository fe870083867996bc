"""Tables and an engine make images; the sampler itself does no arithmetic.

Torch-free. Noise is addressed by sample, so the batch a sample lands in cannot change
its picture.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .backends.base import Engine
from .calls import EngineCalls, engine_calls
from .errors import CancelledError, DeadlineError, HandOverError, InputError
from .guidance import GuidancePlan, GuidanceSettings, Others, guidance_plan
from .noise import CONDITION_STAGES, NoiseAddress, varied_normals
from .noise_ahead import NoiseAhead
from .solvers import RESCALE_COLUMN, SolverTable

Float32 = npt.NDArray[np.float32]
Anneal = Callable[[Float32, npt.NDArray[np.float64], Sequence[int]], Float32]


class NoiseSource(Protocol):
    """Where x_T and the noise of the table rows come from.

    ``row`` is called by another thread than ``start``, in the order of the table rows,
    while the engine works.
    """

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """x_T of the samples, unit variance: [B, C, H, W] float32."""

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Noise of table row j: [B, C, H, W] float32."""


@dataclass(frozen=True)
class SeededNoise:
    """The product's noise: a pure function of (seed, sample, stage, draw).

    ``addresses`` are those of samples that take another one's noise, or vary it.
    """

    seed: int
    stage: int = 0
    addresses: Mapping[int, NoiseAddress] = field(default_factory=dict)

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Draw 0 of every sample."""
        return self._drawn(samples, self.stage, 0, shape)

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Draw j + 1 of every sample."""
        return self._drawn(samples, self.stage, j + 1, shape)

    def condition(self, j: int, samples: Sequence[int], dim: int) -> Float32:
        """What moves the conditions in table row j: [B, dim]."""
        return self._drawn(samples, self.stage + CONDITION_STAGES, j, (dim,))

    def _drawn(
        self, samples: Sequence[int], stage: int, draw: int, shape: tuple[int, ...]
    ) -> Float32:
        addresses = [self.addresses.get(i) or NoiseAddress(i) for i in samples]
        return np.stack(
            [varied_normals(self.seed, one, stage, draw, shape) for one in addresses]
        )


@dataclass(frozen=True)
class SampleJob:
    """What to sample.

    Attributes:
        identity: [n, D] float32, normalised, one row a sample; zeros for
            unconditional ones.
        table: The solver.
        guidance: How strongly the samples are guided, and when.
        noise: Noise source; sample i of the job is sample ``first_sample + i``.
        first_sample: Index of the job's first sample.
        low_res: [n, C, h, w] float32 in [-1, 1], what a super-resolution model
            enlarges, one a sample; None for all other models.
        hand_over: In place of ``low_res``: puts what is enlarged into a begun engine,
            on its device. False where it cannot.
        others: Further identities of the n samples; None where there are none.
        anneal: Moves the samples' conditions (``control/annealing.py``): from [B, D],
            the timesteps [N] and the samples' numbers to [N, B, D]. None: they stay.
    """

    identity: Float32
    table: SolverTable
    guidance: GuidanceSettings
    noise: NoiseSource
    first_sample: int = 0
    low_res: Float32 | None = None
    hand_over: Callable[[Engine], bool] | None = None
    others: Others | None = None
    anneal: Anneal | None = None


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples.

    Attributes:
        samples: Indices of the samples.
        images: [B, C, H, W] float32, in [-1, 1] where the table clips.
        failed: [B] bool, True where a UNet row or the image was ever NaN or infinite;
            such an image must not be shown or written.
        on_device: The images on the engine's device, if that was asked for and there
            is one; see ``Engine.pictures_on_device``.
    """

    samples: tuple[int, ...]
    images: Float32
    failed: npt.NDArray[np.bool_]
    on_device: Any = None


@dataclass(frozen=True)
class Limits:
    """When a run is given up; looked at between chunks of table rows.

    Attributes:
        deadline: A moment of ``time.monotonic``.
        cancelled: Set by whoever wants the run to stop.
    """

    deadline: float | None = None
    cancelled: threading.Event | None = None

    def check(self) -> None:
        """Raise where a limit is reached.

        Raises:
            CancelledError, DeadlineError: It is.
        """
        if self.cancelled is not None and self.cancelled.is_set():
            raise CancelledError("the run was cancelled")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineError(
                "the run did not end before its deadline",
                fix="give it more time, or take fewer steps or pictures",
            )


NO_LIMITS = Limits()


def step_rows(table: SolverTable, plan: GuidancePlan) -> Float32:
    """The solver's table with what guidance puts into it: [N, S] float32."""
    rows: Float32 = table.rows.copy()
    rows[:, RESCALE_COLUMN] = plan.rescale
    return rows


def table_chunks(calls: EngineCalls, most: int) -> Iterator[range]:
    """Calls that may be run together, in order.

    Those of a chunk follow each other, share a guidance table and all take noise or
    all take none; there are at most ``most``. A run of such calls is cut evenly, so
    that its chunks have one length, but for the last, which may be shorter.
    """
    begun = 0
    kinds = list(zip(calls.guidance.tolist(), calls.stochastic.tolist(), strict=True))
    for _, alike in itertools.groupby(kinds):
        count = sum(1 for _ in alike)
        length = math.ceil(count / math.ceil(count / most))
        for first in range(begun, begun + count, length):
            yield range(first, min(first + length, begun + count))
        begun += count


def job_plan(job: SampleJob, samples: Sequence[int]) -> GuidancePlan:
    """Guidance of some of a job's samples, which are positions in ``job.identity``.

    Raises:
        InputError: The guidance does not fit the table.
    """
    identity = np.ascontiguousarray(job.identity[list(samples)])
    times = job.table.timesteps
    others = None if job.others is None else job.others.part(list(samples))
    moved = None
    if job.anneal is not None:
        numbers = [job.first_sample + i for i in samples]
        moved = job.anneal(identity, times, numbers)
    return guidance_plan(identity, job.guidance, times, others=others, moved=moved)


def walk(
    engine: Engine,
    job: SampleJob,
    samples: Sequence[int],
    limits: Limits = NO_LIMITS,
    most: int | None = None,
) -> Generator[int, None, None]:
    """Begin a trajectory and run its table rows; yields j after each chunk of them, j
    being its last row.

    The engine's getters may be used after each chunk, and ``load_state`` too: the next
    row then starts from that state. Close the generator if it is not used up.

    Args:
        engine: An entered engine.
        job: What to sample.
        samples: Which of the job's samples, as positions in ``job.identity``.
        limits: When to give up.
        most: Rows of a chunk; 1 yields after every table row. None: what the engine
            takes at once.

    Raises:
        InputError: The guidance does not fit the table.
        EngineError: The engine cannot run the table.
        HandOverError: The job's pictures cannot be handed over.
        CancelledError, DeadlineError: A limit was reached before the last chunk.
    """
    shape = engine.shapes.picture
    numbers = [job.first_sample + i for i in samples]
    plan = job_plan(job, samples)
    calls = engine_calls(
        step_rows(job.table, plan),
        job.table.stochastic,
        plan,
        sequential=job.guidance.rows == "sequential",
    )
    now = calls.guidance[0]
    limits.check()
    x_t = job.noise.start(numbers, shape) * np.float32(job.table.x_scale)
    engine.begin(x_t, calls.tables[now], _low_res(engine, job, samples))
    if job.hand_over is not None and not job.hand_over(engine):
        raise HandOverError("the two engines share no device")
    at_once = engine.rows_at_once if most is None else min(most, engine.rows_at_once)
    chunks = list(table_chunks(calls, at_once))
    noisy = [chunk for chunk in chunks if calls.stochastic[chunk[0]]]

    def draw(call: int) -> Float32:
        return job.noise.row(int(calls.solver_row[call]), numbers, shape)

    with NoiseAhead(draw, noisy) as ahead:
        for chunk in chunks:
            limits.check()
            if calls.guidance[chunk[0]] != now:
                now = calls.guidance[chunk[0]]
                engine.guide(calls.tables[now])
            noise: list[Float32] | list[None] = [None] * len(chunk)
            if calls.stochastic[chunk[0]]:
                noise = ahead.take()
            values = calls.rows[chunk.start : chunk.stop, None]
            engine.run_rows(np.repeat(values, len(numbers), axis=1), noise)
            del noise  # so that no third chunk of it is alive when the next is taken
            if calls.last[chunk[-1]]:
                yield int(calls.solver_row[chunk[-1]])


def _low_res(engine: Engine, job: SampleJob, samples: Sequence[int]) -> Float32 | None:
    """What the samples are made of; zeros where it is put in place later."""
    if job.hand_over is not None and engine.shapes.low_res is not None:
        return np.zeros((len(samples), *engine.shapes.low_res), np.float32)
    if job.low_res is None:
        return None
    return np.ascontiguousarray(job.low_res[list(samples)])


def run_trajectory(
    engine: Engine,
    job: SampleJob,
    samples: Sequence[int],
    on_row: Callable[[int], None] | None = None,
    limits: Limits = NO_LIMITS,
) -> SampleBatch:
    """Sample one batch.

    Args:
        engine: An entered engine.
        job: What to sample.
        samples: Which of the job's samples, as positions in ``job.identity``.
        on_row: Called with j after table row j, for the rows of a chunk together after
            it; the engine's getters may be used and give what the chunk left.
        limits: When to give up.

    Raises:
        InputError, EngineError, CancelledError, DeadlineError: See :func:`walk`.
    """
    told = 0
    with contextlib.closing(walk(engine, job, samples, limits)) as walked:
        for last in walked:
            while on_row is not None and told <= last:
                on_row(told)
                told += 1
    images = engine.state()[0]
    # A finite but enormous learned variance overflows after the UNet's own check.
    overflowed = ~np.isfinite(images).all(axis=(1, 2, 3))
    numbers = tuple(job.first_sample + i for i in samples)
    return SampleBatch(numbers, images, engine.failed_samples() | overflowed)


def sample_batches(
    engine: Engine,
    job: SampleJob,
    batch_size: int,
    on_row: Callable[[int], None] | None = None,
    limits: Limits = NO_LIMITS,
) -> Iterator[SampleBatch]:
    """Sample the whole job, ``batch_size`` samples at a time, in order.

    Raises:
        CancelledError, DeadlineError: A limit was reached; batches that were given
            are whole.
        InputError: ``batch_size`` is below 1, the identities do not fit the model, or
            the guidance does not fit the table.
    """
    if batch_size < 1:
        raise InputError("the batch size must be at least 1", why=f"it is {batch_size}")
    if job.identity.ndim != 2 or job.identity.shape[1] != engine.shapes.identity_dim:
        raise InputError(
            f"identity vectors must be [n, {engine.shapes.identity_dim}]",
            why=f"they are {list(job.identity.shape)}",
        )
    if job.low_res is not None and len(job.low_res) != len(job.identity):
        raise InputError(
            "there must be one small picture for each sample",
            why=f"{len(job.low_res)} pictures, {len(job.identity)} samples",
        )
    for start in range(0, len(job.identity), batch_size):
        chosen = range(start, min(start + batch_size, len(job.identity)))
        yield run_trajectory(engine, job, chosen, on_row, limits)
