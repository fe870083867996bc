"""How a head is turned, from five points; good for differences between pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..identity.alignment import ARCFACE_112, Points

Float64 = npt.NDArray[np.float64]

_DEPTH = np.array([0.0, 0.0, -16.8, -4.5, -4.5])
"""How far behind the eyes each point lies, in pixels of the ArcFace template, in which
the eyes are 35.2 apart: a nose tip 30 mm and mouth corners 8 mm before them, for 63 mm
between the eyes. Rounded sizes of an adult's face: a pose is off by the same for all
pictures of a person, which leaves differences."""
_HEAD = np.column_stack([ARCFACE_112, _DEPTH])
"""[5, 3]: x to the right, y down, z away from the camera; a face from the front."""


def head_rotation(points: npt.ArrayLike) -> Float64:
    """The rotation [3, 3] that turns a face from the front into this one.

    The scaled orthographic camera of least squares (DeMenthon & Davis 1995, section 3),
    its two rows made orthonormal by the nearest such pair.

    Args:
        points: [5, 2], pixels, from the detector.
    """
    seen = np.asarray(points, np.float64)
    head = _HEAD - _HEAD.mean(axis=0)
    rows = np.linalg.lstsq(head, seen - seen.mean(axis=0), rcond=None)[0].T
    u, _, vt = np.linalg.svd(rows, full_matrices=False)
    pair = u @ vt
    return np.vstack([pair, np.cross(pair[0], pair[1])])


def rotation_angles(rotations: Float64) -> Float64:
    """Degrees from each of n rotations [n, 3, 3] to each other one, [n, n]."""
    trace = np.einsum("aij,bij->ab", rotations, rotations)
    return np.asarray(np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1))))


def pose_distances(faces: Sequence[Points | None]) -> Float64:
    """Degrees between the heads of n pictures, [n, n]; NaN where there is no face."""
    known = [i for i, points in enumerate(faces) if points is not None]
    distances = np.full((len(faces), len(faces)), np.nan)
    if known:
        turned = np.stack([head_rotation(p) for p in faces if p is not None])
        distances[np.ix_(known, known)] = rotation_angles(turned)
    return distances
