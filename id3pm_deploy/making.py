"""How a loaded stage makes pictures: in batches of its own, or in company."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import numpy.typing as npt

from .attributes import Stated, known_to
from .batch import Picture, finished_picture
from .enlarging import enlarged_mark, low_res_from_pixels, noise_stage
from .errors import InputError
from .generate import Conditions, Pictures, SampleSettings, picture_marks
from .guidance import guidance_plan
from .images import to_uint8
from .places import Trajectory
from .replaying import Repeat
from .sampler import Limits, SampleJob, SeededNoise
from .solvers import SolverTable
from .stage import Stage
from .whose import Identities, identities_of, wanted_of, whose_in_record

Float32 = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What one stage makes of all samples of a run."""

    settings: SampleSettings
    table: SolverTable
    wanted: Conditions


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
    table, own = plan.table, slice(chosen.start, chosen.stop)
    job = SampleJob(
        plan.wanted.identity[own],
        table,
        plan.settings.guidance,
        SeededNoise(plan.settings.seed, noise_stage(stage.model.spec)),
        first_sample=first_sample + chosen.start,
        low_res=None if low_res is None else low_res[own],
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
    table, settings = plan.table, plan.settings
    guidance = guidance_plan(plan.wanted.identity, settings.guidance, table.timesteps)
    noise = SeededNoise(settings.seed, noise_stage(stage.model.spec))
    small = None if low_res is None else low_res[0]
    trajectory = Trajectory(table, guidance, noise, sample, small)
    done = await stage.front.submit(trajectory, deadline)
    (mark,) = picture_marks(stage.engine, stage.model, settings, 1)
    return finished_picture(done, dataclasses.replace(mark, sample=sample))


def repeat_plans(
    stage: Stage, second: Stage | None, todo: Repeat, identities: Identities
) -> tuple[StagePlan, StagePlan | None]:
    """The plans that a run record asks for.

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
        return first, None
    stated = known_to(second.model.spec.attributes, todo.attributes)
    return first, plan(second, todo.second, stated)
