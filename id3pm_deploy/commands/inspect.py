"""``id3pm-deploy inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..defaults import MAX_BATCH_SIZE
from ..errors import InputError
from .options import PATH, printable, trust_option


@click.command(name="inspect")
@click.argument("path", type=PATH)
@click.option("--self-test", is_flag=True, help="Run a BUNDLE on its golden data.")
@click.option("--memory", is_flag=True, help="What a BUNDLE needs to run, estimated.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, MAX_BATCH_SIZE),
    default=1,
    show_default=True,
    help="Guided samples at once, for --memory.",
)
@trust_option
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    path: Path,
    self_test: bool,
    memory: bool,
    batch_size: int,
    trust: bool,
    as_json: bool,
) -> None:
    """Show what a CHECKPOINT, BUNDLE, picture (.png) or identity file (.npz) holds.

    Every file of a bundle is checked against the manifest's SHA-256; the weights of a
    checkpoint against its config. Identity vectors are never shown.
    """
    from ..inspection import inspect_path, self_tests

    facts = inspect_path(path)
    if self_test:
        tested = self_tests(path, trust=trust)
        facts["self_test"] = tested.errors
        facts["self_test_not_run"] = tested.not_run
    if memory:
        facts["memory"] = _memory(path, batch_size)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for line in _lines(facts):
        click.echo(line)


def _memory(path: Path, batch_size: int) -> list[dict[str, Any]]:
    from ..bundle import is_bundle, open_bundle
    from ..memory import memory_facts

    if not is_bundle(path):
        raise InputError(f"{path} is not a BUNDLE", fix="--memory needs a bundle")
    return memory_facts(open_bundle(path), batch_size)


def _lines(value: Any, indent: int = 0) -> list[str]:
    lines = []
    for key, item in value.items():
        pad = "  " * indent
        if isinstance(item, dict) and item:
            lines += [f"{pad}{key}", *_lines(item, indent + 1)]
        elif isinstance(item, list | tuple) and item and isinstance(item[0], dict):
            for number, entry in enumerate(item):
                lines += [f"{pad}{key} {number}", *_lines(entry, indent + 1)]
        elif item not in (None, "", {}, [], ()):
            text = ", ".join(map(str, item)) if isinstance(item, list | tuple) else item
            lines.append(printable(f"{pad}{key:<24} {text}"))
    return lines
