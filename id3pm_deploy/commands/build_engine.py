"""``id3pm-deploy build-engine``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .options import PATH, option, super_resolution_option
from .sizes import SIZE


@click.command(name="build-engine")
@click.argument("source", type=PATH)
@super_resolution_option
@option("--target", default="cpu", help="Recipe in engines/, or a TOML file.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the recipe; any number of times.",
)
@click.option("--out", type=PATH, help="BUNDLE folder.  [default: SOURCE.bundle]")
@click.option("--no-cache", is_flag=True, help="Build, even what was built before.")
@click.option(
    "--cache-limit",
    type=SIZE,
    help="Most that plans kept for another time may take.  [default: 10GiB]",
)
@click.option("--dry-run", is_flag=True, help="Print what the recipe resolves to.")
@click.option(
    "--print-trtexec",
    is_flag=True,
    help="Print the command of NVIDIA's own tool for the graph of a BUNDLE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the engine's entry.")
def command(
    source: Path,
    super_resolution: Path | None,
    target: str,
    settings: tuple[str, ...],
    out: Path | None,
    no_cache: bool,
    cache_limit: int | None,
    dry_run: bool,
    print_trtexec: bool,
    as_json: bool,
) -> None:
    """Compile SOURCE, a CHECKPOINT or a BUNDLE, into an engine for a target.

    The engine is added to the BUNDLE with what it was built for and how it did in its
    self-test. A bundle is built in place. Where there are two stages, given with
    --super-resolution or held by a bundle, each gets its engine.

    A TensorRT plan is kept, and taken again where nothing that determines it has
    changed: see `id3pm-deploy cache`.
    """
    if dry_run or print_trtexec:
        _explain(source, target, settings, dry_run=dry_run)
        return
    from ..builders.build import build_engine
    from ..builders.cache import DEFAULT_LIMIT_BYTES, PlanCache
    from ..errors import InputError

    if no_cache and cache_limit is not None:
        raise InputError("give one of --no-cache and --cache-limit")
    limit = DEFAULT_LIMIT_BYTES if cache_limit is None else cache_limit
    cache = None if no_cache else PlanCache.default(limit)
    built = build_engine(source, target, out, super_resolution, settings, cache)
    for note in built.notes:
        click.echo(f"warning: {note}", err=True)
    click.echo(_json(built) if as_json else "\n".join(_table(built)))


def _explain(
    source: Path, target: str, settings: tuple[str, ...], *, dry_run: bool
) -> None:
    """Print the recipe, or NVIDIA's command for it; build nothing."""
    from dataclasses import asdict

    from ..builders.export_recipe import ExportRecipe
    from ..builders.recipe import EngineRecipe, check_export_fits
    from ..recipes import load_recipe, recipe_names

    recipe = load_recipe("engines", target, EngineRecipe, settings)
    if recipe.export in recipe_names("export"):
        export = load_recipe("export", recipe.export, ExportRecipe)
        check_export_fits(recipe, export)
    if dry_run:
        click.echo(json.dumps(asdict(recipe), indent=2))
        return
    from ..builders.trtexec import bundle_commands

    for one in bundle_commands(source, recipe, Path(target).stem):
        for note in one.notes:
            click.echo(f"warning: {note}", err=True)
        click.echo(str(one))


def _json(built: Any) -> str:
    from dataclasses import asdict

    facts = {
        "bundle": str(built.bundle.folder),
        "from_cache": built.from_cache,
        **asdict(built.entry),
    }
    if built.super_resolution is not None:
        facts["super_resolution"] = asdict(built.super_resolution)
    return json.dumps(facts)


def _table(built: Any) -> list[str]:
    rows = [("bundle", str(built.bundle.folder))]
    for entry in filter(None, (built.entry, built.super_resolution)):
        rows += _rows(built, entry)
    return [f"{name:<10} {text}" for name, text in rows]


def _rows(built: Any, entry: Any) -> list[tuple[str, str]]:
    size = built.bundle.manifest.file_entry(entry.file).size / 1e6
    took = f"{entry.build_seconds:.1f} s"
    rows = [
        ("engine", f"{entry.file} ({size:.1f} MB)"),
        ("runs on", f"{entry.flavour} {entry.version}, {entry.precision}"),
        ("built in", f"{took}, before; not built again" if built.from_cache else took),
    ]
    if entry.backend == "tensorrt":
        rows += _plan_rows(entry)
    if entry.self_test_error is None:
        rows.append(("self-test", "not run: this engine needs its GPU"))
    else:
        rows.append(("self-test", f"relative error {entry.self_test_error:.1e}"))
    return rows


def _plan_rows(entry: Any) -> list[tuple[str, str]]:
    """What it computes in, by source; the memory its build took; where it runs."""
    rows = [("computes", _shares(entry.layer_types))]
    rows.append(("", _shares(entry.plan_types)))
    peaks = ((entry.peak_memory_bytes, "host"), (entry.peak_device_memory_bytes, "GPU"))
    memory = [f"{size / 1e6:,.0f} MB on the {where}" for size, where in peaks if size]
    if memory:
        rows.append(("took", " and ".join(memory)))
    if entry.gpu_name:
        gpu = f"{entry.gpu_name}, compute capability {entry.compute_capability}"
        rows.append(("GPU", gpu))
    elif entry.compute_capabilities:
        named = ", ".join(entry.compute_capabilities)
        rows.append(("GPUs", f"compute capability {named}"))
    return rows


def _shares(counts: dict[str, Any]) -> str:
    from ..builders.precision import type_shares

    names = {"HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16"}
    shares = [f"{s:.1%} {names.get(n, n)}" for n, s in type_shares(counts).items()]
    if shares:
        return f"{', '.join(shares)} ({counts['source']})"
    return f"plan not counted: {counts.get('not_counted', 'nothing is known')}"
