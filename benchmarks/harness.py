"""What the benchmark scripts share: rounds, intervals, checks, tables, result files.

Nothing heavy is imported before it is needed: while ``cold_start.py`` measures, its own
process must not hold the files that the measured one has to read.
"""

from __future__ import annotations

import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import machine

from id3pm_deploy import __version__
from id3pm_deploy.errors import Id3pmError, InputError, ParityError
from id3pm_deploy.files import make_folder, write_json

if TYPE_CHECKING:
    import numpy.typing as npt

RESULTS = machine.ROOT / "benchmarks" / "results"
MIN_ROUNDS = 20
"""A result of fewer rounds is a dry run: printed, not kept."""

_RESAMPLES = 10_000
_LEVEL = 0.95
_BUSY = 0.1


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval, in the unit of the values it came from."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float, offset: float = 0.0) -> Interval:
        """All three times ``factor``, plus ``offset``."""
        return Interval(
            self.value * factor + offset,
            self.low * factor + offset,
            self.high * factor + offset,
        )

    def to_json(self) -> dict[str, float]:
        """The three numbers, to six significant digits."""
        return {name: float(f"{number:.6g}") for name, number in vars(self).items()}

    def text(self, digits: int = 1) -> str:
        """For people: ``12.3 (12.1-12.6)``."""
        return (
            f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"
        )


def median_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The median and its percentile bootstrap interval (Efron 1979).

    Args:
        values: One a round.
        seed: Of the resampling, so that the same values give the same interval.

    Raises:
        InputError: There are fewer than two values.
    """
    import numpy as np

    if len(values) < 2:
        raise InputError("an interval needs at least two rounds")
    data = np.asarray(values, np.float64)
    chosen = np.random.default_rng(seed).integers(0, len(data), (_RESAMPLES, len(data)))
    medians = np.median(data[chosen], axis=1)
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return Interval(float(np.median(data)), float(low), float(high))


def ratio_interval(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The median of ``values[i] / baseline[i]``: both of one round, which shared what
    the machine was doing just then."""
    pairs = zip(values, baseline, strict=True)
    return median_interval([value / base for value, base in pairs])


def verdict(found: Interval, goal: float) -> str:
    """Whether ``found`` is at most ``goal``: met, missed, or undecided where the
    interval holds the goal."""
    if found.high <= goal:
        return "met"
    return "missed" if found.low > goal else "undecided"


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """One way of doing the thing that is measured.

    Attributes:
        name: Its row in the table.
        run: Does it once.
        prepare: Called before each turn, not timed.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Plan:
    """How variants take turns.

    In each round every variant has one turn, in an order drawn anew. A turn is a
    pause, in which the threads of the one before stop waiting for more work, then
    ``settle`` calls that are not timed, then ``repeats`` that are; the turn's value is
    their median.

    Attributes:
        rounds: Turns of each variant.
        repeats: Timed calls in a turn.
        settle: Calls before them.
        pause: Seconds.
        warmup: Turns of each variant before the first round.
        seed: Of the order.
    """

    rounds: int
    repeats: int = 3
    settle: int = 1
    pause: float = 0.05
    warmup: int = 1
    seed: int = 0


def interleaved(
    variants: Sequence[Variant],
    plan: Plan,
    on_turn: Callable[[], object] = _nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the variants in turns.

    Returns:
        Seconds of each variant, one value a round.
    """
    order = random.Random(plan.seed)  # noqa: S311 - nothing secret
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(-plan.warmup, plan.rounds):
        for variant in order.sample(list(variants), len(variants)):
            value = _turn(variant, plan, clock)
            if number >= 0:
                seconds[variant.name].append(value)
                on_turn()
    return seconds


def _turn(variant: Variant, plan: Plan, clock: Callable[[], float]) -> float:
    variant.prepare()
    time.sleep(plan.pause)
    for _ in range(plan.settle):
        variant.run()
    values = []
    for _ in range(plan.repeats):
        begun = clock()
        variant.run()
        values.append(clock() - begun)
    return statistics.median(values)


def checked(
    name: str,
    actual: Mapping[str, npt.ArrayLike],
    expected: Mapping[str, npt.ArrayLike],
    tolerance: float,
) -> float:
    """Hold a variant's outputs against the reference before it is timed.

    Returns:
        The largest max|a-b|/max|b| of all outputs.

    Raises:
        ParityError: It is past the tolerance; nothing is to be timed then.
    """
    from id3pm_deploy.compare import compare

    worst = 0.0
    for output, wanted in expected.items():
        found = compare(actual[output], wanted)
        worst = max(worst, found.max_rel)
        if not found.passes(tolerance):
            raise ParityError(
                f"{name} computes another {output} than the reference",
                why=f"relative error {found.max_rel:.2e}, tolerance {tolerance:.0e}",
                fix="nothing was timed; find the fault first",
            )
    return worst


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


def rounded(values: Sequence[float]) -> list[float]:
    """Seconds to the microsecond, for a result file."""
    return [round(value, 6) for value in values]


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
