"""The identity file: raw vectors, random ids, and which FR model made them.

An ``.npz`` of five arrays and nothing else: ``format_version`` (int64), ``vectors``
(float32 [n, D], exactly as the face recognition model gave them), ``ids`` (n random
hexadecimal strings), ``model_name`` and ``model_sha256`` (empty when the model has no
hash). Identity vectors are personal data: the file is written with mode 0600 and
holds nothing about the photo.

Reading never unpickles, and looks at sizes and headers before it takes memory.
"""

from __future__ import annotations

import contextlib
import math
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import IdentityError, InputError
from ..files import atomic_path
from ..npz import NpzError, NpzReader, open_npz

FORMAT_VERSION = 1
MAX_BYTES = 256 * 2**20
MAX_VECTORS = 1_000_000
NORMALISATIONS = ("raw", "unit", "unit_sqrt_dim")

_MAX_NAME = 200
_ID = re.compile(r"[0-9a-f]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMAKE = "make the file again with `id3pm-deploy embed`"

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class IdentityFile:
    """Identity vectors of one FR model.

    Attributes:
        vectors: float32 [n, D], raw: as the FR model gave them, not normalised.
        ids: n different random hexadecimal ids; they say nothing about the person.
        model_name: Name of the FR model.
        model_sha256: SHA-256 of its file, or None where it has none (a callable).
    """

    vectors: Float32Array
    ids: tuple[str, ...]
    model_name: str
    model_sha256: str | None

    @property
    def dim(self) -> int:
        """Length D of a vector."""
        return int(self.vectors.shape[1])

    def __len__(self) -> int:
        return len(self.ids)


def random_ids(count: int) -> tuple[str, ...]:
    """``count`` random ids of 16 hexadecimal digits, derived from nothing."""
    return tuple(secrets.token_hex(8) for _ in range(count))


def identity_file(
    vectors: npt.ArrayLike, model_name: str, model_sha256: str | None
) -> IdentityFile:
    """Build a checked :class:`IdentityFile` with fresh random ids.

    Raises:
        IdentityError: The vectors are not float32-like [n, D], or one is zero or
            not finite.
    """
    raw = np.ascontiguousarray(vectors, dtype=np.float32)
    ids = random_ids(len(raw) if raw.ndim else 0)
    file = IdentityFile(raw, ids, model_name, model_sha256)
    check_contents(file)
    return file


def check_contents(file: IdentityFile, where: str = "the identity vectors") -> None:
    """Raise :class:`IdentityError` unless every field is well formed.

    Args:
        file: What to look at.
        where: How the message calls it.
    """
    vectors = file.vectors
    check_vectors(vectors, where)
    problem = ""
    if len(file.ids) != len(vectors) or len(set(file.ids)) != len(file.ids):
        problem = f"{len(vectors)} vectors need as many different ids"
    elif not all(_ID.fullmatch(one) for one in file.ids):
        problem = "an id is not a short hexadecimal string"
    elif not is_model_name(file.model_name):
        problem = f"the FR model's name is not 1 to {_MAX_NAME} printable characters"
    elif file.model_sha256 is not None and not _SHA256.fullmatch(file.model_sha256):
        problem = "the FR model's SHA-256 is not 64 lower-case hexadecimal digits"
    if problem:
        raise IdentityError(f"{where} cannot be used", why=problem, fix=_REMAKE)


def is_model_name(name: str) -> bool:
    """Whether an identity file can call an FR model so."""
    return 0 < len(name) <= _MAX_NAME and name.isprintable()


def check_vectors(vectors: npt.NDArray[Any], where: str) -> None:
    """Raise :class:`IdentityError` unless this is float32 [n, D], finite, non-zero."""
    problem = ""
    if vectors.dtype != np.float32:
        problem = f"vectors are {vectors.dtype}, not float32"
    elif vectors.ndim != 2 or 0 in vectors.shape:
        problem = f"vectors have shape {list(vectors.shape)}, not [n, D]"
    elif len(vectors) > MAX_VECTORS:
        problem = f"{len(vectors)} vectors; at most {MAX_VECTORS} are allowed"
    elif not np.isfinite(vectors).all():
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        problem = f"{bad} of {len(vectors)} vectors hold NaN or infinity"
    elif not vectors.any(axis=1).all():
        bad = int((~vectors.any(axis=1)).sum())
        problem = f"{bad} of {len(vectors)} vectors are all zero, which is nobody"
    if problem:
        raise IdentityError(f"{where} cannot be used", why=problem, fix=_REMAKE)


def save_identities(path: Path, file: IdentityFile) -> None:
    """Write ``file`` to ``path`` atomically, readable by its owner only (0600).

    Raises:
        IdentityError: The contents are malformed.
        OutputError: The file cannot be written.
    """
    check_contents(file)
    with atomic_path(path, 0o600) as temporary, open(temporary, "wb") as handle:
        np.savez(
            handle,
            format_version=np.int64(FORMAT_VERSION),
            vectors=np.ascontiguousarray(file.vectors),
            ids=np.array(file.ids, dtype=np.str_),
            model_name=np.array(file.model_name, dtype=np.str_),
            model_sha256=np.array(file.model_sha256 or "", dtype=np.str_),
        )


def load_identities(path: Path) -> IdentityFile:
    """Read an identity file, trusting nothing in it.

    Raises:
        IdentityError: It is missing, not an identity file, too large or damaged, or
            its vectors are not finite, non-zero float32 [n, D].
    """
    where = f"identity file {path}"
    try:
        with open_npz(path, MAX_BYTES) as file_arrays:
            arrays = _read_arrays(file_arrays)
    except FileNotFoundError as error:
        raise IdentityError(
            f"{where} does not exist", fix="check the path, or make it with `embed`"
        ) from error
    except OSError as error:
        raise _refused(where, error.strerror or str(error)) from error
    except NpzError as error:
        raise _refused(where, str(error)) from error
    file = _from_arrays(arrays, where)
    check_contents(file, where)
    return file


def _refused(where: str, why: str) -> IdentityError:
    return IdentityError(f"{where} cannot be used", why=why, fix=_REMAKE)


def _read_arrays(file_arrays: NpzReader) -> dict[str, npt.NDArray[Any]]:
    wanted = ("format_version", "vectors", "ids", "model_name", "model_sha256")
    missing = [name for name in wanted if name not in file_arrays.names]
    if missing:
        raise NpzError(f"it has no {', '.join(missing)}")
    return {name: file_arrays.read(name) for name in wanted}


def _from_arrays(arrays: dict[str, npt.NDArray[Any]], where: str) -> IdentityFile:
    """Check the types and put the file together."""
    version = arrays["format_version"]
    if version.dtype.kind != "i" or version.shape != () or version != FORMAT_VERSION:
        raise _refused(where, f"its format is not version {FORMAT_VERSION}")
    for name, shape in (("ids", 1), ("model_name", 0), ("model_sha256", 0)):
        if arrays[name].dtype.kind != "U" or arrays[name].ndim != shape:
            raise _refused(where, f"{name} is not text of the right shape")
    # What NumPy raises for code points beyond Unicode.
    with contextlib.suppress(ValueError, SystemError):
        return IdentityFile(
            vectors=cast(Float32Array, arrays["vectors"]),
            ids=tuple(str(one) for one in arrays["ids"]),
            model_name=str(arrays["model_name"]),
            model_sha256=str(arrays["model_sha256"]) or None,
        )
    raise _refused(where, "its text is not Unicode")


def normalise_identities(vectors: npt.ArrayLike, how: str) -> Float32Array:
    """Bring raw vectors to the scale a checkpoint was trained with.

    Computed in float64 and cast once.

    Args:
        vectors: [n, D], finite and not zero.
        how: ``raw`` (unchanged), ``unit`` (norm 1) or ``unit_sqrt_dim`` (norm √D, so
            that an element has a mean square of 1).

    Returns:
        float32 [n, D].

    Raises:
        InputError: ``how`` is not one of these.
        IdentityError: A vector is zero or not finite, or the shape is not [n, D].
    """
    if how not in NORMALISATIONS:
        raise InputError(
            f"unknown identity normalisation {how!r}",
            fix=f"use one of {', '.join(NORMALISATIONS)}",
        )
    exact = np.asarray(vectors, dtype=np.float64)
    check_vectors(exact.astype(np.float32), "the identity vectors")
    if how != "raw":
        exact = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    if how == "unit_sqrt_dim":
        exact = exact * math.sqrt(exact.shape[1])
    return exact.astype(np.float32)


def check_identities(
    file: IdentityFile, *, dim: int, model_name: str, model_sha256: str | None
) -> None:
    """Refuse vectors that are not of the FR model a checkpoint was trained on.

    An equal SHA-256 decides: a file that was renamed is still the same model. Names
    are compared where it does not.

    Args:
        file: The vectors.
        dim: Length of a vector the checkpoint expects.
        model_name: Name of the checkpoint's FR model.
        model_sha256: Its SHA-256; None compares the name only.

    Raises:
        IdentityError: The hash or the dimension differs, or the name where no hash
            settles it, or the checkpoint's FR model has a hash and the file's none.
    """
    what = "these identity vectors are of another FR model than the checkpoint's"
    fix = f"embed the photo again with the FR model {model_name!r}"
    same = model_sha256 is not None and file.model_sha256 == model_sha256
    if not same and file.model_name != model_name:
        why = f"they are of {file.model_name!r}, the checkpoint of {model_name!r}"
        raise IdentityError(what, why=why, fix=fix)
    if model_sha256 is not None and file.model_sha256 is None:
        raise IdentityError(
            "these identity vectors cannot be shown to be of the checkpoint's FR model",
            why=f"the checkpoint names the SHA-256 {model_sha256[:16]}… of its FR "
            "model, and the vectors have none (they were made by a Python callable)",
            fix=fix,
        )
    if model_sha256 is not None and not same:
        theirs = (file.model_sha256 or "")[:16]
        why = f"the models' SHA-256 differ: {theirs}… and {model_sha256[:16]}…"
        raise IdentityError(what, why=why, fix=fix)
    if file.dim != dim:
        why = f"they have {file.dim} elements, the checkpoint expects {dim}"
        raise IdentityError(what, why=why, fix=fix)
