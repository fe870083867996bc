"""``id3pm-deploy parity``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..defaults import BACKENDS, COUNT, PRECISIONS
from ..errors import InputError, ParityError
from ..tolerances import IDENTITY_DROP, IDENTITY_SAMPLES
from .options import (
    PATH,
    fit_options,
    flags,
    given,
    option,
    rebuild_option,
    sample_settings,
    sampling_options,
    say,
    trust_option,
)

_PRECISIONS = click.Choice(PRECISIONS)
_MEANINGLESS = {
    "golden": "the file says what is to be made",
    "record": "golden data is recorded from random identities, without a report",
}


@click.command(name="parity")
@click.argument("model", type=PATH)
@click.option(
    "--against",
    "--reference",
    "against",
    type=PATH,
    help="CHECKPOINT or BUNDLE of the same model.  [default: a CHECKPOINT's own]",
)
@click.option(
    "--golden", type=PATH, metavar="FILE.npz", help="Compare with recorded data."
)
@click.option(
    "--record", type=PATH, metavar="FILE.npz", help="Record such data; no report."
)
@click.option("--out", type=PATH, help="Folder for the report.")
@click.option("--identity", type=PATH, metavar="FILE.npz", help="[default: random]")
@sampling_options
@option("--count", default=COUNT, help="Pictures of each identity.")
@option(
    "--stage",
    default="base",
    type=click.Choice(["base", "super-resolution"]),
    help="Which model of a BUNDLE of two.",
)
@option("--backend", default="auto", type=click.Choice(BACKENDS))
@option("--precision", type=_PRECISIONS, help="If several.")
@option("--device", default="cpu", help="Device of the torch backend.")
@option("--against-backend", default="auto", type=click.Choice(BACKENDS))
@option("--against-precision", type=_PRECISIONS, help="[default: as the other side]")
@option("--against-device", default="cpu", help="Device of the torch backend.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@trust_option
@rebuild_option
@option("--tolerance-step", type=float, help="Tighter than the graph's.")
@option("--tolerance-trajectory", type=float, help="Tighter than the graph's.")
@click.option("--judge", metavar="SPEC", help="FR model that scores the identity.")
@option(
    "--judge-samples",
    default=IDENTITY_SAMPLES,
    help="Pictures of each side over which --judge may find the engine's less alike to "
    f"their people by {IDENTITY_DROP:g} at most; 0: leave that out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: Path,
    against: Path | None,
    golden: Path | None,
    record: Path | None,
    out: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare two computations of one model, step by step, on the same noise.

    MODEL is a BUNDLE or a CHECKPOINT, and is what is judged. It is held against the
    CHECKPOINT or BUNDLE of --against, or against the recorded data of --golden; where
    a side is PyTorch in float32, diffusers' own scheduler is compared as well. OUT gets
    index.html, parity.json, parity.md and parity.png. The exit status is 1 when an
    error is past its tolerance, which options can tighten and nothing can loosen.
    With --identity and --judge, many more pictures are made on the same noise, and the
    engine's must be as much alike to their people as the reference's.

    Of a chain, one stage is compared at a time. Two BUNDLEs, or a BUNDLE and recorded
    data, need no PyTorch. With both --golden and
    --against, table rows are held against the latter on the recorded noise.
    """
    if record is not None:
        _refuse_unused(
            ctx, "record", ("golden", "against", "out", "identity", "judge", "as_json")
        )
        _record(ctx, record, model, values)
        return
    if out is None:
        raise InputError("--out is missing", fix="give a folder for the report")
    if golden is not None:
        unused = ("identity", "judge", "judge_samples", "count", *_sampling_names())
        _refuse_unused(ctx, "golden", unused)
    report = _compare(ctx, model, against, golden, out, values)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        _say(report, out)
    if not report.passed:
        raise ParityError(
            f"{len(report.failures)} comparisons are past their tolerance",
            why=report.failures[0],
            fix=f"see {out / 'index.html'}",
        )


