"""Directions in identity space: found among people, kept in a file, gone along.

Vectors are compared by their direction, so everything happens on the unit sphere: a
person is moved along a chord and put back on the sphere, and keeps the length that the
vector had.

The file is an ``.npz`` of six arrays and nothing else: ``format_version``, ``vectors``
(float32 [k, D], unit length), ``names``, ``spread`` (float32 [k]), ``model_name`` and
``model_sha256``. It was made of identity vectors, so it has mode 0600.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import IdentityError, InputError, some_of
from ..files import atomic_path
from ..npz import NpzError, open_npz
from ..optional import require
from .vectors import IdentityFile, check_identities, normalise_identities, random_ids

FORMAT_VERSION = 1
_MAX_BYTES = 64 * 2**20
_MOST, _LONGEST = 4096, 80
_FOLDS = 5
_FIELDS = (
    *("format_version", "vectors", "names", "spread"),
    *("model_name", "model_sha256"),
)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """Directions among the identity vectors of one FR model.

    Attributes:
        vectors: float32 [k, D], unit length.
        names: k different names.
        spread: float32 [k], standard deviation of the people they were found among,
            whose vectors have length 1, along each.
        model_name: Name of the FR model.
        model_sha256: SHA-256 of its file, or None where it has none.

    Raises:
        IdentityError: Something is malformed.
    """

    vectors: Float32
    names: tuple[str, ...]
    spread: Float32
    model_name: str
    model_sha256: str | None

    def __post_init__(self) -> None:
        vectors, spread, count = self.vectors, self.spread, len(self.names)
        why = ""
        if vectors.ndim != 2 or vectors.dtype != np.float32 or len(vectors) != count:
            why = "its vectors are not float32, one for each name"
        elif not 0 < count <= _MOST or len(set(self.names)) != count:
            why = f"it has not 1 to {_MOST} different names"
        elif not all(0 < len(n) <= _LONGEST and n.isprintable() for n in self.names):
            why = f"a name is not 1 to {_LONGEST} printable characters"
        elif any("=" in name for name in self.names):
            why = "a name has a = in it"
        elif spread.shape != (count,) or spread.dtype != np.float32:
            why = "it has not one float32 spread for each name"
        elif not np.isfinite(spread).all() or not (spread > 0).all():
            why = "a spread is not a positive number"
        elif not np.isfinite(vectors).all():
            why = "its vectors hold NaN or infinity"
        elif not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4):
            why = "its vectors are not of length 1"
        if why:
            raise IdentityError("these directions cannot be used", why=why)

    @property
    def digest(self) -> str:
        """SHA-256 of the directions, by which records name them."""
        parts = (self.vectors.tobytes(), self.spread.tobytes(), repr(self.names))
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part if isinstance(part, bytes) else part.encode())
        return digest.hexdigest()

    def moved(self, vector: npt.ArrayLike, strengths: Mapping[str, float]) -> Float64:
        """A vector [D] moved by so many standard deviations along each direction.

        Raises:
            InputError: There is no direction of a name, or nothing is left.
        """
        exact = np.asarray(vector, np.float64)
        length = np.linalg.norm(exact)
        unit = exact / length
        for name, strength in strengths.items():
            if name not in self.names:
                raise InputError(
                    f"there is no direction {name!r:.80}",
                    fix=f"there are {some_of(self.names, 12)}",
                )
            place = self.names.index(name)
            step = strength * float(self.spread[place])
            unit = unit + step * self.vectors[place].astype(np.float64)
        if not np.linalg.norm(unit) > 1e-6:
            raise InputError(
                "the directions cancel the identity", fix="use smaller strengths"
            )
        moved: Float64 = unit / np.linalg.norm(unit) * length
        return moved

    def check_model(self, dim: int, name: str, sha256: str | None) -> None:
        """Refuse directions of another FR model.

        Raises:
            IdentityError: They are.
        """
        ids = random_ids(len(self.names))
        own = IdentityFile(self.vectors, ids, self.model_name, self.model_sha256)
        try:
            check_identities(own, dim=dim, model_name=name, model_sha256=sha256)
        except IdentityError as error:
            raise IdentityError(
                "these directions were found with another FR model",
                why=error.why,
                fix="find them again among vectors of this one",
            ) from error


def save_directions(path: Path, found: Directions) -> None:
    """Write ``found`` to ``path`` atomically, readable by its owner only (0600).

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_path(path, 0o600) as temporary, open(temporary, "wb") as handle:
        np.savez(
            handle,
            format_version=np.int64(FORMAT_VERSION),
            vectors=found.vectors,
            names=np.array(found.names, dtype=np.str_),
            spread=found.spread,
            model_name=np.array(found.model_name, dtype=np.str_),
            model_sha256=np.array(found.model_sha256 or "", dtype=np.str_),
        )


def load_directions(path: Path) -> Directions:
    """Read a file of directions, trusting nothing in it.

    Raises:
        IdentityError: It is missing or malformed.
    """
    try:
        with open_npz(path, _MAX_BYTES) as file:
            if missing := [name for name in _FIELDS if name not in file.names]:
                raise NpzError(f"it has no {', '.join(missing)}")
            arrays = {name: file.read(name) for name in _FIELDS}
        return _from_arrays(arrays)
    except OSError as error:
        why = error.strerror or str(error)
    except NpzError as error:
        why = str(error)
    except IdentityError as error:
        why = error.why
    raise IdentityError(
        f"the directions {path} cannot be used",
        why=why,
        fix="find them again with `id3pm-deploy control pca` or `control svm`",
    )


