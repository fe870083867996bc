"""The paper's measure of whose face a picture shows, to an FR model.

A face and its mirror image are embedded and put one behind the other, the mean vector
of the photos is subtracted, and two faces are as far apart as the angle between them
(ID3PM's evaluation, which follows the protocol of FaceNet's public implementation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import FaceError
from ..identity.alignment import FaceDetector, Points, align
from ..identity.embedders import Embedder
from ..images import Pixels

Float64 = npt.NDArray[np.float64]


def find_faces(
    pictures: Sequence[Pixels],
    detector: FaceDetector,
    on_done: Callable[[], object] = lambda: None,
) -> list[Points | None]:
    """The five points [5, 2] of each picture's widest face; None where there is none.

    Args:
        pictures: [H, W, 3] uint8 each.
        detector: At its own threshold.
        on_done: Called after each picture.
    """
    found: list[Points | None] = []
    for picture in pictures:
        try:
            found.append(detector.find_face(picture, largest=True).points)
        except FaceError:
            found.append(None)
        on_done()
    return found


def face_crops(
    pictures: Sequence[Pixels], faces: Sequence[Points | None], size: int
) -> list[Pixels | None]:
    """The faces as an FR model takes them, [size, size, 3] uint8; None for no face.

    Args:
        pictures: [H, W, 3] uint8 each.
        faces: Their points, from :func:`find_faces`.
        size: The FR model's own.
    """
    pairs = zip(pictures, faces, strict=True)
    return [None if p is None else align(picture, p, size) for picture, p in pairs]


def face_vectors(
    crops: Sequence[Pixels | None],
    embedder: Embedder,
    *,
    mirrored: bool = True,
    on_done: Callable[[], object] = lambda: None,
) -> Float64:
    """Unit vectors of aligned faces, [n, D]; with their mirror images' behind them,
    [n, 2D], each half of norm 1. NaN where there is no face.

    Args:
        crops: From :func:`face_crops`.
        embedder: The FR model that judges.
        mirrored: Embed the mirror image of each crop, too.
        on_done: Called after each crop.
    """
    views = 2 if mirrored else 1
    rows = np.full((len(crops), views * embedder.dim), np.nan)
    for row, crop in zip(rows, crops, strict=True):
        if crop is not None:
            both = np.stack([crop, crop[:, ::-1]][:views])
            vectors = embedder.embed(np.ascontiguousarray(both)).astype(np.float64)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            row[:] = vectors.reshape(-1)
        on_done()
    return rows


def mean_vector(photos: Float64) -> Float64:
    """The mean of the photos' vectors [m, D] that are known: what is subtracted.

    It is taken over the photos alone, so that what a model makes cannot move it.
    """
    return np.asarray(np.nanmean(photos, axis=0))


def cosines(pictures: Float64, photos: Float64, mean: Float64 | None = None) -> Float64:
    """Cosine of each picture with each photo, [n, m]; NaN where either is unknown.

    Args:
        pictures: [n, D].
        photos: [m, D].
        mean: [D], subtracted from all; None: nothing is.
    """
    shift = 0.0 if mean is None else mean
    sides = []
    for vectors in (pictures, photos):
        moved = vectors - shift
        length = np.linalg.norm(moved, axis=1, keepdims=True)
        sides.append(moved / np.where(length == 0, 1, length))
    return np.asarray(np.clip(sides[0] @ sides[1].T, -1, 1))


def angular_distance(cosine: npt.ArrayLike) -> Float64:
    """The angle that belongs to a cosine, as a share of half a turn: 0 is the same
    direction, 0.5 unrelated, 1 opposite."""
    exact = np.asarray(cosine, np.float64)
    return np.asarray(np.arccos(np.clip(exact, -1, 1)) / np.pi)
