"""An engine against the PyTorch reference, table row by table row, on the same noise.

Three things are compared: each side's own trajectory, every table row alone (the engine
starts it from the reference's state), and the reference's result with diffusers' own
scheduler, which shares no code with the tables.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import __version__
from .backends.base import Engine
from .backends.torch import TorchEngine
from .compare import Comparison, compare, unsaturated
from .defaults import MAX_BATCH_SIZE
from .errors import InputError
from .generate import Conditions, SampleSettings, picture_marks
from .guidance import guidance_table
from .images import PictureMark, to_uint8
from .models import Model
from .noise import batch_normals
from .reference.unet import IdentityUNet
from .report import IdentitySimilarity, ParityReport, StepComparison, Tolerances
from .sampler import NoiseSource, SampleJob, SeededNoise, run_trajectory
from .solvers import SolverTable, solver_table
from .spec import DiffusionSpec

Float32 = npt.NDArray[np.float32]

ORACLE_TOLERANCE = 1e-4
"""The reference's tables against diffusers' schedulers, both in float32."""

Similarity = Callable[[Sequence[npt.NDArray[np.uint8]]], tuple[float, ...]]
"""Cosine of each uint8 picture [H, W, 3] to the wanted identity; NaN for no face."""


@dataclass(frozen=True)
class Trace:
    """One side's trajectory: its states and previews after every table row.

    Attributes:
        states: [N][K, B, C, H, W] float32.
        previews: [N][B, C, H, W] float32.
        images: [B, C, H, W] float32, the final pictures.
    """

    states: list[Float32]
    previews: list[Float32]
    images: Float32


@dataclass(frozen=True)
class ParityResult:
    """A judged report with the pictures of both sides, uint8 [B, H, W, 3]."""

    report: ParityReport
    reference: npt.NDArray[np.uint8]
    engine: npt.NDArray[np.uint8]
    marks: tuple[PictureMark, ...]


def trace(engine: Engine, job: SampleJob) -> Trace:
    """Run all samples of ``job`` as one batch and keep what every table row made.

    Raises:
        InputError: There are too many samples for one batch.
    """
    if len(job.identity) > MAX_BATCH_SIZE:
        raise InputError(
            f"parity compares at most {MAX_BATCH_SIZE} pictures",
            why=f"{len(job.identity)} were asked for",
            fix="lower --count, or give fewer identities",
        )
    states: list[Float32] = []
    previews: list[Float32] = []

    def keep(_: int) -> None:
        states.append(engine.state())
        previews.append(engine.preview())

    batch = run_trajectory(engine, job, range(len(job.identity)), keep)
    return Trace(states, previews, batch.images)


def single_rows(engine: Engine, job: SampleJob, reference: Trace) -> list[Comparison]:
    """Every table row alone: from the reference's state, compared with its next."""
    samples = range(len(job.identity))
    shape = engine.shapes.picture
    guided = guidance_table(
        job.identity, job.guidance, guide_variance=job.guide_variance
    )
    engine.begin(job.noise.start(samples, shape), guided)
    found = []
    for j, values in enumerate(job.table.rows):
        if j:
            engine.load_state(reference.states[j - 1])
        noise = job.noise.row(j, samples, shape) if job.table.stochastic[j] else None
        engine.run_row(np.repeat(values[None], len(job.identity), axis=0), noise)
        found.append(compare(engine.state(), reference.states[j]))
    return found


def diffusers_images(
    network: IdentityUNet, spec: DiffusionSpec, job: SampleJob, table: SolverTable
) -> Float32:
    """The same trajectory computed by diffusers' scheduler, [B, C, H, W] float32."""
    import torch

    from .reference.sampling import guided_denoiser, reference_trajectory

    samples = range(len(job.identity))
    model = spec.model
    shape = (model.image_channels, model.image_size, model.image_size)
    denoise = guided_denoiser(
        network,
        torch.from_numpy(job.identity),
        job.guidance,
        guide_variance=job.guide_variance,
    )
    settings = table.settings
    steps = reference_trajectory(
        spec,
        denoise,
        torch.from_numpy(job.noise.start(samples, shape)),
        [int(t) for t in table.timesteps],
        lambda j: torch.from_numpy(job.noise.row(j, samples, shape)),
        solver=settings.solver,
        clip=settings.clip,
        eta=settings.eta,
        variance=settings.variance,
    )
    x = None
    for made in steps:
        x = made
    assert x is not None
    images: Float32 = x.numpy()
    return images


