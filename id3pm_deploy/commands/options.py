"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

SOLVERS = ("ddpm", "ddim", "dpmpp-2m")
SPACINGS = ("linspace", "linspace_open", "leading", "trailing")
DEFAULT_SOLVER = "dpmpp-2m"
DEFAULT_STEPS = 20
DEFAULT_GUIDANCE = 2.0


def option(*names: str, **rest: Any) -> Callable[[F], F]:
    """``click.option`` that shows its default."""
    return click.option(*names, show_default=True, **rest)


def sampling_options(function: F) -> F:
    """Solver, steps, guidance, seed and the settings of the table."""
    made = function
    for add in reversed(
        [
            option("--solver", default=DEFAULT_SOLVER, type=click.Choice(SOLVERS)),
            option("--steps", default=DEFAULT_STEPS, help="Solver steps."),
            option("--guidance", default=DEFAULT_GUIDANCE, help="Guidance scale."),
            option(
                "--guide-variance", is_flag=True, help="Guide learned variance too."
            ),
            option("--eta", default=0.0, help="DDIM's η: 0 is deterministic."),
            option(
                "--spacing",
                type=click.Choice(SPACINGS),
                help="Timestep spacing.  [default: the solver's own]",
            ),
            option(
                "--lambda-min",
                type=float,
                help="Start at this half log-SNR.  [default: -5.1; none for ddpm]",
            ),
            option("--clip", default=1.0, help="Bound of the predicted x0; 0: none."),
            option("--seed", default=0, help="Seed of all noise."),
        ]
    ):
        made = add(made)
    return made


def solver_settings(values: dict[str, Any]) -> Any:
    """Take the solver's settings out of a command's options."""
    from ..solvers import SolverSettings

    names = ("solver", "steps", "spacing", "lambda_min", "clip", "eta")
    return SolverSettings(**{name: values[name] for name in names})
