"""Evaluation's arithmetic: figures whose values are known beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.errors import InputError
from id3pm_deploy.evaluation.diversity import (
    between,
    cosine_distances,
    diversity,
    fid_like,
    frechet_distance,
    mean_within,
)
from id3pm_deploy.evaluation.figures import (
    Scores,
    auc,
    chance_figures,
    identity_figures,
    paired_similarity,
    rank1,
    tar_at,
    threshold_at,
    verified,
)
from id3pm_deploy.evaluation.intervals import bootstrap, jackknife, upper_bound
from id3pm_deploy.evaluation.nearest import nearest_figures, nearest_training
from id3pm_deploy.evaluation.pose import head_rotation, pose_distances, rotation_angles
from id3pm_deploy.evaluation.similarity import (
    angular_distance,
    cosines,
    face_crops,
    face_vectors,
    find_faces,
    mean_vector,
)
from id3pm_deploy.identity.alignment import ARCFACE_112
from id3pm_deploy.identity.embedders import Embedder


def scores(people: int, each: int, own: float, other: float, spread: float) -> Scores:
    """Normal cosines around ``own`` and ``other``."""
    rng = np.random.default_rng(0)
    whose = np.repeat(np.arange(people), each)
    values = rng.normal(other, spread, (len(whose), people))
    values[np.arange(len(whose)), whose] += own - other
    return Scores(values, whose)


class Columns(Embedder):
    """Brightness of the left, the middle and the right third."""

    name, sha256 = "columns", None

    @property
    def dim(self) -> int:
        return 3

    def _forward(self, aligned: Any) -> Any:
        thirds = np.array_split(aligned.astype(float), 3, axis=2)
        return np.stack([part.mean(axis=(1, 2, 3)) for part in thirds], axis=1)


class TestSimilarity:
    def faces(self) -> tuple[list[Any], list[Any]]:
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (112, 112, 3), np.uint8) for _ in range(3)]
        pictures[0][:, :40] = 255
        return pictures, [ARCFACE_112, ARCFACE_112, None]

    def test_a_mirror_image_follows_the_picture(self) -> None:
        pictures, faces = self.faces()
        crops = face_crops(pictures, faces, 112)
        found = face_vectors(crops, Columns())
        assert found.shape == (3, 6)
        assert np.linalg.norm(found[0, :3]) == pytest.approx(1)
        assert found[0, 0] > found[0, 2]
        # The columns swap sides in the mirror; the middle one stays.
        assert found[0, 3:] == pytest.approx(found[0, 2::-1], abs=0.02)
        assert np.isnan(found[2]).all()
        alone = face_vectors(crops, Columns(), mirrored=False)
        assert np.array_equal(alone[:2], found[:2, :3])

    def test_the_mean_is_subtracted(self) -> None:
        photos = np.array([[3.0, 1.0], [1.0, 3.0], [np.nan, np.nan]])
        mean = mean_vector(photos)
        assert mean.tolist() == [2, 2]
        found = cosines(photos, photos[:2], mean)
        assert found[:2] == pytest.approx(np.array([[1, -1], [-1, 1]]))
        assert np.isnan(found[2]).all()
        assert cosines(photos[:1], photos[1:2])[0, 0] == pytest.approx(0.6)

    def test_angles_are_shares_of_half_a_turn(self) -> None:
        found = angular_distance([1, 0, -1, math.cos(math.pi / 4), 1.0000001])
        assert found == pytest.approx([0, 0.5, 1, 0.25, 0])

    def test_a_picture_without_a_face(self) -> None:
        class Detector:
            def find_face(self, picture: Any, *, largest: bool) -> Any:
                from id3pm_deploy.errors import FaceError

                assert largest
                if not picture.any():
                    raise FaceError("no face")
                return type("Face", (), {"points": ARCFACE_112})

        pictures = [np.zeros((8, 8, 3), np.uint8), np.ones((8, 8, 3), np.uint8)]
        found = find_faces(pictures, Detector())  # type: ignore[arg-type]
        assert found[0] is None
        assert found[1] is ARCFACE_112


class TestVerification:
    def test_auc_by_hand(self) -> None:
        assert auc(np.array([0.9, 0.4]), np.array([0.1, 0.4, 0.8])) == (1 + 0.5) / 2
        assert auc(np.array([1.0]), np.array([0.0])) == 1

    def test_auc_of_normals_is_the_known_one(self) -> None:
        found = scores(60, 6, 0.2, 0.0, 0.1)
        # P(N(0.2, 0.1) > N(0, 0.1)) = Φ(0.2 / (0.1 √2))
        known = 0.5 * (1 + math.erf(0.2 / (0.1 * math.sqrt(2)) / math.sqrt(2)))
        assert auc(found.filled[found.mine], found.filled[~found.mine]) == (
            pytest.approx(known, abs=0.02)
        )

    def test_the_threshold_lets_no_more_than_its_share_pass(self) -> None:
        impostor = np.arange(100) / 100
        for far in (0.1, 0.01, 0.5):
            limit = threshold_at(impostor, far)
            assert (impostor > limit).mean() == pytest.approx(far)
        assert tar_at(np.array([0.895, 0.9, 0.2]), impostor, 0.1) == pytest.approx(
            2 / 3
        )
        assert math.isnan(tar_at(np.array([0.9]), impostor, 0.001))
        # Equal scores cannot be told apart: none of them is let in.
        assert tar_at(np.array([0.5, 0.6]), np.full(100, 0.5), 0.1) == 0.5

    def test_accuracy_uses_thresholds_of_other_people(self) -> None:
        found = scores(20, 2, 0.8, 0.0, 0.05)
        assert verified(found).all()
        # One person's pictures are as unlike as strangers; that person alone is wrong.
        values = found.cosines.copy()
        values[:2, 0] = 0.0
        right = verified(Scores(values, found.own))
        assert not right[:2, 0].any()
        assert right[2:].all()

    def test_thresholds_do_not_see_the_people_they_judge(self) -> None:
        # Pure noise: a threshold chosen on the judged pairs would beat a coin.
        found = identity_figures(scores(60, 2, 0.0, 0.0, 1.0))["accuracy"]
        assert found.low < 0.5 < found.high

    def test_rank1_by_hand(self) -> None:
        values = np.array([[0.9, 0.1], [0.3, 0.2], [0.5, 0.5], [np.nan, np.nan]])
        assert rank1(Scores(values, np.array([0, 1, 0, 1]))) == 0.25

    def test_a_picture_without_a_face_is_nobody(self) -> None:
        good = scores(10, 2, 0.9, 0.0, 0.01)
        values = good.cosines.copy()
        values[::2] = np.nan
        found = identity_figures(Scores(values, good.own))
        assert found["detected"].value == 0.5
        assert found["rank1"].value == 0.5
        # An undetected genuine pair is below all pairs but the undetected impostors.
        assert found["auc"].value == pytest.approx(0.5 + 0.5 * 0.25)
        assert found["similarity"].value == pytest.approx(0.9, abs=0.01)
        assert found["tar_at_far_0_1"].value == 0.5
        nothing = Scores(np.full((4, 2), np.nan), np.array([0, 0, 1, 1]))
        empty = identity_figures(nothing)
        assert math.isnan(empty["similarity"].value)
        assert empty["rank1"].value == empty["detected"].value == 0

    def test_random_pictures_are_at_chance(self) -> None:
        noise = scores(40, 4, 0.0, 0.0, 0.1)
        found, chance = identity_figures(noise), chance_figures(noise)
        assert set(chance) == set(found) - {"detected"}
        for name, value in chance.items():
            one = found[name]
            if not math.isnan(one.value):
                slack = 0.01
                assert one.low - slack <= value <= one.high + slack, name
        assert chance["rank1"] == 1 / 40
        assert chance["angular_distance"] == pytest.approx(0.5, abs=0.01)

    def test_perfect_pictures(self) -> None:
        found = identity_figures(scores(30, 2, 0.9, 0.0, 0.05))
        for name in ("auc", "accuracy", "rank1", "detected", "tar_at_far_0_01"):
            assert (found[name].low, found[name].high) == (1, 1)
        assert found["similarity"].low < 0.9 < found["similarity"].high

    def test_pairs_of_sides(self) -> None:
        first = scores(20, 3, 0.5, 0.0, 0.2)
        values = first.cosines - 0.01
        gain = paired_similarity([first, Scores(values, first.own)])
        assert (gain.value, gain.low, gain.high) == pytest.approx((-0.01,) * 3)
        values[0] = np.nan
        lost = paired_similarity([first, Scores(values, first.own)])
        own = first.cosines[0, 0]
        assert lost.value == pytest.approx((-0.01 * 59 - own) / 60)
        with pytest.raises(InputError, match="same samples"):
            paired_similarity([first, first.take(np.arange(30))])

    def test_scores_that_do_not_fit(self) -> None:
        for shape, own in (
            ((2, 3), [0]),
            ((1, 1), [0]),
            ((2, 2), [0, 2]),
            ((0, 3), []),
        ):
            with pytest.raises(InputError):
                Scores(np.zeros(shape), np.array(own, int))


class TestIntervals:
    def test_a_bootstrap_knows_the_error_of_a_mean(self) -> None:
        values = np.random.default_rng(1).normal(3, 1, 400)
        found = bootstrap(lambda r: {"m": float(values[r].mean())}, np.arange(400))["m"]
        assert found.value == values.mean()
        error = values.std() / 20
        assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)

    def test_people_are_drawn_and_not_pictures(self) -> None:
        # Ten equal pictures a person say no more than one.
        values = np.random.default_rng(1).normal(0, 1, 50)
        one = bootstrap(lambda r: {"m": float(values[r].mean())}, np.arange(50))["m"]
        ten, owner = np.repeat(values, 10), np.repeat(np.arange(50), 10)
        same = bootstrap(lambda r: {"m": float(ten[r].mean())}, owner)["m"]
        assert (same.low, same.high) == pytest.approx((one.low, one.high))

    def test_the_jackknife_knows_it_too(self) -> None:
        values = np.random.default_rng(2).normal(0, 1, 200)
        found = jackknife(lambda rows: float(values[rows].mean()), np.arange(200))
        error = values.std(ddof=1) / math.sqrt(200)
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.6)
        assert found.value == values.mean()

    def test_the_upper_bound_is_of_one_side(self) -> None:
        values = np.random.default_rng(3).normal(0.01, 0.05, 1000)
        error = values.std() / math.sqrt(1000)
        found = upper_bound(values)
        assert found == pytest.approx(values.mean() + 1.645 * error, abs=0.1 * error)
        assert upper_bound(np.full(5, 0.25)) == 0.25

    def test_too_few(self) -> None:
        for few in (np.zeros(5, int), np.zeros(0, int)):
            with pytest.raises(InputError, match="two people"):
                bootstrap(lambda r: {}, few)
        with pytest.raises(InputError, match="two pairs"):
            upper_bound([0.1])

    def test_what_a_draw_cannot_tell_is_left_out(self) -> None:
        values = np.array([1.0, 1.0, np.nan])
        found = bootstrap(lambda r: {"m": float(values[r].mean())}, np.arange(3))["m"]
        assert (found.low, found.high) == (1, 1)


class TestDiversity:
    def test_distances_within_people(self) -> None:
        distances = np.array([[0, 2, 9, 9], [2, 0, 9, 9], [9, 9, 0, 4], [9, 9, 4, 0.0]])
        own = np.array([0, 0, 1, 1])
        assert mean_within(distances, own).tolist() == [2, 4]
        found = diversity(distances, own)
        assert found is not None
        assert (found.value, found.low, found.high) == (3, 2, 4)
        distances[2, 3] = distances[3, 2] = np.nan
        assert np.isnan(mean_within(distances, own)[1])
        assert diversity(distances, np.arange(4)) is None

    def test_distances_between_people(self) -> None:
        distances = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0.0]])
        found = between(distances)
        assert found is not None
        assert found.value == 2

    def test_cosine_distances(self) -> None:
        ones = np.array([[2.0, 0], [0, 3]])
        found = cosine_distances(ones, np.array([[1.0, 0], [-1, 0], [1, 1]]))
        assert found == pytest.approx(
            np.array([[0, 2, 1 - 0.5**0.5], [1, 1, 1 - 0.5**0.5]])
        )

    def test_frechet_against_the_matrix_square_root(self) -> None:
        rng = np.random.default_rng(0)
        ones, others = rng.normal(0, 1, (50, 6)), rng.normal(0.5, 2, (40, 6))
        c1, c2 = np.cov(ones.T), np.cov(others.T)
        values, vectors = np.linalg.eigh(c1)
        half = vectors * np.sqrt(values) @ vectors.T
        root = np.sqrt(np.linalg.eigvalsh(half @ c2 @ half)).sum()
        gap = ((ones.mean(0) - others.mean(0)) ** 2).sum()
        known = gap + np.trace(c1) + np.trace(c2) - 2 * root
        assert frechet_distance(ones, others) == pytest.approx(known)
        assert frechet_distance(ones, ones) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(ones, ones + 2.0) == pytest.approx(24)

    def test_photos_of_other_people_are_what_a_distance_is_held_against(self) -> None:
        rng = np.random.default_rng(0)
        photos = rng.normal(0, 1, (40, 100))
        itself = fid_like(photos, photos)
        # Fewer pictures than features: far from 0, though nothing is different.
        assert itself.value > 50
        fresh = fid_like(rng.normal(0, 1, (40, 100)), photos)
        assert fresh.low < itself.value < fresh.high
        moved = fid_like(photos + 1, photos)
        assert moved.value == pytest.approx(itself.value + 100, rel=0.05)
        assert moved.low > itself.high
        alike = fid_like(np.repeat(photos[:1], 40, axis=0), photos)
        assert alike.value > itself.value
        with pytest.raises(InputError, match="eight people"):
            fid_like(photos[:7], photos[:7])


class TestPose:
    @staticmethod
    def turned(yaw: float, pitch: float, roll: float) -> Any:
        angles = np.radians([yaw, pitch, roll])
        (cy, cp, cr), (sy, sp, sr) = np.cos(angles), np.sin(angles)
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        return about_z @ about_x @ about_y

    def test_a_known_pose_is_found(self) -> None:
        from id3pm_deploy.evaluation.pose import _HEAD

        for pose in ((0, 0, 0), (30, 0, 0), (-20, 15, 5), (10, -25, 40)):
            rotation = self.turned(*pose)
            points = 0.4 * (_HEAD @ rotation.T)[:, :2] + [100, 30]
            found = head_rotation(points)
            assert found == pytest.approx(rotation, abs=1e-9)

    def test_the_template_looks_ahead(self) -> None:
        assert head_rotation(ARCFACE_112) == pytest.approx(np.eye(3), abs=1e-9)

    def test_degrees_between_poses(self) -> None:
        poses = np.stack([self.turned(a, 0, 0) for a in (0, 10, -25)])
        known = np.array([[0, 10, 25], [10, 0, 35], [25, 35, 0]])
        assert rotation_angles(poses) == pytest.approx(known, abs=1e-5)
        found = pose_distances([ARCFACE_112, None, ARCFACE_112 * 2 + 5])
        assert found[0, 2] == pytest.approx(0, abs=1e-5)
        assert np.isnan(found[1]).all()


class TestNearest:
    @staticmethod
    def features(pictures: Any) -> Any:
        """Left half and right half."""
        return np.array([[p[:, :4].mean(), p[:, 4:].mean()] for p in pictures])

    def pictures(self) -> list[Any]:
        made = np.zeros((3, 8, 8, 3), np.uint8)
        made[0, :, :4], made[1, :, 4:], made[2] = 200, 100, 50
        return list(made)

    def test_a_copy_is_found_and_so_is_its_mirror_image(self) -> None:
        left, right, both = self.pictures()
        training = self.features([both, left])
        found = nearest_training([both, left, right], training, self.features)
        assert found.index.tolist() == [0, 1, 1]
        assert found.distance == pytest.approx([0, 0, 0])
        alone = nearest_training([left], self.features([both]), self.features)
        assert alone.distance == pytest.approx([1 - 0.5**0.5])

    def test_remembering_shows(self) -> None:
        rng = np.random.default_rng(0)
        photos, own = rng.normal(1, 0.1, 100), np.arange(100)
        fresh = nearest_figures(rng.normal(1, 0.1, 100), own, photos)["nearest_close"]
        assert fresh.low <= 0.05 <= fresh.high
        copied = nearest_figures(rng.normal(0.2, 0.1, 100), own, photos)
        assert copied["nearest_close"].low > 0.9
        assert copied["nearest_training"].value == pytest.approx(0.2, abs=0.05)
