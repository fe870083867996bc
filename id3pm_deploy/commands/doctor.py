"""``id3pm-deploy doctor``."""

from __future__ import annotations

import json

import click

from .options import option


@click.command(name="doctor")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    help="A recipe of engines/ or export/, or a .toml file: can it be built here?",
)
@click.option(
    "--imports",
    is_flag=True,
    help="Also import torch and the like, each in a process of its own.",
)
@option(
    "--limit",
    default=60.0,
    type=click.FloatRange(min=0.1),
    help="Seconds that trying one thing may take.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    recipes: tuple[str, ...],
    imports: bool,
    limit: float,
    as_json: bool,
) -> None:
    """Show what is installed, what the machine has, and what each recipe needs.

    Exit status 0 if an engine of some recipe can sample here, otherwise 1. With
    --recipe: 0 if every recipe that is named can be built here (an engine from a BUNDLE
    that holds its graph; name its export recipe as well to build from a CHECKPOINT).

    Host name, user name, folders and serial numbers are not shown.
    """
    from ..doctor.examine import examine, exit_status
    from ..doctor.text import lines

    found = examine(recipes=recipes, imports=imports, limit=limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            click.echo(line)
    ctx.exit(exit_status(found))
