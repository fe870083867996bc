"""``id3pm-deploy benchmark``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..defaults import PRECISIONS
from ..errors import BenchmarkError, InputError, ParityError
from .options import (
    PATH,
    fit_options,
    guidance_settings,
    option,
    sampling_options,
    say,
    solver_settings,
    trust_option,
)

if TYPE_CHECKING:
    from ..benchmark.compare import Comparison


def _names(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...] | None:
    if value is None:
        return None
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list like 1,2,4") from error


@click.command(name="benchmark")
@click.argument("bundle", type=PATH)
@click.option(
    "--checkpoint",
    type=PATH,
    help="What BUNDLE was made from, for the columns that need PyTorch's weights.",
)
@click.option(
    "--columns",
    metavar="NAME,NAME...",
    callback=_names,
    help="Which columns.  [default: all that this machine has]",
)
@option("--batch-sizes", default="1,2,4,8", metavar="B,B...", callback=_sizes)
@sampling_options
@option("--rounds", default=20, help="Turns of each column at each batch size.")
@option("--row-repeats", default=5, help="Table rows timed one by one in a turn.")
@option("--cold-starts", default=1, help="New processes for each column; 0: none.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="If several.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@option("--device", default="auto", help="Device of the columns in PyTorch.")
@option("--replay-rows", default=0, help="Table rows in a replayed graph; 0: its own.")
@option(
    "--stage",
    default="base",
    type=click.Choice(["base", "super-resolution"]),
    help="Of a BUNDLE with two.",
)
@click.option("--out", type=PATH, help="Folder for JSON, table and plot.")
@click.option("--compare", type=PATH, metavar="EARLIER.json", help="What is slower?")
@click.option("--fail-on-regression", is_flag=True, help="Exit with 1 if something is.")
@trust_option
@click.option("--force", is_flag=True, help="Replace an earlier benchmark in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundle: Path,
    checkpoint: Path | None,
    out: Path | None,
    compare: Path | None,
    fail_on_regression: bool,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure how fast BUNDLE runs on this machine, beside what else could run it.

    A column is one way of making the same pictures: the product's engines row by row
    and replayed, and baselines. Each is checked before it is timed, and all take turns.
    Columns that cannot run here stay in the table, with the reason.
    """
    from ..benchmark.compare import compare_results
    from ..benchmark.machine import command_line
    from ..benchmark.result import check_out, load_result, save_result
    from ..benchmark.run import run_benchmark
    from ..benchmark.table import markdown

    if fail_on_regression and compare is None:
        raise InputError("--fail-on-regression needs --compare EARLIER.json")
    earlier = None if compare is None else load_result(compare)
    if out is not None:
        check_out(out, force=force)
    of, how = _settings(ctx, bundle, values)
    line = command_line("id3pm-deploy", sys.argv[1:])
    found = run_benchmark(bundle, checkpoint, of, how, say, line)
    compared = None
    if earlier is not None:
        compared = compare_results(found, earlier)
        found["compared"] = compared.to_json()
    page = markdown(found, compared)
    if out is not None:
        from ..benchmark.plot import plot

        save_result(out, found, page, plot(found), force=force)
        say(f"kept in {out}")
    click.echo(json.dumps(found, allow_nan=False) if as_json else page)
    _judge(found, compared, fail_on_regression)


def _settings(ctx: click.Context, bundle: Path, values: dict[str, Any]) -> Any:
    from ..benchmark.case import CaseSettings
    from ..benchmark.run import BenchmarkSettings
    from ..models import open_model

    opened = open_model(bundle)
    stage = values["stage"].replace("-", "_")
    second = opened.second_stage if stage != "base" else None
    fit_options(ctx, values, (second or opened).spec)
    own = ("seed", "precision", "threads", "device", "trust", "replay_rows")
    of = CaseSettings(
        solver=solver_settings(values),
        guidance=guidance_settings(values),
        stage=stage,
        **{name: values[name] for name in own},
    )
    names = ("columns", "batch_sizes", "rounds", "row_repeats", "cold_starts")
    return of, BenchmarkSettings(**{name: values[name] for name in names})


def _judge(
    found: dict[str, Any], compared: Comparison | None, fail_on_regression: bool
) -> None:
    """Raise for a column that computes something else, for none that was timed, and,
    where that is wanted, for one that became slower."""
    columns = found["columns"]
    wrong = [name for name, one in columns.items() if one["status"] == "wrong"]
    if wrong:
        raise ParityError(
            f"{', '.join(wrong)} computes something else and was not timed",
            why=columns[wrong[0]]["reason"],
            fix="find the fault first; the other columns are not concerned",
        )
    if not any(one["status"] == "timed" for one in columns.values()):
        name, one = next(iter(columns.items()))
        raise BenchmarkError("no column could be timed", why=f"{name}: {one['reason']}")
    if compared is None or not fail_on_regression:
        return
    if compared.differences:
        raise BenchmarkError(
            "the earlier benchmark is of another machine, model or settings",
            why="; ".join(compared.differences[:3]),
            fix="measure both on one machine with the same settings",
        )
    slower = [
        f"{one.column}, B={one.batch}, {one.measure}: {one.ratio.value:.2f} times"
        for one in compared.regressions
    ]
    if slower or compared.lost:
        raise BenchmarkError(
            "slower than the earlier benchmark, beyond noise",
            why="; ".join([*slower, *(f"no longer timed: {o}" for o in compared.lost)]),
        )
