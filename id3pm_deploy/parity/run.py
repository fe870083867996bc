"""Parity from files to a report folder: what the command and the demo call."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..enlarging import noise_stage
from ..errors import InputError
from ..files import sha256_of_file
from ..generate import Conditions, SampleSettings, conditions, picture_marks
from ..marks import PictureMark
from ..progress import progress
from ..report import (
    IdentityDrop,
    IdentitySimilarity,
    ParityReport,
    PicturePairs,
    check_report_folder,
    save_report,
)
from ..sampler import SampleJob, SeededNoise
from ..solvers import solver_table
from ..spec import DiffusionSpec
from ..tolerances import Tolerances, tightened
from .conditions import random_conditions, random_low_res
from .golden import GoldenData, GoldenTrajectory, load_golden_data
from .golden_run import compare_forward, compare_golden
from .identity import check_pairs, judged_pairs, rows_of
from .machine import machine_facts
from .record import record_golden
from .sides import Side, SideRequest, open_reference, open_side, pair_tolerances
from .trajectory import (
    Compared,
    Similarity,
    check_count,
    compare_trajectory,
    guidance_name,
)

_NO_GATE = "identity similarity: what is enlarged here is random pictures, of nobody"


@dataclass(frozen=True)
class Tightening:
    """Tolerances that the user asks for; None leaves the graph's."""

    step: float | None = None
    trajectory: float | None = None


@dataclass(frozen=True)
class ParityRequest:
    """Two sides and what both shall make.

    ``judge`` is the spec of the FR model that scores pictures against the identities;
    it must be the one the vectors are of. ``identity`` None takes random vectors.
    ``judge_samples`` is how many pictures of each side the judge holds the engine's
    identity similarity to the reference's by (see :mod:`.identity`); 0: it only scores
    the pictures that are compared.
    """

    engine: SideRequest
    reference: SideRequest
    settings: SampleSettings
    identity: Path | None = None
    judge: str | None = None
    judge_samples: int = 0
    tolerances: Tightening = Tightening()


@dataclass(frozen=True)
class GoldenRequest:
    """One side and recorded data; ``reference`` runs beside it where it is given."""

    engine: SideRequest
    golden: Path
    reference: SideRequest | None = None
    tolerances: Tightening = Tightening()


def parity_to_folder(out: Path, request: ParityRequest) -> ParityReport:
    """Compare two sides on the same noise and write the report to ``out``.

    Raises:
        ParityError: The two sides are not the same model.
        IdentityError: The vectors or the judge are of another FR model.
        Id3pmError: A side cannot be opened or run, or ``out`` not written.
    """
    check_report_folder(out)
    check_pairs(request.judge_samples)
    engine = open_side(request.engine)
    reference = open_reference(request.reference, engine)
    limits = _limits(engine, reference, request.tolerances)
    spec, settings = engine.model.spec, request.settings
    wanted, similarity = _wanted(engine, request)
    check_count(len(wanted.ids))
    table = solver_table(spec, settings.solver)
    noise = SeededNoise(settings.seed, noise_stage(spec))
    small = random_low_res(spec, len(wanted.ids), settings.seed)
    job = SampleJob(wanted.identity, table, settings.guidance, noise, low_res=small)
    with _entered(engine, reference), progress(len(table), "comparing") as tick:
        compared = compare_trajectory(
            engine.engine, reference.engine, spec, job, tick, limits
        )
        drop = _identity_drop(engine, reference, request)
    report = ParityReport(
        title=f"{engine.name} against {reference.name}: {engine.title}",
        subject=_subject(engine, reference, [compared])
        | {
            "Solver": f"{settings.solver.solver}, {settings.solver.steps} steps",
            "Guidance": guidance_name(job),
            "Noise": f"seed {settings.seed}, drawn once for all sides",
            "Pictures": _pictures_of(request, spec, len(wanted.ids)),
        }
        | machine_facts(),
        tolerances=limits,
        trajectories=(_judged(compared, similarity),),
        not_checked=(
            *compared.not_checked,
            *_other_stage(engine),
            *([_NO_GATE] if request.judge_samples and _enlarges(engine) else []),
        ),
        engine_name=engine.name,
        reference_name=reference.name,
        identity_drop=drop,
    )
    pairs = PicturePairs(
        compared.reference,
        compared.engine,
        compared.error,
        *(
            picture_marks(side.engine, side.model, settings, len(wanted.ids))
            for side in (reference, engine)
        ),
    )
    save_report(out, report, [pairs])
    return report


