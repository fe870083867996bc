"""`audit`: what FR models decide about pictures made from templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_rig import QUICK, command, install, people

from id3pm_deploy.evaluation import audit as module
from id3pm_deploy.evaluation.audit import ANOTHER, ENROLLED, Acceptance, decisions
from id3pm_deploy.evaluation.similarity import cosines
from id3pm_deploy.images import read_mark

pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")

PEOPLE, SIDE = 20, 64


def views(rng: np.random.Generator, near: float, photos: int) -> module.Views:
    """What a system sees of pictures that are ``near`` their templates, two a person;
    0 is somebody else. Photos of a person are alike."""
    base = rng.normal(size=(PEOPLE, SIDE))
    real = np.repeat(base, photos, axis=0)
    real = real + 0.1 * rng.normal(size=real.shape)
    pictures = near * np.repeat(base, 2, axis=0) + rng.normal(size=(2 * PEOPLE, SIDE))
    return module.Views(real, pictures, real + 0.1 * rng.normal(size=real.shape))


def decided(found: list[Acceptance], photo: str, far: float) -> Acceptance:
    (one,) = [a for a in found if (a.photo, a.far) == (photo, far)]
    return one


def owners(photos: int) -> tuple[Any, Any]:
    return np.repeat(np.arange(PEOPLE), photos), np.repeat(np.arange(PEOPLE), 2)


def test_pictures_like_their_templates_are_accepted() -> None:
    found = decisions("fr", views(np.random.default_rng(0), 9.0, 2), *owners(2))
    for photo in (ENROLLED, ANOTHER):
        one = decided(found, photo, 0.01)
        assert one.accepted.value == one.reached.value == one.ceiling.value == 1
        assert one.chance == pytest.approx(0.01, abs=0.02)


def test_pictures_of_nobody_are_accepted_by_chance() -> None:
    found = decisions("fr", views(np.random.default_rng(1), 0.0, 2), *owners(2))
    for photo in (ENROLLED, ANOTHER):
        one = decided(found, photo, 0.1)
        assert one.accepted.low <= 0.1 <= one.accepted.high
        assert one.chance == pytest.approx(0.1, abs=0.05)
        # Two tries reach more people than one.
        assert one.reached.value > one.accepted.value
        assert one.ceiling.value == 1


def test_thresholds_follow_from_the_photos_alone() -> None:
    # 190 pairs of twenty people allow a rate of 0.01 and not of 0.001.
    rng = np.random.default_rng(2)
    seen = views(rng, 1.0, 1)
    found = decisions("fr", seen, *owners(1))
    assert [(one.photo, one.far) for one in found] == [
        (ENROLLED, 0.1),
        (ENROLLED, 0.01),
    ]
    pairs = cosines(seen.photos, seen.photos)[np.triu_indices(PEOPLE, 1)]
    assert (pairs > found[0].threshold).sum() == 19
    other = module.Views(seen.photos, rng.normal(size=seen.pictures.shape), seen.small)
    again = decisions("fr", other, *owners(1))
    assert [one.threshold for one in again] == [one.threshold for one in found]


def test_no_face_is_not_accepted() -> None:
    seen = views(np.random.default_rng(3), 9.0, 1)
    seen.pictures[::2] = np.nan
    one = decided(decisions("fr", seen, *owners(1)), ENROLLED, 0.1)
    assert (one.accepted.value, one.reached.value) == (0.5, 1)


def test_people_without_a_second_photo_are_left_out_of_type_two() -> None:
    photo_of = np.array([0, 0, *range(1, PEOPLE - 1), PEOPLE - 1, PEOPLE - 1])
    rng = np.random.default_rng(4)
    base = rng.normal(size=(PEOPLE, SIDE))
    seen = module.Views(base[photo_of], np.repeat(base, 2, axis=0), base[photo_of])
    seen.pictures[:2] = rng.normal(size=(2, SIDE))
    found = decisions("fr", seen, photo_of, np.repeat(np.arange(PEOPLE), 2))
    one = decided(found, ANOTHER, 0.01)
    assert one.accepted.value == one.reached.value == 0.5
    assert decided(found, ENROLLED, 0.01).accepted.value == pytest.approx(0.95)


@pytest.fixture
def arguments(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    install(monkeypatch, tiny_checkpoint)
    faces = people(tmp_path / "faces", 12, each=2)
    out = tmp_path / "out"
    return ["audit", "own", "--faces", faces, "--model", tiny_checkpoint, "--out", out]


def test_the_command(arguments: list[object], tmp_path: Path) -> None:
    done = command(*arguments, *QUICK, "--judge", "judge", "--count", "2")
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    names = {"audit.json", "audit.md", "audit.png", "index.html"}
    assert {path.name for path in out.iterdir()} == names
    found = json.loads((out / "audit.json").read_text())
    assert (found["people"], found["pictures"]) == (12, 24)
    assert found["systems"][1] == "judge"
    assert {a["photo"] for a in found["acceptances"]} == {ENROLLED, ANOTHER}
    assert all(a["ceiling"] == 1 for a in found["acceptances"])
    # Random weights make nobody: no more than chance, and the report says so.
    assert "More than chance was not shown" in done.stdout
    page = (out / "index.html").read_text()
    assert "More than chance was not shown" in page
    assert str(tmp_path) not in page + (out / "audit.md").read_text()
    assert not read_mark(out / "audit.png").composite


def test_another_fr_model_needs_a_model_of_its_own(
    arguments: list[object], tmp_path: Path
) -> None:
    arguments[1] = "other"
    done = command(*arguments, *QUICK)
    assert done.exit_code == 1
    assert "cannot be audited with this model" in done.output
    assert "train a model on its vectors" in done.output
    assert not (tmp_path / "out").exists()


def test_too_few_people_to_set_a_threshold(
    arguments: list[object], tmp_path: Path
) -> None:
    done = command(*arguments, *QUICK, "--limit", "3")
    assert done.exit_code == 0, done.output
    assert "3 people are too few to set a threshold" in done.stdout
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["acceptances"] == []
