"""Whether an engine's pictures are as much alike to their people as the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..evaluation.intervals import upper_bound
from ..generate import SampleSettings, conditions, make_pictures
from ..identity.vectors import IdentityFile
from ..images import Pixels
from ..report import IdentityDrop
from ..solvers import solver_table
from ..tolerances import IDENTITY_SAMPLES
from .sides import Side

BATCH = 32
"""Pictures at once; cannot change them."""

Similarity = Callable[[Sequence[Pixels]], tuple[float, ...]]


def check_pairs(pairs: int) -> None:
    """Refuse fewer pairs than the drop of the similarity can be held to.

    Raises:
        InputError: There are some, but too few.
    """
    if pairs and not IDENTITY_SAMPLES <= pairs <= 100_000:
        raise InputError(
            f"the identity gate needs {IDENTITY_SAMPLES} to 100000 pairs of pictures",
            why=f"{pairs} were asked for",
            fix="change --judge-samples, or give 0 to leave the gate out",
        )


def identity_drop(
    name: str, reference: npt.ArrayLike, engine: npt.ArrayLike
) -> IdentityDrop:
    """How far similarities drop from the reference to the engine.

    Args:
        name: The FR model that judged.
        reference: Cosine of each picture to its identity; NaN for no face.
        engine: The same of the engine's, of the same noise, in the same order.
    """
    sides = np.stack([np.asarray(one, np.float64) for one in (reference, engine)])
    faces = np.isfinite(sides).sum(axis=1).tolist()
    sides = np.nan_to_num(sides, nan=0.0)
    means = sides.mean(axis=1).tolist()
    return IdentityDrop(
        name=name,
        pairs=sides.shape[1],
        reference=means[0],
        engine=means[1],
        upper=upper_bound(sides[0] - sides[1]),
        faces_reference=faces[0],
        faces_engine=faces[1],
    )


def rows_of(side: Side, settings: SampleSettings, pairs: int) -> int:
    """Table rows that both sides take for that many pairs."""
    return 2 * len(solver_table(side.model.spec, settings.solver)) * -(-pairs // BATCH)


def judged_pairs(
    engine: Side,
    reference: Side,
    settings: SampleSettings,
    file: IdentityFile,
    judge: Callable[[Sequence[int]], Similarity],
    pairs: int,
    on_row: Callable[[int], None] | None = None,
) -> IdentityDrop:
    """Make pictures of the identities on both sides, from the same noise, and judge.

    Args:
        engine: What is judged; entered.
        reference: What it is held against; entered.
        settings: How pictures are made; their count and batch size are not used.
        file: Whose; each has as many pictures as the others, up to one.
        judge: From the number of each picture's identity to what scores the pictures.
        pairs: How many pictures of each side, at least.
        on_row: Called after each table row of each batch.
    """
    each = -(-pairs // len(file))
    settings = dataclasses.replace(settings, count=each, batch_size=BATCH)
    wanted = conditions(engine.model.spec, file, each)
    scores = judge([i for i in range(len(file)) for _ in range(each)])
    found = []
    for side in (reference, engine):
        made = make_pictures(side.engine, side.model, settings, wanted, on_row)
        found.append(scores(list(made.pixels)))
    return identity_drop(file.model_name, *found)
