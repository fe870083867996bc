"""How a loaded stage makes pictures: in batches of its own, or in company."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .attributes import Stated, known_to
from .batch import Batch, Picture, finished_picture
from .control.annealing import Annealing
from .control.resolve import conditions_of
from .control.shots import Grid, Shot, alike
from .enlarging import enlarged_mark, low_res_from_pixels
from .errors import IdentityError, InputError
from .generate import (
    CONTROL_VERSION,
    Conditions,
    Pictures,
    SampleSettings,
    picture_marks,
    run_record,
    sample_job,
    stage_record,
)
from .identity.directions import Directions
from .identity.vectors import IdentityFile
from .images import to_uint8
from .places import Trajectory
from .replaying import Repeat
from .sampler import Limits, job_plan
from .solvers import SolverTable
from .stage import Stage
from .whose import Identities, identities_of, wanted_of, whose_in_record

Float32 = npt.NDArray[np.float32]
Named = tuple[IdentityFile | None, Directions | None]


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What one stage makes of all samples of a run."""

    settings: SampleSettings
    table: SolverTable
    wanted: Conditions


@dataclasses.dataclass(frozen=True)
class Run:
    """Pictures that may share batches.

    Attributes:
        first: What the first stage makes.
        second: What the second one makes of it; None: nothing.
        first_sample: Number of the first picture; the others follow it.
    """

    first: StagePlan
    second: StagePlan | None
    first_sample: int = 0

    def batches(self) -> Iterator[range]:
        """Which pictures of the run are made together, as positions in it."""
        total, size = len(self.first.wanted.ids), self.first.settings.batch_size
        for start in range(0, total, size):
            yield range(start, min(start + size, total))


def shot_runs(
    stages: tuple[Stage, Stage | None],
    settings: tuple[SampleSettings, SampleSettings],
    shots: Sequence[Shot],
    named: Named,
    first_sample: int = 0,
) -> list[Run]:
    """The runs that shots take, one for each guidance scale and annealing.

    Args:
        stages: The first and, where there is one, the second.
        settings: Of both, for shots that do not say otherwise.
        shots: One a picture.
        named: Whom and what they name.
        first_sample: Number of the first picture.

    Raises:
        InputError, IdentityError: A shot asks for what there is not.
    """

    def plan(stage: Stage, own: SampleSettings, some: Sequence[Shot]) -> StagePlan:
        wanted = conditions_of(stage.model.spec, some, *named)
        return StagePlan(own, stage.table(own.solver), wanted)

    first, second = stages
    return [
        Run(
            plan(first, settings_of(settings[0], some[0]), some),
            None if second is None else plan(second, settings[1], some),
            first_sample + start,
        )
        for start, some in alike(shots)
    ]


def check_alone(attributes: object, low_res: object) -> None:
    """Refuse what shots say themselves, or cannot be made of.

    Raises:
        InputError: It is there.
    """
    if attributes or low_res is not None:
        raise InputError(
            "shots have attributes of their own, and are made of no pictures",
            fix="state the attributes in each shot, and leave out low_res",
        )


def settings_of(settings: SampleSettings, shot: Shot) -> SampleSettings:
    """A run's settings with the scale and the annealing of a shot, if it has any."""
    guidance, annealing = settings.guidance, settings.annealing
    if shot.scale is not None:
        if guidance.scales is not None:
            raise InputError(
                "pictures that have a guidance scale each cannot follow a list of them",
                fix="give one scale, or none",
            )
        guidance = dataclasses.replace(guidance, scale=shot.scale)
    if shot.annealing is not None:
        own = Annealing() if annealing is None else annealing
        annealing = dataclasses.replace(own, scale=shot.annealing)
    return dataclasses.replace(settings, guidance=guidance, annealing=annealing)


def batch_of(
    stages: tuple[Stage, Stage | None],
    run: Run,
    chosen: range,
    said: Mapping[str, Any],
    low_res: Float32 | None,
    limits: Limits,
) -> Batch:
    """The chosen pictures of a run.

    Args:
        stages: The first and, where there is one, the second.
        run: What to make.
        chosen: From :meth:`Run.batches`.
        said: What of the record is of the whole run.
        low_res: [n, C, h, w] float32, what the first stage enlarges.
        limits: When to give up.
    """
    first, (stage, enlarger) = run.first, stages
    begun = time.perf_counter()
    small = low_res is not None
    images, made = made_batch(
        stage, first, chosen, run.first_sample, low_res, limits, given=small
    )
    record = {**run_record(made, first.settings, stage.engine, stage.model), **said}
    if run.second is not None and enlarger is not None:
        images, made = enlarged_batch(
            enlarger, run.second, chosen, run.first_sample, made, limits
        )
        record["super_resolution"] = stage_record(
            made, run.second.settings, enlarger.engine, enlarger.model
        )
    wanted = first.wanted.part(slice(chosen.start, chosen.stop))
    return Batch(
        samples=tuple(run.first_sample + i for i in chosen),
        identities=wanted.ids,
        pixels=made.pixels,
        images=images,
        on_device=made.on_device,
        attributes=wanted.attributes,
        shots=wanted.shots,
        failed=made.failed,
        marks=made.marks,
        seconds=time.perf_counter() - begun,
        record=record,
        table=first.table,
    )


def settings_for(settings: SampleSettings, grid: Grid) -> SampleSettings:
    """Settings of a whole grid. Its width is what a sheet counts by; and where a shot
    is annealed, the record has to say how, though the others are not."""
    annealing = settings.annealing
    if annealing is None and any(shot.annealing is not None for shot in grid.shots):
        annealing = Annealing(0.0)
    count = max(1, len(grid.columns))
    return dataclasses.replace(settings, count=count, annealing=annealing)


