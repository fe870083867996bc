"""Measure a bundle with ``id3pm-deploy benchmark`` and keep the result for README.md.

    python benchmarks/latency_table.py BUNDLE NAME [options of the command]

The result becomes ``results/latency-NAME.json``, with the repository's commit in it;
``readme_table.py --write`` puts it into README.md. What was measured in fewer than 20
rounds, or beside other work, is printed and not kept.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import click
import harness
import machine

from id3pm_deploy.benchmark.result import load_result
from id3pm_deploy.cli import main as product
from id3pm_deploy.errors import InputError
from id3pm_deploy.files import make_folder, write_json

BUSY = 0.1
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def keep(out: Path, name: str, results: Path) -> str:
    """Keep the benchmark in ``out`` if it is worth it; returns what was done."""
    found = load_result(out)
    others = found["load"]["others"]
    if found["settings"]["rounds"] < harness.MIN_ROUNDS:
        return f"dry run: fewer than {harness.MIN_ROUNDS} rounds, not kept"
    if others is not None and others > BUSY:
        return f"busy machine: others took {others:.0%} of the cores; not kept"
    found = {**found, **machine.commit()}
    write_json(make_folder(results) / f"latency-{name}.json", found)
    return f"kept as latency-{name}.json; now run readme_table.py --write"


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--results", default=harness.RESULTS, type=click.Path(path_type=Path), hidden=True
)
def main(bundle: Path, name: str, options: tuple[str, ...], results: Path) -> None:
    """Measure BUNDLE and keep it under NAME."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} must be small letters, digits and dashes")
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        words = ["benchmark", str(bundle), *options, "--out", str(out)]
        product.main(words, prog_name="id3pm-deploy", standalone_mode=False)
        if not out.exists():
            sys.exit(1)
        click.echo(keep(out, name, results))


if __name__ == "__main__":
    harness.run(main)
