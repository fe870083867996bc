"""``id3pm-deploy sample``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..defaults import (
    BACKENDS,
    BATCH_SIZE,
    COUNT,
    GUIDANCE_ROWS,
    PRECISIONS,
    SOLVERS,
    SR_BATCH_SIZE,
    SR_GUIDANCE,
    SR_SOLVER,
    SR_STEPS,
)
from ..errors import InputError
from .options import (
    PATH,
    attribute_option,
    compile_option,
    device_option,
    fit_options,
    flags,
    given,
    option,
    rebuild_option,
    replay_option,
    sample_settings,
    sampling_options,
    say,
    second_settings,
    trust_option,
)

if TYPE_CHECKING:
    from ..attributes import Attributes
    from ..enlarging import Enlarging, GivenPictures
    from ..generate import Conditions, SampleSettings
    from ..identity.vectors import IdentityFile
    from ..memory import Memory
    from ..models import Model

_ENGINE = ("precision", "threads", "device", "trust", "compiled", "replay_rows")
_SECOND = ("sr_solver", "sr_steps", "sr_guidance", "sr_batch_size")


@click.command(name="sample")
@click.argument("model", type=PATH)
@click.option("--identity", type=PATH, metavar="FILE.npz", help="What `embed` wrote.")
@click.option("--unconditional", is_flag=True, help="No identity: the null vector.")
@attribute_option
@click.option("--out", required=True, type=PATH, help="Folder for the pictures.")
@sampling_options
@option(
    "--guidance-rows",
    default=GUIDANCE_ROWS[0],
    type=click.Choice(GUIDANCE_ROWS),
    help="sequential: guided rows one after the other, in less memory.",
)
@option(
    "--annealing",
    type=float,
    help="Scale of noise on the identity at first, for more diverse pictures, as 0.25.",
)
@option("--count", default=COUNT, help="Pictures of each identity.")
@option(
    "--batch-size",
    default=BATCH_SIZE,
    help="Pictures made at once; cannot change them.",
)
@click.option(
    "--super-resolution",
    type=PATH,
    metavar="MODEL",
    help="Second stage, a CHECKPOINT or BUNDLE; a BUNDLE may hold its own.",
)
@option(
    "--stages",
    default="all",
    type=click.Choice(["all", "base"]),
    help="base: stop after the first of two.",
)
@option("--sr-solver", default=SR_SOLVER, type=click.Choice(SOLVERS))
@option("--sr-steps", default=SR_STEPS, help="Solver steps of the second stage.")
@option("--sr-guidance", default=SR_GUIDANCE, help="Its guidance scale.")
@option("--sr-batch-size", default=SR_BATCH_SIZE, help="Its pictures at once.")
@click.option(
    "--low-res",
    type=PATH,
    metavar="PNG|FOLDER",
    help="Pictures that MODEL, a super-resolution model, enlarges.",
)
@option(
    "--backend",
    default="auto",
    type=click.Choice(BACKENDS),
    help="auto: onnxruntime for a BUNDLE, torch for a CHECKPOINT.",
)
@option("--precision", type=click.Choice(PRECISIONS), help="If several.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@device_option
@compile_option
@replay_option
@trust_option
@rebuild_option
@click.option(
    "--replay",
    type=PATH,
    metavar="RECORD",
    help="Make the pictures of an earlier run's record.json again.",
)
@click.option(
    "--others",
    type=PATH,
    metavar="FILE.npz",
    help="Of --replay: further people whom a record of `control` names.",
)
@click.option(
    "--directions",
    type=PATH,
    metavar="D.npz",
    help="Of --replay: the directions that such a record names.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up after so long; nothing is written then.",
)
@click.option("--force", is_flag=True, help="Replace an earlier run in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the run record.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: Path,
    identity: Path | None,
    unconditional: bool,
    out: Path,
    low_res: Path | None,
    replay: Path | None,
    deadline: float | None,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Make pictures of the identities in FILE.npz.

    MODEL is a BUNDLE or a CHECKPOINT. OUT gets numbered PNGs that are marked as
    generated, a contact sheet, and record.json, from which the run can be repeated.

    A second stage enlarges what the first one makes, in 8 bits: it makes the same of
    the pictures that the first one wrote, given to it with --low-res.
    """
    from ..attributes import parse_attributes
    from ..control.annealing import Annealing
    from ..generate import check_output, conditions, sample_to_folder
    from ..identity.vectors import load_identities
    from ..models import open_engine, open_model
    from ..sampler import Limits

    limits = Limits(None if deadline is None else time.monotonic() + deadline)
    if replay is not None:
        from .replay_run import run_again

        chosen = {name: values[name] for name in (*_ENGINE, "backend")}
        _report(run_again(ctx, replay, chosen, limits), out, as_json)
        return
    opened = open_model(model)
    fit_options(ctx, values, opened.spec)
    engine_options = {name: values[name] for name in _ENGINE}
    _check_whose(opened, identity, unconditional)
    file = None if identity is None else load_identities(identity)
    pictures, count = _given_pictures(ctx, opened, low_res, file)
    batch_size = values["batch_size"]
    if unused := [name for name in ("others", "directions") if given(ctx, name)]:
        raise InputError(f"{flags(ctx, unused)} cannot go without --replay")
    scale = values["annealing"]
    annealing = None if scale is None else Annealing(scale)
    settings = sample_settings(
        values, count=count, batch_size=batch_size, annealing=annealing
    )
    stated = parse_attributes(opened.spec.attributes, values["attribute"])
    wanted = conditions(opened.spec, file, 1 if pictures else count, stated)
    if pictures is not None and len(wanted.ids) == 1:
        wanted = wanted.repeated(len(pictures.low_res))
    check_output(out, force=force)
    opened = _fresh(opened, values)
    second = _second_stage(ctx, opened, values, settings, file, stated)
    check_stages(opened, settings, wanted, second, values)
    engine = open_engine(opened, values["backend"], **engine_options)
    _, record = sample_to_folder(
        out,
        opened,
        engine,
        settings,
        wanted,
        second=second,
        given=pictures,
        force=force,
        limits=limits,
    )
    _report(record, out, as_json)


