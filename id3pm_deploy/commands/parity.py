"""``id3pm-deploy parity``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..defaults import BACKENDS, COUNT
from ..errors import InputError, ParityError
from .options import PATH, option, sample_settings, sampling_options


@click.command(name="parity")
@click.argument("model", type=PATH)
@click.option("--reference", type=PATH, help="CHECKPOINT.  [default: MODEL itself]")
@click.option("--identity", type=PATH, metavar="FILE.npz", help="[default: random]")
@click.option("--out", required=True, type=PATH, help="Folder for the report.")
@sampling_options
@option("--count", default=COUNT, help="Pictures of each identity.")
@option("--backend", default="auto", type=click.Choice(BACKENDS))
@option("--precision", type=click.Choice(["float32", "float16"]), help="If several.")
@option("--threads", default=0, help="CPU threads; 0 leaves the runtime's choice.")
@option("--device", default="cpu", help="Device of the torch backend.")
@option("--tolerance-step", type=float, help="[default: the graph's]")
@option("--tolerance-trajectory", type=float, help="[default: the graph's]")
@click.option("--judge", metavar="SPEC", help="FR model that scores the identity.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: Path,
    reference: Path | None,
    identity: Path | None,
    out: Path,
    count: int,
    backend: str,
    precision: str | None,
    threads: int,
    device: str,
    tolerance_step: float | None,
    tolerance_trajectory: float | None,
    judge: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare the engine of MODEL with the PyTorch reference on the same noise.

    OUT gets parity.json, parity.png and index.html. The exit status is 1 when an error
    is past its tolerance. MODEL is a BUNDLE, with --reference naming the CHECKPOINT it
    was made from, or a CHECKPOINT, whose torch backend is then tested.
    """
    from ..optional import require

    require("torch", extra="export")
    require("diffusers", extra="export")
    from ..models import open_engine, open_model
    from ..parity_run import ParityRequest, parity_to_folder

    settings = sample_settings(values, count=count)
    opened = open_model(model)
    if opened.bundle is not None and reference is None:
        raise InputError(
            "a BUNDLE needs the CHECKPOINT it is compared with",
            fix="give --reference CHECKPOINT",
        )
    engine = open_engine(
        opened, backend, precision=precision, threads=threads, device=device
    )
    request = ParityRequest(
        checkpoint=reference or model,
        identity=identity,
        settings=settings,
        tolerance_step=tolerance_step,
        tolerance_trajectory=tolerance_trajectory,
        judge=judge,
    )
    with engine:
        report = parity_to_folder(out, opened, engine, request)
    found = report.to_json()
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(f"{'PASS' if report.passed else 'FAIL'}  {report.title}")
        click.echo(
            f"final pictures  relative error {report.final.max_rel:.2e}, at most "
            f"{report.uint8_max} grey levels"
        )
        click.echo(f"report          {out / 'index.html'}")
    if not report.passed:
        raise ParityError(
            f"{len(report.failures)} comparisons are past their tolerance",
            why=report.failures[0],
            fix=f"see {out / 'index.html'}",
        )
