"""What every column of a benchmark is given: one model, one sampler, nobody's identity.

A column is a way of computing the same trajectory. What is told to a child process goes
through :meth:`Case.to_json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import defaults
from ..backends.base import Float32, step_shapes
from ..bundle import BASE, GraphEntry
from ..calls import EngineCalls, engine_calls
from ..enlarging import noise_stage
from ..errors import InputError
from ..guidance import GuidanceSettings, GuidanceTable, guidance_plan
from ..models import Model, bundle_graph, open_model
from ..parity.conditions import random_conditions, random_low_res
from ..recipes import dataclass_from_mapping
from ..sampler import SampleJob, SeededNoise, step_rows
from ..solvers import SolverSettings, SolverTable, solver_table
from ..tolerances import CEILINGS


@dataclass(frozen=True)
class CaseSettings:
    """The settings of a benchmark that change what is computed, or by what.

    Attributes:
        solver, guidance, seed: As ``sample`` has them; the seed is also that of the
            random identity vectors.
        precision: Of the bundle's graph or plan; None takes the bundle's engine's.
        threads: CPU threads; 0 leaves the runtime's choice.
        device: Of what runs in PyTorch: ``cpu``, ``cuda[:n]``, or ``auto``.
        stage: Of the bundle.
        trust: The user answers for a plan.
        replay_rows: Table rows in a replayed graph; 0 leaves the choice.
    """

    solver: SolverSettings = dataclasses.field(default_factory=SolverSettings)
    guidance: GuidanceSettings = dataclasses.field(default_factory=GuidanceSettings)
    seed: int = 0
    precision: str | None = None
    threads: int = 0
    device: str = "auto"
    stage: str = BASE
    trust: bool = False
    replay_rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


def settings_from_json(values: Mapping[str, Any]) -> CaseSettings:
    """What :meth:`CaseSettings.to_json` gave.

    Raises:
        InputError: They are no settings.
    """
    return dataclass_from_mapping(CaseSettings, values, "benchmark settings")


@dataclass(frozen=True)
class Case:
    """An opened bundle, the checkpoint that it was made from if there is one, and the
    settings."""

    model: Model
    checkpoint: Path | None
    settings: CaseSettings

    @cached_property
    def table(self) -> SolverTable:
        """The solver's table."""
        return solver_table(self.model.spec, self.settings.solver)

    @cached_property
    def graph(self) -> GraphEntry:
        """The step graph that the bundle's columns run."""
        assert self.model.bundle is not None
        settings = self.settings
        return bundle_graph(self.model.bundle, settings.precision, settings.stage)

    def job(self, samples: int) -> SampleJob:
        """A trajectory of ``samples`` pictures of random identities."""
        spec, settings = self.model.spec, self.settings
        return SampleJob(
            random_conditions(spec, samples, settings.seed).identity,
            self.table,
            settings.guidance,
            SeededNoise(settings.seed, noise_stage(spec)),
            low_res=random_low_res(spec, samples, settings.seed),
        )

    def calls(self, samples: int) -> EngineCalls:
        """The calls of an engine that this trajectory consists of."""
        job = self.job(samples)
        plan = guidance_plan(job.identity, job.guidance, self.table.timesteps)
        sequential = job.guidance.rows == "sequential"
        rows, stochastic = step_rows(self.table, plan), self.table.stochastic
        return engine_calls(rows, stochastic, plan, sequential=sequential)

    def timed_row(self, samples: int) -> TimedRow:
        """The call that stands for the others where single ones are timed: the first
        of those with the most UNet rows."""
        job, calls = self.job(samples), self.calls(samples)
        sizes = [calls.tables[now].unet_rows for now in calls.guidance]
        m = int(np.argmax(sizes))
        j = int(calls.solver_row[m])
        shape = step_shapes(self.model.spec).picture
        numbers = range(samples)
        noise = None
        if calls.stochastic[m]:
            noise = job.noise.row(j, numbers, shape)
        x_t = job.noise.start(numbers, shape) * np.float32(self.table.x_scale)
        step = np.repeat(calls.rows[m][None], samples, axis=0)
        return TimedRow(m, j, x_t, step, noise, calls.tables[calls.guidance[m]])


@dataclass(frozen=True)
class TimedRow:
    """One table row with its inputs.

    Attributes:
        call: Its number among the engine's calls.
        number: Of its table row.
        x_t: [B, C, H, W] float32.
        step: [B, S] float32.
        noise: [B, C, H, W] float32, or None.
        guidance: Its guidance table.
    """

    call: int
    number: int
    x_t: Float32
    step: Float32
    noise: Float32 | None
    guidance: GuidanceTable


def open_case(bundle: Path, checkpoint: Path | None, settings: CaseSettings) -> Case:
    """Open what is measured.

    Raises:
        InputError: ``bundle`` is no BUNDLE, lacks the stage, or is of another
            checkpoint; a setting does not fit the model.
        BundleError, CheckpointError: One of them is damaged.
        EngineError: The bundle holds no such graph.
    """
    model = open_model(bundle)
    if model.bundle is None:
        raise InputError(
            f"{bundle} is a CHECKPOINT, and benchmark takes a BUNDLE",
            fix="make one with `id3pm-deploy build-engine CHECKPOINT --target cpu "
            "--out BUNDLE`; the checkpoint itself goes with --checkpoint",
        )
    if settings.stage != BASE:
        second = model.second_stage
        if second is None:
            raise InputError(f"{bundle} has no second stage", fix="leave out --stage")
        model = second
    if checkpoint is not None:
        _check_same(model, checkpoint)
    case = Case(model, checkpoint, settings)
    case.calls(1)  # guidance that does not fit is refused before any work
    case.graph  # noqa: B018 - so is a bundle without the graph
    return case


def _check_same(model: Model, path: Path) -> None:
    other = open_model(path)
    if other.bundle is not None:
        raise InputError(f"--checkpoint {path} is a BUNDLE", fix="give a CHECKPOINT")
    if other.weights_sha256 != model.weights_sha256:
        raise InputError(
            f"the bundle was not made from the checkpoint {path}",
            why="the weights have another SHA-256, so the columns would compute "
            "something else",
            fix="give the checkpoint that it was built from",
        )


def check_batch_sizes(sizes: tuple[int, ...]) -> None:
    """Raise :class:`InputError` for batch sizes that cannot be measured."""
    if not sizes or len(set(sizes)) != len(sizes):
        raise InputError("the batch sizes must be different numbers, at least one")
    for size in sizes:
        if not 1 <= size <= defaults.MAX_BATCH_SIZE:
            raise InputError(
                f"a batch size must be from 1 to {defaults.MAX_BATCH_SIZE}",
                why=f"it is {size}",
            )


def loosest(*precisions: str) -> str:
    """The precision with the widest tolerance of those named; labels such as
    ``float16 weights`` count as what they begin with."""
    known = [name for p in precisions if (name := p.split()[0]) in CEILINGS]
    return max(known or ["float32"], key=lambda name: CEILINGS[name].step)
