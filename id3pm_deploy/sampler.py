"""Tables and an engine make images; the sampler itself does no arithmetic.

Torch-free. Noise is addressed by sample, so the batch a sample lands in cannot change
its picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .backends.base import Engine
from .errors import InputError
from .guidance import GuidancePlan, GuidanceSettings, guidance_plan
from .noise import batch_normals
from .solvers import RESCALE_COLUMN, SolverTable

Float32 = npt.NDArray[np.float32]


class NoiseSource(Protocol):
    """Where x_T and the noise of the table rows come from."""

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """x_T of the samples, unit variance: [B, C, H, W] float32."""

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Noise of table row j: [B, C, H, W] float32."""


@dataclass(frozen=True)
class SeededNoise:
    """The product's noise: a pure function of (seed, sample, stage, draw)."""

    seed: int
    stage: int = 0

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Draw 0 of every sample."""
        return batch_normals(self.seed, samples, self.stage, 0, shape)

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Draw j + 1 of every sample."""
        return batch_normals(self.seed, samples, self.stage, j + 1, shape)


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
    """

    identity: Float32
    table: SolverTable
    guidance: GuidanceSettings
    noise: NoiseSource
    first_sample: int = 0
    low_res: Float32 | None = None


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples.

    Attributes:
        samples: Indices of the samples.
        images: [B, C, H, W] float32, in [-1, 1] where the table clips.
        failed: [B] bool, True where a UNet row or the image was ever NaN or infinite;
            such an image must not be shown or written.
    """

    samples: tuple[int, ...]
    images: Float32
    failed: npt.NDArray[np.bool_]


def step_rows(table: SolverTable, plan: GuidancePlan) -> Float32:
    """The solver's table with what guidance puts into it: [N, S] float32."""
    rows: Float32 = table.rows.copy()
    rows[:, RESCALE_COLUMN] = plan.rescale
    return rows


def walk(engine: Engine, job: SampleJob, samples: Sequence[int]) -> Iterator[int]:
    """Begin a trajectory and run its table rows; yields j after table row j.

    The engine's getters may be used after each row, and ``load_state`` too: the next
    row then starts from that state.

    Args:
        engine: An entered engine.
        job: What to sample.
        samples: Which of the job's samples, as positions in ``job.identity``.

    Raises:
        InputError: The guidance does not fit the table.
        EngineError: The engine cannot run the table.
    """
    shape = engine.shapes.picture
    numbers = [job.first_sample + i for i in samples]
    identity = np.ascontiguousarray(job.identity[list(samples)])
    plan = guidance_plan(identity, job.guidance, job.table.timesteps)
    now = plan.index[0]
    x_t = job.noise.start(numbers, shape) * np.float32(job.table.x_scale)
    small = job.low_res
    if small is not None:
        small = np.ascontiguousarray(small[list(samples)])
    engine.begin(x_t, plan.tables[now], small)
    for j, values in enumerate(step_rows(job.table, plan)):
        if plan.index[j] != now:
            now = plan.index[j]
            engine.guide(plan.tables[now])
        noise = job.noise.row(j, numbers, shape) if job.table.stochastic[j] else None
        engine.run_row(np.repeat(values[None], len(numbers), axis=0), noise)
        yield j


def run_trajectory(
    engine: Engine,
    job: SampleJob,
    samples: Sequence[int],
    on_row: Callable[[int], None] | None = None,
) -> SampleBatch:
    """Sample one batch.

    Args:
        engine: An entered engine.
        job: What to sample.
        samples: Which of the job's samples, as positions in ``job.identity``.
        on_row: Called with j after table row j; the engine's getters may be used.

    Raises:
        InputError, EngineError: See :func:`walk`.
    """
    for j in walk(engine, job, samples):
        if on_row is not None:
            on_row(j)
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
) -> Iterator[SampleBatch]:
    """Sample the whole job, ``batch_size`` samples at a time, in order.

    Raises:
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
        yield run_trajectory(engine, job, chosen, on_row)
