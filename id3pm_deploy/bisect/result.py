"""What is asked of ``bisect``, and what it answers; without torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..builders.export_recipe import ExportRecipe
from ..compare import format_error
from ..generate import SampleSettings
from ..tolerances import Tolerances


@dataclass(frozen=True)
class Errors:
    """Largest errors with a set of islands, ``max|a - b| / max|b|``; infinite where
    something was not finite.

    ``trajectory`` is None where no trajectory was walked.
    """

    step: float
    trajectory: float | None = None

    def excess(self, tolerances: Tolerances) -> float:
        """As a multiple of what is allowed; at most 1 passes."""
        found = self.step / tolerances.step
        if self.trajectory is None:
            return found
        return max(found, self.trajectory / tolerances.trajectory)


@dataclass(frozen=True)
class BisectRequest:
    """What to look for islands in, and how.

    Attributes:
        checkpoint: CHECKPOINT folder.
        recipe: Half-precision recipe in ``export/``, or a TOML file.
        settings: Solver, guidance and seed; ``count`` samples are measured, one at a
            time.
        tolerance_step: Against float32; None takes the recipe's.
        tolerance_trajectory: The same.
        budget: Most sets of islands to measure.
        device: A torch device.
        threads: CPU threads; 0 leaves PyTorch's choice.
    """

    checkpoint: Path
    recipe: str
    settings: SampleSettings
    tolerance_step: float | None = None
    tolerance_trajectory: float | None = None
    budget: int = 200
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True)
class TriedSet:
    """One set of islands that was measured; ``share`` is of multiply-accumulates."""

    islands: tuple[str, ...]
    share: float
    errors: Errors


@dataclass(frozen=True)
class BisectResult:
    """What was found.

    Attributes:
        recipe: The recipe with the islands.
        shares: Share of the network's multiply-accumulates by island that was added.
        errors: What is left with them.
        without: The errors without them.
        tolerances: What both were held to.
        minimal: Whether removing any one island was seen to fail; False where the
            budget ended before.
        tried: All sets that were measured, in order.
        overflowing: Largest number in float32 by module, where half precision cannot
            hold it.
        seconds: Of one evaluation, without a trajectory.
    """

    recipe: ExportRecipe
    shares: dict[str, float]
    errors: Errors
    without: Errors
    tolerances: Tolerances
    minimal: bool
    tried: tuple[TriedSet, ...]
    overflowing: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; errors that are not finite are None."""
        return {
            "islands": self.shares,
            "share": sum(self.shares.values()),
            "minimal": self.minimal,
            "tolerances": dataclasses.asdict(self.tolerances),
            "errors": _errors_json(self.errors),
            "errors_without": _errors_json(self.without),
            "overflowing": {n: _finite(v) for n, v in self.overflowing.items()},
            "seconds_an_evaluation": self.seconds,
            "tried": [
                {"islands": one.islands, "share": one.share} | _errors_json(one.errors)
                for one in self.tried
            ],
            "recipe": dataclasses.asdict(self.recipe),
        }


def recipe_comments(result: BisectResult) -> list[str]:
    """What stands above the recipe: figures, nothing of the machine."""
    lines = ["Written by `id3pm-deploy bisect`."]
    for name, share in result.shares.items():
        lines.append(f"{share:7.2%} of multiply-accumulates: {name}")
    found, asked = result.errors, result.tolerances
    said = f"Against float32: one step {format_error(found.step)} of "
    said += format_error(asked.step)
    if found.trajectory is not None:
        said += f", trajectory {format_error(found.trajectory)} of "
        said += format_error(asked.trajectory)
    return [*lines, said + " that were asked for."]


def _errors_json(errors: Errors) -> dict[str, float | None]:
    return {
        "step": _finite(errors.step),
        "trajectory": None if errors.trajectory is None else _finite(errors.trajectory),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