def golden_to_folder(out: Path, request: GoldenRequest) -> ParityReport:
    """Compare a side with recorded golden data and write the report to ``out``.

    Raises:
        GoldenError: The data is damaged or does not fit the model.
        ParityError: ``reference`` is not the same model.
        Id3pmError: A side cannot be opened or run, or ``out`` not written.
    """
    check_report_folder(out)
    engine = open_side(request.engine)
    spec = engine.model.spec
    data = load_golden_data(request.golden, spec, engine.model.weights_sha256)
    reference = None
    if request.reference is not None:
        reference = open_reference(request.reference, engine)
    limits = _limits(engine, reference, request.tolerances)
    rows = sum(len(one.job.table) for one in data.trajectories)
    beside = reference.engine if reference else None
    with _entered(engine, reference), progress(rows, "comparing") as tick:
        forward = compare_forward(engine.engine, spec, data)
        compared = [
            compare_golden(engine.engine, spec, one, beside, tick, limits)
            for one in data.trajectories
        ]
    said = {"Recorded data": f"SHA-256 {sha256_of_file(request.golden)[:12]}"}
    report = ParityReport(
        title=f"{engine.name} against recorded data: {engine.title}",
        subject=_subject(engine, reference, compared) | said | machine_facts(),
        tolerances=limits,
        trajectories=tuple(one.trajectory for one in compared),
        forward=tuple(forward),
        not_checked=(
            *(line for one in compared for line in one.not_checked),
            *_other_stage(engine),
        ),
        engine_name=engine.name,
        reference_name="recorded data",
    )
    save_report(out, report, _golden_pictures(engine, data, compared))
    return report


def record_to_file(path: Path, request: SideRequest, settings: SampleSettings) -> None:
    """Record golden data of a CHECKPOINT; see :func:`~.record.record_golden`.

    Raises:
        GoldenError: MODEL is no CHECKPOINT, or diffusers cannot compute that.
        Id3pmError: It cannot be opened or run, or the file not written.
    """
    side = open_side(request)
    rows = len(solver_table(side.model.spec, settings.solver))
    with side.engine, progress(rows, "recording") as tick:
        record_golden(
            path,
            side.engine,
            side.model.spec,
            side.model.weights_sha256,
            settings,
            tick,
        )


