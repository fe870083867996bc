"""Directions in identity space: found, kept, gone along; files nobody vouches for."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from id3pm_deploy.cli import main
from id3pm_deploy.errors import IdentityError, InputError
from id3pm_deploy.identity.directions import (
    Directions,
    load_directions,
    principal_directions,
    save_directions,
    separating_direction,
)
from id3pm_deploy.identity.vectors import IdentityFile, identity_file, save_identities

MODEL = "model of a test", "ab" * 32
AXES = np.eye(8)


def crowd(count: int, shift: float = 0.0, seed: int = 0) -> IdentityFile:
    """People around one point who differ most along axis 1, then along axis 2; with a
    shift along axis 3."""
    drawn = np.random.default_rng(seed).normal(size=(count, 8))
    spread = drawn * [0, 0.2, 0.1, 0.02, 0.02, 0.02, 0.02, 0.02]
    vectors = 3 * (AXES[0] + spread + shift * AXES[3])
    return identity_file(vectors.astype(np.float32), *MODEL)


def test_principal_directions_are_where_people_differ() -> None:
    found, shares = principal_directions(crowd(200), 2)
    assert found.names == ("pc1", "pc2")
    assert abs(found.vectors[0] @ AXES[1]) > 0.99
    assert abs(found.vectors[1] @ AXES[2]) > 0.99
    assert np.abs(found.vectors).max(axis=1) == pytest.approx(found.vectors.max(axis=1))
    assert found.spread == pytest.approx([0.2, 0.1], rel=0.15)
    assert shares[0] > 3 * shares[1] > 0.3
    assert 0.9 < sum(shares) < 1
    again, _ = principal_directions(crowd(200), 2)
    assert again.digest == found.digest


def test_a_strength_is_in_standard_deviations_and_length_stays() -> None:
    found, _ = principal_directions(crowd(200), 2)
    vector = 5 * AXES[0]
    moved = found.moved(vector, {"pc1": 2.0, "pc2": -1.0})
    chord = AXES[0] + 2 * found.spread[0] * found.vectors[0]
    chord = chord - found.spread[1] * found.vectors[1]
    assert moved == pytest.approx(5 * chord / np.linalg.norm(chord))
    assert found.moved(vector, {"pc1": 0.0}) == pytest.approx(vector)
    with pytest.raises(InputError, match="no direction 'pc7'") as error:
        found.moved(vector, {"pc7": 1.0})
    assert "pc1, pc2" in error.value.fix
    here = dataclasses.replace(found, spread=np.ones(2, np.float32))
    with pytest.raises(InputError, match="cancel the identity"):
        here.moved(found.vectors[0], {"pc1": -1.0})


@pytest.mark.parametrize(("people", "count"), [(2, 1), (5, 5), (5, 0), (30, 9)])
def test_there_are_only_so_many(people: int, count: int) -> None:
    with pytest.raises(InputError, match="principal directions cannot be found"):
        principal_directions(crowd(people), count)


def test_people_who_are_alike_differ_in_no_direction() -> None:
    same = identity_file(np.ones((4, 8), np.float32), *MODEL)
    with pytest.raises(InputError, match="differ in fewer than 1"):
        principal_directions(same, 1)


class TestSeparating:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("sklearn")

    def test_it_leads_to_those_with_the_trait(self) -> None:
        found, score = separating_direction(
            crowd(60, 0.1), crowd(30, -0.1, seed=1), "glasses"
        )
        assert found.names == ("glasses",)
        assert found.vectors[0] @ AXES[3] > 0.95
        assert score > 0.95

    def test_where_nothing_parts_them_the_score_is_chance(self) -> None:
        _, score = separating_direction(crowd(60), crowd(60, seed=1), "nothing")
        assert 0.3 < score < 0.7

    def test_the_command(self, tmp_path: Path) -> None:
        save_identities(tmp_path / "a.npz", crowd(20, 0.1))
        save_identities(tmp_path / "b.npz", crowd(20, -0.1, seed=1))
        given = ["a.npz", "b.npz", "--out", "d.npz"]
        where = [str(tmp_path / g) if g.endswith("npz") else g for g in given]
        done = CliRunner().invoke(main, ["control", "svm", *where, "--name", "hat"])
        assert done.exit_code == 0, done.output
        assert "hat: balanced accuracy" in done.output
        assert load_directions(tmp_path / "d.npz").names == ("hat",)


def test_too_few_or_the_same_people_are_refused() -> None:
    people = crowd(5)
    with pytest.raises(InputError, match="at least three people on each side"):
        separating_direction(people, crowd(2, seed=1), "x")
    with pytest.raises(InputError, match="nobody on both"):
        separating_direction(people, people, "x")
    other = identity_file(people.vectors, "another", None)
    with pytest.raises(IdentityError, match="another FR model"):
        separating_direction(people, other, "x")


def test_the_command_for_principal_directions(tmp_path: Path) -> None:
    people, out = tmp_path / "people.npz", tmp_path / "d.npz"
    save_identities(people, crowd(20))
    asked = ["control", "pca", str(people), "--out", str(out), "--count", "2"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    assert done.output.count("of the variance") == 2
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    found = load_directions(out)
    assert found.digest == principal_directions(crowd(20), 2)[0].digest
    assert (found.model_name, found.model_sha256) == MODEL


def test_directions_of_another_model_are_refused() -> None:
    found, _ = principal_directions(crowd(20), 1)
    found.check_model(8, *MODEL)
    with pytest.raises(IdentityError, match="found with another FR model"):
        found.check_model(8, MODEL[0], "cd" * 32)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vectors": np.ones((1, 8), np.float32)}, "not of length 1"),
        ({"vectors": np.full((1, 8), np.nan, np.float32)}, "NaN"),
        ({"vectors": AXES[:1]}, "not float32"),
        ({"names": np.array(["a", "b"])}, "one for each name"),
        ({"names": np.array(["a=b"])}, "has a ="),
        ({"names": np.array(["\x1b[2J"])}, "printable"),
        ({"names": np.array([1])}, "names is not text"),
        ({"spread": np.zeros(1, np.float32)}, "not a positive number"),
        ({"format_version": np.int64(9)}, "not version 1"),
        ({"model_name": None}, "it has no model_name"),
    ],
)
def test_damaged_files(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    found = Directions(
        AXES[:1].astype(np.float32), ("a",), np.ones(1, np.float32), *MODEL
    )
    save_directions(tmp_path / "good.npz", found)
    with np.load(tmp_path / "good.npz") as file:
        arrays = {**file, **changes}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    assert load_directions(tmp_path / "good.npz").digest == found.digest
    with pytest.raises(IdentityError, match="cannot be used") as error:
        load_directions(tmp_path / "bad.npz")
    assert why in error.value.why
    with pytest.raises(IdentityError, match="cannot be used"):
        load_directions(tmp_path / "none.npz")
