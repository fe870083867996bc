"""Faces between two faces; landmarks are given here, MediaPipe is not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from id3pm_deploy.errors import FaceError, InputError, MissingPackageError
from id3pm_deploy.training.morphs import (
    Landmarked,
    Mixture,
    draw_morphs,
    mixtures,
    morph,
    read_faces,
    turned,
)

SIZE = 64


def points(shift: float = 0.0) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A ring of landmarks around the middle, and as many as MediaPipe numbers."""
    angles = np.linspace(0, 2 * np.pi, 468, endpoint=False)
    radii = np.where(np.arange(468) % 2, 20.0, 12.0)
    ring = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    found = ring + SIZE / 2 + shift
    found[1] = found[[234, 454]].mean(0)
    return found


def face(seed: int, shift: float = 0.0) -> Landmarked:
    """A smooth picture, so that resampling changes little."""
    small = np.random.default_rng(seed).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    large = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return Landmarked(np.asarray(large), points(shift))


def test_the_ends_are_the_two_faces() -> None:
    first, second = face(0), face(1, 3.0)
    same = morph(first, second, Mixture(0.0, 0.0, True))
    np.testing.assert_array_equal(same, first.rgb)
    other = morph(first, second, Mixture(1.0, 1.0, True))
    assert np.abs(other.astype(int) - second.rgb).max() <= 2
    assert np.abs(first.rgb.astype(int) - second.rgb).max() > 50


def test_points_move_to_where_they_are_asked() -> None:
    """A dot on a landmark is found where the second face has that landmark."""
    first, second = face(0), face(0, 4.0)
    dark = np.zeros_like(first.rgb)
    x, y = np.rint(first.points[234]).astype(int)
    dark[y - 1 : y + 2, x - 1 : x + 2] = 255
    moved = morph(Landmarked(dark, first.points), second, Mixture(1.0, 0.0, False))
    row, column = np.unravel_index(moved[..., 0].argmax(), (SIZE, SIZE))
    assert np.abs(np.array([column, row]) - second.points[234]).max() <= 2


def test_surroundings_stay_where_only_the_face_is_mixed() -> None:
    first, second = face(0), face(1)
    inner = morph(first, second, Mixture(0.0, 1.0, False)).astype(int)
    whole = morph(first, second, Mixture(0.0, 1.0, True)).astype(int)
    np.testing.assert_array_equal(inner[:4], first.rgb[:4])
    assert np.abs(inner[28:36, 28:36] - first.rgb[28:36, 28:36]).max() > 10
    np.testing.assert_array_equal(whole, second.rgb)
    ring = (slice(18, 46), slice(18, 46))
    means = [one[ring].mean() for one in (inner, whole, first.rgb)]
    assert abs(means[0] - means[2]) < 0.5 * abs(means[1] - means[2])


def test_pairs_look_the_same_way_and_follow_the_seed() -> None:
    turns = np.array([0.3, 0.32, 0.5, 0.51, 0.7])
    drawn = list(mixtures(turns, 300, 1))
    assert drawn == list(mixtures(turns, 300, 1)) != list(mixtures(turns, 300, 2))
    pairs = {(one, other) for one, other, _ in drawn}
    assert all(abs(turns[one] - turns[other]) < 0.06 for one, other in pairs)
    assert {(0, 1), (2, 3), (3, 2), (4, 4)} <= pairs
    assert len({how.whole for _, _, how in drawn}) == 2
    assert {how.skin == 0 for _, _, how in drawn} == {True, False}


def test_turned_is_the_nose_between_the_cheeks() -> None:
    assert turned(points()) == pytest.approx(0.5)


def test_morphs_are_written_whole_and_again_the_same(tmp_path: Path) -> None:
    faces = [face(0), face(1, 2.0), face(2, 1.0)]
    for name in ("one", "two"):
        draw_morphs(faces, tmp_path / name, 5, 7)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [f"{index:05d}.png" for index in range(5)]
    for name in names:
        one, two = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one == two
    assert np.asarray(Image.open(tmp_path / "one" / names[0])).shape == (SIZE, SIZE, 3)


def test_too_few_faces_and_missing_packages_are_named(tmp_path: Path) -> None:
    with pytest.raises(FaceError, match="at least two faces"):
        draw_morphs([face(0)], tmp_path / "out", 5, 0)
    assert not (tmp_path / "out").exists()
    with pytest.raises((MissingPackageError, InputError), match="MediaPipe"):
        read_faces([])
