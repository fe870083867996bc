"""``id3pm-deploy export``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from .options import PATH, option


@click.command(name="export")
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, help="BUNDLE folder.  [default: CHECKPOINT.bundle]")
@option("--recipe", default="float32", help="Name in export/, or a TOML file.")
@option(
    "--graph",
    default="step",
    type=click.Choice(["step", "unet"]),
    help="step: a whole solver step, what engines run; unet: the bare UNet.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    checkpoint: Path, out: Path | None, recipe: str, graph: str, as_json: bool
) -> None:
    """Export CHECKPOINT to an ONNX graph in a BUNDLE.

    The graph is checked by onnx's full checker and compared with PyTorch under ONNX
    Runtime at several sizes before it is kept. A graph of the same kind and precision
    in the bundle is replaced.
    """
    from dataclasses import asdict

    from ..builders.build import export_bundle, export_unet
    from ..bundle import SIGNATURE_NAME
    from ..files import beside

    folder = out or beside(checkpoint, ".bundle")
    make = export_unet if graph == "unet" else export_bundle
    signed = os.path.lexists(folder / SIGNATURE_NAME)
    bundle = make(checkpoint, recipe, folder)
    if signed:
        click.echo("warning: the bundle's signature was removed", err=True)
    entry = bundle.manifest.graphs[-1]
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), **asdict(entry)}))
        return
    size = bundle.manifest.file_entry(entry.file).size / 1e6
    click.echo(f"bundle  {folder}")
    click.echo(
        f"graph   {entry.file} ({entry.kind}, {entry.precision}, opset {entry.opset}, "
        f"{size:.1f} MB)"
    )
    click.echo(
        f"parity  relative error {entry.max_relative_error:.1e} against PyTorch, "
        f"tolerance {entry.tolerance_step:.0e}"
    )
