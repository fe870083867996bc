"""`evaluate`, as a user runs it, on a model of random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from evaluation_rig import QUICK, command, install, people
from models import tiny_network, tiny_spec
from PIL import Image

from id3pm_deploy.commands.evaluate import engine_requests
from id3pm_deploy.evaluation import run
from id3pm_deploy.evaluation.result import METRICS
from id3pm_deploy.images import read_mark
from id3pm_deploy.reference.checkpoint import save_checkpoint

pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")

FILES = {"evaluation.json", "evaluation.md", "evaluation.png", "index.html"}


@pytest.fixture
def faces(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    install(monkeypatch, tiny_checkpoint)
    return people(tmp_path / "faces", 12)


def evaluated(faces: Path, out: Path, *more: object) -> Result:
    named = ["--faces", faces, "--judge", "judge", "--fr-model", "own", "--out", out]
    return command("evaluate", *more, *named, *QUICK)


def record(out: Path) -> Any:
    return json.loads((out / "evaluation.json").read_text())


def test_engine_and_reference_stand_side_by_side(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    out = tmp_path / "out"
    done = evaluated(faces, out, tiny_checkpoint, tiny_bundle, "--training", faces)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == FILES
    found = record(out)
    assert (found["people"], found["pictures"]) == (12, 24)
    assert len(found["models"]) == 2
    assert all(key in found and f"{key}_ceiling_low" in found for key in METRICS)
    # The photos are told apart at the model's size, and random pictures are nobody's.
    assert found["rank1_ceiling"] == 1
    assert found["rank1_chance"] == pytest.approx(1 / 12)
    assert found["rank1"] < 0.5
    assert found["detected"] == 1
    # On the same noise the two differ by rounding.
    (change,) = found["changes"]
    assert abs(change["similarity_change"]) < 1e-3
    assert change["similarity_change_low"] <= change["similarity_change_high"]
    assert any("among the training pictures" in note for note in found["notes"])


def test_everything_says_the_same(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    done = evaluated(faces, out, tiny_checkpoint, "--count", "3")
    found = record(out)
    rank1 = f"{found['rank1']:.3f} ({found['rank1_low']:.3f} to"
    page, text = (out / "index.html").read_text(), (out / "evaluation.md").read_text()
    for said in (done.stdout, page):
        assert rank1 in said
    assert rank1 in text.replace("\\", "")
    assert len(re.findall("<svg", page)) == 2
    assert str(faces) not in page + text + json.dumps(found)
    assert "://" not in page


def test_photos_are_shown_only_if_asked_for(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    wide = {}
    for name, more in (("without", []), ("with", ["--show-photos"])):
        out = tmp_path / name
        done = evaluated(faces, out, tiny_checkpoint, "--limit", "4", *more)
        assert done.exit_code == 0, done.output
        mark = read_mark(out / "evaluation.png")
        assert mark is not None
        assert mark.composite == bool(more)
        with Image.open(out / "evaluation.png") as sheet:
            wide[name] = sheet.width
    assert wide["with"] > wide["without"]


def test_a_run_repeats_itself_and_replaces_its_report(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    evaluated(faces, out, tiny_checkpoint, "--limit", "4", "--seed", "1")
    first = record(out)
    assert evaluated(faces, out, tiny_checkpoint, "--limit", "4").exit_code == 0
    other = record(out)
    evaluated(faces, out, tiny_checkpoint, "--limit", "4", "--seed", "1")
    assert record(out) == first
    assert other["similarity"] != first["similarity"]


def test_bundles_run_in_every_way_that_is_asked_for(
    faces: Path, tmp_path: Path, tiny_bundle: Path
) -> None:
    ways = ["--backend", "onnxruntime", "--backend", "torch", "--limit", "3"]
    out = tmp_path / "out"
    done = evaluated(faces, out, tiny_bundle, *ways, "--precision", "float32")
    assert done.exit_code != 0  # a bundle has no weights for PyTorch
    assert not out.exists()
    done = evaluated(faces, out, tiny_bundle, *ways[:2], *ways[4:])
    assert done.exit_code == 0, done.output
    assert len(record(out)["models"]) == 1


def test_a_model_that_enlarges(faces: Path, tmp_path: Path) -> None:
    spec = tiny_spec(low_res_size=8)
    save_checkpoint(tmp_path / "large", spec, tiny_network(spec).state_dict())
    done = evaluated(faces, tmp_path / "out", tmp_path / "large")
    assert done.exit_code == 2
    assert "it enlarges pictures that are given to it" in done.output
    assert not (tmp_path / "out").exists()


def test_no_judge(faces: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    out = tmp_path / "out"
    done = command("evaluate", tiny_checkpoint, "--faces", faces, "--out", out)
    assert done.exit_code == 2
    assert "--judge" in done.output


@pytest.mark.parametrize("wrong", ["settings", "second model", "training"])
def test_what_is_wrong_is_said_before_a_picture_is_made(
    faces: Path,
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
) -> None:
    def made(*_: object) -> None:
        raise AssertionError("a picture was made")

    monkeypatch.setattr(run, "make_pictures", made)
    nothing = tmp_path / "nothing"
    more: dict[str, list[object]] = {
        "settings": ["--guidance-interval", 1, 2],
        "second model": [nothing],
        "training": ["--training", nothing],
    }
    done = evaluated(faces, tmp_path / "out", tiny_checkpoint, *more[wrong])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code in (1, 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--judge", "judge"], "two judges are the same"),
        (["--fr-model", "other"], "another FR model"),
        (["--limit", "1"], "two are needed"),
        (["--backend", "onnxruntime"], "are for BUNDLEs"),
        (["--steps", "0"], "steps"),
        (["--count", "0"], "count"),
    ],
)
def test_what_cannot_be_evaluated(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path, more: list[str], says: str
) -> None:
    out = tmp_path / "out"
    named = ["--faces", faces, "--judge", "judge", "--fr-model", "own", "--out", out]
    done = command("evaluate", tiny_checkpoint, *named, *QUICK, *more)
    assert done.exit_code in (1, 2)
    assert says in done.output
    assert not out.exists()


def test_photos_that_cannot_be_used(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    Image.new("RGB", (64, 64)).save(faces / "nobody.png")
    (faces / "damaged.jpg").write_bytes(b"\xff\xd8\xff")
    out = tmp_path / "out"
    done = evaluated(faces, out, tiny_checkpoint)
    assert done.exit_code == 1
    for name in ("2 of 14", "nobody.png", "damaged.jpg", "--skip-bad"):
        assert name in done.output
    done = evaluated(faces, out, tiny_checkpoint, "--skip-bad")
    assert done.exit_code == 0, done.output
    assert record(out)["people"] == 12
    assert "nobody.png" not in (out / "index.html").read_text()


def test_a_folder_of_others_is_left_alone(
    faces: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    done = evaluated(faces, tmp_path / "mine", tiny_checkpoint)
    assert done.exit_code == 2
    assert "something else than an earlier report" in done.output
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_the_device_is_of_those_who_have_a_choice(
    tiny_checkpoint: Path, tiny_bundle: Path
) -> None:
    values = {"threads": 0, "trust": False, "device": "cuda:1", "precisions": ()}
    values["backends"] = ("onnxruntime", "onnxruntime-cuda")
    found = engine_requests((tiny_checkpoint, tiny_bundle), values)
    devices = [(one.backend, one.device) for one in found]
    assert devices == [
        ("auto", "cuda:1"),
        ("onnxruntime", "cpu"),
        ("onnxruntime-cuda", "cuda:1"),
    ]
