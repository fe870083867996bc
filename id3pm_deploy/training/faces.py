"""From folders and shards of pictures to aligned faces and their identity vectors.

Every face is found, aligned and embedded once, and kept in a cache that grows while
this is going on; its mirror image is embedded on its own, because an FR model does not
see the two as the same picture. Pictures that cannot be read are named, and refused or
left out; those without one usable face and those that are there twice are left out and
told.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..attributes import encode_attributes
from ..errors import FaceError, InputError, some_of
from ..identity.alignment import FaceDetector, align
from ..identity.embed import check_header, photo_from_bytes, pixels_sha256
from ..identity.embedders import Embedder
from ..progress import progress
from ..spec import AttributeSpec
from .cache import FaceCache, KnownFace
from .labels import Row, check_stated, read_tables, stated_attributes
from .pictures import Picture, list_pictures

_FR_SIZE = 112
_JITTER_PIXELS = 2.0
_CROPS = 64
"""Crops and their mirror images that an FR model is given at once, about."""
_NAMED = 20
_SAME = "it is the same picture as another one"


@dataclass(frozen=True)
class TrainingFaces:
    """Aligned faces with their vectors.

    Attributes:
        pictures: [n, 2, S, S, 3] uint8 RGB; index 1 of axis 1 is the mirror image.
        vectors: [n, 2, J, D] float32, raw identity vectors of J shifted crops each.
        folders: [n] int64, which of the given folders and shards a face came from.
        skipped: How many pictures were left out.
        attributes: [n, A] float32, encoded; None stands for A = 0.
    """

    pictures: npt.NDArray[np.uint8]
    vectors: npt.NDArray[np.float32]
    folders: npt.NDArray[np.int64]
    skipped: int
    attributes: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.pictures)


class FaceCut(NamedTuple):
    """How a face is cut out of its picture, see :func:`load_faces`."""

    size: int
    margin: float
    jitter: int
    seed: int


class _LeftOut:
    """Which pictures are left out, and why."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def add(self, picture: Picture, why: str) -> None:
        self.names.setdefault(why, []).append(picture.place.name)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def lines(self) -> list[str]:
        """One line a reason, with the pictures' names."""
        return [
            f"{len(names)} not used: {why}: {some_of(names, _NAMED)}"
            for why, names in self.names.items()
        ]

    def refuse(self, total: int) -> None:
        """Raise :class:`InputError` if a picture is in here."""
        if not self.names:
            return
        raise InputError(
            f"{len(self)} of {total} pictures cannot be used",
            why="; ".join(
                f"{some_of(names, _NAMED)}: {why}" for why, names in self.names.items()
            ),
            fix="put complete ones in their place, or leave them out with --skip-bad",
        )


def load_faces(
    folders: Sequence[Path],
    embedder: Embedder,
    *,
    size: int,
    margin: float,
    jitter: int,
    seed: int = 0,
    cache: Path | None = None,
    attributes: Sequence[AttributeSpec] = (),
    tables: Sequence[Path] = (),
    skip_bad: bool = False,
    tell: Callable[[str], object] = lambda _: None,
) -> TrainingFaces:
    """Find, align and embed every face in some folders and shards.

    A picture without exactly one usable face is left out and told, and so is one whose
    bytes or pixels are those of an earlier one. One that cannot be read, or whose
    attributes are out of range, is refused: what its header or its attributes give away
    before anything is embedded, the rest when all have been looked at, so that all are
    named and what was embedded is kept.

    Args:
        folders: Folders of pictures, searched with their subfolders, and tar shards.
        embedder: The FR model.
        size: Side S of the training pictures, in pixels.
        margin: How much is shown around the face (see ``align``).
        jitter: Number J of crops embedded for each face; the first is not shifted.
        seed: Seed of the shifts.
        cache: Folder to keep faces in, and to find them again.
        attributes: What is conditioned on beside identity.
        tables: CSV tables that state attributes (see ``labels``).
        skip_bad: Leave out and tell what would be refused.
        tell: Called with each line about what is left out.

    Raises:
        InputError: A folder is missing or empty, a picture cannot be used, no picture
            states an attribute, or none has a usable face.
        IdentityError: The FR model's answer is unusable; what was embedded is kept.
    """
    cut = FaceCut(size, margin, jitter, seed)
    if tables and not attributes:
        raise InputError(
            "a table of attributes was given and no attribute declared",
            fix="declare what to take from it with --attribute",
        )
    stated = read_tables(tables, attributes)
    pictures = list_pictures(folders)
    kept = FaceCache(cache, repr((embedder.name, embedder.sha256, *cut)))
    left, bad = _LeftOut(), _LeftOut()

    def refuse() -> None:
        if not skip_bad:
            bad.refuse(len(pictures))

    rows = list(_rows(pictures, attributes, stated, bad))
    digests = list(_digests([one for one, _ in rows], kept, bad))
    refuse()
    check_stated([row for _, row in rows], attributes)
    _embed_new(digests, kept, cut, embedder, bad)
    refuse()
    row_of = {id(picture): row for picture, row in rows}
    used = list(_usable(digests, kept, left))
    for line in (*bad.lines(), *left.lines()):
        tell(line)
    if not used:
        raise InputError(
            "no picture has exactly one usable face",
            fix="give pictures of one person each, facing the camera",
        )
    stated_rows = [row_of[id(picture)] for picture, _ in used]
    return TrainingFaces(
        *_arrays([face for _, face in used]),
        np.array([picture.source for picture, _ in used], dtype=np.int64),
        len(pictures) - len(used),
        encode_attributes(attributes, stated_rows),
    )


