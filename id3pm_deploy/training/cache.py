"""Faces that were aligned and embedded already, kept from run to run.

A folder of ``.npz`` files that grows while faces are embedded, so that an interrupted
run loses half a minute of it at most. Each picture is known by the SHA-256 of its
bytes; names and paths are not kept. Faces and identity vectors are personal data: the
files are readable by their owner only (mode 0600).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import atomic_path, make_folder, output_error, remove
from ..npz import NpzError, open_npz

FORMAT_VERSION = 1
_MAX_BYTES = 2**30
_FLUSH_BYTES = 2**27
_FLUSH_SECONDS = 30.0
_LONGEST = 200


@dataclass(frozen=True)
class KnownFace:
    """What is known of one picture.

    Attributes:
        pixels: SHA-256 of its pixels, the same for two files of one picture.
        problem: Why it has no usable face; empty if it has one.
        picture: [S, S, 3] uint8 RGB, aligned; None without a face.
        vectors: [2, J, D] float32, raw, of J crops and their mirror images; None
            without a face.
    """

    pixels: str
    problem: str = ""
    picture: npt.NDArray[np.uint8] | None = None
    vectors: npt.NDArray[np.float32] | None = None


class FaceCache:
    """Faces by the SHA-256 of the file that shows them.

    Args:
        folder: Where they are kept; None: nowhere but in memory.
        settings: Text that fixes how a face is cut and embedded. What was kept under
            other settings is removed, and so is what is damaged.

    Raises:
        OutputError: The folder cannot be made.
    """

    def __init__(self, folder: Path | None, settings: str) -> None:
        self.faces: dict[str, KnownFace] = {}
        self._folder, self._settings = folder, settings
        self._pending: list[str] = []
        self._bytes, self._flushed = 0, time.monotonic()
        if folder is None:
            return
        make_folder(folder)
        try:
            os.chmod(folder, 0o700)
        except OSError as error:
            raise output_error(folder, error) from error
        for path in sorted(folder.glob("*.npz")):
            try:
                self.faces |= _read(path, settings)
            except (OSError, NpzError):
                remove(path)

    def add(self, digest: str, face: KnownFace) -> None:
        """Keep what is known of a picture; it is written now and then.

        Raises:
            OutputError: It cannot be written.
        """
        self.faces[digest] = face
        self._pending.append(digest)
        if face.picture is not None and face.vectors is not None:
            self._bytes += face.picture.nbytes + face.vectors.nbytes
        late = time.monotonic() - self._flushed > _FLUSH_SECONDS
        if late or self._bytes > _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet.

        Raises:
            OutputError: It cannot be written.
        """
        pending, self._pending, self._bytes = self._pending, [], 0
        if self._folder is not None and pending:
            # Named by what it holds, so that no file of another run is replaced.
            path = self._folder / f"{pending[0][:32]}.npz"
            _write(path, self._settings, {one: self.faces[one] for one in pending})
        self._flushed = time.monotonic()


def _write(path: Path, settings: str, faces: dict[str, KnownFace]) -> None:
    seen = [one for one in faces.values() if one.picture is not None]
    pictures: list[Any] = [one.picture for one in seen]
    vectors: list[Any] = [one.vectors for one in seen]
    with atomic_path(path, 0o600) as temporary, open(temporary, "wb") as handle:
        np.savez(
            handle,
            format_version=np.int64(FORMAT_VERSION),
            settings=np.array(settings),
            digests=np.array(list(faces)),
            pixels=np.array([one.pixels for one in faces.values()]),
            problems=np.array([one.problem[:_LONGEST] for one in faces.values()]),
            pictures=np.stack(pictures) if seen else np.zeros(0, np.uint8),
            vectors=np.stack(vectors) if seen else np.zeros(0, np.float32),
        )


def _read(path: Path, settings: str) -> dict[str, KnownFace]:
    """What :func:`_write` wrote.

    Raises:
        OSError: It cannot be read.
        NpzError: It is damaged, of another format or of other settings.
    """
    with open_npz(path, _MAX_BYTES) as file:
        if file.read("format_version").tolist() != FORMAT_VERSION:
            raise NpzError("it is of another format")
        if file.read("settings").tolist() != settings:
            raise NpzError("it is of other settings")
        digests, pixels, problems = (
            file.read(name).tolist() for name in ("digests", "pixels", "problems")
        )
        pictures, vectors = file.read("pictures"), file.read("vectors")
    lists = all(isinstance(one, list) for one in (digests, pixels, problems))
    if not lists or not len(digests) == len(pixels) == len(problems):
        raise NpzError("its lists are not of one length")
    if not len(pictures) == len(vectors) == problems.count(""):
        raise NpzError("its faces are not as many as it says")
    if pictures.dtype != np.uint8 or vectors.dtype != np.float32:
        raise NpzError("its faces are of another type")
    faces, rows = {}, zip(pictures, vectors, strict=True)
    for digest, same, problem in zip(digests, pixels, problems, strict=True):
        face = (None, None) if problem else next(rows)
        faces[digest] = KnownFace(same, problem, *face)
    return faces
