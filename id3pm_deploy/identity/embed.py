"""Photos to identity vectors."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageOps

from ..errors import FaceError, InputError
from ..files import open_plain
from .alignment import MIN_FACE, FaceDetector, Image, align
from .embedders import Embedder
from .vectors import Float32Array, IdentityFile, identity_file

MAX_PIXELS = 100_000_000
MAX_SCANS = 100
_BAND = 256  # rows
_BATCH = 64  # faces that an FR model gets at once
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow without its warnings about large pictures, whose limit is ours, and
    without its log of what is odd in a file; errors still come."""
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def read_photo(path: Path) -> Image:
    """A picture file as uint8 RGB [H, W, 3], upright as its EXIF data says.

    Args:
        path: JPEG, PNG, WebP, BMP, TIFF, GIF (first picture) or PPM, of at most
            100 megapixels. Transparent parts come out white.

    Raises:
        InputError: It is missing, no picture, damaged or too large.
    """
    try:
        with open_plain(path, follow=True) as handle:
            return _photo_from_stream(handle, str(path))
    except FileNotFoundError as error:
        raise InputError(f"photo {path} does not exist") from error
    except OSError as error:
        raise _unreadable(str(path), error) from error


def photo_from_bytes(data: bytes, name: str) -> Image:
    """The same as :func:`read_photo`, for a file's bytes.

    Args:
        data: The bytes.
        name: How messages call the picture.
    """
    return _photo_from_stream(io.BytesIO(data), name)


def check_header(data: bytes, name: str) -> None:
    """Look at a picture without decoding it.

    Raises:
        InputError: It is none, too large, or damaged as far as that can be seen.
    """
    try:
        with quiet_pillow(), Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(*picture.size)
            picture.verify()
    except Exception as error:  # Pillow's decoders raise almost anything
        raise _unreadable(name, error) from error


def _photo_from_stream(handle: BinaryIO, name: str) -> Image:
    try:
        with quiet_pillow():
            if _scans(handle) > MAX_SCANS:
                raise ValueError(f"it has more than {MAX_SCANS} scans")
            with Pillow.open(handle, formats=FORMATS) as picture:
                _check_size(*picture.size)
                return _rgb_from_picture(picture)
    except Exception as error:  # Pillow's decoders raise almost anything on bad data
        raise _unreadable(name, error) from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"it is {width}x{height} pixels")


def _scans(handle: BinaryIO) -> int:
    """Scans of a JPEG file, 0 of another; the file is rewound.

    A progressive JPEG may have any number of them, some bytes each, and each is work
    on all pixels.
    """
    found, last = 0, handle.read(2)
    if last == b"\xff\xd8":
        while chunk := handle.read(1 << 20):
            found += (last[-1:] + chunk).count(b"\xff\xda")
            last = chunk
    handle.seek(0)
    return found


def _unreadable(name: str, error: Exception) -> InputError:
    why = getattr(error, "strerror", None) or str(error).split(" <")[0]
    return InputError(
        f"{name} cannot be read as a photo",
        why=why or type(error).__name__,
        fix="give a complete JPEG, PNG or WebP of at most 100 megapixels",
    )


def _rgb_from_picture(picture: Any) -> Image:
    """Upright RGB, made band by band: a large picture is not held several times."""
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    width, height = picture.size
    rgb = np.empty((height, width, 3), dtype=np.uint8)
    for top in range(0, height, _BAND):
        band = picture.crop((0, top, width, min(top + _BAND, height)))
        rgb[top : top + _BAND] = _rgb_from_band(band)
    return rgb


def _rgb_from_band(band: Any) -> npt.NDArray[Any]:
    """RGB; 16-bit grey is scaled, transparency put on white."""
    if band.mode.startswith("I;16"):
        return (np.asarray(band, dtype=np.uint16) >> 8)[:, :, None]
    if band.mode in ("RGBA", "LA", "PA") or "transparency" in band.info:
        coloured = band.convert("RGBA")
        white = Pillow.new("RGBA", coloured.size, "white")
        band = Pillow.alpha_composite(white, coloured)
    return np.asarray(band.convert("RGB"))


