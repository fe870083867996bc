"""A parity run from files to a report folder: what the command and the demo call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .backends.base import Engine
from .errors import BundleError, InputError
from .generate import Conditions, SampleSettings, conditions
from .models import Model, bundle_graph
from .parity import (
    Similarity,
    random_conditions,
    reference_is_half,
    run_parity,
)
from .progress import progress
from .reference.checkpoint import Checkpoint, load_checkpoint
from .report import ParityReport, Tolerances, save_report
from .spec import DiffusionSpec

_PARTS = 5
_FLOAT32 = Tolerances(step=1e-5, trajectory=1e-4)
_FLOAT16 = Tolerances(step=1e-2, trajectory=5e-2)
"""For a CHECKPOINT, which has no export recipe; those of the recipes in export/."""


@dataclass(frozen=True)
class ParityRequest:
    """What to compare; see ``id3pm-deploy parity --help``.

    ``judge`` is the spec of the FR model that scores pictures against the identities;
    it must be the one the vectors are of.
    """

    checkpoint: Path
    identity: Path | None
    settings: SampleSettings
    tolerance_step: float | None = None
    tolerance_trajectory: float | None = None
    judge: str | None = None


def parity_to_folder(
    out: Path, model: Model, engine: Engine, request: ParityRequest
) -> ParityReport:
    """Compare an engine with the reference and write the report to ``out``.

    Raises:
        BundleError: The checkpoint is not the one the bundle was made from.
        IdentityError: The vectors or the judge are of another FR model.
    """
    check_report_folder(out)
    checkpoint = load_checkpoint(request.checkpoint)
    facts = (_function(checkpoint.spec), checkpoint.weights_sha256)
    if facts != (_function(model.spec), model.weights_sha256):
        raise BundleError(
            f"{model.path} was not made from {request.checkpoint}",
            why="the weights' SHA-256 or the facts in config.json differ",
            fix="give the CHECKPOINT that the bundle was exported from",
        )
    wanted, similarity = _wanted(model, checkpoint, request)
    with progress(_PARTS, "comparing") as tick:
        result = run_parity(
            engine,
            model,
            checkpoint.network,
            request.settings,
            wanted,
            _tolerances(model, engine, request),
            similarity=similarity,
            on_part=tick,
        )
    half = reference_is_half(engine)
    save_report(
        out,
        result.report,
        result.reference,
        result.engine,
        result.marks,
        reference_precision="float16" if half else "float32",
    )
    return result.report


def check_report_folder(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier report.

    Raises:
        InputError: It is a file, or not empty and without an earlier parity.json.
    """
    if not out.exists() or (out / "parity.json").is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise InputError(
            f"{out} holds something else than an earlier report",
            fix="choose another --out",
        )


def _function(spec: DiffusionSpec) -> DiffusionSpec:
    """``spec`` without what does not change the function."""
    return dataclasses.replace(spec, title="", origin={})


def _tolerances(model: Model, engine: Engine, request: ParityRequest) -> Tolerances:
    half = "float16" in engine.info.precision
    known = _FLOAT16 if half else _FLOAT32
    step, whole = known.step, known.trajectory
    if model.bundle is not None:
        precision = "float16" if half else "float32"
        graph = bundle_graph(model.bundle, precision)
        step, whole = graph.tolerance_step, graph.tolerance_trajectory
    return Tolerances(
        step=step if request.tolerance_step is None else request.tolerance_step,
        trajectory=whole
        if request.tolerance_trajectory is None
        else request.tolerance_trajectory,
    )


def _wanted(
    model: Model, checkpoint: Checkpoint, request: ParityRequest
) -> tuple[Conditions, tuple[str, Similarity] | None]:
    count = request.settings.count
    if request.identity is None:
        seed = request.settings.seed
        return random_conditions(checkpoint.spec, count, seed), None
    from .identity.vectors import load_identities

    file = load_identities(request.identity)
    wanted = conditions(model.spec, file, count)
    if request.judge is None:
        return wanted, None
    raw = np.repeat(file.vectors, count, axis=0)
    return wanted, (file.model_name, _judge(request.judge, file, raw))


def _judge(spec: str, file: Any, raw: Any) -> Similarity:
    from .identity.alignment import FaceDetector
    from .identity.embedders import load_embedder
    from .identity.similarity import picture_similarity
    from .identity.vectors import check_identities

    embedder = load_embedder(spec)
    check_identities(
        file,
        dim=embedder.dim,
        model_name=embedder.name,
        model_sha256=embedder.sha256,
    )
    return picture_similarity(raw, embedder, FaceDetector())
