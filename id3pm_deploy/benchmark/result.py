"""What a benchmark found: its file, and the figures that follow from the raw values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import make_folder, write_json, write_text
from ..staging import check_folder, staged_folder
from ..versioned_json import JsonFormat
from .rounds import PERCENTILES, Interval, median_interval, percentile_interval

FORMAT = JsonFormat(
    name="id3pm-benchmark",
    version=1,
    what="an ID3PM benchmark",
    noun="benchmark",
    max_bytes=64 << 20,
    error=InputError,
)
JSON_NAME, TABLE_NAME, PLOT_NAME = "benchmark.json", "benchmark.md", "benchmark.svg"

TIMED, ABSENT, FAILED, WRONG = "timed", "absent", "failed", "wrong"
"""What became of a column: it was timed; cannot run here; died; computes another thing
than it should."""

_KEYS = (
    "tool_version",
    "command",
    "date",
    "machine",
    "versions",
    "load",
    "model",
    "settings",
    "reference",
    "rates",
    "columns",
)
_BATCH = ("row_seconds", "trajectory_seconds")


def measured(
    rows: Sequence[Sequence[float]],
    trajectories: Sequence[Sequence[float]],
    inside: Sequence[Sequence[float]] | None,
    samples: int,
    limit_seconds: float | None,
) -> dict[str, Any]:
    """The figures of one column at one batch size, with the values they follow from.

    Args:
        rows: Seconds a table row, of each round.
        trajectories: Seconds a trajectory, of each round.
        inside: Of these, seconds in the engine; None where that is not told apart.
        samples: B.
        limit_seconds: The least that a table row could take; None if not known.
    """
    found: dict[str, Any] = {"samples": samples}
    for name, values in (("row", rows), ("trajectory", trajectories)):
        found[f"{name}_ms"] = {"n": sum(map(len, values))}
        for percent in PERCENTILES:
            one = percentile_interval(values, percent)
            found[f"{name}_ms"][f"p{percent}"] = one and one.scaled(1e3).to_json()
    flat = [value for values in trajectories for value in values]
    rates = [samples / value for value in flat]
    found["pictures_per_second"] = _median(rates)
    found["outside_engine"] = found["limit_ms"] = found["limit_share"] = None
    if inside is not None:
        own = [value for values in inside for value in values]
        shares = [1 - a / b for a, b in zip(own, flat, strict=True)]
        found["outside_engine"] = _median(shares)
    if limit_seconds is not None:
        found["limit_ms"] = limit_seconds * 1e3
        shares = [limit_seconds / value for values in rows for value in values]
        found["limit_share"] = _median(shares)
    for name, seconds in (
        ("row_seconds", rows),
        ("trajectory_seconds", trajectories),
        ("engine_seconds", inside),
    ):
        found[name] = seconds and [[round(v, 8) for v in of] for of in seconds]
    return found


def _median(values: Sequence[float]) -> dict[str, float] | None:
    return median_interval(values).to_json() if len(values) > 1 else None


def interval(values: Mapping[str, float] | None) -> Interval | None:
    """The interval that :meth:`Interval.to_json` gave, or None."""
    return None if values is None else Interval(**values)


def load_result(path: Path) -> dict[str, Any]:
    """A benchmark's file, checked as far as it is used here.

    Raises:
        InputError: It is missing or none, or of another version.
    """
    file = path / JSON_NAME if path.is_dir() else path
    try:
        data = FORMAT.read(file, follow=True)
    except OSError as error:
        raise InputError(
            f"cannot read {file}",
            why=error.strerror or str(error),
            fix=f"give the {JSON_NAME} that an earlier benchmark wrote",
        ) from error
    values = FORMAT.values(data, str(file))
    if values.get("format_version") != FORMAT.version:
        raise InputError(
            f"{file} is of another format version",
            why=f"it is {values.get('format_version')!r:.40}, this release reads "
            f"{FORMAT.version}",
            fix="measure again",
        )
    _check(values, str(file))
    return values


def _check(values: Mapping[str, Any], where: str) -> None:
    """Raise :class:`InputError` unless the parts that are used are there."""
    missing = [key for key in _KEYS if key not in values]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}", fix="measure again")
    for key in ("machine", "versions", "settings", "columns", "model"):
        if not isinstance(values[key], dict):
            raise InputError(f"{where}: {key} must be an object")
    for name, column in values["columns"].items():
        batches = column.get("batches") if isinstance(column, dict) else None
        if not isinstance(batches, dict):
            raise InputError(f"{where}: the column {name!r:.60} has no batches")
        for batch in batches.values():
            _check_batch(batch, f"{where}, column {name!r:.60}")


def _check_batch(batch: Any, where: str) -> None:
    if not isinstance(batch, dict):
        raise InputError(f"{where}: a batch must be an object")
    if "reason" in batch:
        return
    for key in _BATCH:
        rounds = batch.get(key)
        good = isinstance(rounds, list) and all(
            isinstance(of, list)
            and of
            and all(isinstance(v, float | int) and v > 0 for v in of)
            for of in rounds
        )
        if not good:
            raise InputError(f"{where}: {key} must be lists of seconds")


def check_out(out: Path, *, force: bool) -> None:
    """Refuse an output folder before any work is done; with ``force``, an earlier
    benchmark's is replaced.

    Raises:
        InputError: It is not empty, and may not be replaced.
        OutputError: It cannot be made.
    """
    check_folder(out, _is_benchmark, "benchmark", force=force)


def _is_benchmark(folder: Path) -> bool:
    return (folder / JSON_NAME).is_file()


def save_result(
    out: Path, found: Mapping[str, Any], table: str, plot: str, *, force: bool = False
) -> None:
    """Write file, table and plot to ``out``, all or nothing.

    Raises:
        InputError, OutputError: See :func:`check_out`.
    """
    make_folder(Path(os.path.abspath(out)).parent)
    with staged_folder(out) as staging:
        write_json(staging / JSON_NAME, dict(found))
        write_text(staging / TABLE_NAME, table)
        write_text(staging / PLOT_NAME, plot)
        check_out(out, force=force)
