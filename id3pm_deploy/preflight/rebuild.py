"""``--rebuild-if-stale``: a plan that only building it again helps is built again."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..builders.recipe import EngineRecipe
from ..bundle import BASE, Bundle, EngineEntry, open_bundle
from ..doctor.verdicts import build_verdict
from ..errors import EngineError, RecipeError
from ..files import write_text
from ..recipes import recipe_text
from .choose import stage_plans
from .commands import entry_recipe
from .machine import Here, here
from .rules import PlanProblem, plan_problem

Say = Callable[[str], None]

_TARGET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class _Stale:
    """A plan that building it here again would put right."""

    entry: EngineEntry
    problem: PlanProblem


def rebuild_if_stale(
    path: Path,
    stage: str = BASE,
    precision: str | None = None,
    *,
    say: Say,
    machine: Here | None = None,
) -> bool:
    """Build a plan of a BUNDLE again if none of them runs here and that would help.

    It is built with the settings that the manifest keeps of it, for all stages of the
    bundle that have an engine of its target. What else keeps it from running, such as a
    GPU that is missing, is not looked at; :func:`plan_problem` says it afterwards.

    Args:
        path: The BUNDLE; it is changed in place.
        stage: Of which model.
        precision: Of which plans; None takes any.
        say: Called with what is done, a line at a time.
        machine: What this machine has; None looks at it.

    Returns:
        Whether a plan was built.

    Raises:
        EngineError: A plan is stale and cannot be built here; the error says why.
        BundleError: The bundle is damaged.
        Id3pmError: The build fails; see ``builders.build.build_engine``.
    """
    bundle = open_bundle(path)
    plans = stage_plans(bundle, stage, precision)
    if not plans:
        return False
    machine = machine or here(entry.flavour for entry in plans)
    problems = [plan_problem(entry, machine, path) for entry in plans]
    if None in problems:
        return False
    pairs = zip(plans, filter(None, problems), strict=True)
    stale = [_Stale(entry, problem) for entry, problem in pairs if problem.stale]
    # First those that will run here when they are built.
    stale.sort(key=lambda one: _problem_afterwards(one.entry, machine) is not None)
    refusals = []
    for one in stale:
        refusal, recipe = _buildable(bundle, one, machine)
        if recipe is not None:
            _build(bundle, one, recipe, say)
            return True
        refusals.append(refusal)
    if refusals:
        raise next(filter(None, refusals))
    return False


def _problem_afterwards(entry: EngineEntry, machine: Here) -> PlanProblem | None:
    """What would still keep the plan from running if it had been built here."""
    version = machine.versions.get(entry.flavour, entry.version)
    anew = dataclasses.replace(entry, version=version)
    if machine.gpus:
        gpu = machine.gpus[0]  # the one that TensorRT builds on
        anew = dataclasses.replace(
            anew,
            gpu_name=gpu.name,
            compute_capability=gpu.compute_capability,
            multiprocessors=gpu.multiprocessors,
            cuda=machine.cuda,
        )
    return plan_problem(anew, machine)


def _buildable(
    bundle: Bundle, stale: _Stale, machine: Here
) -> tuple[EngineError | None, EngineRecipe | None]:
    """The recipe to build a plan with here, or the error that says why not."""
    entry = stale.entry
    try:
        recipe = entry_recipe(entry)
    except RecipeError as error:
        why = f"{error.what}; {error.why}" if error.why else error.what
        return _refusal(stale, why, error.fix), None
    lacks = build_verdict(recipe, machine.facts()).lacks
    if lacks:
        return _refusal(stale, f"it needs {lacks[0].what}", lacks[0].fix), None
    if not _TARGET.fullmatch(entry.target):
        return _refusal(stale, "its target is no plain name", stale.problem.fix), None
    if bundle.graph("step", recipe.precision, entry.stage) is None:
        fix = f"id3pm-deploy export CHECKPOINT --recipe {recipe.export} --out "
        why = f"the bundle holds no step graph in {recipe.precision}"
        return _refusal(stale, why, f"{fix}{bundle.folder}"), None
    if not os.access(bundle.folder, os.W_OK):
        why = "the bundle's folder may not be written to"
        fix = "copy the bundle to a folder of yours, or change its permissions"
        return _refusal(stale, why, fix), None
    return None, recipe


def _refusal(stale: _Stale, why: str, fix: str) -> EngineError:
    problem = stale.problem
    return EngineError(
        f"the plan of the engine {problem.engine!r:.80} is stale and cannot be built "
        f"again here: {why}",
        why=f"{problem.reason}; {problem.why}",
        fix=fix,
    )


def _build(bundle: Bundle, stale: _Stale, recipe: EngineRecipe, say: Say) -> None:
    from ..builders.build import build_engine
    from ..builders.cache import PlanCache

    say(
        f"the plan of the engine {stale.problem.engine!r:.80} is stale "
        f"({stale.problem.reason}; {stale.problem.why}): building it again"
    )
    with tempfile.TemporaryDirectory(prefix="id3pm-recipe-") as folder:
        file = Path(folder) / f"{stale.entry.target}.toml"
        write_text(file, recipe_text(recipe))
        cache = PlanCache.default()
        built = build_engine(bundle.folder, str(file), None, cache=cache)
    for note in built.notes:
        say(f"warning: {note}")
    entry = built.entry
    how = f"built in {entry.build_seconds:.1f} s"
    if built.from_cache:
        how = "taken from the cache of plans"
    say(f"{entry.file}: {how} ({entry.flavour} {entry.version})")
