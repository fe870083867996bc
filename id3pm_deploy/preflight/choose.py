"""Which of a bundle's plans runs here."""

from __future__ import annotations

import dataclasses

from ..bundle import BASE, Bundle, EngineEntry
from .machine import Here, here
from .rules import PlanProblem, plan_problem

_NEAREST = ("cuda", "gpu", "version", "library", "flavour")
"""Kinds of problems, those that are looked at last first."""


def stage_plans(
    bundle: Bundle, stage: str = BASE, precision: str | None = None
) -> list[EngineEntry]:
    """Engines of a stage that are plans; with ``precision``, those in it."""
    return [
        entry
        for entry in bundle.manifest.plans
        if entry.stage == stage and precision in (None, entry.precision)
    ]


def runnable_plans(
    bundle: Bundle,
    stage: str = BASE,
    precision: str | None = None,
    machine: Here | None = None,
) -> list[EngineEntry]:
    """Engines of a stage whose plans run here, in the manifest's order.

    Nothing is said of whether their files are whole and may be trusted.

    Args:
        bundle: The bundle.
        stage: Of which model.
        precision: Of which plans; None takes any.
        machine: What this machine has; None looks at it.

    Returns:
        None of them where the bundle has no such plan.

    Raises:
        EngineError: There are plans and none runs here; it tells of the one that is
            nearest to it.
    """
    plans = stage_plans(bundle, stage, precision)
    if not plans:
        return []
    machine = machine or here(entry.flavour for entry in plans)
    problems: list[PlanProblem] = []
    fitting = []
    for entry in plans:
        problem = plan_problem(entry, machine, bundle.folder)
        if problem is None:
            fitting.append(entry)
        else:
            problems.append(problem)
    if not fitting:
        problems.sort(key=lambda one: (not one.stale, _NEAREST.index(one.kind)))
        raise problems[0].error()
    return fitting


def fitting_gpu(entry: EngineEntry, machine: Here | None = None) -> int:
    """The first GPU that a plan which runs here runs on, counted as the driver does.

    Args:
        entry: An engine with a plan.
        machine: What this machine has; None looks at it.
    """
    machine = machine or here([entry.flavour])
    for index, gpu in enumerate(machine.gpus):
        if plan_problem(entry, dataclasses.replace(machine, gpus=(gpu,))) is None:
            return index
    return 0
