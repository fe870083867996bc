"""The shipped checkpoint, from a photo to pictures of that person, as a user would."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image

from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.cli import main
from id3pm_deploy.identity.alignment import FaceDetector
from id3pm_deploy.identity.embedders import load_embedder
from id3pm_deploy.identity.similarity import picture_similarity
from id3pm_deploy.identity.vectors import check_identities, load_identities
from id3pm_deploy.images import read_mark
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.shipped import shipped_checkpoint, shipped_identities

_LIMIT = 12_000_000


def _people() -> Path:
    found = importlib.util.find_spec("openpeople")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package openpeople")
    return Path(next(iter(found.submodule_search_locations))) / "data" / "curated"


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def _pictures(folder: Path) -> list[npt.NDArray[np.uint8]]:
    return [np.asarray(Image.open(p)) for p in sorted(folder.glob("sample-*.png"))]


def test_the_checkpoint_is_small_whole_and_described() -> None:
    folder = shipped_checkpoint()
    assert sum(p.stat().st_size for p in folder.iterdir()) <= _LIMIT
    loaded = load_checkpoint(folder)
    assert loaded.spec.identity.model_name == "sface"
    card = (folder / "README.md").read_text()
    assert loaded.weights_sha256 in card
    assert str(loaded.spec.origin["steps"]) in card.replace(",", "")


def test_the_shipped_identities_fit_the_checkpoint() -> None:
    file = load_identities(shipped_identities())
    spec = load_checkpoint(shipped_checkpoint()).spec.identity
    assert len(file) >= 3
    check_identities(
        file,
        dim=spec.dim,
        model_name=spec.model_name,
        model_sha256=spec.model_sha256,
    )
    assert load_embedder("sface").sha256 == spec.model_sha256


@pytest.mark.slow
def test_demo_from_photo_to_parity_page(tmp_path: Path) -> None:
    _people()
    out = tmp_path / "demo"
    result = json.loads(_run("demo", "--out", out, "--json"))
    assert result["parity_passed"] is True
    assert (out / "overview.png").is_file()
    pictures = _pictures(out / "pictures")
    assert len(pictures) == 6
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    mark = read_mark(out / "pictures" / "sample-00000.png")
    assert mark.backend == "onnxruntime"
    parity = json.loads((out / "parity" / "parity.json").read_text())
    assert parity["passed"] is True
    assert parity["final_max_rel"] <= 1e-4
    assert parity["oracle_max_rel"] <= 1e-4
    assert len(parity["identity_engine"]) == 3
    bundle = open_bundle(out / "bundle")
    bundle.verify()
    assert bundle.manifest.engines[0].self_test_error is not None

    # The pictures look like the person, and more so than like other people.
    file = load_identities(out / "identity.npz")
    others = load_identities(shipped_identities())
    detector, fr = FaceDetector(), load_embedder("sface")

    def mean_similarity(vector: Any) -> float:
        judge = picture_similarity(np.repeat(vector[None], 6, axis=0), fr, detector)
        return float(np.nanmean(judge(pictures)))

    own = mean_similarity(file.vectors[0])
    cosines = [
        float(np.dot(v, file.vectors[0]))
        / float(np.linalg.norm(v) * np.linalg.norm(file.vectors[0]))
        for v in others.vectors
    ]
    strangers = [v for v, c in zip(others.vectors, cosines, strict=True) if c < 0.5]
    assert len(strangers) >= 2
    assert own > max(mean_similarity(vector) for vector in strangers)


def test_the_demo_does_not_touch_a_folder_of_yours(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine.txt").write_text("keep me")
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "something else than an earlier demo" in result.stderr
    assert (tmp_path / "pictures" / "mine.txt").read_text() == "keep me"


@pytest.mark.slow
def test_training_from_real_photos(tmp_path: Path) -> None:
    root = _people()
    faces = tmp_path / "faces"
    faces.mkdir()
    for person in ("P003", "P004", "P005"):
        photo = Image.open(root / person / "assets" / "studio_portrait.jpg")
        photo.resize((512, 512)).save(faces / f"{person}.png")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(faces / "no-face.png")
    out = tmp_path / "mine"
    small = ["--image-size", "16", "--channel-multipliers", "1,1", "--steps", "2"]
    small += ["--attention-resolutions", "", "--batch-size", "4"]
    result = json.loads(_run("train", faces, "--out", out, *small, "--json"))
    assert (result["faces"], result["skipped"]) == (3, 1)
    spec = load_checkpoint(out).spec
    assert spec.identity.dim == 128
    assert spec.identity.model_sha256 == load_embedder("sface").sha256
    work = tmp_path / "mine.training"
    assert {p.name for p in work.iterdir()} == {
        "faces",
        "log.jsonl",
        "settings.json",
        "sheet-0000002.png",
        "state.safetensors",
    }
    _run("train", faces, "--out", out, *small, "--steps", "3", "--resume")
