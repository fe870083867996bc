"""What the benchmarks share: statistics, turns, checks and result files."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.benchmark import rounds as shared_rounds
from id3pm_deploy.errors import InputError, ParityError

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
harness: Any = importlib.import_module("harness")
machine: Any = importlib.import_module("machine")

ENVELOPE = {
    "benchmark",
    "tool_version",
    "command",
    "date",
    "commit",
    "changed",
    "machine",
    "versions",
    "load",
    "rounds",
    "settings",
    "measured",
}


# Statistics


def test_the_median_and_its_interval_do_not_depend_on_the_order() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 2.5, 1.5, 2.2]
    found = harness.median_interval(values)
    assert found.value == 2.2
    assert 1.0 <= found.low < found.value < found.high <= 10.0
    assert harness.median_interval(values) == found


def test_equal_values_leave_no_doubt() -> None:
    assert harness.median_interval([4.0] * 20) == harness.Interval(4.0, 4.0, 4.0)


def test_one_value_has_no_interval() -> None:
    with pytest.raises(InputError, match="at least two"):
        harness.median_interval([1.0])


@pytest.mark.parametrize("rounds", [20, 40])
def test_the_interval_holds_the_true_median_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    monkeypatch.setattr(shared_rounds, "_RESAMPLES", 1000)
    rng = np.random.default_rng(5)
    trials = 400
    # As machines are: a floor, and a long tail above it. The true median is 2.
    hits = 0
    for _ in range(trials):
        found = harness.median_interval(1 + rng.lognormal(0.0, 0.5, rounds))
        hits += found.low <= 2.0 <= found.high
    assert 0.91 <= hits / trials <= 0.985


def test_a_ratio_is_taken_within_each_round() -> None:
    speed = np.linspace(1.0, 9.0, 21)  # the machine slows down ninefold meanwhile
    found = harness.ratio_interval(1.2 * speed, speed)
    assert (found.value, found.low, found.high) == pytest.approx((1.2, 1.2, 1.2))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.009, "met"),
        (0.005, 0.02, "undecided"),
        (-0.02, 0.02, "undecided"),
        (0.02, 0.03, "missed"),
    ],
)
def test_a_goal_is_met_only_if_the_whole_interval_meets_it(
    low: float, high: float, expected: str
) -> None:
    found = harness.Interval((low + high) / 2, low, high)
    assert harness.verdict(found, 0.01) == expected


# Turns


class Machine:
    """A clock that only work moves, and who worked when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def variant(self, name: str, cost: Callable[[], float]) -> Any:
        """A variant that takes ``cost()`` seconds."""

        def run() -> None:
            self.calls.append(name)
            self.now += cost()

        return harness.Variant(name, run, lambda: self.calls.append("prepare " + name))


def test_every_variant_has_one_turn_in_each_round_in_a_changing_order() -> None:
    work = Machine()
    variants = [work.variant(name, lambda: 1.0) for name in "abc"]
    plan = harness.Plan(rounds=12, repeats=2, settle=1, pause=0.0, warmup=1, seed=3)
    seconds = harness.interleaved(variants, plan, clock=lambda: work.now)
    turns = [call for call in work.calls if call.startswith("prepare")]
    turns = [turn.removeprefix("prepare ") for turn in turns]
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 13
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    expected = [call for turn in turns for call in (f"prepare {turn}", *[turn] * 3)]
    assert work.calls == expected
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        "abc", 12
    )


def test_the_order_follows_from_the_seed() -> None:
    def order(seed: int) -> list[str]:
        work = Machine()
        variants = [work.variant(name, lambda: 1.0) for name in "abcd"]
        harness.interleaved(variants, harness.Plan(5, pause=0.0, seed=seed))
        return work.calls

    assert order(1) == order(1) != order(2)


