"""From identity vectors to a folder of marked pictures, a sheet and a run record."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import __version__, defaults
from .attributes import Attributes, Stated, encode_attributes, of_each
from .backends.base import Engine
from .control.annealing import Annealer, Annealing
from .control.shots import UNCONDITIONAL as UNCONDITIONAL
from .control.shots import Shot
from .enlarging import (
    Enlarging,
    GivenPictures,
    enlarged_mark,
    noise_stage,
)
from .errors import IdentityError, InputError, NonFiniteError
from .files import make_folder, write_json
from .guidance import GuidanceSettings, Others
from .identity.vectors import IdentityFile, check_identities, normalise_identities
from .images import PictureMark, contact_sheet, save_png, save_sheet, to_uint8
from .models import Model
from .presets import preset_called
from .progress import progress
from .sampler import (
    NO_LIMITS,
    Limits,
    SampleBatch,
    SampleJob,
    SeededNoise,
    sample_batches,
)
from .solvers import SolverSettings, SolverTable, solver_table
from .spec import DiffusionSpec
from .staging import check_folder, staged_folder

RECORD_NAME = "record.json"
SHEET_NAME = "sheet.png"
_SHEET_MOST = 64
RECORD_FORMAT, RECORD_VERSION = "id3pm-run", 1
CONTROL_VERSION = 2
"""Version of records with annealing or shots, of which version 1 knows nothing."""
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are made; everything a run record needs to make them again.

    ``count`` is the number of pictures of each identity. ``annealing`` is of the
    first stage alone. ``preset`` is the name that
    the rest was taken from, if any; it changes nothing and stands in the record.
    """

    solver: SolverSettings = field(default_factory=SolverSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    seed: int = 0
    count: int = defaults.COUNT
    batch_size: int = defaults.BATCH_SIZE
    preset: str | None = None
    annealing: Annealing | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 100_000:
            raise InputError(
                "the count must be from 1 to 100000", why=f"it is {self.count}"
            )
        if not 1 <= self.batch_size <= defaults.MAX_BATCH_SIZE:
            raise InputError(
                f"the batch size must be from 1 to {defaults.MAX_BATCH_SIZE}",
                why=f"it is {self.batch_size}",
                fix="sample more pictures with --count; batches follow each other",
            )
        if not 0 <= self.seed < 1 << 63:
            raise InputError(
                "the seed must be from 0 to 2**63 - 1", why=f"it is {self.seed}"
            )
        if self.preset is not None:
            preset_called(self.preset)


@dataclass(frozen=True)
class Conditions:
    """Conditions, one a picture, and whose they are.

    Attributes:
        identity: [n, D] float32, normalised identity vectors with the columns of their
            attributes behind them; [n, 0] of a model without either.
        ids: The identity file's random ids, or ``unconditional``.
        attributes: What is stated of each; empty for a model without attributes.
        others: Further identities.
        shots: What else they are made of; None: each has its own number's noise.
    """

    identity: Float32
    ids: tuple[str, ...]
    attributes: tuple[Attributes, ...] = ()
    others: Others | None = None
    shots: tuple[Shot, ...] | None = None

    def part(self, chosen: slice) -> Conditions:
        """Those of some pictures."""
        return Conditions(
            self.identity[chosen],
            self.ids[chosen],
            self.attributes[chosen],
            None if self.others is None else self.others.part(chosen),
            None if self.shots is None else self.shots[chosen],
        )

    def repeated(self, count: int) -> Conditions:
        """Each of them for ``count`` pictures, which follow each other."""
        return Conditions(
            np.repeat(self.identity, count, axis=0),
            tuple(one for one in self.ids for _ in range(count)),
            tuple(one for one in self.attributes for _ in range(count)),
        )


def conditions(
    spec: DiffusionSpec,
    file: IdentityFile | None,
    count: int,
    attributes: Stated = (),
) -> Conditions:
    """``count`` pictures of every identity in ``file``; None means unconditional.

    Args:
        spec: Of the model.
        file: Whose pictures.
        count: How many of each.
        attributes: Of all, or of each identity; of each picture where ``file`` is None.

    Raises:
        IdentityError: The vectors are of another FR model or dimension, or the model
            takes none.
        InputError: An attribute is none of the model's, or out of range.
    """
    if file is not None and not spec.identity.dim:
        raise IdentityError(
            "this model was trained without identities",
            why="its pictures are of nobody, whatever vectors it would be given",
            fix="leave out the identities, and say with --count how many pictures",
        )
    if file is None:
        zeros = np.zeros((count, spec.identity.dim), dtype=np.float32)
        return _with_attributes(spec, zeros, (UNCONDITIONAL,) * count, attributes)
    check_identities(
        file,
        dim=spec.identity.dim,
        model_name=spec.identity.model_name,
        model_sha256=spec.identity.model_sha256,
    )
    vectors = normalise_identities(file.vectors, spec.identity.normalisation)
    return _with_attributes(spec, vectors, file.ids, attributes).repeated(count)


def _with_attributes(
    spec: DiffusionSpec, vectors: Float32, ids: tuple[str, ...], attributes: Stated
) -> Conditions:
    """Conditions of identity vectors and of what is stated beside them."""
    rows = of_each(attributes, len(ids))
    columns = encode_attributes(spec.attributes, rows)
    whole = np.concatenate([vectors, columns], axis=1)
    return Conditions(whole, ids, rows if spec.attributes else ())


@dataclass(frozen=True)
class Pictures:
    """What a run made.

    Attributes:
        pixels: [n, H, W, 3] uint8; failed samples are black and not written.
        marks: One a picture.
        failed: [n] bool.
        seconds: Wall time of the sampling alone.
        table: The solver's table.
        on_device: The images of a single batch on its engine's device, or None.
    """

    pixels: npt.NDArray[np.uint8]
    marks: tuple[PictureMark, ...]
    failed: npt.NDArray[np.bool_]
    seconds: float
    table: SolverTable
    on_device: Any = None


def make_pictures(
    engine: Engine,
    model: Model,
    settings: SampleSettings,
    wanted: Conditions,
    on_row: Callable[[int], None] | None = None,
    low_res: Float32 | None = None,
    limits: Limits = NO_LIMITS,
    on_batch: Callable[[SampleBatch], None] | None = None,
) -> Pictures:
    """Sample every condition; the engine must be entered.

    Args:
        engine: Runs the model.
        model: What it runs.
        settings: Solver, guidance, seed, batch size.
        wanted: One condition a picture.
        on_row: Called after each table row of each batch, with its number.
        low_res: [n, C, h, w] float32, what a super-resolution model enlarges.
        limits: When to give up.
        on_batch: Called with each batch while the engine still holds it.

    Raises:
        CancelledError, DeadlineError: A limit was reached.
    """
    job, table = sample_job(model, settings, wanted, low_res)
    begun = time.perf_counter()
    batches = []
    for batch in sample_batches(engine, job, settings.batch_size, on_row, limits):
        batches.append(batch)
        if on_batch is not None:
            on_batch(batch)
    seconds = time.perf_counter() - begun
    return finished_pictures(engine, model, settings, batches, seconds, table)


def sample_job(
    model: Model,
    settings: SampleSettings,
    wanted: Conditions,
    low_res: Float32 | None = None,
    first_sample: int = 0,
) -> tuple[SampleJob, SolverTable]:
    """What has to be sampled for these pictures, and the solver's table.

    Raises:
        InputError: The settings fit no table.
    """
    spec = model.spec
    table = solver_table(spec, settings.solver)
    addresses = {
        first_sample + i: shot.address for i, shot in enumerate(wanted.shots or ())
    }
    noise = SeededNoise(settings.seed, noise_stage(spec), addresses)
    anneal = None
    if settings.annealing is not None and spec.model.low_res_size is None:
        last = spec.schedule.timesteps - 1
        own = settings.annealing, noise.condition, spec.identity.dim, last
        anneal = Annealer(*own)
    job = SampleJob(
        wanted.identity,
        table,
        settings.guidance,
        noise,
        first_sample=first_sample,
        low_res=low_res,
        others=wanted.others,
        anneal=anneal,
    )
    return job, table


def finished_pictures(
    engine: Engine,
    model: Model,
    settings: SampleSettings,
    batches: Sequence[SampleBatch],
    seconds: float,
    table: SolverTable,
) -> Pictures:
    """The pictures of finished batches; failed samples become black."""
    pixels = []
    for batch in batches:
        batch.images[batch.failed] = -1.0
        pixels.append(to_uint8(batch.images))
    marks = picture_marks(engine, model, settings, sum(map(len, pixels)))
    failed = np.concatenate([batch.failed for batch in batches])
    return Pictures(np.concatenate(pixels), marks, failed, seconds, table)


def picture_marks(
    engine: Engine, model: Model, settings: SampleSettings, count: int
) -> tuple[PictureMark, ...]:
    """What the pictures of samples 0 to ``count`` - 1 say about themselves."""
    guidance = settings.guidance
    listed = guidance.scales
    return tuple(
        PictureMark(
            tool_version=__version__,
            seed=settings.seed,
            sample=index,
            solver=settings.solver.solver,
            steps=settings.solver.steps,
            guidance=guidance.scale if listed is None else max(listed),
            guidance_schedule=guidance.schedule if listed is None else "listed",
            guidance_interval=guidance.interval,
            guidance_rescale=guidance.rescale,
            backend=engine.info.backend,
            precision=engine.info.precision,
            checkpoint=model.title,
        )
        for index in range(count)
    )


def sample_to_folder(
    out: Path,
    model: Model,
    engine: Engine,
    settings: SampleSettings,
    wanted: Conditions,
    *,
    second: Enlarging | None = None,
    given: GivenPictures | None = None,
    force: bool = False,
    limits: Limits = NO_LIMITS,
) -> tuple[Pictures, dict[str, Any]]:
    """Sample and write pictures, sheet and run record, with a progress bar.

    Args:
        out: Folder; see :func:`check_output`.
        model: What ``engine`` runs.
        engine: Not yet entered.
        settings: How.
        wanted: One condition a picture.
        second: What enlarges the pictures; only large ones are written then.
        given: What ``model`` itself enlarges, one a condition.
        force: Replace an earlier run in ``out``.
        limits: When to give up; nothing is written then.

    Returns the pictures and the run record.

    Raises:
        InputError, OutputError, EngineError, NonFiniteError: See the parts.
        CancelledError, DeadlineError: A limit was reached.
    """
    from .chain import both_stages

    check_output(out, force=force)
    rows = _table_rows(model, settings, wanted)
    if second is not None:
        rows += _table_rows(second.model, second.settings, second.wanted)
    small = None if given is None else given.low_res
    with progress(rows, "sampling") as tick:
        made, large = both_stages(
            engine, model, settings, wanted, second, small, limits, lambda _: tick()
        )
    record = run_record(made, settings, engine, model)
    if given is not None and not given.generated:
        marks = (dataclasses.replace(m, composite=True) for m in made.marks)
        made = dataclasses.replace(made, marks=tuple(marks))
    if second is not None and large is not None:
        record["super_resolution"] = stage_record(
            large.pictures, second.settings, large.engine, second.model
        )
        made = enlarged_pictures(made, large.pictures)
    numbers = range(len(wanted.ids))
    record["samples"] = sample_entries(
        numbers, wanted.ids, made.failed, wanted.attributes, wanted.shots
    )
    save_pictures(out, made, record, columns=settings.count, force=force)
    return made, record


def sample_entries(
    numbers: Sequence[int],
    ids: Sequence[str],
    failed: npt.NDArray[np.bool_],
    attributes: Sequence[Attributes] = (),
    shots: Sequence[Shot] | None = None,
) -> list[dict[str, Any]]:
    """The ``samples`` of a run record, with attributes where some are stated, and what
    else each is made of."""
    states = zip(numbers, ids, failed, strict=True)
    entries: list[dict[str, Any]] = [
        {"sample": number, "identity": who, "failed": bool(bad)}
        for number, who, bad in states
    ]
    for entry, stated in zip(entries, attributes, strict=False):
        entry.update({"attributes": dict(stated)} if stated else {})
    for entry, shot in zip(entries, shots or (), strict=False):
        entry["shot"] = shot.to_json()
    return entries


def _table_rows(model: Model, settings: SampleSettings, wanted: Conditions) -> int:
    table = solver_table(model.spec, settings.solver)
    return len(table) * -(-len(wanted.ids) // settings.batch_size)


def enlarged_pictures(small: Pictures, large: Pictures) -> Pictures:
    """What the second stage made, with both stages' marks and failures."""
    marks = map(enlarged_mark, small.marks, large.marks)
    failed = small.failed | large.failed
    return dataclasses.replace(large, marks=tuple(marks), failed=failed)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output folder before any work is done.

    With ``force``, a folder is replaced only if an earlier run of this tool made it.

    Raises:
        InputError: It exists, is not empty, and may not be replaced.
        OutputError: It cannot be made.
    """
    check_folder(out, is_run, "run", force=force)


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds what :func:`save_pictures` wrote."""
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("format") == RECORD_FORMAT


def save_pictures(
    out: Path,
    pictures: Pictures,
    record: dict[str, Any],
    *,
    columns: int,
    force: bool = False,
) -> None:
    """Write PNGs, contact sheet and run record to ``out``, all or nothing.

    They are written to a folder beside it, which then takes its place.

    Args:
        out: Folder; see :func:`check_output`.
        pictures: What was made.
        record: What to write as the run record.
        columns: Pictures of one identity, which stand in a row on the sheet.
        force: Replace an earlier run in ``out``.

    Raises:
        NonFiniteError: A sample failed; the others were written.
        OutputError: Something cannot be written.
    """
    make_folder(Path(os.path.abspath(out)).parent)
    numbers = [mark.sample for mark in pictures.marks]
    good = np.flatnonzero(~pictures.failed)
    with staged_folder(out) as staging:
        for index in good:
            path = staging / f"sample-{numbers[index]:05d}.png"
            save_png(path, pictures.pixels[index], pictures.marks[index])
        if len(good):
            _save_sheet(staging / SHEET_NAME, pictures, columns, record.get("grid"))
        write_json(staging / RECORD_NAME, record)
        check_output(out, force=force)
    if pictures.failed.any():
        bad = ", ".join(str(numbers[i]) for i in np.flatnonzero(pictures.failed))
        mark = pictures.marks[0]
        ran = " and ".join(filter(None, (mark.precision, mark.sr_precision)))
        raise NonFiniteError(
            f"samples {bad} were not finite and were not written",
            why=f"the network produced NaN or infinity in {ran}",
            fix="try a float32 engine, fewer guidance or more steps",
        )


def _save_sheet(
    path: Path, pictures: Pictures, count: int, grid: Mapping[str, Any] | None
) -> None:
    """Those that are good, ``count`` of one identity beside each other; or all of a
    grid, where the failed ones are black."""
    shown = np.flatnonzero(~pictures.failed)[:_SHEET_MOST]
    columns = min(count, len(shown), 8) if count > 1 else min(len(shown), 8)
    labels: dict[str, Any] = {"title": "generated with id3pm-deploy"}
    if grid is not None:
        rows, heads = tuple(grid["rows"]), tuple(grid["columns"])
        labels["title"] = grid["title"] or labels["title"]
        if rows and len(rows) * len(heads) == len(pictures.pixels):
            shown, columns = np.arange(len(pictures.pixels)), len(heads)
            labels |= {"row_labels": rows, "column_labels": heads}
    sheet = contact_sheet(
        [pictures.pixels[index] for index in shown], columns=columns, **labels
    )
    save_sheet(path, sheet, dataclasses.replace(pictures.marks[0], sample=None))


def run_record(
    pictures: Pictures, settings: SampleSettings, engine: Engine, model: Model
) -> dict[str, Any]:
    """Everything needed to make the pictures again but ``samples``, and nothing of the
    identities."""
    own = stage_record(pictures, settings, engine, model)
    annealing = settings.annealing
    if annealing is not None:
        own["annealing"] = dataclasses.asdict(annealing)
    return {
        "format": RECORD_FORMAT,
        "format_version": RECORD_VERSION if annealing is None else CONTROL_VERSION,
        "tool_version": __version__,
        **own,
        "preset": settings.preset,
        "seed": settings.seed,
        "count": settings.count,
        "machine": platform.machine(),
        "low_res": "given" if model.spec.model.low_res_size else None,
        "super_resolution": None,
    }


def stage_record(
    pictures: Pictures, settings: SampleSettings, engine: Engine, model: Model
) -> dict[str, Any]:
    """The part of a run record that each stage of a chain has; ``replay`` where the
    engine replayed table rows, and how."""
    replay = {"replay": engine.replay_note} if engine.replay_note else {}
    return {
        "checkpoint": model.title,
        "checkpoint_sha256": model.weights_sha256,
        "solver": dataclasses.asdict(pictures.table.settings),
        "guidance": dataclasses.asdict(settings.guidance),
        "batch_size": settings.batch_size,
        "engine": dataclasses.asdict(engine.info),
        **replay,
        "seconds": round(pictures.seconds, 4),
        "table_rows": len(pictures.table),
    }
