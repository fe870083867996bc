"""``id3pm-deploy audit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..defaults import BACKENDS, PRECISIONS
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

COUNT = 4
"""Pictures of each template."""


@click.command(name="audit")
@click.argument("fr_model", metavar="FR-MODEL")
@click.option(
    "--faces",
    required=True,
    type=PATH,
    metavar="DIR",
    help="Photos: one of each person, or a subfolder of each.",
)
@click.option("--out", required=True, type=PATH, help="Folder for the report.")
@click.option(
    "--model",
    type=PATH,
    help="CHECKPOINT or BUNDLE trained on vectors of FR-MODEL.  [default: the shipped "
    "one, of sface]",
)
@click.option(
    "--judge",
    "judges",
    multiple=True,
    metavar="SPEC",
    help="Another FR model that decides, too; may be repeated.",
)
@sampling_options
@option("--count", default=COUNT, help="Pictures of each template.")
@option("--limit", default=0, help="Take that many people, evenly spread; 0: all.")
@option("--crop-margin", default=1.15, help="How much the model shows around the face.")
@click.option("--skip-bad", is_flag=True, help="Leave out photos that cannot be used.")
@click.option("--show-photos", is_flag=True, help="Put the photos into the report.")
@option("--backend", default="auto", type=click.Choice(BACKENDS))
@option("--precision", type=click.Choice(PRECISIONS), help="If several.")
@option("--device", default="cpu", help="Device of the torch backend.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    fr_model: str,
    model: Path | None,
    out: Path,
    show_photos: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Report how invertible the templates of a face recognition (FR) model are.

    A template is FR-MODEL's vector of one photo of each person. A model that was
    trained on such vectors makes pictures of it, and FR-MODEL decides, as a system in
    use would, whether it takes them for the person: at thresholds of fixed false
    acceptance rates, beside chance and real photos, with 95 % intervals. Where a person
    has two photos, pictures are held against the second, too. A low share does not show
    that templates are safe. OUT gets index.html, audit.json, audit.md and audit.png.
    """
    from ..evaluation.audit import audit
    from ..evaluation.audit_report import AUDIT, audit_lines, save_audit
    from ..evaluation.run import EvaluationRequest
    from ..parity.sides import SideRequest
    from ..report.save import check_report_folder
    from ..shipped import shipped_checkpoint

    check_report_folder(out, AUDIT)
    names = ("backend", "precision", "threads", "device", "trust")
    side = SideRequest(model or shipped_checkpoint(), **{n: values[n] for n in names})
    fit_options(ctx, values, side.open_model().spec)
    request = EvaluationRequest(
        models=(side,),
        faces=values["faces"],
        judges=values["judges"],
        settings=sample_settings(values, count=values["count"]),
        embedder=fr_model,
        limit=values["limit"],
        margin=values["crop_margin"],
        skip_bad=values["skip_bad"],
    )
    found, shown = audit(request, say)
    paths = save_audit(out, found, shown, photos=show_photos)
    if as_json:
        click.echo(json.dumps(found.to_json()))
        return
    for line in audit_lines(found):
        click.echo(printable(line))
    for note in found.notes:
        say(f"note: {note}")
    click.echo(f"report  {printable(str(paths.page))}")
