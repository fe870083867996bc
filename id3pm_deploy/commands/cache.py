"""``id3pm-deploy cache``: the TensorRT plans that are kept for the next build."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from .options import printable
from .sizes import SIZE


@click.group(name="cache")
def command() -> None:
    """List or remove the TensorRT plans that are kept for the next build.

    `build-engine` keeps each plan under all that determined it (graph, recipe, version
    of the library, GPU), and takes it from there when all of it is the same again. The
    plans lie in $XDG_CACHE_HOME/id3pm-deploy/plans, ~/.cache by default; removing them
    costs time and nothing else.
    """


@command.command(name="list", short_help="Show the plans that are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def list_(as_json: bool) -> None:
    """Show the plans that are kept, the most recently used first."""
    from ..builders.cache import PlanCache

    cache = PlanCache.default()
    entries = cache.entries()
    if as_json:
        found = {
            "folder": None if cache.folder is None else str(cache.folder),
            "limit_bytes": cache.limit_bytes,
            "bytes": sum(entry.size for entry in entries),
            "plans": [entry.to_json() for entry in entries],
        }
        click.echo(json.dumps(found, indent=2))
        return
    for entry in entries:
        click.echo(printable(_line(entry)))
    size = sum(entry.size for entry in entries)
    where = cache.folder or "no folder: there is no home folder"
    click.echo(printable(f"{_amount(len(entries), size)}, in {where}"))


def _amount(plans: int, size: int) -> str:
    return f"{plans} plan{'' if plans == 1 else 's'}, {size / 1e6:.1f} MB"


def _line(entry: Any) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
    head = f"{entry.key[:12]}  {entry.size / 1e6:8.1f} MB  used {used}  "
    if entry.plan is None:
        return f"{head}DAMAGED: {entry.problem}"
    facts = entry.plan.facts
    parts = [f"{facts.get('flavour')} {facts.get('version')}", facts.get("precision")]
    capabilities = facts.get("compute_capabilities") or ()
    gpus = facts.get("gpu_name") or ", ".join(map(str, capabilities))
    if gpus:
        parts.append(f"for {gpus}")
    seconds = facts.get("build_seconds")
    if isinstance(seconds, int | float):
        parts.append(f"built in {seconds:.0f} s")
    return head + ", ".join(map(str, parts))


@command.command(short_help="Remove plans.")
@click.option(
    "--max-size",
    type=SIZE,
    help="Keep the most recently used plans up to this size.  [default: 10GiB]",
)
@click.option("--all", "everything", is_flag=True, help="Remove all plans.")
def prune(max_size: int | None, everything: bool) -> None:
    """Remove damaged plans, what killed builds left, and the least recently used plans.

    A bundle keeps its own copy of its plans; a build that is running is not disturbed.
    """
    from ..builders.cache import PlanCache
    from ..errors import InputError

    if everything and max_size is not None:
        raise InputError("give one of --max-size and --all")
    removed = PlanCache.default().prune(0 if everything else max_size)
    click.echo(f"removed {_amount(removed.plans, removed.size)}")
