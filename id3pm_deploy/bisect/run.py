"""From a CHECKPOINT to an export recipe with the islands that it needs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from ..backends.base import step_shapes
from ..builders.export_recipe import ExportRecipe
from ..compare import format_error
from ..enlarging import noise_stage
from ..errors import InputError, ParityError
from ..generate import SampleSettings
from ..parity.conditions import random_conditions, random_low_res
from ..progress import Tick, progress
from ..recipes import load_recipe
from ..reference.checkpoint import load_checkpoint
from ..reference.unet import IdentityUNet
from ..sampler import SampleJob, SeededNoise
from ..solvers import solver_table
from ..spec import DiffusionSpec
from ..tolerances import Tolerances, tightened
from .measure import TorchMeasure
from .modules import candidates, holders, largest_numbers, multiply_accumulates
from .result import BisectRequest, BisectResult, Errors, TriedSet, recipe_comments
from .search import Found, Islands, every_candidate, smallest_islands
from .write import check_recipe_path, save_recipe

MOST_SAMPLES = 16
_LEAST_BUDGET = 10
_RUNS = 3
"""UNet calls for a table row along a trajectory: the reference's, and two in half."""


def bisect_to_recipe(
    out: Path,
    request: BisectRequest,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> BisectResult:
    """Find the smallest set of islands and write the recipe ``out`` with it.

    Args:
        out: A ``.toml`` file.
        request: What to do.
        force: Replace ``out`` if it exists.
        say: Called with lines for people, before the long part begins.

    Raises:
        InputError, RecipeError: A setting is out of range, or ``out`` exists.
        OutputError: ``out`` cannot be written.
        CheckpointError: Unusable checkpoint.
        ParityError: No set of islands is inside the tolerances.
    """
    check_recipe_path(out, force=force)
    recipe = _wanted(request)
    loaded = load_checkpoint(request.checkpoint)
    if request.threads:
        torch.set_num_threads(request.threads)
    result = find_islands(loaded.network, loaded.spec, recipe, request, say)
    save_recipe(out, result.recipe, recipe_comments(result), force=force)
    return result


def find_islands(
    network: IdentityUNet,
    spec: DiffusionSpec,
    recipe: ExportRecipe,
    request: BisectRequest,
    say: Callable[[str], None] = lambda line: None,
) -> BisectResult:
    """Search; see :func:`bisect_to_recipe`. The tolerances are the recipe's, or the
    request's."""
    search = _Bisection(network, spec, recipe, request, say)
    search.prepare()
    return search.run()


class _Bisection:
    def __init__(
        self,
        network: IdentityUNet,
        spec: DiffusionSpec,
        recipe: ExportRecipe,
        request: BisectRequest,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.request, self.say = recipe, request, say
        self.tolerances = _asked(recipe, request)
        costs = multiply_accumulates(network)
        self.total = costs[""]
        self.tree = candidates(network, recipe.form, costs)
        self.cost_of = {one.name: one.cost for one in every_candidate(self.tree)}
        shapes = step_shapes(spec)
        with progress(None, "running the float32 reference"):
            self.measure = TorchMeasure(
                network,
                spec,
                recipe.form,
                sample_jobs(spec, request.settings),
                request.device,
            )
            largest = largest_numbers(
                network, shapes, recipe.form, self.measure.rows, request.device
            )
        self.limit = torch.finfo(getattr(torch, recipe.precision)).max
        self.overflowing = {n: v for n, v in largest.items() if not v <= self.limit}
        self.suspects = holders(tuple(self.overflowing), self.tree)
        self.order: dict[Islands, None] = {}
        self.whole = False
        self.seconds = 0.0
        self.tick: Tick = lambda n=1, note="": None

    def prepare(self) -> None:
        """Measure without islands, and tell what the search will take."""
        begun = time.perf_counter()
        errors = self.measure.on_rows(frozenset())
        self.seconds = time.perf_counter() - begun
        limit = format_error(self.tolerances.step)
        self.say(
            f"{self.recipe.precision} without more islands: one step "
            f"{format_error(errors.step)}, tolerance {limit}"
        )
        budget, measure = self.request.budget, self.measure
        row = self.seconds / len(measure.rows)
        self.say(
            f"one evaluation takes {self.seconds:.2g} s, at most {budget} are made: up "
            f"to {math.ceil(self.seconds * budget / 60)} min; the trajectories at the "
            f"end about {math.ceil(_RUNS * row * measure.table_rows / 60)} min"
        )
        for name, value in self.overflowing.items():
            self.say(f"past {self.limit:g} in float32: {value:.3g} in {name}")

    def run(self) -> BisectResult:
        with progress(self.request.budget, "searching") as self.tick:
            found = self.search(self.suspects)
            if found.islands is not None and not self.confirmed(found.islands):
                self.whole = True
                self.say(
                    "single table rows pass, whole trajectories do not: searching "
                    "on with both"
                )
                found = self.search(found.islands or self.suspects)
                if found.islands is not None:
                    self.confirmed(found.islands)
        if found.islands is None:
            raise self.impossible()
        islands = frozenset(found.islands)
        return BisectResult(
            recipe=self.filled(islands),
            shares={name: self.share([name]) for name in found.islands},
            errors=self.known(islands),
            without=self.known(frozenset()),
            tolerances=self.tolerances,
            minimal=found.minimal,
            tried=tuple(
                TriedSet(tuple(sorted(one)), self.share(one), self.known(one))
                for one in self.order
            ),
            overflowing=self.overflowing,
            seconds=self.seconds,
        )

    def search(self, suspects: tuple[str, ...]) -> Found:
        return smallest_islands(
            self.tree, self.excess, budget=self.request.budget, suspects=suspects
        )

    def excess(self, islands: Islands) -> float:
        """How the search judges a set: on table rows first, on whole trajectories only
        once these turned out to be what fails."""
        errors = self.measure.on_rows(islands)
        if self.whole and errors.excess(self.tolerances) <= 1:
            errors = self.measure.on_trajectories(islands, self.tolerances)
        if islands not in self.order:
            self.order[islands] = None
            self.tick(note=f"{len(islands)} islands, {format_error(errors.step)}")
        return errors.excess(self.tolerances)

    def confirmed(self, islands: tuple[str, ...]) -> bool:
        self.tick(0, note="walking a whole trajectory")
        errors = self.measure.on_trajectories(frozenset(islands), self.tolerances)
        return errors.excess(self.tolerances) <= 1

    def known(self, islands: Islands) -> Errors:
        errors = self.measure.measured(islands)
        assert errors is not None
        return errors

    def share(self, islands: Iterable[str]) -> float:
        """Of the network's multiply-accumulates."""
        return sum(self.cost_of[name] for name in islands) / self.total

    def filled(self, islands: Islands) -> ExportRecipe:
        if not islands:
            return self.recipe
        count = f"{len(islands)} island{'s' if len(islands) > 1 else ''}"
        return dataclasses.replace(
            self.recipe,
            summary=f"{self.recipe.precision} with {count} of float32 that bisect "
            "found",
            islands=self.recipe.islands + tuple(sorted(islands)),
        )

    def impossible(self) -> ParityError:
        best = min(self.order, key=lambda one: self.known(one).excess(self.tolerances))
        errors = self.known(best)
        said = f"one step {format_error(errors.step)} of "
        said += format_error(self.tolerances.step)
        if errors.trajectory is not None:
            said += f", trajectory {format_error(errors.trajectory)} of "
            said += format_error(self.tolerances.trajectory)
        count = f"{len(best)} islands" if best else "no island"
        return ParityError(
            f"no set of islands brings {self.recipe.precision} inside the tolerances",
            why=f"the best, {count}, reached {said}",
            fix="allow a larger tolerance, take more steps, or export in float32",
        )


def _wanted(request: BisectRequest) -> ExportRecipe:
    """The recipe to start from; everything that was asked for is checked."""
    if request.budget < _LEAST_BUDGET:
        raise InputError(
            f"the budget must be at least {_LEAST_BUDGET}",
            why=f"it is {request.budget}",
        )
    if not 1 <= request.settings.count <= MOST_SAMPLES:
        raise InputError(
            f"1 to {MOST_SAMPLES} samples can be measured",
            why=f"{request.settings.count} were asked for",
            fix="change --count",
        )
    if not 0 <= request.threads <= 1024:
        raise InputError(
            "threads must be from 0 to 1024", why=f"it is {request.threads}"
        )
    recipe = load_recipe("export", request.recipe, ExportRecipe)
    if recipe.precision == "float32":
        raise InputError(
            f"the recipe {request.recipe} is in float32 throughout",
            fix="give one in half precision, such as --recipe float16",
        )
    asked = _asked(recipe, request)
    dataclasses.replace(  # which checks them
        recipe,
        tolerance_step=asked.step,
        tolerance_trajectory=asked.trajectory,
    )
    return recipe


def _asked(recipe: ExportRecipe, request: BisectRequest) -> Tolerances:
    """What is asked for, against float32.

    The recipe keeps its own: an export is held against PyTorch in the same precision,
    on other inputs and under guidance, where rounding alone may be more than this.
    """
    return tightened(
        Tolerances(recipe.tolerance_step, recipe.tolerance_trajectory),
        request.tolerance_step,
        request.tolerance_trajectory,
    )


def sample_jobs(spec: DiffusionSpec, settings: SampleSettings) -> list[SampleJob]:
    """One job for each sample, on random identity vectors and, where the model enlarges
    pictures, random ones."""
    table = solver_table(spec, settings.solver)
    count = settings.count
    identity = random_conditions(spec, count, settings.seed).identity
    small = random_low_res(spec, count, settings.seed)
    noise = SeededNoise(settings.seed, noise_stage(spec))
    return [
        SampleJob(
            np.ascontiguousarray(identity[i : i + 1]),
            table,
            settings.guidance,
            noise,
            first_sample=i,
            low_res=None if small is None else small[i : i + 1],
        )
        for i in range(count)
    ]
