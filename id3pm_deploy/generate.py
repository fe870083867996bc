"""From identity vectors to a folder of marked pictures, a sheet and a run record."""

from __future__ import annotations

import dataclasses
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import __version__
from .backends.base import Engine
from .errors import InputError, NonFiniteError, OutputError
from .files import make_folder, output_error, write_json
from .identity.vectors import IdentityFile, check_identities, normalise_identities
from .images import PictureMark, contact_sheet, save_png, save_sheet, to_uint8
from .models import Model
from .sampler import SampleJob, SeededNoise, sample_batches
from .solvers import SolverSettings, SolverTable, solver_table
from .spec import DiffusionSpec

RECORD_NAME = "record.json"
SHEET_NAME = "sheet.png"
_SHEET_MOST = 64

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are made; everything a run record needs to make them again.

    ``count`` is the number of pictures of each identity.
    """

    solver: SolverSettings = field(default_factory=SolverSettings)
    guidance: float = 2.0
    guide_variance: bool = False
    seed: int = 0
    count: int = 4
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 100_000:
            raise InputError(
                "the count must be from 1 to 100000", why=f"it is {self.count}"
            )
        if not 1 <= self.batch_size <= 1024:
            raise InputError(
                "the batch size must be from 1 to 1024", why=f"it is {self.batch_size}"
            )
        if not 0 <= self.seed < 1 << 63:
            raise InputError(
                "the seed must be from 0 to 2**63 - 1", why=f"it is {self.seed}"
            )


@dataclass(frozen=True)
class Conditions:
    """Normalised identity vectors, one a picture, and whose they are.

    ``ids`` are the identity file's random ids, or ``unconditional``.
    """

    identity: Float32
    ids: tuple[str, ...]


def conditions(
    spec: DiffusionSpec, file: IdentityFile | None, count: int
) -> Conditions:
    """``count`` pictures of every identity in ``file``; None means unconditional.

    Raises:
        IdentityError: The vectors are of another FR model or dimension.
    """
    if file is None:
        zeros = np.zeros((count, spec.identity.dim), dtype=np.float32)
        return Conditions(zeros, ("unconditional",) * count)
    check_identities(
        file,
        dim=spec.identity.dim,
        model_name=spec.identity.model_name,
        model_sha256=spec.identity.model_sha256,
    )
    vectors = normalise_identities(file.vectors, spec.identity.normalisation)
    ids = tuple(one for one in file.ids for _ in range(count))
    return Conditions(np.repeat(vectors, count, axis=0), ids)


@dataclass(frozen=True)
class Pictures:
    """What a run made.

    Attributes:
        pixels: [n, H, W, 3] uint8; failed samples are black and not written.
        marks: One a picture.
        failed: [n] bool.
        seconds: Wall time of the sampling alone.
        table: The solver's table.
    """

    pixels: npt.NDArray[np.uint8]
    marks: tuple[PictureMark, ...]
    failed: npt.NDArray[np.bool_]
    seconds: float
    table: SolverTable


def make_pictures(
    engine: Engine,
    model: Model,
    settings: SampleSettings,
    wanted: Conditions,
    on_row: Callable[[int], None] | None = None,
) -> Pictures:
    """Sample every condition; the engine must be entered.

    Args:
        engine: Runs the model.
        model: What it runs.
        settings: Solver, guidance, seed, batch size.
        wanted: One condition a picture.
        on_row: Called after each table row of each batch, with its number.
    """
    table = solver_table(model.spec, settings.solver)
    job = SampleJob(
        wanted.identity,
        table,
        settings.guidance,
        SeededNoise(settings.seed),
        settings.guide_variance,
    )
    begun = time.perf_counter()
    batches = list(sample_batches(engine, job, settings.batch_size, on_row))
    seconds = time.perf_counter() - begun
    images = np.concatenate([batch.images for batch in batches])
    failed = np.concatenate([batch.failed for batch in batches])
    images[failed] = -1.0
    marks = tuple(
        PictureMark(
            tool_version=__version__,
            seed=settings.seed,
            sample=index,
            solver=settings.solver.solver,
            steps=settings.solver.steps,
            guidance=settings.guidance,
            backend=engine.info.backend,
            precision=engine.info.precision,
            checkpoint=model.title,
        )
        for index in range(len(images))
    )
    return Pictures(to_uint8(images), marks, failed, seconds, table)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output folder before any work is done.

    Raises:
        InputError: It exists and is not empty, and ``force`` is not given.
        OutputError: It cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", fix="choose another --out")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(
            f"{out} is not empty", fix="choose another --out, or give --force"
        )
    there = next(folder for folder in out.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {out}",
            why=f"{there} is not a folder you may write to",
            fix="choose another --out",
        )


def save_pictures(
    out: Path,
    pictures: Pictures,
    settings: SampleSettings,
    engine: Engine,
    model: Model,
    wanted: Conditions,
) -> dict[str, Any]:
    """Write PNGs, contact sheet and run record to ``out``, all or nothing.

    They are written to a folder beside it, which then takes its place.

    Returns:
        The run record.

    Raises:
        NonFiniteError: A sample failed; the others were written.
        OutputError: Something cannot be written.
    """
    staging = make_folder(out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp"))
    try:
        record = _record(pictures, settings, engine, model, wanted)
        good = np.flatnonzero(~pictures.failed)
        for index in good:
            path = staging / f"sample-{index:05d}.png"
            save_png(path, pictures.pixels[index], pictures.marks[index])
        if len(good):
            _save_sheet(staging / SHEET_NAME, pictures, good, settings.count)
        write_json(staging / RECORD_NAME, record)
        _take_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if pictures.failed.any():
        bad = ", ".join(map(str, np.flatnonzero(pictures.failed)))
        raise NonFiniteError(
            f"samples {bad} were not finite and were not written",
            why=f"the network produced NaN or infinity in {engine.info.precision}",
            fix="try a float32 engine, fewer guidance or more steps",
        )
    return record


def _take_place(staging: Path, out: Path) -> None:
    """Rename ``staging`` to ``out``, moving an older folder of ours away first."""
    old = out.with_name(f".{out.name}.{secrets.token_hex(6)}.old")
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise output_error(out, error) from error
    shutil.rmtree(old, ignore_errors=True)


def _save_sheet(
    path: Path, pictures: Pictures, good: npt.NDArray[np.int64], count: int
) -> None:
    shown = good[:_SHEET_MOST]
    sheet = contact_sheet(
        [pictures.pixels[index] for index in shown],
        columns=min(count, len(shown), 8) if count > 1 else min(len(shown), 8),
        title="generated with id3pm-deploy",
    )
    save_sheet(path, sheet, dataclasses.replace(pictures.marks[0], sample=None))


def _record(
    pictures: Pictures,
    settings: SampleSettings,
    engine: Engine,
    model: Model,
    wanted: Conditions,
) -> dict[str, Any]:
    """Everything needed to make the pictures again, and nothing of the identities but
    the random ids of their file."""
    return {
        "format": "id3pm-run",
        "format_version": 1,
        "tool_version": __version__,
        "checkpoint": model.title,
        "checkpoint_sha256": model.weights_sha256,
        "solver": dataclasses.asdict(pictures.table.settings),
        "guidance": settings.guidance,
        "guide_variance": settings.guide_variance,
        "seed": settings.seed,
        "count": settings.count,
        "batch_size": settings.batch_size,
        "engine": dataclasses.asdict(engine.info),
        "machine": platform.machine(),
        "seconds": round(pictures.seconds, 4),
        "table_rows": len(pictures.table),
        "samples": [
            {"sample": index, "identity": who, "failed": bool(bad)}
            for index, (who, bad) in enumerate(
                zip(wanted.ids, pictures.failed, strict=True)
            )
        ],
    }