def embed_images(
    images: Sequence[Image],
    embedder: Embedder,
    detector: FaceDetector,
    *,
    largest: bool = False,
    min_size: float = MIN_FACE,
    names: Sequence[str] | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> Float32Array:
    """Find, align and embed the face of each picture.

    Args:
        images: n pictures, uint8 RGB [H, W, 3], sizes may differ.
        embedder: The FR model.
        detector: The face detector.
        largest: Take the widest of several faces instead of refusing.
        min_size: Smallest width of a face in pixels.
        names: How messages call the pictures.
        on_done: Called after each picture.

    Returns:
        float32 [n, D], raw.

    Raises:
        FaceError: A picture has no face, several or a too small one.
        IdentityError: The FR model's answer is unusable.
    """
    crops = []
    for index, rgb in enumerate(images):
        name = names[index] if names else f"picture {index}"
        face = detector.find_face(rgb, largest=largest, min_size=min_size, name=name)
        crops.append(align(rgb, face.points, embedder.size))
        on_done()
    return embed_crops(crops, embedder)


def embed_crops(crops: Sequence[Image], embedder: Embedder) -> Float32Array:
    """Vectors [n, D], raw, of aligned faces, which the FR model gets in batches.

    Raises:
        IdentityError: The FR model's answer is unusable.
    """
    if not crops:
        return np.zeros((0, embedder.dim), dtype=np.float32)
    batches = range(0, len(crops), _BATCH)
    rows = [embedder.embed(np.stack(crops[i : i + _BATCH])) for i in batches]
    return np.concatenate(rows)


def embed_photos(
    paths: Sequence[Path],
    embedder: Embedder,
    detector: FaceDetector,
    *,
    largest: bool = False,
    average: bool = False,
    min_size: float = MIN_FACE,
    skip_bad: bool = False,
    tell: Callable[[str], object] = lambda _: None,
    on_done: Callable[[], object] = lambda: None,
) -> IdentityFile:
    """The identity file of some photos; nothing about the photos is in it.

    Args:
        paths: Photos, at least one. One at a time is held in memory; the FR model is
            not asked before all of them have been looked at.
        embedder: The FR model.
        detector: The face detector.
        largest: Take the widest of several faces instead of refusing.
        average: The photos show one person: combine them into one vector, see
            :func:`average_identity`.
        min_size: Smallest width of a face in pixels.
        skip_bad: Leave out and tell what would be refused.
        tell: Called with each line about photos that are left out, or that show the
            same picture as an earlier one; of such ones an average takes one.
        on_done: Called after each photo.

    Returns:
        One vector a photo in the order given, or one in all, with random ids.

    Raises:
        InputError: No photo, one cannot be read, or several cannot be used: all of
            them are named.
        FaceError: A photo has no face, several or a too small one.
        IdentityError: The FR model's answer is unusable.
    """
    if not paths:
        raise InputError("no photo was given", fix="name at least one")
    crops: list[Image] = []
    bad: list[InputError | FaceError] = []
    first: dict[str, Path] = {}
    for path in paths:
        try:
            rgb = read_photo(path)
            face = detector.find_face(
                rgb, largest=largest, min_size=min_size, name=str(path)
            )
        except (InputError, FaceError) as error:
            bad.append(error)
        else:
            same = first.setdefault(pixels_sha256(rgb), path)
            if same is not path:
                tell(f"{path} is the same picture as {same}")
            if same is path or not average:
                crops.append(align(rgb, face.points, embedder.size))
        on_done()
    _check_bad(bad, len(paths), skip_bad, tell)
    vectors = embed_crops(crops, embedder)
    if average:
        vectors = average_identity(vectors)
    return identity_file(vectors, embedder.name, embedder.sha256)


def _check_bad(
    bad: Sequence[InputError | FaceError],
    total: int,
    skip_bad: bool,
    tell: Callable[[str], object],
) -> None:
    """Refuse photos that cannot be used, or tell which are left out."""
    lines = [f"{error.what}: {error.why}" if error.why else error.what for error in bad]
    if len(bad) == total or (bad and not skip_bad):
        if total == 1 or len(bad) == 1:
            raise bad[0]
        raise InputError(
            f"{len(bad)} of {total} photos cannot be used",
            why="; ".join(lines),
            fix="give others, or leave them out with --skip-bad",
        )
    for line in lines:
        tell(f"not used: {line}")


def pixels_sha256(rgb: Image) -> str:
    """SHA-256 of a picture's pixels, uint8 [H, W, 3], whatever file it came from."""
    return hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()


def average_identity(vectors: npt.ArrayLike) -> Float32Array:
    """One vector for several pictures of a person.

    The direction is the mean of the unit vectors', so that no picture counts more for
    its length; the length is the mean length, so that the result still looks raw to a
    checkpoint that takes raw vectors. One vector comes back unchanged.

    Args:
        vectors: [n, D], raw, none of them zero.

    Returns:
        float32 [1, D].

    Raises:
        FaceError: The vectors cancel out; they are not of one person.
    """
    exact = np.asarray(vectors, dtype=np.float64)
    if len(exact) == 1:
        return exact.astype(np.float32)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    mean = (exact / norms).mean(axis=0, keepdims=True)
    length = float(np.linalg.norm(mean))
    if not length > 1e-6:
        raise FaceError(
            "the photos' identity vectors cancel out",
            why="their directions are opposed, so they cannot show one person",
            fix="average only photos of the same person",
        )
    return cast(Float32Array, (mean / length * norms.mean()).astype(np.float32))
