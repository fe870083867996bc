"""``id3pm-deploy wipe``: removes the personal data that a training run has kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from .options import PATH, printable


@click.command(name="wipe")
@click.argument("checkpoint", type=PATH)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Remove CHECKPOINT.training as a whole; the run cannot go on.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(checkpoint: Path, everything: bool, as_json: bool) -> None:
    """Remove the faces and identity vectors that the training of CHECKPOINT kept.

    They lie in CHECKPOINT.training, with contact sheets that show photos, which go as
    well. CHECKPOINT itself stays, and so do state, log and settings: the run can go on
    as long as its pictures are there. Files are removed, not overwritten.
    """
    from ..training.work import wipe_run, work_folder

    wiped = wipe_run(checkpoint, everything=everything)
    if as_json:
        click.echo(json.dumps(asdict(wiped)))
        return
    files = "1 file" if wiped.files == 1 else f"{wiped.files} files"
    line = f"{work_folder(checkpoint)}: {files} removed, {wiped.bytes / 1e6:.1f} MB"
    click.echo(printable(line))
