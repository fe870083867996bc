"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..defaults import (
    FINAL_ORDERS,
    GUIDANCE,
    GUIDANCE_ROWS,
    GUIDANCE_SCHEDULES,
    SOLVER,
    SOLVERS,
    SPACINGS,
    SR_GUIDANCE,
    STEPS,
    VARIANCES,
)
from ..presets import PRESETS, preset_called

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)


def option(*names: str, **rest: Any) -> Callable[[F], F]:
    """``click.option`` that shows its default."""
    return click.option(*names, show_default=True, **rest)


def _scales(
    ctx: click.Context, param: click.Parameter, value: str
) -> float | tuple[float, ...]:
    """A number, or several with commas between them."""
    try:
        scales = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a number, nor a list like 1,2,2"
        ) from error
    return scales if len(scales) > 1 else scales[0]


super_resolution_option = click.option(
    "--super-resolution",
    type=PATH,
    metavar="CHECKPOINT",
    help="Second stage, which enlarges what the first one makes.",
)

trust_option = click.option(
    "--trust",
    is_flag=True,
    help="Load a plan, which is native code, that was neither built here nor signed "
    "by a trusted key.",
)

rebuild_option = click.option(
    "--rebuild-if-stale",
    is_flag=True,
    help="Build a plan again that is of another version or for another GPU.",
)

device_option = option(
    "--device",
    default="cpu",
    metavar="cpu|cuda[:N]",
    help="Of torch; a GPU by its number for the backends of ONNX Runtime on GPUs.",
)

compile_option = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Of torch: compile the step first, by torch.compile.",
)


replay_option = option(
    "--replay-rows",
    default=0,
    help="Of GPUs: table rows in a captured graph; 0: its own choice, -1: no graphs.",
)


attribute_option = click.option(
    "--attribute",
    multiple=True,
    metavar="NAME=VALUE",
    help="State an attribute of the faces that MODEL knows; repeat it for others.",
)


def say(text: str) -> None:
    """A line for the user, beside what the command prints."""
    click.echo(printable(text), err=True)


def printable(text: str) -> str:
    """``text`` from a file without what could steer a terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


_GUIDANCE_OPTIONS = (
    option(
        "--guidance",
        default=str(GUIDANCE),
        metavar="SCALE[,SCALE...]",
        callback=_scales,
        help="Guidance scale, or one for each table row; 1 without identity.",
    ),
    option(
        "--guidance-schedule",
        default=GUIDANCE_SCHEDULES[0],
        type=click.Choice(GUIDANCE_SCHEDULES),
        help="How the scale moves from 1 to --guidance.",
    ),
    option(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar="LOW HIGH",
        help="Timesteps that are guided.  [default: all]",
    ),
    option(
        "--guidance-rescale",
        default=0.0,
        help="0 to 1: take contrast back that guidance adds.",
    ),
    option("--guide-variance", is_flag=True, help="Guide learned variance too."),
)


def sampling_options(function: F) -> F:
    """Solver, steps, guidance, seed and the settings of the table."""
    made = function
    for add in reversed(
        [
            click.option(
                "--preset",
                type=click.Choice(tuple(PRESETS)),
                help="What to take where you do not say it: "
                + "; ".join(f"{name}: {what}" for name, what in PRESETS.items())
                + ".",
            ),
            option("--solver", default=SOLVER, type=click.Choice(SOLVERS)),
            option(
                "--steps",
                default=STEPS,
                help="Solver steps; one UNet call each, two with heun.",
            ),
            *_GUIDANCE_OPTIONS,
            option("--eta", default=0.0, help="Of ddim: 0 is deterministic, 1 ddpm."),
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
            option(
                "--final-order",
                type=click.Choice(FINAL_ORDERS),
                help="Of unipc-3's last steps.  [default: lower]",
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

    names = [field.name for field in dataclasses.fields(SolverSettings)]
    return SolverSettings(**{name: values[name] for name in names})


def guidance_settings(values: dict[str, Any]) -> Any:
    """GuidanceSettings from a command's options."""
    from ..guidance import GuidanceSettings

    given = values["guidance"]
    listed = isinstance(given, tuple)
    return GuidanceSettings(
        scale=GUIDANCE if listed else given,
        schedule=values["guidance_schedule"],
        scales=given if listed else None,
        interval=values["guidance_interval"],
        rescale=values["guidance_rescale"],
        guide_variance=values["guide_variance"],
        rows=values.get("guidance_rows", GUIDANCE_ROWS[0]),
    )


def given(ctx: click.Context, name: str) -> bool:
    """Whether the user gave the option, and not its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def flags(ctx: click.Context, names: Iterable[str]) -> str:
    """Options as they are typed, for a message."""
    known = {one.name: one.opts[0] for one in ctx.command.params}
    return ", ".join(known[name] for name in names)


def fit_options(ctx: click.Context, values: dict[str, Any], spec: Any) -> None:
    """Put what the preset says of a model, or else the guidance that fits it, in place
    where the user gave nothing."""
    if values["preset"] is not None:
        own = vars(preset_called(values["preset"]).of(spec))
        values.update({name: own[name] for name in own if not given(ctx, name)})
        return
    if given(ctx, "guidance"):
        return
    if spec.model.low_res_size is not None:
        values["guidance"] = SR_GUIDANCE
    if not spec.condition_dim:
        values["guidance"] = 1.0


def second_settings(
    ctx: click.Context, values: dict[str, Any], first: Any, spec: Any
) -> Any:
    """SampleSettings of a second stage, from its options and the preset.

    Args:
        ctx: Of the command.
        values: Its options.
        first: SampleSettings of the first stage.
        spec: Of the second stage's model.
    """
    from ..guidance import GuidanceSettings
    from ..solvers import SolverSettings

    names = ("solver", "steps", "guidance")
    own = {name: values[f"sr_{name}"] for name in names}
    if values["preset"] is not None:
        of_preset = vars(preset_called(values["preset"]).of(spec))
        said = {name for name in names if given(ctx, f"sr_{name}")}
        own = {**of_preset, **{name: own[name] for name in said}}
    return dataclasses.replace(
        first,
        solver=SolverSettings(own["solver"], own["steps"]),
        guidance=GuidanceSettings(
            own["guidance"],
            own.get("guidance_schedule", GUIDANCE_SCHEDULES[0]),
            interval=own.get("guidance_interval"),
            rows=first.guidance.rows,
        ),
        batch_size=values["sr_batch_size"],
    )


def sample_settings(values: dict[str, Any], **rest: Any) -> Any:
    """SampleSettings from a command's options."""
    from ..generate import SampleSettings

    return SampleSettings(
        solver=solver_settings(values),
        guidance=guidance_settings(values),
        seed=values["seed"],
        preset=values["preset"],
        **rest,
    )
