"""Percentiles, intervals and turns of a benchmark, on numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from id3pm_deploy.benchmark.rounds import (
    Plan,
    Variant,
    change_interval,
    percentile_interval,
    turns,
)
from id3pm_deploy.errors import EngineError, InputError


def test_percentiles_of_known_values() -> None:
    rounds = np.random.default_rng(0).permutation(np.arange(1000.0)).reshape(100, 10)
    for percent in (50, 90, 99):
        found = percentile_interval(rounds.tolist(), percent)
        assert found is not None
        assert found.value == pytest.approx(np.percentile(np.arange(1000), percent))
        assert found.low < found.value < found.high
        assert found.high - found.low < 150


def test_an_interval_of_a_percentile_knows_that_a_round_shares_its_luck() -> None:
    rng = np.random.default_rng(1)
    alone = rng.normal(100, 5, (400, 1)).tolist()
    shared = np.repeat(rng.normal(100, 5, (20, 1)), 20, axis=1).tolist()
    wide, narrow = percentile_interval(shared, 50), percentile_interval(alone, 50)
    assert wide is not None
    assert narrow is not None
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)


@pytest.mark.parametrize(
    ("rounds", "repeats", "stated"),
    [(1, 200, ()), (3, 3, (50,)), (9, 11, (50, 90)), (20, 5, (50, 90, 99))],
)
def test_a_percentile_without_enough_values_is_not_stated(
    rounds: int, repeats: int, stated: tuple[int, ...]
) -> None:
    values = [[1.0] * repeats] * rounds
    found = [p for p in (50, 90, 99) if percentile_interval(values, p) is not None]
    assert tuple(found) == stated


def test_the_change_between_two_runs() -> None:
    rng = np.random.default_rng(2)
    before = rng.lognormal(0, 0.05, 30).tolist()
    again = rng.lognormal(0, 0.05, 30).tolist()
    slower = (1.3 * rng.lognormal(0, 0.05, 30)).tolist()
    same, worse = change_interval(again, before), change_interval(slower, before)
    assert same.low < 1 < same.high
    assert 1.2 < worse.low < 1.3 < worse.high < 1.4
    with pytest.raises(InputError, match="at least two"):
        change_interval([1.0], before)


def test_a_variant_that_dies_has_no_more_turns_and_leaves_the_others() -> None:
    now, died = [0.0], []

    def works(cost: float) -> Variant:
        def run() -> None:
            now[0] += cost

        return Variant(f"costs {cost:g}", run, repeats=2)

    def dies() -> None:
        now[0] += 1
        if now[0] > 20:
            raise EngineError("out of memory")

    variants = [works(1.0), Variant("dies", dies, settle=0, repeats=1), works(3.0)]
    plan = Plan(rounds=8, repeats=1, settle=1, warmup=0, pause=0)
    found = turns(
        variants,
        plan,
        clock=lambda: now[0],
        on_error=lambda variant, error: died.append((variant.name, str(error))),
    )
    assert died == [("dies", "out of memory")]
    assert found["costs 1"] == [[1.0, 1.0]] * 8
    assert found["costs 3"] == [[3.0, 3.0]] * 8
    assert 0 < len(found["dies"]) < 8
    with pytest.raises(EngineError):
        turns([Variant("dies", dies)], plan)