def check_directions(wanted: object, directions: Directions | None) -> None:
    """Refuse directions that are not those of a record, which has their SHA-256.

    Raises:
        IdentityError: They are not.
    """
    if wanted is not None and (directions is None or directions.digest != wanted):
        raise IdentityError(
            "these are not the directions of the run record",
            why="none are given" if directions is None else "their SHA-256 differ",
            fix="give the file of directions that the run took",
        )


def run_facts(
    settings: SampleSettings, grid: Grid, directions: Directions | None
) -> dict[str, Any]:
    """What the record of a run of shots says of all of them; a shot's own scale and
    annealing stand beside it."""
    facts: dict[str, Any] = {
        "format_version": CONTROL_VERSION,
        "guidance": dataclasses.asdict(settings.guidance),
        "grid": grid.to_json(),
    }
    if settings.annealing is not None:
        facts["annealing"] = dataclasses.asdict(settings.annealing)
    if directions is not None:
        facts["directions_sha256"] = directions.digest
    return facts


def made_batch(
    stage: Stage,
    plan: StagePlan,
    chosen: range,
    first_sample: int,
    low_res: Float32 | None,
    limits: Limits,
    *,
    given: bool,
) -> tuple[Float32, Pictures]:
    """The chosen samples of a plan as one batch: images and pictures.

    ``given``: what is enlarged came from outside, and may show anything.
    """
    job, table = sample_job(
        stage.model,
        plan.settings,
        plan.wanted.part(slice(chosen.start, chosen.stop)),
        None if low_res is None else low_res[chosen.start : chosen.stop],
        first_sample + chosen.start,
    )
    begun = time.perf_counter()
    batch = stage.run(job, limits)
    batch.images[batch.failed] = -1.0
    pixels, seconds = to_uint8(batch.images), time.perf_counter() - begun
    made = picture_marks(stage.engine, stage.model, plan.settings, len(chosen))
    marks = tuple(
        dataclasses.replace(mark, sample=number, composite=given)
        for mark, number in zip(made, batch.samples, strict=True)
    )
    found = batch.on_device
    return batch.images, Pictures(pixels, marks, batch.failed, seconds, table, found)


def enlarged_batch(
    stage: Stage,
    plan: StagePlan,
    chosen: range,
    first_sample: int,
    base: Pictures,
    limits: Limits,
) -> tuple[Float32, Pictures]:
    """What the second stage makes of a batch of the first."""
    small = low_res_from_pixels(base.pixels)
    size = plan.settings.batch_size
    parts = []
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        own = slice(some.start, some.stop)
        here = dataclasses.replace(plan, wanted=plan.wanted.part(own))
        low_res = small[start : start + size]
        first = first_sample + some.start
        few = range(len(some))
        part = made_batch(stage, here, few, first, low_res, limits, given=False)
        parts.append(part)
    marks = [mark for _, part in parts for mark in part.marks]
    failed = np.concatenate([part.failed for _, part in parts])
    return np.concatenate([images for images, _ in parts]), Pictures(
        np.concatenate([part.pixels for _, part in parts]),
        tuple(map(enlarged_mark, base.marks, marks)),
        base.failed | failed,
        sum(part.seconds for _, part in parts),
        plan.table,
        parts[0][1].on_device if len(parts) == 1 else None,
    )


def plan_of_one(
    stage: Stage, settings: SampleSettings, wanted: Conditions
) -> StagePlan:
    """The plan of one picture.

    Raises:
        InputError: There are several identities, or the settings fit no table.
    """
    if len(wanted.ids) != 1:
        raise InputError(
            "one picture is of one identity", why=f"there are {len(wanted.ids)}"
        )
    return StagePlan(settings, stage.table(settings.solver), wanted)


async def served(
    stage: Stage,
    plan: StagePlan,
    sample: int,
    low_res: Float32 | None,
    deadline: float | None,
) -> Picture:
    """One picture through the stage's front."""
    job, table = sample_job(
        stage.model, plan.settings, plan.wanted, first_sample=sample
    )
    small = None if low_res is None else low_res[0]
    trajectory = Trajectory(table, job_plan(job, [0]), job.noise, sample, small)
    done = await stage.front.submit(trajectory, deadline)
    (mark,) = picture_marks(stage.engine, stage.model, plan.settings, 1)
    return finished_picture(done, dataclasses.replace(mark, sample=sample))


def repeat_runs(
    stage: Stage, second: Stage | None, todo: Repeat, identities: Identities
) -> list[Run]:
    """What a run record asks for, where it has no shots.

    Raises:
        IdentityError: These are not its identities.
        InputError: It is of nobody, and identities were given.
    """
    given = identities_of(stage.model.spec, identities)
    file = whose_in_record(given, todo.identities)
    each = len(todo.identities) if file is None else 1

    def plan(stage: Stage, settings: SampleSettings, stated: Stated) -> StagePlan:
        wanted = wanted_of(stage.model.spec, file, each, stated)
        return StagePlan(settings, stage.table(settings.solver), wanted)

    first = plan(stage, todo.settings, todo.attributes)
    if todo.second is None or second is None:
        return [Run(first, None, todo.first_sample)]
    stated = known_to(second.model.spec.attributes, todo.attributes)
    return [Run(first, plan(second, todo.second, stated), todo.first_sample)]