def _rows(
    pictures: Sequence[Picture],
    attributes: Sequence[AttributeSpec],
    tables: Any,
    bad: _LeftOut,
) -> Iterator[tuple[Picture, Row]]:
    """The pictures whose attributes can be used, with them."""
    for picture in pictures:
        try:
            row = stated_attributes(picture, attributes, tables) if attributes else {}
        except InputError as error:
            bad.add(picture, f"{error.what}, {error.why}" if error.why else error.what)
            continue
        yield picture, row


def _digests(
    pictures: Sequence[Picture], cache: FaceCache, bad: _LeftOut
) -> Iterator[tuple[Picture, str]]:
    """The pictures that can be read as far as their headers tell, with the SHA-256 of
    their bytes."""
    with progress(len(pictures), "reading") as tick:
        for picture in pictures:
            tick()
            try:
                data = picture.place.read()
                digest = hashlib.sha256(data).hexdigest()
                if digest not in cache.faces:
                    check_header(data, picture.place.name)
            except InputError as error:
                bad.add(picture, error.why)
                continue
            yield picture, digest


def _embed_new(
    pictures: Sequence[tuple[Picture, str]],
    cache: FaceCache,
    cut: FaceCut,
    embedder: Embedder,
    bad: _LeftOut,
) -> None:
    """Put every picture that is not in the cache there."""
    new: dict[str, list[Picture]] = {}
    for picture, digest in pictures:
        if digest not in cache.faces:
            new.setdefault(digest, []).append(picture)
    if not new:
        return
    detector, todo = FaceDetector(), iter(new.items())
    at_once = max(1, _CROPS // (2 * cut.jitter))
    try:
        with progress(len(new), "faces") as tick:
            while group := list(itertools.islice(todo, at_once)):
                _embed_group(group, cache, cut, embedder, detector, bad)
                tick(len(group))
    finally:
        cache.flush()


def _embed_group(
    group: Sequence[tuple[str, Sequence[Picture]]],
    cache: FaceCache,
    cut: FaceCut,
    embedder: Embedder,
    detector: FaceDetector,
    bad: _LeftOut,
) -> None:
    """Find and cut the faces of some pictures, and embed them at once.

    Beside each SHA-256 stand the pictures whose bytes have it.
    """
    found, crops = [], []
    for digest, same in group:
        place = same[0].place
        try:
            rgb = photo_from_bytes(place.read(), place.name)
        except InputError as error:
            for picture in same:
                bad.add(picture, error.why)
            continue
        pixels = pixels_sha256(rgb)
        try:
            face, around = cut_face(rgb, digest, cut, detector)
        except FaceError as error:
            cache.add(digest, KnownFace(pixels, error.what))
            continue
        found.append((digest, pixels, face))
        crops.append(around)
    if not found:
        return
    vectors = embedder.embed(np.concatenate(crops))
    vectors = vectors.reshape(len(found), 2, cut.jitter, -1)
    for (digest, pixels, face), row in zip(found, vectors, strict=True):
        cache.add(digest, KnownFace(pixels, "", face, row.copy()))


def cut_face(
    rgb: npt.NDArray[np.uint8], digest: str, cut: FaceCut, detector: FaceDetector
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The face of a picture, and the crops of it that an FR model is shown.

    Args:
        rgb: [H, W, 3] uint8.
        digest: SHA-256 of the picture's file, in hexadecimal; with the seed it fixes
            the crops' shifts, whatever other pictures there are.
        cut: How to cut.
        detector: What finds the face.

    Returns:
        [S, S, 3] uint8, and [2 J, 112, 112, 3] uint8, of which the second half mirrors
        the first.

    Raises:
        FaceError: There is no single usable face.
    """
    points = detector.find_face(rgb).points
    rng = np.random.default_rng([cut.seed, int(digest[:16], 16)])
    spread = _JITTER_PIXELS * np.linalg.norm(points[0] - points[1]) / 35.0
    crops = []
    for j in range(cut.jitter):
        shift = rng.normal(0.0, spread, points.shape) if j else 0.0
        crops.append(align(rgb, points + shift, _FR_SIZE))
    mirrored = [crop[:, ::-1] for crop in crops]
    return align(rgb, points, cut.size, cut.margin), np.stack(crops + mirrored)


def _usable(
    pictures: Sequence[tuple[Picture, str]], cache: FaceCache, left: _LeftOut
) -> Iterator[tuple[Picture, KnownFace]]:
    """The pictures with a face, of the same ones only the first."""
    seen: set[str] = set()
    for picture, digest in pictures:
        face = cache.faces.get(digest)
        if face is None:  # it could not be read, which has been told
            continue
        if face.pixels in seen:
            left.add(picture, _SAME)
        elif face.problem:
            left.add(picture, face.problem)
        else:
            yield picture, face
        seen.add(face.pixels)


def _arrays(
    faces: Sequence[KnownFace],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pictures with their mirror images, and vectors."""
    seen = np.stack([face.picture for face in faces if face.picture is not None])
    vectors = [face.vectors for face in faces if face.vectors is not None]
    return np.stack([seen, seen[:, :, ::-1]], axis=1), np.stack(vectors)
