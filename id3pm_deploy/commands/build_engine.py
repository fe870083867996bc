"""``id3pm-deploy build-engine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import PATH, option


@click.command(name="build-engine")
@click.argument("source", type=PATH)
@option("--target", default="cpu", help="Recipe in engines/, or a TOML file.")
@click.option("--out", type=PATH, help="BUNDLE folder.  [default: SOURCE.bundle]")
@click.option("--dry-run", is_flag=True, help="Print what the recipe resolves to.")
@click.option("--json", "as_json", is_flag=True, help="Print the engine's entry.")
def command(
    source: Path, target: str, out: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Compile SOURCE, a CHECKPOINT or a BUNDLE, into an engine for a target.

    The engine is added to the BUNDLE with what it was built for and how it did in its
    self-test. A bundle is built in place.
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

    built = build_engine(source, target, out)
    for note in built.notes:
        click.echo(f"warning: {note}", err=True)
    if as_json:
        click.echo(
            json.dumps({"bundle": str(built.bundle.folder), **asdict(built.entry)})
        )
        return
    for name, text in _lines(built):
        click.echo(f"{name:<10} {text}")


def _lines(built: Any) -> list[tuple[str, str]]:
    entry, bundle = built.entry, built.bundle
    size = bundle.manifest.file_entry(entry.file).size / 1e6
    lines = [
        ("bundle", str(bundle.folder)),
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
