"""``id3pm-deploy sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..defaults import BACKENDS, BATCH_SIZE, COUNT
from ..errors import InputError
from .options import PATH, option, sample_settings, sampling_options, trust_option


@click.command(name="sample")
@click.argument("model", type=PATH)
@click.option("--identity", type=PATH, metavar="FILE.npz", help="What `embed` wrote.")
@click.option("--unconditional", is_flag=True, help="No identity: the null vector.")
@click.option("--out", required=True, type=PATH, help="Folder for the pictures.")
@sampling_options
@option("--count", default=COUNT, help="Pictures of each identity.")
@option(
    "--batch-size",
    default=BATCH_SIZE,
    help="Pictures made at once; cannot change them.",
)
@option(
    "--backend",
    default="auto",
    type=click.Choice(BACKENDS),
    help="auto: onnxruntime for a BUNDLE, torch for a CHECKPOINT.",
)
@option("--precision", type=click.Choice(["float32", "float16"]), help="If several.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@option("--device", default="cpu", help="Device of the torch backend.")
@trust_option
@click.option("--force", is_flag=True, help="Replace an earlier run in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print the run record.")
def command(
    model: Path,
    identity: Path | None,
    unconditional: bool,
    out: Path,
    count: int,
    batch_size: int,
    backend: str,
    precision: str | None,
    threads: int,
    device: str,
    trust: bool,
    force: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Make pictures of the identities in FILE.npz.

    MODEL is a BUNDLE or a CHECKPOINT. OUT gets numbered PNGs that are marked as
    generated, a contact sheet, and record.json, from which the run can be repeated.
    """
    if (identity is None) != unconditional:
        raise InputError(
            "give either --identity FILE.npz or --unconditional",
            fix="make the file with `id3pm-deploy embed PHOTO --out FILE.npz`",
        )
    from ..generate import check_output, conditions, sample_to_folder
    from ..identity.vectors import load_identities
    from ..models import open_engine, open_model

    settings = sample_settings(values, count=count, batch_size=batch_size)
    opened = open_model(model)
    file = None if identity is None else load_identities(identity)
    wanted = conditions(opened.spec, file, count)
    check_output(out, force=force)
    engine = open_engine(
        opened,
        backend,
        precision=precision,
        threads=threads,
        device=device,
        trust=trust,
    )
    made, record = sample_to_folder(out, opened, engine, settings, wanted, force=force)
    if as_json:
        click.echo(json.dumps(record))
        return
    info = engine.info
    click.echo(
        f"{len(made.marks)} pictures in {out} "
        f"({info.backend} {info.version}, {info.precision}, {made.seconds:.2f} s)"
    )
