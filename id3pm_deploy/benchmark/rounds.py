"""Taking turns, and what may be said afterwards: medians, percentiles, intervals.

The command ``benchmark`` and the scripts in ``benchmarks/`` share it. NumPy is imported
when it is needed: while a cold start is measured, the process that measures must not
hold the files that the measured one has to read.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError, ParityError

if TYPE_CHECKING:
    import numpy.typing as npt

PERCENTILES = (50, 90, 99)
FEWEST = {50: 2, 90: 10, 99: 100}
"""Values below which a percentile is not stated: it would be the largest of them."""

_RESAMPLES = 10_000
_PERCENTILE_RESAMPLES = 2_000
_LEVEL = 0.95


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


def percentile_interval(
    rounds: Sequence[Sequence[float]], percent: int, seed: int = 0
) -> Interval | None:
    """A percentile of all values, and its bootstrap interval over whole rounds: the
    values of one round share what the machine was doing, and are drawn together.

    Args:
        rounds: The values of each round, as many in each.
        percent: One of ``PERCENTILES``.
        seed: Of the resampling.

    Returns:
        None where there are fewer values than ``FEWEST`` asks for, or one round.
    """
    import numpy as np

    count = sum(map(len, rounds))
    if count < FEWEST[percent] or len(rounds) < 2:
        return None
    data = np.asarray(rounds, np.float64)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(data), (_PERCENTILE_RESAMPLES, len(data)))
    drawn = np.percentile(data[chosen].reshape(len(chosen), -1), percent, axis=1)
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(float(np.percentile(data, percent)), float(low), float(high))


def change_interval(
    now: Sequence[float], before: Sequence[float], seed: int = 0
) -> Interval:
    """How many times the median of ``before`` that of ``now`` is: rounds of two runs,
    which have nothing in common and are resampled apart.

    Raises:
        InputError: One of them has fewer than two values.
    """
    import numpy as np

    if min(len(now), len(before)) < 2:
        raise InputError("an interval needs at least two rounds")
    rng = np.random.default_rng(seed)
    drawn = []
    for values in (now, before):
        data = np.asarray(values, np.float64)
        chosen = rng.integers(0, len(data), (_RESAMPLES, len(data)))
        drawn.append(np.median(data[chosen], axis=1))
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(drawn[0] / drawn[1], [tail, 100 - tail])
    value = statistics.median(now) / statistics.median(before)
    return Interval(value, float(low), float(high))


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
        repeats: Timed calls in a turn; None takes the plan's.
        settle: Calls before them that are not timed; None takes the plan's.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    repeats: int | None = None
    settle: int | None = None


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


def turns(
    variants: Sequence[Variant],
    plan: Plan,
    on_turn: Callable[[], object] = _nothing,
    clock: Callable[[], float] = time.perf_counter,
    on_error: Callable[[Variant, Exception], object] | None = None,
) -> dict[str, list[list[float]]]:
    """Time the variants in turns.

    Args:
        variants: Of different names.
        plan: How they take turns.
        on_turn: Called after each turn that counts.
        clock: Seconds.
        on_error: Called where a variant raises; it has no more turns then. None lets
            the exception through.

    Returns:
        Seconds of each variant: a list a round, with each timed call.
    """
    order = random.Random(plan.seed)  # noqa: S311 - nothing secret
    seconds: dict[str, list[list[float]]] = {one.name: [] for one in variants}
    left = list(variants)
    for number in range(-plan.warmup, plan.rounds):
        for variant in order.sample(left, len(left)):
            try:
                values = _turn(variant, plan, clock)
            except Exception as error:
                if on_error is None:
                    raise
                left.remove(variant)
                on_error(variant, error)
                continue
            if number >= 0:
                seconds[variant.name].append(values)
                on_turn()
    return seconds


def interleaved(
    variants: Sequence[Variant],
    plan: Plan,
    on_turn: Callable[[], object] = _nothing,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The median of each turn of :func:`turns`: one value a round."""
    found = turns(variants, plan, on_turn, clock)
    return {name: [statistics.median(v) for v in of] for name, of in found.items()}


def _turn(variant: Variant, plan: Plan, clock: Callable[[], float]) -> list[float]:
    variant.prepare()
    time.sleep(plan.pause)
    settle = plan.settle if variant.settle is None else variant.settle
    repeats = plan.repeats if variant.repeats is None else variant.repeats
    for _ in range(settle):
        variant.run()
    values = []
    for _ in range(repeats):
        begun = clock()
        variant.run()
        values.append(clock() - begun)
    return values


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
    from ..compare import compare

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


def rounded(values: Sequence[float]) -> list[float]:
    """Seconds to the microsecond, for a result file."""
    return [round(value, 6) for value in values]
