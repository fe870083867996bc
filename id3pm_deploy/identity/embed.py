"""Photos to identity vectors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageOps

from ..errors import FaceError, InputError
from .alignment import MIN_FACE, FaceDetector, Image, align
from .embedders import Embedder
from .vectors import Float32Array, IdentityFile, identity_file

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def read_photo(path: Path) -> Image:
    """A picture file as uint8 RGB [H, W, 3], upright as its EXIF data says.

    Args:
        path: JPEG, PNG, WebP, BMP, TIFF, GIF (first picture) or PPM, of at most
            100 megapixels. Transparent parts come out white.

    Raises:
        InputError: It is missing, no picture, damaged or too large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about large pictures and odd metadata; the limit is ours.
            warnings.simplefilter("ignore")
            with Pillow.open(path, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise _unreadable(path, f"it is {width}x{height} pixels")
                rgb = _rgb_from_picture(picture)
    except Exception as error:  # Pillow's decoders raise almost anything on bad data
        if isinstance(error, InputError):
            raise
        if isinstance(error, FileNotFoundError):
            raise InputError(f"photo {path} does not exist") from error
        why = getattr(error, "strerror", None) or str(error).split(" '")[0]
        raise _unreadable(path, why) from error
    return np.ascontiguousarray(rgb, dtype=np.uint8)


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} cannot be read as a photo",
        why=why,
        fix="give a complete JPEG, PNG or WebP of at most 100 megapixels",
    )


def _rgb_from_picture(picture: Any) -> npt.NDArray[Any]:
    """Upright RGB; 16-bit grey is scaled, transparency put on white."""
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):
        return np.stack([np.asarray(upright, dtype=np.uint16) >> 8] * 3, axis=-1)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        coloured = upright.convert("RGBA")
        white = Pillow.new("RGBA", coloured.size, "white")
        upright = Pillow.alpha_composite(white, coloured)
    return np.asarray(upright.convert("RGB"))


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
    rows = [np.zeros((0, embedder.dim), dtype=np.float32)] if not images else []
    for index, rgb in enumerate(images):
        name = names[index] if names else f"picture {index}"
        face = detector.find_face(rgb, largest=largest, min_size=min_size, name=name)
        crop = align(rgb, face.points, embedder.size)
        rows.append(embedder.embed(crop[None]))
        on_done()
    return np.concatenate(rows)


def embed_photos(
    paths: Sequence[Path],
    embedder: Embedder,
    detector: FaceDetector,
    *,
    largest: bool = False,
    average: bool = False,
    min_size: float = MIN_FACE,
    on_done: Callable[[], object] = lambda: None,
) -> IdentityFile:
    """The identity file of some photos; nothing about the photos is in it.

    Args:
        paths: Photos, at least one. One at a time is held in memory.
        embedder: The FR model.
        detector: The face detector.
        largest: Take the widest of several faces instead of refusing.
        average: The photos show one person: combine them into one vector, see
            :func:`average_identity`.
        min_size: Smallest width of a face in pixels.
        on_done: Called after each photo.

    Returns:
        One vector a photo in the order given, or one in all, with random ids.

    Raises:
        InputError: No photo, or one cannot be read.
        FaceError: A photo has no face, several or a too small one.
        IdentityError: The FR model's answer is unusable.
    """
    if not paths:
        raise InputError("no photo was given", fix="name at least one")
    rows = []
    for path in paths:
        vector = embed_images(
            [read_photo(path)],
            embedder,
            detector,
            largest=largest,
            min_size=min_size,
            names=[str(path)],
            on_done=on_done,
        )
        rows.append(vector)
    vectors = np.concatenate(rows)
    if average:
        vectors = average_identity(vectors)
    return identity_file(vectors, embedder.name, embedder.sha256)


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
