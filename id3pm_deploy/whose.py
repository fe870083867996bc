"""Identity vectors that the library is handed: files, paths and plain arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .attributes import Stated
from .errors import IdentityError, InputError
from .generate import UNCONDITIONAL, Conditions, conditions
from .identity.directions import Directions, load_directions
from .identity.vectors import IdentityFile, check_vectors, load_identities
from .spec import DiffusionSpec

Identities = IdentityFile | str | os.PathLike[str] | npt.NDArray[Any] | None
"""An identity file, its path, raw vectors [n, D], or None: unconditional."""

_ARRAY = "array-"


def identities_of(spec: DiffusionSpec, identities: Identities) -> IdentityFile | None:
    """What the vectors are, wherever they came from; None is unconditional.

    Args:
        spec: Of the model. An array says nothing of the FR model it came from, and is
            taken for one of the model's own.
        identities: An array [n, D] of any float type holds vectors as the FR model
            gave them, not normalised.

    Raises:
        IdentityError: They cannot be used.
    """
    if identities is None or isinstance(identities, IdentityFile):
        return identities
    if isinstance(identities, (str, os.PathLike)):
        return load_identities(Path(identities))
    vectors = np.asarray(identities)
    if vectors.dtype.kind != "f":
        raise IdentityError(
            "the identity vectors cannot be used",
            why=f"they are {vectors.dtype}, not floating-point numbers",
            fix="give an array [n, D], or the file that `embed` wrote",
        )
    with np.errstate(over="ignore"):
        raw = np.ascontiguousarray(vectors, np.float32)
    check_vectors(raw, "the identity vectors")
    ids = tuple(f"{_ARRAY}{i}" for i in range(len(raw)))
    own = spec.identity
    return IdentityFile(raw, ids, own.model_name or "unknown", own.model_sha256)


def directions_of(
    directions: Directions | str | os.PathLike[str] | None,
) -> Directions | None:
    """Directions, from their file if need be.

    Raises:
        IdentityError: They cannot be used.
    """
    if directions is None or isinstance(directions, Directions):
        return directions
    return load_directions(Path(directions))


def wanted_of(
    spec: DiffusionSpec,
    file: IdentityFile | None,
    count: int,
    attributes: Stated = (),
) -> Conditions:
    """``count`` pictures of every identity for one stage of a chain; the second one may
    take none. ``attributes`` are those of all identities, or of each.

    Raises:
        IdentityError: The vectors do not fit the model.
        InputError: The attributes do not.
    """
    if file is None or spec.identity.dim:
        return conditions(spec, file, count, attributes)
    return conditions(spec, None, len(file), attributes).repeated(count)


def whose_in_record(
    file: IdentityFile | None, recorded: Sequence[str]
) -> IdentityFile | None:
    """The vectors of a record's samples, one each, in their order.

    Args:
        file: What the caller gave.
        recorded: Ids from the record, one a sample.

    Raises:
        IdentityError: A vector is missing, or of another kind than the record's.
        InputError: The record is of nobody, and vectors were given.
    """
    if set(recorded) == {UNCONDITIONAL}:
        if file is not None:
            raise InputError(
                "the run record is of unconditional pictures",
                fix="leave out the identities",
            )
        return None
    if file is None:
        raise IdentityError(
            "the run record needs the identities it was made of",
            why="it holds their ids only, as vectors are personal data",
            fix="give the identity file or the array of that run",
        )
    places = {one: i for i, one in enumerate(file.ids)}
    missing = sorted(set(recorded) - set(places))
    if missing:
        arrays = any(one.startswith(_ARRAY) for one in missing)
        raise IdentityError(
            "these are not the identities of the run record",
            why=f"of its {len(set(recorded))} ids, {len(missing)} are not among them",
            fix="give the array of that run" if arrays else "give that identity file",
        )
    index = [places[one] for one in recorded]
    return IdentityFile(
        file.vectors[index], tuple(recorded), file.model_name, file.model_sha256
    )
