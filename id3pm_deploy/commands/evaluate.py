"""``id3pm-deploy evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..defaults import BACKENDS, ORT_GPU_BACKENDS, PRECISIONS
from ..errors import InputError
from .options import (
    PATH,
    fit_options,
    option,
    printable,
    sample_settings,
    sampling_options,
    say,
    trust_option,
)

COUNT = 2
"""Pictures of a person: the fewest that show how much they differ."""


@click.command(name="evaluate")
@click.argument("models", nargs=-1, required=True, type=PATH, metavar="MODEL...")
@click.option(
    "--faces",
    required=True,
    type=PATH,
    metavar="DIR",
    help="Photos: one of each person, or a subfolder of each.",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="FR model that judges, another than the models' own; may be repeated.",
)
@click.option("--out", required=True, type=PATH, help="Folder for the report.")
@option("--fr-model", default="sface", help="FR model of the identity vectors.")
@sampling_options
@option("--count", default=COUNT, help="Pictures of each person.")
@option("--limit", default=0, help="Take that many people, evenly spread; 0: all.")
@click.option(
    "--training",
    multiple=True,
    type=PATH,
    metavar="DIR",
    help="What the model was trained on: look for the nearest of these pictures.",
)
@option("--crop-margin", default=1.15, help="How much the model shows around the face.")
@click.option("--skip-bad", is_flag=True, help="Leave out photos that cannot be used.")
@click.option("--show-photos", is_flag=True, help="Put the photos into the report.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(BACKENDS),
    help="Of the BUNDLEs; repeated, each runs on each.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    help="Of the BUNDLEs; repeated, each runs in each.",
)
@option("--device", default="cpu", help="Of PyTorch, and of ONNX Runtime on a GPU.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    models: tuple[Path, ...],
    out: Path,
    show_photos: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure whose faces a model makes, how diverse they are, and what it remembers.

    Each MODEL is a CHECKPOINT, which PyTorch runs, or a BUNDLE, whose engine does; all
    are the same function. Pictures are made from a photo of each person, on the same
    noise for all models; none is picked or left out. Every figure has its 95 %
    interval, what chance reaches, and what the photos reach at the model's resolution.
    OUT gets index.html, evaluation.json, evaluation.md and evaluation.png.
    docs/evaluation.md says what the figures are.
    """
    from ..evaluation.report import EVALUATION, save_evaluation
    from ..evaluation.run import EvaluationRequest, evaluate
    from ..report.save import check_report_folder

    check_report_folder(out, EVALUATION)
    sides = engine_requests(models, values)
    fit_options(ctx, values, sides[0].open_model().spec)
    request = EvaluationRequest(
        models=sides,
        faces=values["faces"],
        judges=values["judges"],
        settings=sample_settings(values, count=values["count"]),
        embedder=values["fr_model"],
        training=values["training"],
        limit=values["limit"],
        margin=values["crop_margin"],
        skip_bad=values["skip_bad"],
    )
    found, shown = evaluate(request, say)
    paths = save_evaluation(out, found, shown, photos=show_photos)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    say_figures(found)
    click.echo(f"report  {printable(str(paths.page))}")


def engine_requests(
    models: tuple[Path, ...], values: dict[str, Any]
) -> tuple[Any, ...]:
    """A SideRequest for each CHECKPOINT, and for each way to run each BUNDLE.

    Raises:
        InputError: A backend or precision is given, and there is no BUNDLE.
    """
    from ..checkpoint_config import is_checkpoint
    from ..parity.sides import SideRequest

    common = {name: values[name] for name in ("threads", "trust")}
    device = values["device"]
    bundles = [path for path in models if not is_checkpoint(path)]
    if not bundles and (values["backends"] or values["precisions"]):
        raise InputError(
            "--backend and --precision are for BUNDLEs",
            why="a CHECKPOINT runs on PyTorch, in float32",
            fix="leave them out, or give a BUNDLE as well",
        )
    found = []
    for path in models:
        if path not in bundles:
            found.append(SideRequest(path, device=device, **common))
            continue
        # Other backends have no choice of a device, and would refuse it.
        found += [
            SideRequest(
                path,
                backend,
                precision,
                device=device if backend in ORT_GPU_BACKENDS else "cpu",
                **common,
            )
            for backend in values["backends"] or ("auto",)
            for precision in values["precisions"] or (None,)
        ]
    return tuple(found)


def say_figures(found: Any) -> None:
    """The outcome, a line each."""
    from ..evaluation import words

    head = words.figure_head(found)
    lines = [words.summary(found)]
    for judge in found.judges:
        rows = words.identity_rows(found, judge)
        lines += ["", f"to {judge}:", *words.aligned([head, *rows])]
    lines += ["", "of the pictures:"]
    lines += words.aligned([head, *words.picture_rows(found)])
    changes = words.change_rows(found)
    lines += [f"change of similarity, {name}: {change}" for name, change in changes]
    for line in lines:
        click.echo(printable(line))
    for note in found.notes:
        say(f"note: {note}")
