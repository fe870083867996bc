"""README's latency table, made from ``results/latency-*.json``.

python benchmarks/readme_table.py --check | --write
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import harness
import machine

from id3pm_deploy.benchmark.columns import COLUMNS
from id3pm_deploy.benchmark.result import TIMED, load_result
from id3pm_deploy.benchmark.table import estimate, table
from id3pm_deploy.errors import InputError
from id3pm_deploy.files import write_text

README = machine.ROOT / "README.md"
BEGIN = "<!-- latency table: written by benchmarks/readme_table.py -->"
END = "<!-- end of the latency table -->"

_HEAD = (
    "column",
    "table row, ms",
    "trajectory, ms",
    "pictures a second",
    "share of the limit, %",
)
_MOST_REASON = 70


def loaded(results: Path) -> dict[str, dict[str, Any]]:
    """The results for README, by name.

    Raises:
        InputError: One is damaged, a dry run, or of other columns than the product has.
    """
    found = {path.stem: load_result(path) for path in sorted(results.glob("latency-*"))}
    known = {column.name: column.title for column in COLUMNS}
    for name, result in found.items():
        if result["settings"]["rounds"] < harness.MIN_ROUNDS:
            raise InputError(f"{name} is a dry run", fix="measure it again")
        titles = {key: one["title"] for key, one in result["columns"].items()}
        if titles != {key: known.get(key) for key in titles}:
            raise InputError(
                f"{name} has columns that the product does not have",
                why=", ".join(sorted(set(titles.items()) - set(known.items()))[0]),
                fix="measure it again with benchmarks/latency_table.py",
            )
    return found


def block(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands between the two comments."""
    if not found:
        return "No latency has been measured on an idle machine yet."
    return "\n\n".join(_section(name, result) for name, result in found.items())


def _section(name: str, found: Mapping[str, Any]) -> str:
    machine_, model, settings = found["machine"], found["model"], found["settings"]
    batch = str(settings["batch_sizes"][0])
    where = ", ".join(machine_["gpus"]) or f"{machine_['processor']}, "
    if not machine_["gpus"]:
        where += f"{machine_['cores']} cores"
    versions = [
        f"{package} {found['versions'][package]}"
        for package in ("python", "onnxruntime", "torch", "tensorrt")
        if found["versions"].get(package)
    ]
    side = model["picture"][-1]
    said = (
        f"{model['title']}, {side}x{side}, {model['precision']} graph, "
        f"{settings['solver']['solver']} with {model['table_rows']} table rows, "
        f"guidance {settings['guidance']['scale']:g}, batch size {batch}, on {where}; "
        f"{', '.join(versions)}; {found['date']}, {settings['rounds']} rounds, medians "
        f"with 95 % intervals; `benchmarks/results/{name}.json` has the rest. A column "
        "without figures could not be run there."
    )
    rows = [_row(column, batch) for column in found["columns"].values()]
    return f"{said}\n\n{table(_HEAD, rows)}"


def _row(column: Mapping[str, Any], batch: str) -> list[str]:
    values = column["batches"].get(batch, {})
    if column["status"] != TIMED or "reason" in values or not values:
        reason = column["reason"] or values.get("reason", "")
        return [column["title"], reason[:_MOST_REASON], "", "", ""]
    return [
        column["title"],
        estimate(values["row_ms"]["p50"]),
        estimate(values["trajectory_ms"]["p50"]),
        estimate(values["pictures_per_second"]),
        estimate(values["limit_share"], 100),
    ]


def replaced(text: str, new: str) -> str:
    """README's text with another block.

    Raises:
        InputError: The comments are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise InputError("README.md has not the two comments around its latency table")
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{after}"


@click.command()
@click.option("--check", "mode", flag_value="check", help="Is it up to date?")
@click.option("--write", "mode", flag_value="write", help="Put it there.")
@click.option("--readme", default=README, type=click.Path(path_type=Path))
@click.option("--results", default=harness.RESULTS, type=click.Path(path_type=Path))
def main(mode: str | None, readme: Path, results: Path) -> None:
    """Check or write README's latency table."""
    if mode is None:
        raise InputError("give --check or --write")
    text = readme.read_text("utf-8")
    wanted = replaced(text, block(loaded(results)))
    if mode == "write" and wanted != text:
        write_text(readme, wanted)
    if mode == "check" and wanted != text:
        click.echo("README.md's latency table is not what the results say", err=True)
        sys.exit(1)


def columns_of(results: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of the columns that were timed in any of the results."""
    return {
        name
        for found in results
        for name, column in found["columns"].items()
        if column["status"] == TIMED
    }


if __name__ == "__main__":
    harness.run(main)
