"""What the benchmark scripts share: result files, tables, and the product's own way of
taking turns.

Nothing heavy is imported before it is needed: while ``cold_start.py`` measures, its own
process must not hold the files that the measured one has to read.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import machine

from id3pm_deploy import __version__
from id3pm_deploy.benchmark.rounds import (
    Interval,
    Plan,
    Variant,
    checked,
    interleaved,
    median_interval,
    ratio_interval,
    rounded,
    verdict,
)
from id3pm_deploy.errors import Id3pmError
from id3pm_deploy.files import make_folder, write_json

__all__ = [
    "Interval",
    "Plan",
    "Variant",
    "checked",
    "interleaved",
    "median_interval",
    "ratio_interval",
    "rounded",
    "verdict",
]

RESULTS = machine.ROOT / "benchmarks" / "results"
MIN_ROUNDS = 20
"""A result of fewer rounds is a dry run: printed, not kept."""

_BUSY = 0.1


def result(
    benchmark: str,
    rounds: int,
    settings: Mapping[str, Any],
    load: machine.Load,
    packages: Sequence[str],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything a result file holds: what was measured, on what, and how to repeat it.

    Args:
        benchmark: The script's name.
        rounds: Rounds of the measurement.
        settings: What the command resolved its options to.
        load: Who used the cores meanwhile.
        packages: Distributions whose versions matter.
        measured: Figures, with their units in their names.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "benchmark": benchmark,
        "tool_version": __version__,
        "command": machine.command_line(sys.argv),
        "date": now.date().isoformat(),
        **machine.commit(),
        "machine": machine.facts(),
        "versions": machine.versions(packages),
        "load": load.to_json(),
        "rounds": rounds,
        "settings": dict(settings),
        "measured": dict(measured),
    }


def publish(found: Mapping[str, Any], name: str, folder: Path = RESULTS) -> None:
    """Say what the figures are worth, keep them, and end with them as a JSON line.

    Raises:
        OutputError: The file cannot be written.
    """
    others = found["load"]["others"]
    if others is not None and others > _BUSY:
        click.echo(f"busy machine: other processes took {others:.0%} of the cores")
    if found["changed"]:
        click.echo("the working tree differs from the commit that is named")
    if found["rounds"] < MIN_ROUNDS:
        click.echo(f"dry run: fewer than {MIN_ROUNDS} rounds, not kept")
    else:
        write_json(make_folder(folder) / f"{name}.json", found)
        click.echo(f"kept as {name}.json")
    click.echo(json.dumps(found, allow_nan=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, its columns padded to one width."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo(f"| {' | '.join(cells)} |")


def run(command: click.Command) -> None:
    """Run a script's command; our own errors become a message and an exit status."""
    try:
        command()
    except Id3pmError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)