def _sampling_names() -> tuple[str, ...]:
    """Parameters that :func:`sampling_options` adds."""

    def nothing() -> None:
        """Carry the options."""

    made: Any = sampling_options(nothing)
    return tuple(one.name for one in made.__click_params__)


def _refuse_unused(ctx: click.Context, mode: str, names: tuple[str, ...]) -> None:
    unused = [name for name in names if given(ctx, name)]
    if unused:
        raise InputError(
            f"{flags(ctx, unused)} cannot go with --{mode}",
            why=_MEANINGLESS[mode],
            fix="leave it out",
        )


def _sides(
    model: Path, against: Path | None, values: dict[str, Any]
) -> tuple[Any, ...]:
    from ..parity.sides import SideRequest

    common = {"threads": values["threads"], "trust": values["trust"]}
    common["stage"] = values["stage"].replace("-", "_")
    names = ("backend", "precision", "device")
    sides = [SideRequest(model, **{n: values[n] for n in names}, **common)]
    if against is not None:
        chosen = {n: values[f"against_{n}"] for n in names}
        sides.append(SideRequest(against, **chosen, **common))
    if values["rebuild_if_stale"]:
        from ..models import with_fresh_plans

        with_plans = [side for side in sides if side.backend == "tensorrt"]
        for side in with_plans or sides[:1]:
            with_fresh_plans(side.open_model(), side.backend, side.precision, say)
    return sides[0], sides[1] if against is not None else None


def _record(
    ctx: click.Context, path: Path, model: Path, values: dict[str, Any]
) -> None:
    from ..parity.run import record_to_file

    side, _ = _sides(model, None, values)
    fit_options(ctx, values, side.open_model().spec)
    record_to_file(path, side, sample_settings(values, count=values["count"]))
    click.echo(f"recorded  {path}")


def _compare(
    ctx: click.Context,
    model: Path,
    against: Path | None,
    golden: Path | None,
    out: Path,
    values: dict[str, Any],
) -> Any:
    from ..checkpoint_config import is_checkpoint
    from ..parity.run import (
        GoldenRequest,
        ParityRequest,
        Tightening,
        golden_to_folder,
        parity_to_folder,
    )

    if golden is None and against is None:
        if not is_checkpoint(model):
            raise InputError(
                "a BUNDLE has to be compared with something",
                fix="give --reference CHECKPOINT, --against BUNDLE or --golden FILE",
            )
        against = model
    first, second = _sides(model, against, values)
    tighter = Tightening(values["tolerance_step"], values["tolerance_trajectory"])
    if golden is not None:
        return golden_to_folder(out, GoldenRequest(first, golden, second, tighter))
    fit_options(ctx, values, first.open_model().spec)
    return parity_to_folder(
        out,
        ParityRequest(
            engine=first,
            reference=second,
            settings=sample_settings(values, count=values["count"]),
            identity=values["identity"],
            judge=values["judge"],
            judge_samples=values["judge_samples"] if values["judge"] else 0,
            tolerances=tighter,
        ),
    )


def _say(report: Any, out: Path) -> None:
    """The verdict, the largest error of each kind, and where the report is."""
    from ..compare import format_error

    click.echo(f"{'PASS' if report.passed else 'FAIL'}  {report.title}")
    names = {
        "forward": "forward passes",
        "final": "final pictures",
        "single": "one step",
        "state": "along the trajectory",
        "oracle": "diffusers' scheduler",
    }
    for part, name in names.items():
        worst = report.worst(part)
        if worst is not None:
            error = format_error(worst.found.max_rel)
            limit = format_error(worst.tolerance or 0)
            click.echo(f"{name:22}largest error {error}, tolerance {limit}")
    if (drop := report.identity_drop) is not None:
        found = f"drop {drop.drop:.4f}, at most {drop.upper:.4f} at 95 %"
        click.echo(f"{'identity similarity':22}{found}, tolerance {IDENTITY_DROP:g}")
    for line in report.not_checked:
        click.echo(f"not compared: {line}")
    click.echo(f"{'report':22}{out / 'index.html'}")