def _report(record: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print a run's record, or a line about it."""
    if as_json:
        click.echo(json.dumps(record))
        return
    engine, seconds = record["engine"], record["seconds"]
    ran = [f"{engine['backend']} {engine['version']}, {engine['precision']}"]
    if (enlarged := record["super_resolution"]) is not None:
        seconds += enlarged["seconds"]
        ran.append(f"enlarged in {enlarged['engine']['precision']}")
    count = len(record["samples"])
    click.echo(f"{count} pictures in {out} ({', '.join(ran)}, {seconds:.2f} s)")


def check_stages(
    model: Model,
    settings: SampleSettings,
    wanted: Conditions,
    second: Enlarging | None,
    values: dict[str, Any],
) -> None:
    """Warn or refuse where there is too little memory to run on a CPU. Stages are
    loaded one after the other, so what counts is the one that takes more."""
    from ..memory import check_memory

    stages = [stage_memory(model, settings, wanted, values, "--batch-size")]
    if second is not None:
        of = (second.model, second.settings, second.wanted)
        stages.append(stage_memory(*of, values, "--sr-batch-size"))
    if found := [stage for stage in stages if stage is not None]:
        needed, less = max(found, key=lambda stage: stage[0].total)
        check_memory(needed, say, less)


def stage_memory(
    model: Model,
    settings: SampleSettings,
    wanted: Conditions,
    values: dict[str, Any],
    batch_option: str,
) -> tuple[Memory, list[str]] | None:
    """What a stage takes, and the options that would have it take less; None where
    the CPU does not run it from a BUNDLE."""
    bundle = model.bundle
    if bundle is None or values["backend"] not in ("auto", "onnxruntime"):
        return None
    if values["backend"] == "auto" and bundle.manifest.plans:
        return None
    from ..memory import graph_memory, rows_at_once
    from ..models import bundle_graph

    graph = bundle_graph(bundle, values["precision"], model.stage)
    samples, guidance = min(settings.batch_size, len(wanted.ids)), settings.guidance
    guided = bool(wanted.identity.any()) and any(
        scale != 1 for scale in guidance.scales or (guidance.scale,)
    )
    both = guided and guidance.rows == "parallel"
    rows = rows_at_once(model.spec, samples, parallel=both)
    less = [f"a smaller {batch_option}"] * (samples > 1)
    less += ["--guidance-rows sequential"] * both
    return graph_memory(bundle, graph, samples, rows), less


def _fresh(model: Model, values: dict[str, Any]) -> Model:
    """The model, with a plan that was built again if one was stale and it is wanted."""
    from ..models import with_fresh_plans

    if not values["rebuild_if_stale"]:
        return model
    return with_fresh_plans(model, values["backend"], values["precision"], say)


def _check_whose(model: Model, identity: Path | None, unconditional: bool) -> None:
    """Refuse to guess whose pictures are wanted."""
    if identity is not None and unconditional:
        raise InputError("--identity and --unconditional exclude each other")
    if identity is None and not unconditional and model.spec.identity.dim:
        raise InputError(
            "give either --identity FILE.npz or --unconditional",
            fix="make the file with `id3pm-deploy embed PHOTO --out FILE.npz`",
        )


def _given_pictures(
    ctx: click.Context, model: Model, low_res: Path | None, file: IdentityFile | None
) -> tuple[GivenPictures | None, int]:
    """What MODEL enlarges, if that is what it does, and how many pictures of each."""
    count: int = ctx.params["count"]
    if model.spec.model.low_res_size is None:
        if low_res is not None:
            raise InputError(
                "--low-res is for a super-resolution model, which MODEL is not",
                fix="leave it out, or give the model that enlarges",
            )
        return None, count
    if low_res is None:
        raise InputError(
            "MODEL is a super-resolution model and needs pictures to enlarge",
            fix="give --low-res, or put it behind a base with --super-resolution",
        )
    if given(ctx, "count"):
        raise InputError("--count cannot go with --low-res: each is enlarged once")
    from ..enlarging import read_pictures
    from ..generate import SHEET_NAME, is_run

    sheet = SHEET_NAME if is_run(low_res) else ""
    pictures = read_pictures(low_res, model.spec, sheet)
    wanted = len(pictures.low_res)
    if file is not None and len(file) not in (1, wanted):
        raise InputError(
            f"there must be one identity for all {wanted} pictures, or one for each",
            why=f"there are {len(file)}",
        )
    return pictures, 1


def _second_stage(
    ctx: click.Context,
    model: Model,
    values: dict[str, Any],
    first: Any,
    file: IdentityFile | None,
    stated: Attributes,
) -> Enlarging | None:
    """The second stage, from MODEL's own bundle or from --super-resolution."""
    from ..attributes import known_to
    from ..enlarging import Enlarging
    from ..models import open_engine, open_second_stage
    from ..whose import wanted_of

    path, stop = values["super_resolution"], values["stages"] == "base"
    if stop and path is not None:
        raise InputError("--stages base and --super-resolution exclude each other")
    second = None if stop else open_second_stage(model, path)
    if second is None:
        if unused := [name for name in _SECOND if given(ctx, name)]:
            raise InputError(
                f"{flags(ctx, unused)} cannot be used: there is no second stage",
                fix="give --super-resolution MODEL, or leave it out",
            )
        return None
    if path is not None:
        second = _fresh(second, values)
    engine_options = {name: values[name] for name in _ENGINE}
    few = known_to(second.spec.attributes, stated)
    return Enlarging(
        second,
        lambda: open_engine(second, values["backend"], **engine_options),
        second_settings(ctx, values, first, second.spec),
        wanted_of(second.spec, file, first.count, few),
    )
