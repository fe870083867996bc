"""Everything that is measured of pictures, beside chance and what real photos reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..benchmark.rounds import Interval
from ..errors import MissingPackageError
from ..identity.alignment import FaceDetector, Points
from ..identity.embedders import Embedder
from ..images import Pixels
from ..progress import progress
from .diversity import between, cosine_distances, diversity, fid_like
from .features import PerceptualFeatures
from .figures import Scores, chance_figures, identity_figures, paired_similarity
from .intervals import Indices
from .nearest import CLOSE, nearest_figures, nearest_training
from .people import Photos
from .pose import pose_distances
from .result import IDENTITY_METRICS, Change, Figure, Spread
from .similarity import (
    Float64,
    cosines,
    face_crops,
    face_vectors,
    find_faces,
    mean_vector,
)

FEWEST_PEOPLE = 8
"""Below this no Fréchet distance is stated."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """Pictures of one model: [n, S, S, 3] uint8, and the person [n] of each."""

    name: str
    pixels: Pixels
    own: Indices


@dataclass(frozen=True)
class Yardstick:
    """What pictures are held against.

    Attributes:
        detector: Finds faces.
        judges: FR models.
        photos: One of each person.
        noise: As many pictures of noise.
        training: What the model was trained on, if that is known.
    """

    detector: FaceDetector
    judges: tuple[Embedder, ...]
    photos: Photos
    noise: Pixels
    training: Photos | None = None


@dataclass
class Measured:
    """What was found so far."""

    figures: tuple[Figure, ...] = ()
    changes: tuple[Change, ...] = ()
    spreads: tuple[Spread, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Faces:
    """Where the faces are in every set of pictures."""

    subjects: tuple[list[Points | None], ...]
    photos: list[Points | None]
    noise: list[Points | None]


def measured(
    yardstick: Yardstick, subjects: Sequence[Subject], say: Say = lambda _: None
) -> Measured:
    """All figures of all subjects.

    Args:
        yardstick: What they are held against.
        subjects: Of the same samples, in one order.
        say: Called with a line for what cannot be measured.
    """
    found = Measured()
    faces = _find_all(yardstick, subjects)
    for judge in yardstick.judges:
        _judge(found, judge, yardstick, subjects, faces)
    _poses(found, yardstick, subjects, faces)
    try:
        features = PerceptualFeatures()
    except MissingPackageError as error:
        note = (
            f"Perceptual features and what follows from them: not measured; {error.fix}"
        )
        found.notes += (note,)
        say(note)
        return found
    found.facts["Perceptual features"] = features.name
    _perceptual(found, features, yardstick, subjects)
    return found


def _find_all(yardstick: Yardstick, subjects: Sequence[Subject]) -> _Faces:
    photos, noise = yardstick.photos.small, yardstick.noise
    sets = [*(list(one.pixels) for one in subjects), list(photos), list(noise)]
    with progress(sum(map(len, sets)), "finding faces") as tick:
        found = [find_faces(some, yardstick.detector, tick) for some in sets]
    return _Faces(tuple(found[:-2]), found[-2], found[-1])


def _judge(
    found: Measured,
    judge: Embedder,
    yardstick: Yardstick,
    subjects: Sequence[Subject],
    faces: _Faces,
) -> None:
    """Whose faces the pictures show, to one FR model."""
    photos = yardstick.photos
    sets = [
        (one.pixels, where) for one, where in zip(subjects, faces.subjects, strict=True)
    ]
    sets.append((photos.small, faces.photos))
    total = len(photos) + sum(len(pictures) for pictures, _ in sets)
    with progress(total, f"judging by {judge.name}") as tick:
        real = face_vectors(list(photos.crops[judge.size]), judge, on_done=tick)
        vectors = [
            face_vectors(face_crops(list(p), w, judge.size), judge, on_done=tick)
            for p, w in sets
        ]
    mean = mean_vector(real)
    owners = [*(one.own for one in subjects), np.arange(len(photos))]
    scores = [
        Scores(cosines(v, real, mean), own)
        for v, own in zip(vectors, owners, strict=True)
    ]
    ceiling = identity_figures(scores[-1])
    for one, score in zip(subjects, scores, strict=False):
        values, chance = identity_figures(score), chance_figures(score)
        found.figures += tuple(
            Figure(key, one.name, judge.name, values[key], chance[key], ceiling[key])
            for key in IDENTITY_METRICS
        )
        if judge is yardstick.judges[0]:
            seen = sum(points is not None for points in faces.noise) / len(faces.noise)
            detected = (values["detected"], seen, ceiling["detected"])
            found.figures += (Figure("detected", one.name, "", *detected),)
    for one, score in zip(subjects[1:], scores[1:-1], strict=True):
        change = paired_similarity((scores[0], score))
        found.changes += (Change(one.name, judge.name, change),)
    found.spreads += (_similarities(judge, subjects, scores),)


def _similarities(
    judge: Embedder, subjects: Sequence[Subject], scores: Sequence[Scores]
) -> Spread:
    series = {}
    for one, score in zip(subjects, scores, strict=False):
        series[f"{one.name}, own photo"] = _finite(score.cosines[score.mine])
    first = scores[0]
    series["other people's photos"] = _finite(first.cosines[~first.mine])
    series["photos at the model's resolution"] = _finite(
        scores[-1].cosines[scores[-1].mine]
    )
    return Spread(f"Similarity, judged by {judge.name}", "cosine", series)


def _poses(
    found: Measured, yardstick: Yardstick, subjects: Sequence[Subject], faces: _Faces
) -> None:
    ceiling = between(pose_distances(faces.photos))
    for one, where in zip(subjects, faces.subjects, strict=True):
        value = diversity(pose_distances(where), one.own)
        found.figures += (Figure("pose_diversity", one.name, "", value, 0.0, ceiling),)


def _perceptual(
    found: Measured,
    features: PerceptualFeatures,
    yardstick: Yardstick,
    subjects: Sequence[Subject],
) -> None:
    photos, noise = yardstick.photos.small, yardstick.noise
    total = sum(len(one.pixels) for one in subjects) + 2 * len(photos)
    with progress(total, "perceptual features") as tick:
        real = features(list(photos), tick)
        drawn = features(list(noise), tick)
        made = [features(list(one.pixels), tick) for one in subjects]
    ceiling = between(cosine_distances(real, real))
    for one, own in zip(subjects, made, strict=True):
        value = diversity(cosine_distances(own, own), one.own)
        found.figures += (
            Figure("perceptual_diversity", one.name, "", value, 0.0, ceiling),
        )
    _frechet(found, subjects, made, real, drawn)
    if yardstick.training is not None:
        _nearest(found, features, yardstick, subjects)


def _frechet(
    found: Measured,
    subjects: Sequence[Subject],
    made: Sequence[Float64],
    real: Float64,
    drawn: Float64,
) -> None:
    if len(real) < FEWEST_PEOPLE:
        found.notes += (f"FID-like: not measured below {FEWEST_PEOPLE} people.",)
        return
    ceiling, chance = fid_like(real, real), fid_like(drawn, real).value
    for one, features in zip(subjects, made, strict=True):
        first = np.searchsorted(one.own, np.arange(len(real)))
        value: Interval = fid_like(features[first], real)
        found.figures += (Figure("fid_like", one.name, "", value, chance, ceiling),)


def _nearest(
    found: Measured,
    features: PerceptualFeatures,
    yardstick: Yardstick,
    subjects: Sequence[Subject],
) -> None:
    """How near pictures come to what was trained on, beside photos that were not."""
    assert yardstick.training is not None
    kept = yardstick.training.small
    total = len(kept) + 2 * sum(len(one.pixels) for one in subjects)
    total += 4 * len(yardstick.photos)
    with progress(total, "training pictures") as tick:

        def counted(pictures: Sequence[Pixels]) -> Float64:
            return features(pictures, tick)

        training = counted(list(kept))
        photos, noise = (
            nearest_training(list(some), training, counted).distance
            for some in (yardstick.photos.small, yardstick.noise)
        )
        people = np.arange(len(photos))
        ceiling = nearest_figures(photos, people, photos)
        chance = nearest_figures(noise, people, photos)
        series = {}
        for one in subjects:
            near = nearest_training(list(one.pixels), training, counted).distance
            series[one.name] = near
            for key, value in nearest_figures(near, one.own, photos).items():
                limit = ceiling[key] if key == "nearest_training" else None
                low = chance[key].value
                found.figures += (Figure(key, one.name, "", value, low, limit),)
    series["photos at the model's resolution"] = photos
    title = "Distance to the nearest training picture"
    found.spreads += (Spread(title, "1 - cosine of perceptual features", series),)
    found.facts["Training pictures"] = f"{len(kept)}"
    if np.quantile(photos, CLOSE) < 1e-6:
        found.notes += (
            "Photos are among the training pictures, and nothing can be nearer: give "
            "photos of people who were not trained on.",
        )


def _finite(values: Float64) -> Float64:
    return values[np.isfinite(values)]
