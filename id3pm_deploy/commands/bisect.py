"""``id3pm-deploy bisect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import some_of
from .options import PATH, fit_options, option, sample_settings, sampling_options

_COUNT = 2


@click.command(name="bisect")
@click.argument("checkpoint", type=PATH)
@click.option(
    "--out", type=PATH, required=True, metavar="FILE.toml", help="Recipe to write."
)
@option("--recipe", default="float16", help="Half-precision one in export/, or a file.")
@option("--tolerance-step", type=float, help="Tighter than the recipe's.")
@option("--tolerance-trajectory", type=float, help="Tighter than the recipe's.")
@sampling_options
@option("--count", default=_COUNT, help="Samples to measure, one at a time.")
@option("--budget", default=200, help="Most sets of islands to measure.")
@option("--device", default="cpu", help="A torch device.")
@option("--threads", default=0, help="CPU threads; 0 leaves PyTorch's choice.")
@click.option("--force", is_flag=True, help="Replace FILE.toml if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    checkpoint: Path,
    out: Path,
    recipe: str,
    tolerance_step: float | None,
    tolerance_trajectory: float | None,
    count: int,
    budget: int,
    device: str,
    threads: int,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Find what has to stay in float32 for a half-precision export of CHECKPOINT.

    Modules are made islands of float32, coarse ones first and then parts of them, until
    PyTorch in half precision is inside the tolerances against PyTorch in float32: on
    single table rows at early, middle and late timesteps, and along whole
    trajectories. The recipe that is written holds the smallest set: without any one of
    its islands a tolerance is broken. `export --recipe FILE.toml` takes it.
    """
    from ..bisect.result import BisectRequest
    from ..bisect.run import bisect_to_recipe
    from ..checkpoint_config import load_spec

    fit_options(ctx, values, load_spec(checkpoint))
    request = BisectRequest(
        checkpoint,
        recipe,
        sample_settings(values, count=count),
        tolerance_step,
        tolerance_trajectory,
        budget,
        device,
        threads,
    )
    result = bisect_to_recipe(
        out, request, force=force, say=lambda line: click.echo(line, err=True)
    )
    if as_json:
        click.echo(json.dumps(result.to_json()))
        return
    for line in [*_table(result), "", *_verdict(result)]:
        click.echo(line)
    click.echo(f"{'recipe':12}{out}")


def _table(result: Any) -> list[str]:
    """A line for each set that was measured."""
    lines = ["  set  islands  of the work     one step   trajectory"]
    for number, tried in enumerate(result.tried, 1):
        passed = tried.errors.excess(result.tolerances) <= 1
        lines.append(
            f"{number:5}{len(tried.islands):9}{tried.share:13.2%}"
            f"{_said(tried.errors.step):>13}{_said(tried.errors.trajectory):>13}"
            f"  {'pass' if passed else 'fail'}  {some_of(tried.islands)}"
        )
    return lines


def _verdict(result: Any) -> list[str]:
    """The islands with what they cost, and what they bring."""
    lines = []
    for part in ("step", "trajectory"):
        before, after = getattr(result.without, part), getattr(result.errors, part)
        limit = _said(getattr(result.tolerances, part))
        changed = "" if before is None else f"{_said(before)} before, "
        lines.append(f"{part:12}{changed}{_said(after)} now, tolerance {limit}")
    if not result.shares:
        return [*lines, "islands     none are needed"]
    total = sum(result.shares.values())
    lines.append(
        f"islands     {len(result.shares)}, with {total:.2%} of the "
        "multiply-accumulates"
    )
    lines += [f"  {share:8.2%}  {name}" for name, share in result.shares.items()]
    if not result.minimal:
        lines.append("the budget was spent: fewer islands may do, give --budget more")
    return lines


def _said(error: float | None) -> str:
    from ..compare import format_error

    return "" if error is None else format_error(error)
