"""Two benchmarks of one machine: what became slower, beyond noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rounds import Interval, change_interval

SLACK = 0.02
"""A ratio within this of 1 is no change, however narrow its interval: intervals are of
one run and do not hold what changes from run to run, such as where memory lies."""

SLOWER, FASTER, SAME = "slower", "faster", "no change beyond noise"
_MEASURES = {"row_seconds": "table row", "trajectory_seconds": "trajectory"}
_MACHINE = ("processor", "cores", "memory_gib", "gpus", "governor")
_NOT_COMPUTED = ("columns", "cold_starts", "rounds", "trust", "batch_sizes")


@dataclass(frozen=True)
class Change:
    """One figure of one column in both benchmarks.

    Attributes:
        column, batch, measure: Which.
        ratio: Now over before; above 1 is slower.
        verdict: ``SLOWER``, ``FASTER`` or ``SAME``.
    """

    column: str
    batch: str
    measure: str
    ratio: Interval
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two benchmarks.

    Attributes:
        differences: What of machine, model and settings is not the same, which makes
            the ratios doubtful.
        versions: Packages that changed, which may be what one wants to see.
        changes: Every figure that both have.
        lost: Columns and batch sizes that were timed before and are not now.
    """

    differences: tuple[str, ...]
    versions: tuple[str, ...]
    changes: tuple[Change, ...]
    lost: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What is slower."""
        return tuple(change for change in self.changes if change.verdict == SLOWER)

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        changes = [
            {**vars(change), "ratio": change.ratio.to_json()} for change in self.changes
        ]
        return {**vars(self), "changes": changes}


def compare_results(now: Mapping[str, Any], before: Mapping[str, Any]) -> Comparison:
    """Compare two results as ``load_result`` gives them."""
    differences = [
        f"{part}, {key}: {_short(before[part].get(key))} before, "
        f"{_short(now[part].get(key))} now"
        for part, keys in (
            ("machine", _MACHINE),
            ("model", ("weights_sha256", "precision", "table_rows")),
            ("settings", _setting_names(now, before)),
        )
        for key in keys
        if _plain(before[part].get(key)) != _plain(now[part].get(key))
    ]
    names = sorted({*now["versions"], *before["versions"]})
    old, new = before["versions"], now["versions"]
    versions = [
        f"{name}: {old.get(name)} before, {new.get(name)} now"
        for name in names
        if old.get(name) != new.get(name)
    ]
    changes, lost = _changes(now["columns"], before["columns"])
    return Comparison(tuple(differences), tuple(versions), changes, lost)


def _setting_names(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    names = {*now["settings"], *before["settings"]} - set(_NOT_COMPUTED)
    return sorted(names)


def _plain(value: Any) -> Any:
    """JSON has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    return str(value)[:60]


def _changes(
    now: Mapping[str, Any], before: Mapping[str, Any]
) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    changes, lost = [], []
    for name, old in before.items():
        for batch, earlier in old["batches"].items():
            if "row_seconds" not in earlier:
                continue
            later = now.get(name, {}).get("batches", {}).get(batch, {})
            if "row_seconds" not in later:
                lost.append(f"{name}, batch size {batch}")
                continue
            for measure, title in _MEASURES.items():
                pair = _medians(later[measure]), _medians(earlier[measure])
                if min(map(len, pair)) < 2:
                    continue
                ratio = change_interval(*pair)
                changes.append(Change(name, batch, title, ratio, verdict(ratio)))
    return tuple(changes), tuple(lost)


def verdict(ratio: Interval) -> str:
    """What a ratio says: only where its whole interval is past the slack."""
    if ratio.low > 1 + SLACK:
        return SLOWER
    return FASTER if ratio.high < 1 - SLACK else SAME


def _medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """One value a round; those of one round have too much in common."""
    return [statistics.median(values) for values in rounds]