def _from_arrays(arrays: dict[str, npt.NDArray[Any]]) -> Directions:
    version = arrays["format_version"]
    if version.dtype.kind != "i" or version.shape != () or version != FORMAT_VERSION:
        raise NpzError(f"its format is not version {FORMAT_VERSION}")
    for name, shape in (("names", 1), ("model_name", 0), ("model_sha256", 0)):
        if arrays[name].dtype.kind != "U" or arrays[name].ndim != shape:
            raise NpzError(f"{name} is not text of the right shape")
    try:
        return Directions(
            vectors=arrays["vectors"],
            names=tuple(str(one) for one in arrays["names"]),
            spread=arrays["spread"],
            model_name=str(arrays["model_name"]),
            model_sha256=str(arrays["model_sha256"]) or None,
        )
    except (ValueError, SystemError) as error:  # code points beyond Unicode
        raise NpzError("its text is not Unicode") from error


def principal_directions(
    people: IdentityFile, count: int
) -> tuple[Directions, tuple[float, ...]]:
    """The directions in which people differ most: principal components of their
    vectors of length 1.

    Args:
        people: At least three.
        count: How many directions, named ``pc1`` and so on; of two opposite signs, the
            one whose largest element is positive.

    Returns the directions and each one's share of the variance.

    Raises:
        InputError: There are too few people for so many directions.
    """
    most = min(len(people) - 1, people.dim)
    if len(people) < 3 or not 1 <= count <= most:
        raise InputError(
            f"{count} principal directions cannot be found among {len(people)} people",
            why=f"there can be from 1 to {most}" if len(people) > 2 else "",
            fix="give more people, or ask for fewer directions",
        )
    unit = _unit(people)
    centred = unit - unit.mean(axis=0)
    _, sizes, components = np.linalg.svd(centred, full_matrices=False)
    if sizes[count - 1] <= 1e-6 * max(sizes[0], 1e-12):
        raise InputError(
            f"the people differ in fewer than {count} directions",
            fix="give more different people, or ask for fewer directions",
        )
    chosen = components[:count]
    largest = np.abs(chosen).argmax(axis=1)
    chosen = chosen * np.sign(chosen[np.arange(count), largest])[:, None]
    shares = (sizes[:count] ** 2 / (sizes**2).sum()).tolist()
    names = tuple(f"pc{i + 1}" for i in range(count))
    return _directions(people, chosen, names, unit), tuple(shares)


def separating_direction(
    with_it: IdentityFile, without: IdentityFile, name: str
) -> tuple[Directions, float]:
    """The direction that parts people with some trait from people without it: the
    normal of a linear support vector machine (C = 1, classes weighted evenly).

    Args:
        with_it: Strengths above 0 lead to them.
        without: Others, of the same FR model.
        name: Of the direction.

    Returns the direction, and the balanced accuracy on people who were left out of
    training, in as many as five folds; 0.5 is chance.

    Raises:
        InputError: There are fewer than three people on a side, or some on both.
        IdentityError: They are of two FR models.
        MissingPackageError: scikit-learn is not installed.
    """
    check_identities(
        without,
        dim=with_it.dim,
        model_name=with_it.model_name,
        model_sha256=with_it.model_sha256,
    )
    fewest = min(len(with_it), len(without))
    if fewest < 3 or set(with_it.ids) & set(without.ids):
        raise InputError(
            "a direction needs at least three people on each side, nobody on both",
            why=f"there are {len(with_it)} and {len(without)}, of whom "
            f"{len(set(with_it.ids) & set(without.ids))} are on both sides",
        )
    svm = require("sklearn.svm", extra="faces")
    selection = require("sklearn.model_selection", extra="faces")
    unit = np.concatenate([_unit(with_it), _unit(without)])
    labels = np.repeat([1, 0], [len(with_it), len(without)])
    machine = svm.SVC(kernel="linear", C=1.0, class_weight="balanced")
    scaled = unit * np.sqrt(with_it.dim)
    folds = selection.StratifiedKFold(min(_FOLDS, fewest), shuffle=True, random_state=0)
    scores = selection.cross_val_score(
        machine, scaled, labels, cv=folds, scoring="balanced_accuracy"
    )
    normal = machine.fit(scaled, labels).coef_
    normal = normal / np.linalg.norm(normal)
    return _directions(with_it, normal, (name,), unit), float(scores.mean())


def _unit(people: IdentityFile) -> Float64:
    return normalise_identities(people.vectors, "unit").astype(np.float64)


def _directions(
    people: IdentityFile, vectors: Float64, names: tuple[str, ...], unit: Float64
) -> Directions:
    spread = (unit @ vectors.T).std(axis=0, ddof=1)
    return Directions(
        vectors=vectors.astype(np.float32),
        names=names,
        spread=spread.astype(np.float32),
        model_name=people.model_name,
        model_sha256=people.model_sha256,
    )
