"""``id3pm-deploy export``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from .options import PATH, option, super_resolution_option


@click.command(name="export")
@click.argument("checkpoint", type=PATH)
@super_resolution_option
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
    checkpoint: Path,
    super_resolution: Path | None,
    out: Path | None,
    recipe: str,
    graph: str,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to an ONNX graph in a BUNDLE.

    The graph is checked by onnx's full checker and compared with PyTorch under ONNX
    Runtime at several sizes before it is kept. A graph of the same kind and precision
    in the bundle is replaced. With --super-resolution, the bundle holds both stages of
    a chain.
    """
    from dataclasses import asdict

    from ..builders.build import export_bundle, export_unet
    from ..bundle import SIGNATURE_NAME
    from ..files import beside

    folder = out or beside(checkpoint, ".bundle")
    make = export_unet if graph == "unet" else export_bundle
    signed = os.path.lexists(folder / SIGNATURE_NAME)
    bundle = make(checkpoint, recipe, folder, super_resolution)
    if signed:
        click.echo("warning: the bundle's signature was removed", err=True)
    entries = bundle.manifest.graphs[-1 if super_resolution is None else -2 :]
    if as_json:
        facts: dict[str, Any] = {"bundle": str(folder), **asdict(entries[0])}
        for second in entries[1:]:
            facts[second.stage] = asdict(second)
        click.echo(json.dumps(facts))
        return
    click.echo(f"bundle  {folder}")
    for entry in entries:
        size = bundle.manifest.file_entry(entry.file).size / 1e6
        click.echo(
            f"graph   {entry.file} ({entry.kind}, {entry.precision}, "
            f"opset {entry.opset}, {size:.1f} MB)"
        )
        click.echo(
            f"parity  relative error {entry.max_relative_error:.1e} against PyTorch, "
            f"tolerance {entry.tolerance_step:.0e}"
        )
