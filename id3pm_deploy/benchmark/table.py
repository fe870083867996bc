"""A benchmark for people: Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .compare import SAME, Comparison
from .result import TIMED, interval
from .rounds import PERCENTILES, Interval

MIN_ROUNDS = 20
"""Below this a benchmark is called a dry run."""

_BUSY = 0.1
_NAMES = {"row": "table row, ms", "trajectory": "trajectory, ms"}


def markdown(found: Mapping[str, Any], compared: Comparison | None = None) -> str:
    """The whole page: what was measured, the tables, how to read them."""
    parts = [_head(found)]
    for batch in map(str, found["settings"]["batch_sizes"]):
        parts += [f"## Batch size {batch}", latency_table(found, batch)]
    parts += ["## Throughput, pictures a second", throughput_table(found)]
    parts += ["## Cold start and memory", _cold_table(found)]
    parts += ["## The limit", _limit_table(found)]
    if compared is not None:
        parts += ["## Against the earlier benchmark", comparison_text(compared)]
    parts += ["## Not measured", _absent(found), "## How", _notes(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns padded to one width."""
    lines = [list(head), *[[cell.replace("|", "/") for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = (
        [cell.ljust(width) for cell, width in zip(one, widths, strict=True)]
        for one in lines
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return (
        f"{value:.{2 if abs(value) < 10 else 1}f}"
        if abs(value) >= 1
        else (f"{value:.3g}")
    )


def estimate(values: Mapping[str, float] | None, factor: float = 1.0) -> str:
    """``12.3 (12.1 to 12.6)``, or nothing."""
    found = interval(values)
    return "" if found is None else ratio(found.scaled(factor))


def ratio(found: Interval) -> str:
    """An interval for people."""
    return f"{number(found.value)} ({number(found.low)} to {number(found.high)})"


def _head(found: Mapping[str, Any]) -> str:
    machine, model, settings = found["machine"], found["model"], found["settings"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    size = "x".join(map(str, model["picture"][1:]))
    solver = settings["solver"]
    lines = [
        f"# Benchmark of {model['title']}",
        f"{size} pictures, {model['precision']} graph, {solver['solver']} with "
        f"{model['table_rows']} table rows, guidance "
        f"{settings['guidance']['scale']:g}; {settings['rounds']} rounds; "
        f"{machine['processor']}, {machine['cores']} cores, {gpus}; "
        f"id3pm-deploy {found['tool_version']}, {found['date']}.",
    ]
    if settings["rounds"] < MIN_ROUNDS:
        lines.append(f"A dry run: fewer than {MIN_ROUNDS} rounds.")
    others = found["load"]["others"]
    if others is not None and others > _BUSY:
        lines.append(f"A busy machine: other processes took {others:.0%} of the cores.")
    return "\n\n".join(lines)


def latency_table(found: Mapping[str, Any], batch: str) -> str:
    """Percentiles of table rows and trajectories; every column has its line."""
    head = ["column"]
    head += [f"{name}: p{p}" for name in _NAMES.values() for p in PERCENTILES]
    head += ["n", "outside the engine, %", "error"]
    rows = []
    for column in found["columns"].values():
        values = column["batches"].get(batch, {})
        cells = [""] * (len(head) - 2)
        if "row_ms" in values:
            cells = [
                estimate(values[f"{name}_ms"][f"p{p}"])
                for name in _NAMES
                for p in PERCENTILES
            ]
            counts = [str(values[f"{name}_ms"]["n"]) for name in _NAMES]
            cells += [", ".join(counts), estimate(values["outside_engine"], 100)]
        error = column.get("trajectory_errors", {}).get(batch)
        shown = "" if error is None else f"{error:.1e}"
        if found["reference"].get(batch) in found["columns"] and (
            column is found["columns"][found["reference"][batch]]
        ):
            shown = "reference"
        rows.append([column["title"], *cells, shown])
    return table(head, rows)


def throughput_table(found: Mapping[str, Any]) -> str:
    """Pictures a second, by batch size."""
    sizes = [str(size) for size in found["settings"]["batch_sizes"]]
    rows = [
        [
            column["title"],
            *(
                estimate(column["batches"].get(s, {}).get("pictures_per_second"))
                for s in sizes
            ),
        ]
        for column in found["columns"].values()
    ]
    return table(["column", *(f"B = {size}" for size in sizes)], rows)


def _cold_table(found: Mapping[str, Any]) -> str:
    if not found["settings"]["cold_starts"]:
        return "Not measured."
    rows = []
    for column in found["columns"].values():
        starts = column.get("cold_starts", [])
        cells = [
            number(_middle([one[key] for one in starts])) if starts else ""
            for key in ("seconds", "opened")
        ]
        for key in ("peak_bytes", "device_bytes"):
            known = [one[key] for one in starts if one[key] is not None]
            cells.append(f"{max(known) / 2**20:.0f}" if known else "")
        rows.append([column["title"], *cells])
    head = ["column", "to the first picture, s", "to the engine, s"]
    return table([*head, "host memory, MiB", "device memory, MiB"], rows)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _limit_table(found: Mapping[str, Any]) -> str:
    rows = []
    for column in found["columns"].values():
        for batch, values in column["batches"].items():
            if values.get("limit_ms"):
                share = estimate(values["limit_share"], 100)
                limit = number(values["limit_ms"])
                size = f"{batch}, {values['unet_rows']}"
                rows.append([column["title"], size, limit, share])
    lines = [
        f"{key}: {one['method']}: "
        + (
            f"{one['operations'] / 1e9:.0f} Gop/s, {one['bytes'] / 1e9:.1f} GB/s."
            if one["operations"] and one["bytes"]
            else "not measured."
        )
        for key, one in found["rates"].items()
    ]
    if not rows:
        return "\n".join(lines) or "Not known."
    head = ["column", "B, R", "a table row at least, ms", "share reached, %"]
    return "\n\n".join([table(head, rows), *lines])


def comparison_text(compared: Comparison) -> str:
    """What changed, the slower ones first."""
    lines = []
    if compared.differences:
        lines.append("Not the same machine, model or settings, so no verdict holds:")
        lines.append("\n".join(f"- {one}" for one in compared.differences))
    if compared.versions:
        lines.append("Other versions:")
        lines.append("\n".join(f"- {one}" for one in compared.versions))
    if compared.lost:
        lines.append("No longer timed: " + "; ".join(compared.lost) + ".")
    shown = sorted(compared.changes, key=lambda one: -one.ratio.value)
    rows = [
        [
            one.column,
            one.batch,
            one.measure,
            f"{one.ratio.value:.3f} ({one.ratio.low:.3f} to {one.ratio.high:.3f})",
            one.verdict if one.verdict == SAME else f"**{one.verdict}**",
        ]
        for one in shown
    ]
    head = ["column", "batch size", "of", "now over before", ""]
    lines.append(table(head, rows) if rows else "Nothing that both have.")
    return "\n\n".join(lines)


def _absent(found: Mapping[str, Any]) -> str:
    lines = []
    for name, column in found["columns"].items():
        if column["status"] != TIMED:
            lines.append(f"- {name}, {column['status']}: {column['reason']}")
            continue
        for batch, values in column["batches"].items():
            if "reason" in values:
                lines.append(f"- {name}, batch size {batch}: {values['reason']}")
    return "\n".join(lines) or "Everything was."


def _notes(found: Mapping[str, Any]) -> str:
    notes = [
        f"- {name}: {column['note']}"
        for name, column in found["columns"].items()
        if column.get("note")
    ]
    return "\n".join(
        [
            "- Each column's output was held against the reference before it is timed.",
            "- Columns took turns in an order drawn anew for each round. Intervals are "
            "95 % bootstrap intervals over rounds; a percentile without enough values "
            "is left empty (p90: 10, p99: 100). n: table rows, trajectories.",
            f"- Limit: {found['methods']['limit']}.",
            f"- Memory: {found['methods']['memory']}.",
            *notes,
            f"- `{found['command']}`",
        ]
    )