@contextlib.contextmanager
def _entered(engine: Side, reference: Side | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for side in (engine, reference):
            if side is not None:
                stack.enter_context(side.engine)
        yield


def _other_stage(engine: Side) -> tuple[str, ...]:
    """What a report on one model of a bundle of two leaves open."""
    bundle = engine.model.bundle
    if bundle is None or bundle.manifest.super_resolution is None:
        return ()
    others = (name for name in bundle.manifest.stages if name != engine.model.stage)
    return tuple(
        f"the bundle's other stage: run parity again with --stage "
        f"{name.replace('_', '-')}"
        for name in others
    )


def _limits(engine: Side, reference: Side | None, asked: Tightening) -> Tolerances:
    return tightened(pair_tolerances(engine, reference), asked.step, asked.trajectory)


def _subject(
    engine: Side, reference: Side | None, compared: Sequence[Compared]
) -> dict[str, str]:
    model = engine.model
    found = {
        "Engine": engine.facts,
        "Model": f"{model.title} (weights {model.weights_sha256[:12]})",
    }
    if engine.stage:
        found["Stage"] = engine.stage
    if reference is not None:
        found["Reference"] = reference.facts
    rows = [row for one in compared for row in one.trajectory.per_step]
    if any(row.oracle is not None for row in rows):
        import diffusers

        found["Oracle"] = f"diffusers {diffusers.__version__}, its own schedulers"
    return found


def _pictures_of(request: ParityRequest, spec: DiffusionSpec, count: int) -> str:
    if spec.model.low_res_size is not None:
        return f"{count}, enlarged from random ones"
    if not spec.identity.dim:
        return f"{count}, the model takes no identity"
    if request.identity is None:
        return f"{count} of random vectors, nobody's"
    return f"{count} of identity vectors that were given"


def _wanted(
    engine: Side, request: ParityRequest
) -> tuple[Conditions, tuple[str, Similarity] | None]:
    spec, count = engine.model.spec, request.settings.count
    if request.identity is None:
        if request.judge is not None:
            raise InputError(
                "random vectors have no face that --judge could look for",
                fix="give --identity FILE.npz, or leave out --judge",
            )
        return random_conditions(spec, count, request.settings.seed), None
    from ..identity.vectors import load_identities

    file = load_identities(request.identity)
    wanted = conditions(spec, file, count)
    if request.judge is None:
        return wanted, None
    raw = np.repeat(file.vectors, count, axis=0)
    return wanted, (file.model_name, _judge(request.judge, file, raw))


def _enlarges(side: Side) -> bool:
    return side.model.spec.model.low_res_size is not None


def _identity_drop(
    engine: Side, reference: Side, request: ParityRequest
) -> IdentityDrop | None:
    """What the judge says of many pictures, where it was asked for and there is
    anybody to see."""
    judge, pairs, path = request.judge, request.judge_samples, request.identity
    if judge is None or path is None or not pairs or _enlarges(engine):
        return None
    from ..identity.vectors import load_identities

    file = load_identities(path)
    rows = rows_of(engine, request.settings, pairs)
    with progress(rows, "identity") as tick:
        return judged_pairs(
            engine,
            reference,
            request.settings,
            file,
            lambda whose: _judge(judge, file, file.vectors[whose]),
            pairs,
            lambda _: tick(),
        )


def _judge(spec: str, file: Any, raw: Any) -> Similarity:
    from ..identity.alignment import FaceDetector
    from ..identity.embedders import load_embedder
    from ..identity.similarity import picture_similarity
    from ..identity.vectors import check_identities

    embedder = load_embedder(spec)
    check_identities(
        file,
        dim=embedder.dim,
        model_name=embedder.name,
        model_sha256=embedder.sha256,
    )
    return picture_similarity(raw, embedder, FaceDetector())


def _judged(compared: Compared, similarity: tuple[str, Similarity] | None) -> Any:
    if similarity is None:
        return compared.trajectory
    name, judge = similarity
    found = IdentitySimilarity(
        name, judge(list(compared.reference)), judge(list(compared.engine))
    )
    return dataclasses.replace(compared.trajectory, identity=found)


def _golden_pictures(
    engine: Side, data: GoldenData, compared: Sequence[Compared]
) -> list[PicturePairs]:
    return [
        PicturePairs(
            found.reference, found.engine, found.error, *_golden_marks(engine, one)
        )
        for one, found in zip(data.trajectories, compared, strict=True)
    ]


def _golden_marks(
    engine: Side, one: GoldenTrajectory
) -> tuple[Sequence[PictureMark], Sequence[PictureMark]]:
    """Marks of the recorded pictures and of the engine's. There is no seed to state:
    the noise was recorded, too."""
    settings = SampleSettings(
        solver=one.job.table.settings, guidance=one.job.guidance, seed=0
    )
    made = picture_marks(engine.engine, engine.model, settings, len(one.sample))
    noise = f"{engine.model.title} (recorded noise, no seed)"
    ours = [dataclasses.replace(mark, checkpoint=noise) for mark in made]
    theirs = [
        dataclasses.replace(mark, backend="recorded data", precision="float32")
        for mark in ours
    ]
    return theirs, ours
