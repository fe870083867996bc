"""The library: a model is loaded once, and pictures come out as arrays.

    with id3pm_deploy.load("BUNDLE") as sampler:
        for batch in sampler.sample("identity.npz", count=4, seed=0):
            show(batch.pixels)

``submit`` is for servers: many coroutines share the batches of one engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import defaults
from .arguments import Guidance, Solver, count_with, one_each, way_of
from .attributes import Attributes, Stated, known_to
from .batch import Batch, Picture, check_finite, joined
from .control.annealing import Annealing
from .control.resolve import conditions_of
from .control.shots import Grid, Shot, grid_of
from .enlarging import enlarged_mark, low_res_from_pixels
from .errors import EngineError, InputError
from .generate import SampleSettings
from .identity.directions import Directions
from .images import Pixels
from .making import (
    Run,
    StagePlan,
    batch_of,
    check_alone,
    check_directions,
    plan_of_one,
    repeat_runs,
    run_facts,
    served,
    settings_for,
    settings_of,
    shot_runs,
)
from .models import Model, open_model, open_second_stage
from .replaying import note_engine, read_record, repeat
from .sampler import Limits
from .serving import PLACES, WAITING
from .stage import Stage
from .whose import Identities, directions_of, identities_of, wanted_of

Float32 = npt.NDArray[np.float32]

_NO_LIMITS = Limits()


def load(
    path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    super_resolution: str | os.PathLike[str] | None = None,
    places: int = PLACES,
    waiting: int = WAITING,
    **engine: Any,
) -> Sampler:
    """See :func:`id3pm_deploy.load`."""
    model = open_model(Path(path))
    second = None if super_resolution is None else Path(super_resolution)
    enlarges = open_second_stage(model, second)
    stages = [
        Stage(one, backend, engine, places, waiting)
        for one in (model, enlarges)
        if one is not None
    ]
    return Sampler(*stages)


class Sampler:
    """A loaded model that makes pictures; use it as a context manager.

    It may be used from several threads: an engine has a thread of its own, and calls
    of :meth:`sample` and :meth:`submit` have their turns there, batch by batch. What
    is closed stays closed; load the model again.

    Args:
        stage: The model.
        second: What enlarges its pictures; None: nothing does.
    """

    def __init__(self, stage: Stage, second: Stage | None = None) -> None:
        self._stage, self._second = stage, second
        self._opened = self._closed = False
        self._lock = threading.Lock()

    @property
    def model(self) -> Model:
        """The model that was loaded; ``model.spec`` has its facts."""
        return self._stage.model

    def __enter__(self) -> Sampler:
        self._check_closed()
        with self._lock:
            if self._opened:
                raise EngineError("the sampler is in use in a with statement already")
            self._opened = True
        try:
            self._stage.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Sampler:
        await asyncio.to_thread(self.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            await self.drain()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Cancel what is in flight and release everything; may be called twice.

        Raises:
            EngineError: Something could not be released.
        """
        self._closed = True
        try:
            self._stage.close()
        finally:
            if self._second is not None:
                self._second.close()

    def _check_closed(self) -> None:
        if self._closed:
            raise EngineError(
                "the sampler was closed", fix="load the model again to go on"
            )

    def _check_open(self) -> None:
        self._check_closed()
        if not self._opened:
            raise EngineError(
                "the sampler was not entered",
                fix="use it as `with id3pm_deploy.load(...) as sampler:`",
            )

    def sample(
        self,
        identities: Identities = None,
        *,
        attributes: Stated = (),
        shots: Grid | Sequence[Shot] | None = None,
        directions: Directions | str | os.PathLike[str] | None = None,
        annealing: Annealing | None = None,
        count: int = defaults.COUNT,
        preset: str | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
        solver: Solver | None = None,
        seed: int = 0,
        batch_size: int = defaults.BATCH_SIZE,
        low_res: Pixels | None = None,
        enlarge: bool = True,
        sr_solver: Solver | None = None,
        sr_steps: int | None = None,
        sr_guidance: Guidance | None = None,
        sr_batch_size: int = defaults.SR_BATCH_SIZE,
        limits: Limits = _NO_LIMITS,
    ) -> Iterator[Batch]:
        """Pictures of every identity, batch by batch; the same ones that
        ``id3pm-deploy sample`` makes.

        What is wrong with the arguments is raised here, the rest while the batches are
        taken.

        Args:
            identities: An identity file, its path, or raw vectors [n, D]; None makes
                unconditional pictures.
            attributes: Values by name, as ``{"age": 30}``, of all pictures alike, or
                one such mapping an identity (a picture where there is none). What is
                left out is not stated, and left to the model.
            shots: What each picture is made of (``id3pm_deploy.control``), in place of
                ``count`` pictures of each identity; ``identities`` has all whom they
                name.
            directions: Those that shots name, or their file.
            annealing: Of conditions, for more diverse pictures of less likeness.
            count: Pictures of each identity.
            preset: ``fast``, ``balanced`` or ``reference``: what to take of both stages
                where nothing is given; None is ``balanced``.
            guidance: Scale or settings; None: the preset's, fitted to the model.
            steps: Solver steps; None: the preset's, or those of a ``solver`` that has
                them.
            solver: Name or settings; None: the preset's.
            seed: Of all noise.
            batch_size: Pictures made at once; cannot change them.
            low_res: [n, h, w, 3] uint8, what a super-resolution model enlarges, each
                once; of one identity for all, or of one each. The marks then call
                the pictures composites, as what was given may show anything.
            enlarge: Use the second stage where there is one.
            sr_solver, sr_steps, sr_guidance, sr_batch_size: Of the second stage.
            limits: A deadline for all of it and an event that cancels.

        Raises:
            InputError, IdentityError: An argument is out of range or does not fit.
            EngineError: The sampler is not open, or the engine fails.
            CancelledError, DeadlineError: A limit was reached, or the sampler closed.
        """
        self._check_open()
        spec = self.model.spec
        count = count_with(spec, low_res, count)
        file = identities_of(spec, identities)
        settings = SampleSettings(
            *way_of(spec, preset, solver, steps, guidance),
            seed,
            count,
            batch_size,
            preset=preset,
            annealing=annealing,
        )
        enlarger = self._second if enlarge else None
        larger = settings
        if enlarger is not None:
            own = enlarger.model.spec
            way, scale = way_of(own, preset, sr_solver, sr_steps, sr_guidance)
            larger = dataclasses.replace(
                settings, solver=way, guidance=scale, batch_size=sr_batch_size
            )
        stages = self._stage, enlarger
        if shots is not None:
            check_alone(attributes, low_res)
            grid, named = grid_of(shots), (file, directions_of(directions))
            settings = settings_for(settings, grid)
            runs = shot_runs(stages, (settings, larger), grid.shots, named)
            said = run_facts(settings, grid, named[1])
            return self._batches(runs, said, None, limits)
        wanted = one_each(wanted_of(spec, file, count, attributes), low_res)
        first = StagePlan(settings, self._stage.table(settings.solver), wanted)
        second = None
        if enlarger is not None:
            own = enlarger.model.spec
            stated = known_to(own.attributes, attributes)
            wanted = wanted_of(own, file, count, stated)
            second = StagePlan(larger, enlarger.table(larger.solver), wanted)
        return self._batches([Run(first, second)], {}, low_res, limits)

    def sample_all(
        self, identities: Identities = None, **options: Any
    ) -> npt.NDArray[np.uint8]:
        """All pictures of :meth:`sample` as one array, [n, H, W, 3] uint8.

        Raises:
            NonFiniteError: A sample failed.
            Id3pmError: See :meth:`sample`.
        """
        batch = joined(list(self.sample(identities, **options)))
        check_finite(batch)
        return batch.pixels

    def replay(
        self,
        record: Mapping[str, Any] | str | Path,
        identities: Identities = None,
        *,
        directions: Directions | str | os.PathLike[str] | None = None,
        low_res: Pixels | None = None,
        limits: Limits = _NO_LIMITS,
    ) -> Iterator[Batch]:
        """The pictures of an earlier run again: bit for bit on the same kind of CPU
        engine. What of the engine is another than the record's is logged.

        Args:
            record: A run's ``record.json``, its folder, or what is in it.
            identities: Those of the run; the record holds their ids only.
            directions: Those of the run, if it went along any, or their file.
            low_res: What was enlarged, where the run was given pictures.
            limits: As for :meth:`sample`.

        Raises:
            InputError: The record cannot be repeated with this model or release.
            IdentityError: These are not its identities.
            Id3pmError: See :meth:`sample`.
        """
        self._check_open()
        values = read_record(record)
        enlarges = None if self._second is None else self._second.model
        todo = repeat(values, self.model, enlarges)
        count_with(self.model.spec, low_res, 1)
        if low_res is not None and len(low_res) != len(todo.identities):
            raise InputError(
                f"the run record is of {len(todo.identities)} pictures to enlarge",
                why=f"{len(low_res)} are given",
            )
        note_engine(values, self._stage.engine.info)
        stages = self._stage, self._second
        if todo.grid is None:
            runs, said = repeat_runs(*stages, todo, identities), {}
        else:
            named = (
                identities_of(self.model.spec, identities),
                directions_of(directions),
            )
            check_directions(values.get("directions_sha256"), named[1])
            settings = todo.settings, todo.second or todo.settings
            stages = self._stage, None if todo.second is None else self._second
            shots, start = todo.grid.shots, todo.first_sample
            runs = shot_runs(stages, settings, shots, named, start)
            said = run_facts(todo.settings, todo.grid, named[1])
        return self._batches(runs, said, low_res, limits)

    def _batches(
        self,
        runs: Sequence[Run],
        said: Mapping[str, Any],
        low_res: Pixels | None,
        limits: Limits,
    ) -> Iterator[Batch]:
        small = None if low_res is None else low_res_from_pixels(low_res)
        for run in runs:
            for chosen in run.batches():
                self._check_open()
                stages = self._stage, self._second
                yield batch_of(stages, run, chosen, said, small, limits)

    async def submit(
        self,
        identity: Identities = None,
        *,
        attributes: Attributes | None = None,
        shot: Shot | None = None,
        directions: Directions | str | os.PathLike[str] | None = None,
        annealing: Annealing | None = None,
        preset: str | None = None,
        steps: int | None = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        sample: int = 0,
        deadline: float | None = None,
        solver: Solver | None = None,
        low_res: Pixels | None = None,
        enlarge: bool = True,
        sr_solver: Solver | None = None,
        sr_steps: int | None = None,
        sr_guidance: Guidance | None = None,
    ) -> Picture:
        """One picture, made in company of what other coroutines ask for; the same that
        :meth:`sample` makes. Cancel the task to give it up.

        Samples join and leave the batch between table rows, whatever their solvers,
        steps and scales. Where too many wait already, this waits before it queues.
        While it has company, :meth:`sample` waits until the batch is empty.

        Args:
            identity: Of one person; None makes an unconditional picture.
            attributes: Values by name, as ``{"age": 30}``.
            shot: What the picture is made of, its noise included; ``identity`` has all
                whom it names.
            directions: Those that ``shot`` names, or their file.
            annealing: As for :meth:`sample`.
            preset, steps, guidance, seed, solver: As for :meth:`sample`.
            sample: Number of the sample, which is a part of its noise's address.
            deadline: Of the whole, by ``time.monotonic``.
            low_res: [1, h, w, 3] uint8, what a super-resolution model enlarges.
            enlarge, sr_solver, sr_steps, sr_guidance: As for :meth:`sample`.

        Raises:
            InputError, IdentityError: An argument is out of range or does not fit.
            DeadlineError: It cannot be done in time, even at the best pace seen.
            CancelledError: The sampler was closed meanwhile.
            NonFiniteError: The network produced NaN or infinity.
            EngineError: The engine failed, or the sampler is not open.
        """
        self._check_open()
        spec = self.model.spec
        count = count_with(spec, low_res, 1)
        file = identities_of(spec, identity)
        settings = SampleSettings(
            *way_of(spec, preset, solver, steps, guidance),
            seed,
            preset=preset,
            annealing=annealing,
        )
        stated = attributes or {}
        named = file, directions_of(directions)
        if shot is None:
            wanted = wanted_of(spec, file, count, stated)
        else:
            check_alone(attributes, low_res)
            settings = settings_of(settings, shot)
            wanted = conditions_of(spec, [shot], *named)
        enlarges = self._second if enlarge else None
        if enlarges is not None:
            own = enlarges.model.spec
            large_settings = SampleSettings(
                *way_of(own, preset, sr_solver, sr_steps, sr_guidance),
                seed,
                preset=preset,
            )
            few = known_to(own.attributes, stated)
            larger = (
                wanted_of(own, file, 1, few)
                if shot is None
                else conditions_of(own, [shot], *named)
            )
            large = plan_of_one(enlarges, large_settings, larger)
        plan = plan_of_one(self._stage, settings, wanted)
        small = None if low_res is None else low_res_from_pixels(low_res)
        picture = await served(self._stage, plan, sample, small, deadline)
        if small is not None:
            mark = dataclasses.replace(picture.mark, composite=True)
            return dataclasses.replace(picture, mark=mark)
        if enlarges is None:
            return picture
        small = low_res_from_pixels(picture.pixels[None])
        made = await served(enlarges, large, sample, small, deadline)
        return dataclasses.replace(made, mark=enlarged_mark(picture.mark, made.mark))

    async def drain(self) -> None:
        """Wait until nothing that was submitted is in flight."""
        await self._stage.front.drain()
        if self._second is not None:
            await self._second.front.drain()
