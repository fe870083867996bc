"""Verification and retrieval: what an FR model's similarities say of pictures.

A *probe* is a picture that ought to show person ``own``; it is compared with the photo
of each person. A probe in which no face was found is accepted as nobody and counts
everywhere but in the two means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..benchmark.rounds import Interval
from ..errors import InputError
from .intervals import Indices, bootstrap
from .similarity import Float64, angular_distance

FARS = (0.1, 0.01, 0.001)
"""False acceptance rates at which the true acceptance rate is stated."""

_FOLDS = 10
_NOBODY = -2.0
"""In place of a cosine where there is no face: below every one."""

Mask = npt.NDArray[np.bool_]


def far_name(far: float) -> str:
    """The key of the true acceptance rate at ``far``: 0.01 is ``tar_at_far_0_01``."""
    return "tar_at_far_" + f"{far:g}".replace(".", "_")


@dataclass(frozen=True)
class Scores:
    """Cosines of n probes with the photos of m people.

    Attributes:
        cosines: [n, m]; NaN rows where no face was found.
        own: [n], whose face each probe ought to show.

    Raises:
        InputError: The shapes do not fit, or there are fewer than two people.
    """

    cosines: Float64
    own: Indices

    def __post_init__(self) -> None:
        shape, count = self.cosines.shape, len(self.own)
        if len(shape) != 2 or shape[0] != count or not count or shape[1] < 2:
            raise InputError(
                "similarities must be [pictures, people] of two people or more",
                why=f"they are {list(shape)} for {count} pictures",
            )
        if not (self.own.min() >= 0 and self.own.max() < shape[1]):
            raise InputError("a picture is of nobody among the people")

    @property
    def mine(self) -> Mask:
        """[n, m], True where a probe meets its own person."""
        mask = np.zeros(self.cosines.shape, bool)
        mask[np.arange(len(self.own)), self.own] = True
        return mask

    @property
    def filled(self) -> Float64:
        """The cosines, with a number below all of them in place of NaN."""
        return np.where(np.isnan(self.cosines), _NOBODY, self.cosines)

    def take(self, rows: Indices) -> Scores:
        """These probes only."""
        return Scores(self.cosines[rows], self.own[rows])


def auc(genuine: Float64, impostor: Float64) -> float:
    """Chance that a genuine pair is more alike than an impostor one; ties are half."""
    below = np.sort(impostor)
    left = np.searchsorted(below, genuine, "left")
    ties = np.searchsorted(below, genuine, "right") - left
    return float(((left + 0.5 * ties) / len(below)).mean())


def threshold_at(impostor: Float64, far: float) -> float:
    """The similarity above which no more than a share ``far`` of impostor pairs lies;
    NaN where there are too few pairs (below 1/far) to say."""
    allowed = int(far * len(impostor) + 1e-9)
    if allowed < 1:
        return float("nan")
    place = len(impostor) - allowed - 1
    return float(np.partition(impostor, place)[place]) if place >= 0 else -np.inf


def tar_at(genuine: Float64, impostor: Float64, far: float) -> float:
    """Share of genuine pairs accepted at a false acceptance rate of at most ``far``;
    NaN where there are too few impostor pairs."""
    limit = threshold_at(impostor, far)
    return float("nan") if np.isnan(limit) else float((genuine > limit).mean())


def verified(scores: Scores, folds: int = _FOLDS) -> Mask:
    """[n, m], whether each pair is decided rightly, at a threshold that was chosen on
    other people: ten-fold cross-validation, as LFW's protocol has it.

    The threshold is the one of the highest balanced accuracy, so that it does not
    matter that there are more impostor pairs.
    """
    people = np.unique(scores.own)
    right = np.zeros(scores.cosines.shape, bool)
    filled, mine = scores.filled, scores.mine
    for part in np.array_split(people, min(folds, len(people))):
        test = np.isin(scores.own, part)
        limit = _best_threshold(filled[~test][mine[~test]], filled[~test][~mine[~test]])
        right[test] = (filled[test] > limit) == mine[test]
    return right


def _best_threshold(genuine: Float64, impostor: Float64) -> float:
    """Half-way between the two neighbouring scores of the highest balanced accuracy."""
    scores = np.unique(np.concatenate([genuine, impostor]))
    limits = np.concatenate([[scores[0] - 1], (scores[1:] + scores[:-1]) / 2])
    accepted = 1 - np.searchsorted(np.sort(genuine), limits, "right") / len(genuine)
    refused = np.searchsorted(np.sort(impostor), limits, "right") / len(impostor)
    return float(limits[np.argmax(accepted + refused)])


def accuracy(right: Mask, mine: Mask) -> float:
    """Balanced accuracy: genuine and impostor pairs count half each."""
    return float((right[mine].mean() + right[~mine].mean()) / 2)


def rank1(scores: Scores) -> float:
    """Share of probes that are most alike to their own person's photo; a tie with
    another person's is a miss."""
    filled, mine = scores.filled, scores.mine
    others = np.where(mine, -np.inf, filled).max(axis=1)
    return float((filled[mine] > others).mean())


def identity_figures(scores: Scores) -> dict[str, Interval]:
    """All figures, with 95 % intervals over people.

    ``similarity`` and ``angular_distance`` are means over probes with a face, to the
    own photo; ``auc``, ``accuracy`` and ``tar_at_far_…`` are verification, ``rank1``
    retrieval, ``detected`` the share with a face. NaN where there is too little.
    """
    right = verified(scores)

    def of(rows: Indices) -> dict[str, float]:
        some = scores.take(rows)
        filled, mine = some.filled, some.mine
        genuine, impostor = filled[mine], filled[~mine]
        found = ~np.isnan(some.cosines[mine])
        own = some.cosines[mine][found]
        means = (
            (own.mean(), angular_distance(own).mean()) if len(own) else (np.nan,) * 2
        )
        return {
            "similarity": float(means[0]),
            "angular_distance": float(means[1]),
            "auc": auc(genuine, impostor),
            "accuracy": accuracy(right[rows], mine),
            **{far_name(far): tar_at(genuine, impostor, far) for far in FARS},
            "rank1": rank1(some),
            "detected": float(found.mean()),
        }

    return bootstrap(of, scores.own)


def chance_figures(scores: Scores) -> dict[str, float]:
    """What the same figures are where a picture has nothing to do with its person: of
    the two means, what probes reach with other people's photos."""
    others = scores.cosines[~scores.mine]
    others = others[~np.isnan(others)]
    means = (
        (others.mean(), angular_distance(others).mean())
        if len(others)
        else (
            np.nan,
            np.nan,
        )
    )
    return {
        "similarity": float(means[0]),
        "angular_distance": float(means[1]),
        "auc": 0.5,
        "accuracy": 0.5,
        **{far_name(far): far for far in FARS},
        "rank1": 1 / scores.cosines.shape[1],
    }


def paired_similarity(sides: Sequence[Scores]) -> Interval:
    """How much more alike to their own people the second side's probes are than the
    first's, sample by sample; no face counts as a cosine of 0.

    Raises:
        InputError: The sides are not of the same samples.
    """
    first, second = sides
    if not np.array_equal(first.own, second.own):
        raise InputError("only the same samples of two sides can be paired")
    gains = [np.nan_to_num(one.cosines[one.mine], nan=0.0) for one in sides]
    difference = gains[1] - gains[0]
    return bootstrap(lambda rows: {"it": float(difference[rows].mean())}, first.own)[
        "it"
    ]
