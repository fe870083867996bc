"""From folders of pictures to aligned faces and their identity vectors.

Every face is found, aligned and embedded once; its mirror image is embedded on its
own, because an FR model does not see the two as the same picture. A file that is no
picture is refused by name before the first face is embedded; one that turns out to be
damaged while it is decoded is skipped like a picture without a face. The result may be
kept in a cache file that only its owner can read (mode 0600).
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from ..errors import FaceError, InputError
from ..files import atomic_path
from ..identity.alignment import FaceDetector, align
from ..identity.embed import FORMATS, MAX_PIXELS, quiet_pillow, read_photo
from ..identity.embedders import Embedder
from ..progress import progress

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_FR_SIZE = 112
_JITTER_PIXELS = 2.0


@dataclass(frozen=True)
class TrainingFaces:
    """Aligned faces with their vectors.

    Attributes:
        pictures: [n, 2, S, S, 3] uint8 RGB; index 1 of axis 1 is the mirror image.
        vectors: [n, 2, J, D] float32, raw identity vectors of J shifted crops each.
        folders: [n] int64, which of the given folders a face came from.
        skipped: How many pictures had no single usable face or were damaged.
    """

    pictures: npt.NDArray[np.uint8]
    vectors: npt.NDArray[np.float32]
    folders: npt.NDArray[np.int64]
    skipped: int

    def __len__(self) -> int:
        return len(self.pictures)


def picture_paths(folder: Path) -> list[Path]:
    """Picture files in ``folder`` and below, sorted; broken links do not count.

    Raises:
        InputError: No such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="give a folder of faces")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    if not found:
        raise InputError(
            f"{folder} holds no pictures", fix=f"put {', '.join(SUFFIXES)} files in it"
        )
    return found


def check_pictures(paths: Sequence[Path]) -> None:
    """Look at all pictures without decoding them: some seconds for a thousand.

    Raises:
        InputError: Some are no pictures, or too large; the first of them is named.
    """
    bad = []
    for path in paths:
        try:
            with quiet_pillow(), Pillow.open(path, formats=FORMATS) as picture:
                width, height = picture.size
                picture.verify()
            if width * height > MAX_PIXELS:
                raise ValueError(f"it is {width}x{height} pixels")
        except Exception as error:  # Pillow's decoders raise almost anything
            why = getattr(error, "strerror", None) or str(error).split(" '")[0]
            bad.append((path, why))
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(
            f"{bad[0][0]}{more} cannot be read as pictures",
            why=bad[0][1],
            fix="remove them, or put complete pictures in their place",
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
) -> TrainingFaces:
    """Find, align and embed every face in ``folders``.

    A picture without exactly one usable face is skipped and counted, and so is one
    whose header is sound and whose pixels cannot be decoded.

    Args:
        folders: Folders of pictures, searched with their subfolders.
        embedder: The FR model.
        size: Side S of the training pictures, in pixels.
        margin: How much is shown around the face (see ``align``).
        jitter: Number J of crops embedded for each face; the first is not shifted.
        seed: Seed of the shifts.
        cache: Where to keep the result, or find it again.

    Raises:
        InputError: A folder is missing or empty, a file is no picture (found before
            anything is embedded), or no picture has a usable face.
    """
    paths = [(i, p) for i, folder in enumerate(folders) for p in picture_paths(folder)]
    key = _cache_key(paths, embedder, (size, margin, jitter, seed))
    if cache is not None and (kept := _read_cache(cache, key)) is not None:
        return kept
    check_pictures([path for _, path in paths])
    detector = FaceDetector()
    rng = np.random.default_rng(seed)
    pictures, vectors, sources = [], [], []
    with progress(len(paths), "faces") as tick:
        for folder, path in paths:
            try:
                face = _one_face(path, detector, embedder, size, margin, jitter, rng)
            except FaceError:
                face = None
            if face is not None:
                pictures.append(face[0])
                vectors.append(face[1])
                sources.append(folder)
            tick()
    if not pictures:
        raise InputError(
            "no picture has exactly one usable face",
            fix="give pictures of one person each, facing the camera",
        )
    faces = TrainingFaces(
        np.stack(pictures),
        np.stack(vectors),
        np.array(sources, dtype=np.int64),
        len(paths) - len(pictures),
    )
    if cache is not None:
        _write_cache(cache, key, faces)
    return faces


def _one_face(
    path: Path,
    detector: FaceDetector,
    embedder: Embedder,
    size: int,
    margin: float,
    jitter: int,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    try:
        rgb = read_photo(path)
    except InputError as error:  # damaged behind its header, or gone by now
        raise FaceError(error.what, why=error.why) from error
    points = detector.find_face(rgb).points
    picture = align(rgb, points, size, margin)
    crops = []
    scale = np.linalg.norm(points[0] - points[1]) / 35.0
    for j in range(jitter):
        shift = rng.normal(0.0, _JITTER_PIXELS * scale, points.shape) if j else 0.0
        crops.append(align(rgb, points + shift, _FR_SIZE))
    mirrored = [crop[:, ::-1] for crop in crops]
    vectors = embedder.embed(np.ascontiguousarray(np.stack(crops + mirrored)))
    return np.stack([picture, picture[:, ::-1]]), vectors.reshape(2, jitter, -1)


def _cache_key(
    paths: Sequence[tuple[int, Path]], embedder: Embedder, settings: tuple[float, ...]
) -> str:
    digest = hashlib.sha256(repr((embedder.name, embedder.sha256, settings)).encode())
    for folder, path in paths:
        status = path.stat()
        entry = (folder, path.name, status.st_size, status.st_mtime_ns)
        digest.update(repr(entry).encode())
    return digest.hexdigest()


def _read_cache(path: Path, key: str) -> TrainingFaces | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            return TrainingFaces(
                kept["pictures"],
                kept["vectors"],
                kept["folders"],
                int(kept["skipped"]),
            )
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, key: str, faces: TrainingFaces) -> None:
    with atomic_path(path, 0o600) as temporary, open(temporary, "wb") as handle:
        np.savez(
            handle,
            key=np.array(key),
            pictures=faces.pictures,
            vectors=faces.vectors,
            folders=faces.folders,
            skipped=np.array(faces.skipped),
        )