def test_a_machine_that_slows_down_does_not_favour_who_went_first() -> None:
    work = Machine()
    variants = [
        work.variant("slow", lambda: 1.10 * (1 + work.now / 50)),
        work.variant("fast", lambda: 1.00 * (1 + work.now / 50)),
    ]
    plan = harness.Plan(rounds=30, repeats=1, settle=0, pause=0.0)
    seconds = harness.interleaved(variants, plan, clock=lambda: work.now)
    assert max(seconds["fast"]) > 2 * min(seconds["fast"])
    found = harness.ratio_interval(seconds["slow"], seconds["fast"])
    assert found.low <= 1.10 <= found.high
    assert found.value == pytest.approx(1.10, abs=0.03)


def test_the_call_that_settles_and_one_hiccup_are_not_counted() -> None:
    work = Machine()
    costs = iter([9.0, 1.0, 7.0, 1.0] * 6)
    variants = [work.variant("only", lambda: next(costs))]
    plan = harness.Plan(rounds=5, repeats=3, settle=1, pause=0.0)
    seconds = harness.interleaved(variants, plan, clock=lambda: work.now)
    assert seconds["only"] == [1.0] * 5


# Checks


def test_a_wrong_output_is_refused_and_named() -> None:
    right = np.linspace(-1, 1, 10, dtype=np.float32)
    wrong = right.copy()
    wrong[3] += 1e-4
    assert harness.checked("x", {"out": right}, {"out": right}, 1e-5) == 0.0
    with pytest.raises(ParityError, match="planted computes another out"):
        harness.checked("planted", {"out": wrong}, {"out": right}, 1e-5)
    wrong[3] = np.nan
    with pytest.raises(ParityError):
        harness.checked("planted", {"out": wrong}, {"out": right}, 1.0)


# Files


def _result(rounds: int) -> Any:
    load = machine.Watch().stop()
    return harness.result("a test", rounds, {"k": 1}, load, ("numpy", "no-such"), {})


def test_a_result_says_what_it_was_measured_on(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    script = str(root / "benchmarks" / "cold_start.py")
    bundle = str(root / "somewhere" / "my.bundle")
    monkeypatch.setattr(sys, "argv", [script, "--bundle", bundle, f"--name={bundle}"])
    found = _result(20)
    assert set(found) == ENVELOPE
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["no-such"] is None
    assert set(found["machine"]) >= {"processor", "cores", "governor", "virtual"}
    assert set(found["load"]) == {"before", "after", "others", "stolen"}
    assert found["command"] == (
        "python benchmarks/cold_start.py --bundle my.bundle --name=my.bundle"
    )
    text = json.dumps(found, allow_nan=False)
    assert str(root) not in text
    assert str(Path.home()) not in text


@pytest.mark.parametrize(("rounds", "kept"), [(19, False), (20, True)])
def test_a_dry_run_is_printed_and_not_kept(
    rounds: int, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _result(rounds)
    harness.publish(found, "name", tmp_path / "results")
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == found
    path = tmp_path / "results" / "name.json"
    assert path.is_file() == kept
    assert ("dry run" in "\n".join(printed)) != kept
    if kept:
        assert json.loads(path.read_text("utf-8")) == found


def test_a_busy_machine_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = _result(20)
    found["load"]["others"] = 0.4
    harness.publish(found, "name", tmp_path)
    assert "other processes took 40% of the cores" in capsys.readouterr().out


def test_the_shares_of_the_cores_are_shares() -> None:
    watch = machine.Watch()
    sum(range(1_000_000))
    load = watch.stop()
    assert load.others is not None
    assert -0.01 <= load.others <= 1.5
    assert load.stolen is not None
    assert 0 <= load.stolen <= 1.5


def test_other_results_do_not_make_a_commit_doubtful(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    script = results.parent / "script.py"
    script.write_text("measure()\n")
    (results / "a.json").write_text("{}\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {"commit": None, "changed": None}
    who = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "one")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (results / "a.json").write_text('{"more": 1}\n')
    (results / "b.json").write_text("{}\n")
    found = machine.commit()
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    script.write_text("measure(twice)\n")
    assert machine.commit()["changed"] is True
