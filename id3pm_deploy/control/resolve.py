"""From shots, which name people, to the vectors that a model is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..attributes import Attributes, encode_attributes, known_to
from ..errors import IdentityError, InputError
from ..generate import Conditions
from ..guidance import Others
from ..identity.directions import Directions
from ..identity.vectors import IdentityFile, check_identities, normalise_identities
from ..spec import DiffusionSpec
from .shots import UNCONDITIONAL, Shot

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
_SMALLEST_SINE = 1e-6


def conditions_of(
    spec: DiffusionSpec,
    shots: Sequence[Shot],
    file: IdentityFile | None,
    directions: Directions | None = None,
) -> Conditions:
    """What a model is conditioned on for each shot.

    A second stage may take no identities; and of attributes, it takes those it has.

    Args:
        spec: Of the model.
        shots: One a picture.
        file: Everybody whom a shot names.
        directions: All that a shot names.

    Raises:
        IdentityError: A vector is missing or of another FR model than the model's.
        InputError: A shot asks for what the model has not, or directions for it are
            missing.
    """
    second = spec.model.low_res_size is not None
    stated: tuple[Attributes, ...] = tuple(shot.attributes for shot in shots)
    if second:
        stated = known_to(spec.attributes, stated)
    encoded = encode_attributes(spec.attributes, stated)
    stated = stated if spec.attributes else ()
    ids = tuple(shot.identity for shot in shots)
    if not spec.identity.dim:
        if not second and any(shot.ids for shot in shots):
            raise IdentityError(
                "this model was trained without identities",
                why="its pictures are of nobody, whatever vectors it would be given",
                fix="make unconditional pictures",
            )
        nobody = np.zeros((len(shots), 0), np.float32)
        whole = np.hstack([nobody, encoded])
        return Conditions(whole, ids, stated, None, tuple(shots))
    find = _finder(spec, shots, file)
    if directions is not None:
        own = spec.identity
        directions.check_model(own.dim, own.model_name, own.model_sha256)
    seen = np.stack([_seen(spec, shot, find, directions) for shot in shots])
    others = _others(spec, shots, find, encoded)
    return Conditions(np.hstack([seen, encoded]), ids, stated, others, tuple(shots))


def together(*files: IdentityFile | None) -> IdentityFile | None:
    """Everybody in some identity files, each once; None where there is nobody.

    Raises:
        IdentityError: They are of different FR models.
    """
    there = [file for file in files if file is not None]
    if not there:
        return None
    first = there[0]
    for file in there[1:]:
        check_identities(
            file,
            dim=first.dim,
            model_name=first.model_name,
            model_sha256=first.model_sha256,
        )
    known: dict[str, Float32] = {}
    for file in there:
        known = dict(zip(file.ids, file.vectors, strict=True)) | known
    return IdentityFile(
        np.stack(list(known.values())),
        tuple(known),
        first.model_name,
        first.model_sha256,
    )


def _finder(
    spec: DiffusionSpec, shots: Sequence[Shot], file: IdentityFile | None
) -> Callable[[str], Float32]:
    """From an id to the raw vector [D]."""
    wanted = frozenset[str]().union(*(shot.ids for shot in shots))
    places: dict[str, int] = {}
    if file is not None:
        own = spec.identity
        check_identities(
            file,
            dim=own.dim,
            model_name=own.model_name,
            model_sha256=own.model_sha256,
        )
        places = {one: i for i, one in enumerate(file.ids)}
    if missing := wanted - set(places):
        raise IdentityError(
            "somebody who is to be shown is not in the identity file",
            why=f"of {len(wanted)} ids, {len(missing)} are not there",
            fix="give the file that has them, or the array they were numbered in",
        )

    def find(one: str) -> Float32:
        assert file is not None
        vector: Float32 = file.vectors[places[one]]
        return vector

    return find


def _seen(
    spec: DiffusionSpec,
    shot: Shot,
    find: Callable[[str], Float32],
    directions: Directions | None,
) -> Float32:
    """A shot's own normalised vector [D]; zeros for nobody."""
    if shot.identity == UNCONDITIONAL:
        return np.zeros(spec.identity.dim, np.float32)
    vector: npt.NDArray[np.floating] = find(shot.identity)
    if shot.towards is not None and shot.at:
        vector = interpolated(vector, find(shot.towards), shot.at)
    if any(shot.directions.values()):
        if directions is None:
            raise InputError(
                "directions are to be followed, and none are given",
                fix="give the file that `control pca` or `control svm` wrote",
            )
        vector = directions.moved(vector, shot.directions)
    (seen,) = normalise_identities(vector[None], spec.identity.normalisation)
    return np.asarray(seen)


def interpolated(
    one: npt.NDArray[np.floating], other: npt.NDArray[np.floating], at: float
) -> npt.NDArray[np.floating]:
    """Spherical interpolation (Shoemake 1985) of two vectors [D]: along the great
    circle through both, with a length that goes evenly from the one's to the other's.

    Args:
        one: Where ``at`` is 0.
        other: Where it is 1.
        at: 0 to 1; both ends are exact.

    Raises:
        IdentityError: They are opposite, so that no way is the shortest.
    """
    if at in (0.0, 1.0):
        return one if at == 0 else other
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    a, b = a / lengths[0], b / lengths[1]
    # Kahan's angle is exact where the arc cosine is not: near 0 and π.
    angle = 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    length = (1 - at) * lengths[0] + at * lengths[1]
    if angle > np.pi - _SMALLEST_SINE:
        raise IdentityError(
            "there is no shortest way between opposite identities",
            fix="go by way of a third one",
        )
    if angle < _SMALLEST_SINE:
        return np.asarray(length * ((1 - at) * a + at * b))
    weights = np.sin((1 - at) * angle), np.sin(at * angle)
    return np.asarray(length * (weights[0] * a + weights[1] * b) / np.sin(angle))


def _others(
    spec: DiffusionSpec,
    shots: Sequence[Shot],
    find: Callable[[str], Float32],
    encoded: Float32,
) -> Others | None:
    """Further identities: those of a blend with the shot's attributes, negative ones
    with none. None where no shot has any."""
    most = max(len(shot.blend) + len(shot.negative) for shot in shots)
    if not most:
        return None
    width = spec.identity.dim + encoded.shape[1]
    identity = np.zeros((len(shots), most, width), np.float32)
    blend, negative = np.zeros((2, len(shots), most))
    for i, shot in enumerate(shots):
        people = [*shot.blend, *shot.negative]
        for v, one in enumerate(people):
            vector = normalise_identities(find(one)[None], spec.identity.normalisation)
            identity[i, v, : spec.identity.dim] = vector[0]
        count = len(shot.blend)
        identity[i, :count, spec.identity.dim :] = encoded[i]
        blend[i, :count] = list(shot.blend.values())
        negative[i, count : len(people)] = list(shot.negative.values())
    return Others(identity, blend, negative)