def run_parity(
    engine: Engine,
    model: Model,
    network: IdentityUNet,
    settings: SampleSettings,
    wanted: Conditions,
    tolerances: Tolerances,
    *,
    noise: NoiseSource | None = None,
    similarity: tuple[str, Similarity] | None = None,
    on_part: Callable[[], None] = lambda: None,
) -> ParityResult:
    """Compare ``engine`` with the reference network on the same noise.

    The reference of an engine whose body is float16 is PyTorch in float16; PyTorch
    itself in float16 is compared with float32.

    Args:
        engine: Entered, runs the same checkpoint as ``network``.
        model: What the engine runs.
        network: The reference network in float32.
        settings: Solver, guidance and seed; ``batch_size`` is not used.
        wanted: One condition a picture.
        tolerances: Largest relative errors that pass.
        noise: Injected noise; None: the seed's.
        similarity: Name of an FR model and a function that judges pictures with it.
        on_part: Called after each of the five parts.
    """
    table = solver_table(model.spec, settings.solver)
    job = SampleJob(
        wanted.identity,
        table,
        settings.guidance,
        noise or SeededNoise(settings.seed),
        settings.guide_variance,
    )
    half = reference_is_half(engine)
    precision: Any = "float16" if half else "float32"
    with TorchEngine(network, engine.shapes, precision) as reference:
        theirs = trace(reference, job)
        info = reference.info
    on_part()
    ours = trace(engine, job)
    on_part()
    singles = single_rows(engine, job, theirs)
    on_part()
    oracle = None
    if not half:
        oracle = compare(
            theirs.images, diffusers_images(network, model.spec, job, table)
        )
    on_part()
    pixels = to_uint8(theirs.images), to_uint8(ours.images)
    report = ParityReport.build(
        title=f"{engine.info.backend} against PyTorch, {model.title}",
        subject=_subject(engine, info, model, settings),
        per_step=_per_step(table, ours, theirs, singles),
        final=compare(ours.images, theirs.images),
        final_unsaturated=_unsaturated(ours.images, theirs.images),
        uint8_max=int(np.abs(pixels[0].astype(int) - pixels[1].astype(int)).max()),
        tolerances=tolerances,
        identity=_judged(similarity, pixels),
        oracle=oracle,
        oracle_tolerance=ORACLE_TOLERANCE,
    )
    on_part()
    marks = picture_marks(engine, model, settings, len(pixels[0]))
    return ParityResult(report, *pixels, marks)


def reference_is_half(engine: Engine) -> bool:
    """Whether the reference of ``engine`` runs in float16."""
    info = engine.info
    return info.backend != "torch" and info.precision.startswith("float16")


def _per_step(
    table: SolverTable, ours: Trace, theirs: Trace, singles: list[Comparison]
) -> list[StepComparison]:
    return [
        StepComparison(
            table_row=j,
            timestep=float(table.timesteps[j]),
            state=compare(ours.states[j], theirs.states[j]),
            x0=compare(ours.previews[j], theirs.previews[j]),
            single=singles[j],
        )
        for j in range(len(table))
    ]


def _unsaturated(ours: Float32, theirs: Float32) -> Comparison | None:
    mask = unsaturated(theirs)
    return compare(ours, theirs, mask) if mask.any() else None


def _judged(
    similarity: tuple[str, Similarity] | None, pixels: tuple[Any, Any]
) -> IdentitySimilarity | None:
    if similarity is None:
        return None
    name, judge = similarity
    return IdentitySimilarity(name, judge(pixels[0]), judge(pixels[1]))


def _subject(
    engine: Engine, reference: Any, model: Model, settings: SampleSettings
) -> dict[str, str]:
    solver = settings.solver
    ours = engine.info
    return {
        "Checkpoint": f"{model.title} ({model.weights_sha256[:12]})",
        "Reference": f"{reference.backend} {reference.version}, "
        f"{reference.precision}, {reference.device}",
        "Engine": f"{ours.backend} {ours.version}, {ours.precision}, {ours.device}",
        "Solver": f"{solver.solver}, {solver.steps} steps",
        "Guidance scale": f"{settings.guidance:g}",
        "Seed": str(settings.seed),
        "Machine": f"{platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}",
        "Tool": f"id3pm-deploy {__version__}",
    }


def random_conditions(spec: DiffusionSpec, count: int, seed: int) -> Conditions:
    """Random identity vectors, nobody's: unit norm times √D, as FR models' often are.

    Raises:
        InputError: ``count`` is below 1.
    """
    if count < 1:
        raise InputError("the count must be at least 1", why=f"it is {count}")
    vectors = batch_normals(seed, range(count), 1, 0, (spec.identity.dim,))
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled = vectors / norms * np.sqrt(spec.identity.dim)
    return Conditions(scaled.astype(np.float32), ("random",) * count)
