"""What all FR models have in common: checked crops in, checked vectors out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ...errors import IdentityError, InputError
from ...files import open_plain
from ...optional import require
from ..alignment import ARCFACE_SIZE

Image = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

_PROBE = 127  # grey level of the picture that asks a model for its dimension


class Embedder(ABC):
    """An FR model as a black box.

    Attributes:
        name: What identity files and checkpoints call it.
        sha256: What :func:`~id3pm_deploy.identity.preprocessing.function_sha256` makes
            of its file and preprocessing, mostly just the file's SHA-256; None where
            there is no file: a callable, a program.
        size: Side of the aligned crops it takes best, in pixels.
        notice: Something the user should be told, or empty.
    """

    name: str
    sha256: str | None
    size: int = ARCFACE_SIZE
    notice: str = ""
    _dim: int | None = None

    @property
    def dim(self) -> int:
        """Length D of its vectors; a grey picture is embedded to find out."""
        if self._dim is None:
            grey = np.full((1, self.size, self.size, 3), _PROBE, dtype=np.uint8)
            self._dim = int(self.embed(grey).shape[1])
        return self._dim

    @abstractmethod
    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        """Vectors [n, D] of crops uint8 RGB [n, size, size, 3], unchecked."""

    def embed(self, aligned: Image) -> Float32Array:
        """Raw identity vectors of aligned faces.

        Args:
            aligned: uint8 RGB [n, size, size, 3], as ``alignment.align`` cuts them
                with margin 1. Another size (such as 112) is resized to ``size``.

        Returns:
            float32 [n, D], not normalised; a vector does not depend on the others
            in the batch (for a callable or a program, as far as it sees to that).

        Raises:
            InputError: The crops are not square uint8 RGB.
            IdentityError: The model fails, or answers with something else than
                finite, non-zero [n, D].
        """
        aligned = _checked_crops(aligned)
        if len(aligned) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        answer = self._forward(_resized(aligned, self.size))
        vectors = checked_vectors(answer, len(aligned), self.name)
        self._dim = int(vectors.shape[1])
        return vectors


def checked_vectors(answer: npt.NDArray[Any], count: int, name: str) -> Float32Array:
    """``answer`` as float32 [count, D], or an :class:`IdentityError` saying why not."""
    problem = ""
    if answer.dtype.kind != "f":
        problem = f"its answer is {answer.dtype}, not floating point"
    elif answer.ndim != 2 or answer.shape[0] != count or answer.shape[1] == 0:
        problem = f"its answer has shape {list(answer.shape)}, not [{count}, D]"
    elif not (np.abs(answer) <= np.finfo(np.float32).max).all():  # NaN fails as well
        problem = "its answer holds NaN, infinity or numbers beyond float32"
    elif not answer.astype(np.float32).any(axis=1).all():
        problem = "its answer is the zero vector"
    if problem:
        raise IdentityError(f"the FR model {name!r} cannot be used", why=problem)
    return np.ascontiguousarray(answer, dtype=np.float32)


def model_bytes(path: Path) -> bytes:
    """The file that is hashed is the file that is loaded: it is read once.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with open_plain(path, follow=True) as handle:
            return handle.read()
    except OSError as error:
        raise InputError(
            f"cannot read the FR model {path}", why=error.strerror or str(error)
        ) from error


def not_loadable(path: Path, why: object) -> IdentityError:
    """The error for a file that no runtime takes as an FR model."""
    return IdentityError(
        f"{path} cannot be loaded as an FR model",
        why=str(why).strip(),
        fix="give a complete ONNX file with its weights inside",
    )


def _checked_crops(aligned: npt.NDArray[Any]) -> Image:
    square = aligned.ndim == 4 and aligned.shape[1] == aligned.shape[2] > 0
    if aligned.dtype != np.uint8 or not square or aligned.shape[3] != 3:
        raise InputError(
            "these are not aligned faces",
            why=f"they are {aligned.dtype} of shape {list(aligned.shape)}",
            fix="give uint8 RGB [n, 112, 112, 3], as alignment.align cuts them",
        )
    return cast(Image, aligned)


def _resized(aligned: Image, size: int) -> Image:
    if aligned.shape[1] == size:
        return aligned
    cv2 = require("cv2", extra="faces")
    how = cv2.INTER_AREA if size < aligned.shape[1] else cv2.INTER_LINEAR
    return np.stack(
        [cv2.resize(one, (size, size), interpolation=how) for one in aligned]
    )
