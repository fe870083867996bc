"""Parity's identity gate: an engine must not make less of its people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from models import random_identity

from id3pm_deploy.cli import main
from id3pm_deploy.identity.vectors import identity_file, save_identities
from id3pm_deploy.models import open_model
from id3pm_deploy.parity import run
from id3pm_deploy.parity.identity import identity_drop
from id3pm_deploy.tolerances import IDENTITY_DROP, IDENTITY_SAMPLES

PAIRS = IDENTITY_SAMPLES
QUICK = ["--solver", "ddim", "--steps", "1", "--guidance", "1", "--count", "1"]


def scores(mean: float, spread: float = 0.1, count: int = PAIRS, seed: int = 0) -> Any:
    drawn = np.random.default_rng(seed).normal(0, spread, count)
    return (drawn - drawn.mean()) * (spread / drawn.std()) + mean


def test_an_equal_engine_passes() -> None:
    reference = scores(0.4)
    found = identity_drop("fr", reference, reference)
    assert (found.drop, found.upper, found.failure) == (0, 0, "")


def test_a_clear_drop_fails_and_an_equal_gain_passes() -> None:
    reference = scores(0.4)
    noise = scores(0, 0.01, seed=1)
    worse = identity_drop("fr", reference, reference - 0.01 + noise)
    assert worse.drop == pytest.approx(0.01)
    assert "less alike to their people by 0.0100" in worse.failure
    assert identity_drop("fr", reference, reference + 0.01 + noise).failure == ""


def test_the_bound_decides_and_not_the_mean() -> None:
    # A drop below what is allowed fails where it cannot be told from a larger one.
    reference, drop = scores(0.4), 0.7 * IDENTITY_DROP
    sure = identity_drop("fr", reference, reference - drop + scores(0, 0.001, seed=1))
    unsure = identity_drop("fr", reference, reference - drop + scores(0, 0.1, seed=1))
    assert sure.drop == pytest.approx(unsure.drop)
    assert sure.failure == ""
    assert unsure.failure
    error = 0.1 / np.sqrt(PAIRS)
    assert unsure.upper == pytest.approx(drop + 1.645 * error, abs=0.1 * error)


def test_pairing_takes_out_what_both_sides_share() -> None:
    reference = scores(0.4, 0.3)
    paired = identity_drop("fr", reference, reference + scores(0, 0.001, seed=1))
    assert paired.failure == ""
    assert identity_drop("fr", reference, scores(0.4, 0.3, seed=2)).failure


def test_faces_that_the_engine_loses_count() -> None:
    reference = scores(0.4)
    engine = reference.copy()
    engine[:10] = np.nan
    found = identity_drop("fr", reference, engine)
    assert (found.faces_reference, found.faces_engine) == (PAIRS, PAIRS - 10)
    assert found.drop == pytest.approx(reference[:10].sum() / PAIRS)
    assert found.failure


def test_what_cannot_be_judged_does_not_pass() -> None:
    nothing = np.full(PAIRS, np.nan)
    assert "too few to judge" in identity_drop("fr", nothing, nothing).failure
    few = scores(0.4, count=PAIRS - 1)
    assert "too few" in identity_drop("fr", few, few).failure


class Command:
    """`parity` of a CHECKPOINT against itself, judged by brightness."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        spec = open_model(checkpoint).spec
        who = identity_file(
            random_identity(3, spec), spec.identity.model_name, "0" * 64
        )
        save_identities(folder / "who.npz", who)
        self.arguments = ["parity", str(checkpoint), "--out", str(folder / "r"), *QUICK]
        self.arguments += ["--identity", str(folder / "who.npz"), "--judge", "fake"]
        self.out = folder / "r"
        self.seen: list[tuple[int, list[float]]] = []
        self.lost = 0.0

    def judge(self, spec: str, file: Any, raw: Any) -> Any:
        def of(pictures: Sequence[Any]) -> tuple[float, ...]:
            assert len(raw) == len(pictures)
            bright = [float(one.mean()) / 255 for one in pictures]
            self.seen.append((len(pictures), bright))
            # The engine's many pictures come last.
            lost = self.lost if len(self.seen) == 4 else 0.0
            return tuple(value - lost for value in bright)

        return of

    def run(self, *more: str) -> Any:
        return CliRunner().invoke(main, [*self.arguments, *more])


@pytest.fixture
def command(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Command:
    made = Command(tiny_checkpoint, tmp_path)
    monkeypatch.setattr(run, "_judge", made.judge)
    return made


def test_the_command_holds_the_engine_to_it(command: Command) -> None:
    result = command.run()
    assert result.exit_code == 0, result.output + result.stderr
    assert "identity similarity   drop 0.0000, at most 0.0000" in result.stdout
    counts = [count for count, _ in command.seen]
    assert counts == [258, 258, 3, 3]
    assert command.seen[0][1] == command.seen[1][1], "both sides see the same noise"
    assert len(set(command.seen[0][1])) > 200, "pictures are of different noise"
    found = json.loads((command.out / "parity.json").read_text())
    assert (found["passed"], found["identity_pairs"]) == (True, 258)
    for name in ("index.html", "parity.md"):
        assert "Over 258 pairs of pictures" in (command.out / name).read_text()


def test_an_engine_that_loses_identity_fails(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.lost = 0.01
    command.seen = [(0, [])] * 2  # so that the fourth call is the engine's
    result = command.run("--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["identity_drop"] == pytest.approx(0.01)
    assert found["identity_drop_upper"] == pytest.approx(0.01)
    assert found["identity_drop_limit"] == 0.005
    assert len(found["failures"]) == 1
    assert "less alike to their people" in result.stderr
    page = (command.out / "index.html").read_text()
    assert "FAIL" in page
    assert "identity similarity: drop, upper bound, 258 pairs" in page


def test_the_gate_can_be_left_out_but_not_made_small(command: Command) -> None:
    refused = command.run("--judge-samples", "255")
    assert refused.exit_code == 2
    assert "256" in refused.stderr
    assert not command.out.exists()
    result = command.run("--judge-samples", "0")
    assert result.exit_code == 0, result.output + result.stderr
    assert [count for count, _ in command.seen] == [3, 3]
    assert (
        json.loads((command.out / "parity.json").read_text())["identity_drop"] is None
    )
