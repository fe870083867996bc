"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..defaults import GUIDANCE, SOLVER, SOLVERS, SPACINGS, STEPS, VARIANCES

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def option(*names: str, **rest: Any) -> Callable[[F], F]:
    """``click.option`` that shows its default."""
    return click.option(*names, show_default=True, **rest)


def sampling_options(function: F) -> F:
    """Solver, steps, guidance, seed and the settings of the table."""
    made = function
    for add in reversed(
        [
            option("--solver", default=SOLVER, type=click.Choice(SOLVERS)),
            option("--steps", default=STEPS, help="Solver steps."),
            option("--guidance", default=GUIDANCE, help="Guidance scale."),
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
            option(
                "--variance",
                type=click.Choice(VARIANCES),
                help="Of ddpm.  [default: learned if there is, else fixed_small]",
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
    chosen = {name: values[name] for name in names}
    return SolverSettings(**chosen, variance=values["variance"])


def sample_settings(values: dict[str, Any], **rest: Any) -> Any:
    """SampleSettings from a command's options."""
    from ..generate import SampleSettings

    return SampleSettings(
        solver=solver_settings(values),
        guidance=values["guidance"],
        guide_variance=values["guide_variance"],
        seed=values["seed"],
        **rest,
    )
