"""Draw people between the people of a folder, so that there are more to train on.

``python -m id3pm_deploy.training.morphs FACES OUT --count N`` reads aligned faces and
writes morphs: the shape of a face moved towards another one's or past it, its skin
mixed with the other's. To an FR model these are people of their own. The landmarks are
MediaPipe's (Kartynnik et al. 2019), whose last release with the face mesh inside,
0.10.21, needs NumPy 1, so it wants an environment of its own:

    pip install 'mediapipe==0.10.21' 'numpy<2' pillow click
    pip install --no-deps id3pm-deploy
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import numpy.typing as npt

from ..errors import FaceError, InputError, MissingPackageError
from ..files import atomic_path, make_folder
from ..progress import progress

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Picture = npt.NDArray[np.uint8]

SIZE = 128
_MESH_POINTS = 468
_LEFT, _NOSE, _RIGHT = 234, 1, 454  # cheek, tip, cheek, in MediaPipe's numbering
_SAME_POSE = 0.06
_FOLD = 1e-3  # twice the area, in square pixels, below which a triangle is a line
_SUBPIXELS = 4


@dataclass(frozen=True)
class Landmarked:
    """A face and where its parts are.

    Attributes:
        rgb: uint8 [S, S, 3].
        points: [n, 2] float64, x and y in pixels.
    """

    rgb: Picture
    points: Float64


@dataclass(frozen=True)
class Mixture:
    """How one face is made of two.

    Attributes:
        shape: 0 is the first face's, 1 the second's; from 1 on it is overdrawn.
        skin: Share of the second face's colours, from 0 to 1.
        whole: Mix hair and surroundings as well, or the inner face alone.
    """

    shape: float
    skin: float
    whole: bool


def morph(first: Landmarked, second: Landmarked, mixture: Mixture) -> Picture:
    """A face between two, uint8 [S, S, 3].

    Both are warped, triangle by triangle, to the points between theirs; the edge of
    the picture stays. Where only the inner face is mixed, the second one's colours
    are first moved to the mean of the first one's.
    """
    size = len(first.rgb)
    edge = _edge(size)
    inner = (1 - mixture.shape) * first.points + mixture.shape * second.points
    points = np.concatenate([inner, edge])
    triangles = _triangles(points, size)
    ours = _warped(first, edge, points, triangles)
    if not mixture.skin:
        return _to_bytes(ours)
    theirs = _warped(second, edge, points, triangles)
    share: Float32 | float = mixture.skin
    if not mixture.whole:
        mask = _face_mask(inner, size)
        inside = mask[..., 0] > 0.5
        theirs = theirs + ours[inside].mean(0) - theirs[inside].mean(0)
        share = mixture.skin * mask
    return _to_bytes((1 - share) * ours + share * theirs)


def _to_bytes(pixels: Float32) -> Picture:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _edge(size: int) -> Float64:
    """Sixteen points around the picture."""
    steps = np.linspace(0, size - 1, 5)
    return np.array([(x, y) for x in steps for y in steps if {x, y} & {0, size - 1}])


def _triangles(points: Float64, size: int) -> npt.NDArray[np.int64]:
    """Delaunay triangles [k, 3] of points, as their indices."""
    import cv2

    inside = np.clip(points, 0, size - 1).astype(np.float32)
    plane = cv2.Subdiv2D((0, 0, size, size))
    known = {}
    for index, (x, y) in enumerate(inside.tolist()):
        known[plane.insert((x, y))] = index
    corners = np.asarray(plane.getTriangleList()).reshape(-1, 3, 2)
    by_place = {
        tuple(plane.getVertex(vertex)[0]): index for vertex, index in known.items()
    }
    found = [[by_place.get(tuple(c)) for c in t.tolist()] for t in corners]
    return np.array([t for t in found if None not in t], dtype=np.int64)


def _warped(
    face: Landmarked, edge: Float64, points: Float64, triangles: npt.NDArray[np.int64]
) -> Float32:
    """The face, float32 [S, S, 3], with its points moved to ``points``."""
    import cv2

    size = len(face.rgb)
    own = np.concatenate([face.points, edge])[triangles]
    moved = points[triangles]
    system = np.concatenate([moved, np.ones((*moved.shape[:2], 1))], axis=2)
    affine = np.tile(np.eye(3, 2), (len(triangles), 1, 1))
    open_ones = np.abs(np.linalg.det(system)) > _FOLD
    affine[open_ones] = np.linalg.solve(system[open_ones], own[open_ones])
    label = np.zeros((size, size), np.int32)
    scale = 1 << _SUBPIXELS
    for index, corners in enumerate(np.rint(moved * scale).astype(np.int32)):
        cv2.fillConvexPoly(label, corners, index, shift=_SUBPIXELS)
    y, x = np.mgrid[:size, :size].astype(np.float64)
    places = np.stack([x, y, np.ones_like(x)], axis=-1)[..., None, :] @ affine[label]
    from_x, from_y = places[..., 0, :].astype(np.float32).transpose(2, 0, 1)
    warped = cv2.remap(
        face.rgb, from_x, from_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    return cast(Float32, warped.astype(np.float32))


def _face_mask(points: Float64, size: int) -> Float32:
    """1 on the inner face, 0 around it, softly between; float32 [S, S, 1]."""
    import cv2

    mask = np.zeros((size, size), np.float32)
    hull = cv2.convexHull(points.astype(np.float32))
    cv2.fillConvexPoly(mask, np.rint(hull).astype(np.int32), 1.0)
    thin = max(size // 16, 1)
    eroded = cv2.erode(mask, np.ones((thin, thin), np.float32))
    return cast(Float32, cv2.GaussianBlur(eroded, (0, 0), size / 32))[..., None]


def mixtures(
    turns: Float64, count: int, seed: int
) -> Iterator[tuple[int, int, Mixture]]:
    """Which two faces make each morph, and how; a pure function of its arguments.

    The two look into about the same direction.

    Args:
        turns: [n], how each face is turned (see :func:`turned`).
        count: Number of morphs.
        seed: Of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    for _ in range(count):
        one = int(rng.integers(len(turns)))
        near = np.flatnonzero(np.abs(turns - turns[one]) < _SAME_POSE)
        other = int(rng.choice(near))
        kind, place = rng.random(), rng.random()
        if kind < 0.3:  # one's skin over the other's features
            yield one, other, Mixture(0.5 + 0.7 * place, 0.0, False)
        else:
            skin = rng.uniform(0.3, 1.0 if kind < 0.8 else 0.7)
            yield one, other, Mixture(place, skin, kind >= 0.8)


