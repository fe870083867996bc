"""``id3pm-deploy demo``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..errors import ParityError
from .options import PATH, option


@click.command(name="demo")
@option("--out", default="demo-out", type=PATH, help="Folder for everything.")
@click.option("--photo", type=PATH, help="[default: a synthetic person's]")
@click.option("--checkpoint", type=PATH, help="[default: the shipped one]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    out: Path,
    photo: Path | None,
    checkpoint: Path | None,
    as_json: bool,
) -> None:
    """Photo to identity vector to engine to pictures to parity page.

    Runs on the CPU with the shipped checkpoint and the photo of a person who does not
    exist. Replaces an earlier demo in OUT, opens nothing and prints where to look. With
    --photo, overview.png shows that photo's face: treat OUT as personal data.
    """
    from dataclasses import asdict

    from ..optional import require

    for module in ("torch", "diffusers", "onnx", "onnxscript"):
        require(module, extra="all")
    from ..demo import run_demo

    result = run_demo(
        out,
        photo=photo,
        checkpoint=checkpoint,
        say=lambda line: click.echo(line, err=as_json),
    )
    if as_json:
        click.echo(json.dumps({k: _plain(v) for k, v in asdict(result).items()}))
    else:
        click.echo(f"done in {result.seconds:.0f} s; look at")
        click.echo(f"  {result.overview}  the photo and the pictures")
        click.echo(f"  {result.pictures}  the pictures, marked as generated")
        click.echo(f"  {result.parity_page}  the engine against PyTorch")
    if not result.parity_passed:
        raise ParityError(
            "the engine differs from PyTorch by more than its tolerance",
            fix=f"see {result.parity_page}",
        )


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
