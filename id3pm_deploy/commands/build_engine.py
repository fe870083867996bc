"""``id3pm-deploy build-engine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import PATH, option, super_resolution_option


@click.command(name="build-engine")
@click.argument("source", type=PATH)
@super_resolution_option
@option("--target", default="cpu", help="Recipe in engines/, or a TOML file.")
@click.option("--out", type=PATH, help="BUNDLE folder.  [default: SOURCE.bundle]")
@click.option("--dry-run", is_flag=True, help="Print what the recipe resolves to.")
@click.option("--json", "as_json", is_flag=True, help="Print the engine's entry.")
def command(
    source: Path,
    super_resolution: Path | None,
    target: str,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compile SOURCE, a CHECKPOINT or a BUNDLE, into an engine for a target.

    The engine is added to the BUNDLE with what it was built for and how it did in its
    self-test. A bundle is built in place. Where there are two stages, given with
    --super-resolution or held by a bundle, each gets its engine.
    """
    from dataclasses import asdict

    if dry_run:
        from ..builders.recipe import EngineRecipe
        from ..recipes import load_recipe

        click.echo(
            json.dumps(asdict(load_recipe("engines", target, EngineRecipe)), indent=2)
        )
        return
    from ..builders.build import build_engine

    built = build_engine(source, target, out, super_resolution)
    for note in built.notes:
        click.echo(f"warning: {note}", err=True)
    if as_json:
        facts = {"bundle": str(built.bundle.folder), **asdict(built.entry)}
        if built.super_resolution is not None:
            facts["super_resolution"] = asdict(built.super_resolution)
        click.echo(json.dumps(facts))
        return
    click.echo(f"{'bundle':<10} {built.bundle.folder}")
    for entry in filter(None, (built.entry, built.super_resolution)):
        for name, text in _lines(built.bundle, entry):
            click.echo(f"{name:<10} {text}")


def _lines(bundle: Any, entry: Any) -> list[tuple[str, str]]:
    size = bundle.manifest.file_entry(entry.file).size / 1e6
    lines = [
        ("engine", f"{entry.file} ({size:.1f} MB)"),
        ("runs on", f"{entry.flavour} {entry.version}, {entry.precision}"),
        ("built in", f"{entry.build_seconds:.1f} s"),
    ]
    if entry.compute_capabilities:
        lines.append(
            ("GPUs", f"compute capability {', '.join(entry.compute_capabilities)}")
        )
    if entry.self_test_error is None:
        lines.append(("self-test", "not run: this engine needs its GPU"))
    else:
        lines.append(("self-test", f"relative error {entry.self_test_error:.1e}"))
    return lines