def turned(points: Float64) -> float:
    """Where the tip of the nose lies between the cheeks: 0.5 looks ahead."""
    across = points[_RIGHT, 0] - points[_LEFT, 0]
    return float((points[_NOSE, 0] - points[_LEFT, 0]) / across)


def read_faces(paths: Sequence[Path]) -> list[Landmarked]:
    """The faces in pictures and in their mirror images; those without one are left out.

    Raises:
        MissingPackageError: MediaPipe with the face mesh is not installed.
        InputError: A picture cannot be read.
    """
    from ..identity.embed import read_photo

    faces = []
    with _face_mesh() as mesh, progress(len(paths), "faces") as tick:
        for path in paths:
            rgb = _square(read_photo(path))
            for one in (rgb, np.ascontiguousarray(rgb[:, ::-1])):
                points = _landmarks(one, mesh)
                if points is not None:
                    faces.append(Landmarked(one, points))
            tick()
    return faces


def _face_mesh() -> Any:
    try:
        face_mesh: Any = importlib.import_module("mediapipe.python.solutions.face_mesh")
    except ImportError as error:
        raise MissingPackageError(
            "MediaPipe's face mesh cannot be imported",
            why=str(error),
            fix="pip install 'mediapipe==0.10.21' 'numpy<2', in an environment of its "
            "own",
        ) from error
    return face_mesh.FaceMesh(
        static_image_mode=True, max_num_faces=1, min_detection_confidence=0.3
    )


def _square(rgb: Picture) -> Picture:
    import cv2

    if rgb.shape[0] != rgb.shape[1]:
        raise InputError(
            "morphs are made of square pictures of aligned faces",
            why=f"one is {rgb.shape[1]}x{rgb.shape[0]}",
        )
    how = cv2.INTER_AREA if len(rgb) > SIZE else cv2.INTER_CUBIC
    return cast(Picture, cv2.resize(rgb, (SIZE, SIZE), interpolation=how))


def _landmarks(rgb: Picture, mesh: Any) -> Float64 | None:
    """[468, 2] in pixels; the mesh finds more in a picture with a margin."""
    import cv2

    size = len(rgb)
    large = cv2.resize(rgb, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    padded = cv2.copyMakeBorder(large, size, size, size, size, cv2.BORDER_REFLECT)
    found = mesh.process(padded).multi_face_landmarks
    if not found:
        return None
    marks = [(mark.x, mark.y) for mark in found[0].landmark[:_MESH_POINTS]]
    return (np.array(marks) * len(padded) - size) / 2


def draw_morphs(faces: Sequence[Landmarked], out: Path, count: int, seed: int) -> None:
    """Write ``count`` morphs as PNG files of 128x128 pixels into ``out``.

    Raises:
        FaceError: There are fewer than two faces.
        OutputError: A file cannot be written.
    """
    from PIL import Image

    if len(faces) < 2:
        raise FaceError(
            "morphs need at least two faces", why=f"{len(faces)} were found"
        )
    make_folder(out)
    turns = np.array([turned(face.points) for face in faces])
    with progress(count, "morphs") as tick:
        for index, (one, other, how) in enumerate(mixtures(turns, count, seed)):
            picture = Image.fromarray(morph(faces[one], faces[other], how))
            with atomic_path(out / f"{index:05d}.png") as temporary:
                picture.save(temporary, format="PNG")
            tick()


@click.command()
@click.argument("faces", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--count", default=10_000, show_default=True, help="Morphs to draw.")
@click.option("--seed", default=0, show_default=True)
def main(faces: Path, out: Path, count: int, seed: int) -> None:
    """Write morphs of the aligned faces in FACES to OUT."""
    from .pictures import picture_paths

    found = read_faces(picture_paths(faces))
    draw_morphs(found, out, count, seed)
    click.echo(f"{count} morphs of {len(found)} faces, mirror images included")


if __name__ == "__main__":
    main()
