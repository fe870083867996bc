"""``id3pm-deploy control``: contact sheets that show what can be asked of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ..defaults import BACKENDS, BATCH_SIZE, PRECISIONS
from ..errors import InputError
from .options import (
    PATH,
    F,
    compile_option,
    device_option,
    fit_options,
    option,
    replay_option,
    sample_settings,
    sampling_options,
    super_resolution_option,
    trust_option,
)

if TYPE_CHECKING:
    from ..control.annealing import Annealing
    from ..control.shots import Grid
    from ..identity.directions import Directions
    from ..identity.vectors import IdentityFile

_ENGINE = ("precision", "threads", "device", "trust", "compiled", "replay_rows")
_NUMBERS = "NUMBER,..."


@click.group(name="control")
def command() -> None:
    """Show what guidance, identities and noise do to pictures.

    Every command but `pca` and `svm` makes a folder of pictures with a contact sheet,
    and a record from which `sample --replay` makes them again. MODEL is a BUNDLE or a
    CHECKPOINT; its engine is the same for all of them.
    """


def _numbers(
    ctx: click.Context, param: click.Parameter, value: str
) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is not a list of numbers like 1,2,3"
        ) from error


def _picture_options(function: F) -> F:
    """What all commands that make pictures have in common."""
    made: Any = function
    options: list[Callable[[Any], Any]] = [
        click.argument("model", type=PATH),
        click.option(
            "--identity",
            type=PATH,
            metavar="FILE.npz",
            help="Whose pictures; without it, unconditional ones.",
        ),
        click.option("--out", required=True, type=PATH, help="Folder for them."),
        option("--people", default=4, help="At most so many of FILE.npz."),
        option("--count", default=1, help="How many noises to show it with."),
        option("--first-noise", default=0, help="Number of the first of them."),
        sampling_options,
        option("--batch-size", default=BATCH_SIZE, help="Pictures made at once."),
        super_resolution_option,
        option("--stages", default="all", type=click.Choice(["all", "base"])),
        option("--backend", default="auto", type=click.Choice(BACKENDS)),
        option("--precision", type=click.Choice(PRECISIONS), help="If several."),
        option("--threads", default=0, help="CPU threads; 0: the runtime's choice."),
        device_option,
        compile_option,
        replay_option,
        trust_option,
        click.option("--force", is_flag=True, help="Replace an earlier run in OUT."),
        click.option("--json", "as_json", is_flag=True, help="Print the record."),
        click.pass_context,
    ]
    for add in reversed(options):
        made = add(made)
    return cast(F, made)


@command.command(short_help="The same noise at several guidance scales.")
@option("--scales", default="0,1,2,3,4,6", callback=_numbers, metavar=_NUMBERS)
@_picture_options
def guidance(ctx: click.Context, /, scales: tuple[float, ...], **values: Any) -> None:
    """A row for each guidance scale, a column for each person and noise."""
    from ..control.grids import guidance_sweep

    _make(ctx, values, lambda ids, noises: guidance_sweep(ids, scales, noises))


@command.command(short_help="From one person to the next.")
@option("--between", default=7, help="Pictures of a row, both people included.")
@_picture_options
def interpolate(ctx: click.Context, /, between: int, **values: Any) -> None:
    """Spherical interpolation between people who follow each other in FILE.npz."""
    from ..control.grids import interpolation

    _make(ctx, values, lambda ids, noises: interpolation(ids, between, noises))


@command.command(short_help="Two people's predictions, mixed.")
@option("--between", default=7, help="Pictures of a row, both people included.")
@_picture_options
def blend(ctx: click.Context, /, between: int, **values: Any) -> None:
    """Blends of the predictions for two people who follow each other in FILE.npz."""
    from ..control.grids import blends

    _make(ctx, values, lambda ids, noises: blends(ids, between, noises))


@command.command(short_help="Away from somebody.")
@click.option(
    "--negative",
    required=True,
    type=PATH,
    metavar="OTHERS.npz",
    help="Whom pictures shall not resemble.",
)
@option("--shares", default="0,0.5,1", callback=_numbers, metavar=_NUMBERS)
@_picture_options
def negative(
    ctx: click.Context, /, negative: Path, shares: tuple[float, ...], **values: Any
) -> None:
    """Guidance away from people in OTHERS.npz, as well as from the null identity.

    A share of 1 leaves nothing of the null identity. Without --identity, pictures of
    anybody but them. It takes a guidance scale other than 1.
    """
    from ..control.grids import negatives
    from ..identity.vectors import load_identities

    others = load_identities(negative)
    whom = others.ids[: values["people"]]
    _make(
        ctx,
        values,
        lambda ids, noises: negatives(ids, whom, shares, noises),
        others=others,
    )


@command.command(short_help="Along directions in identity space.")
@click.option(
    "--directions",
    required=True,
    type=PATH,
    metavar="D.npz",
    help="What `control pca` or `control svm` wrote.",
)
@click.option(
    "--name", "names", multiple=True, help="Of a direction.  [default: the first 4]"
)
@option("--strengths", default="-3,-1.5,0,1.5,3", callback=_numbers, metavar=_NUMBERS)
@_picture_options
def direction(
    ctx: click.Context,
    /,
    directions: Path,
    names: tuple[str, ...],
    strengths: tuple[float, ...],
    **values: Any,
) -> None:
    """People moved along directions, by so many standard deviations."""
    from ..control.grids import along
    from ..identity.directions import load_directions

    found = load_directions(directions)
    chosen = names or found.names[:4]
    _make(
        ctx,
        values,
        lambda ids, noises: along(ids, chosen, strengths, noises),
        directions=found,
    )


@command.command(short_help="The same person with several attributes.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    required=True,
    metavar="NAME=VALUE,...",
    help="Attributes of one column; give it several times.",
)
@_picture_options
def attribute(ctx: click.Context, /, sets: tuple[str, ...], **values: Any) -> None:
    """A column for each --set, beside one that states nothing."""
    from ..attributes import parse_attributes
    from ..control.grids import attribute_values
    from ..models import open_model

    specs = open_model(values["model"]).spec.attributes
    stated = [{}, *(parse_attributes(specs, one.split(",")) for one in sets)]
    _make(ctx, values, lambda ids, noises: attribute_values(ids, stated, noises))


@command.command(short_help="Condition annealing, for more diverse pictures.")
@option("--scales", default="0,0.1,0.25,0.5", callback=_numbers, metavar=_NUMBERS)
@option("--clear", default=0.6, help="Time, 1 to 0, from which nothing is disturbed.")
@option("--noisy", default=0.9, help="Time before which there is noise alone.")
@option("--rescale", default=1.0, help="0 to 1: give noisy vectors their length back.")
@_picture_options
def anneal(
    ctx: click.Context,
    /,
    scales: tuple[float, ...],
    clear: float,
    noisy: float,
    rescale: float,
    **values: Any,
) -> None:
    """Identities that are noisy at first (CADS, Sadat et al. 2024): a row for each
    scale of that noise, a column for each person and noise."""
    from ..control.annealing import Annealing
    from ..control.grids import annealed

    annealing = Annealing(0.0, clear, noisy, rescale)
    _make(
        ctx,
        values,
        lambda ids, noises: annealed(ids, scales, noises),
        annealing=annealing,
    )


@command.command(short_help="Several people with the same noise.")
@_picture_options
def noise(ctx: click.Context, /, **values: Any) -> None:
    """A row for each noise, a column for each person."""
    from ..control.grids import same_noise

    _make(ctx, values, same_noise)


@command.command(short_help="Variations of one picture.")
@option("--strengths", default="0.1,0.25,0.5,1", callback=_numbers, metavar=_NUMBERS)
@option("--variants", default=6, help="Pictures of a row.")
@_picture_options
def vary(
    ctx: click.Context, /, strengths: tuple[float, ...], variants: int, **values: Any
) -> None:
    """Pictures whose noise is exchanged in part: a strength of 0 is the picture that
    --first-noise numbers, 1 another one."""
    from ..control.grids import variations

    _make(ctx, values, lambda ids, noises: variations(ids, strengths, variants, noises))


@command.command(short_help="Pictures of nobody in particular.")
@_picture_options
def unconditional(ctx: click.Context, /, **values: Any) -> None:
    """Pictures without identity, --count of them."""
    from ..control import grids

    if values["identity"] is not None:
        raise InputError("unconditional pictures have no --identity")
    _make(ctx, values, lambda _, noises: grids.unconditional(noises))


@command.command(short_help="Find the directions in which people differ most.")
@click.argument("people", type=PATH, metavar="FILE.npz")
@click.option("--out", required=True, type=PATH, metavar="D.npz")
@option("--count", default=4, help="How many directions.")
def pca(people: Path, out: Path, count: int) -> None:
    """Principal components of the identity vectors in FILE.npz."""
    from ..identity.directions import principal_directions, save_directions
    from ..identity.vectors import load_identities

    found, shares = principal_directions(load_identities(people), count)
    save_directions(out, found)
    for name, share in zip(found.names, shares, strict=True):
        click.echo(f"{name}: {share:.1%} of the variance")


@command.command(short_help="Find the direction between two sets of people.")
@click.argument("with_it", type=PATH, metavar="WITH.npz")
@click.argument("without", type=PATH, metavar="WITHOUT.npz")
@click.option("--name", required=True, help="Of the direction, as `glasses`.")
@click.option("--out", required=True, type=PATH, metavar="D.npz")
def svm(with_it: Path, without: Path, name: str, out: Path) -> None:
    """A linear support vector machine between people with a trait and without it.

    Prints how well it tells people apart whom it has not seen; near 0.5 the direction
    means nothing.
    """
    from ..identity.directions import save_directions, separating_direction
    from ..identity.vectors import load_identities

    found, score = separating_direction(
        load_identities(with_it), load_identities(without), name
    )
    save_directions(out, found)
    click.echo(f"{name}: balanced accuracy {score:.3f} on people left out (chance 0.5)")


def _make(
    ctx: click.Context,
    values: dict[str, Any],
    grid: Callable[[Sequence[str], Sequence[int]], Grid],
    *,
    others: IdentityFile | None = None,
    annealing: Annealing | None = None,
    directions: Directions | None = None,
) -> None:
    """Make a grid's pictures, in the folder of ``--out``."""
    from ..api import load
    from ..batch import joined
    from ..control.resolve import together
    from ..control.shots import UNCONDITIONAL
    from ..generate import check_output
    from ..identity.vectors import load_identities
    from ..progress import progress

    for name in ("people", "count"):
        if values[name] < 1:
            raise InputError(f"--{name} must be at least 1")
    out, first = values["out"], values["first_noise"]
    check_output(out, force=values["force"])
    path = values["identity"]
    people = None if path is None else load_identities(path)
    ids = (UNCONDITIONAL,) if people is None else people.ids[: values["people"]]
    wanted = grid(ids, range(first, first + values["count"]))
    engine = {name: values[name] for name in _ENGINE}
    second = values["super_resolution"]
    with load(
        values["model"], values["backend"], super_resolution=second, **engine
    ) as sampler:
        fit_options(ctx, values, sampler.model.spec)
        settings = sample_settings(values)
        batches = []
        with progress(len(wanted.shots), "sampling") as tick:
            for batch in sampler.sample(
                together(people, others),
                shots=wanted,
                guidance=settings.guidance,
                solver=settings.solver,
                seed=settings.seed,
                batch_size=values["batch_size"],
                annealing=annealing,
                directions=directions,
                enlarge=values["stages"] == "all",
            ):
                batches.append(batch)
                for _ in batch.samples:
                    tick()
    made = joined(batches)
    record = made.save(out, force=values["force"])
    if values["as_json"]:
        click.echo(json.dumps(record))
        return
    click.echo(f"{len(made)} pictures in {out} ({made.seconds:.2f} s)")
