"""Both sides' pictures and their differences, as marked PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InputError
from ..images import PictureMark, Pixels, check_pixels, contact_sheet, encode_png

SHOWN = 12
"""Pictures of a trajectory on the sheet and the page, at most; the figures are over all
of them."""
_MOST_DOUBLINGS = 24


@dataclass(frozen=True)
class PicturePairs:
    """What both sides made of the same samples, of one trajectory.

    Attributes:
        reference: [B, H, W, 3] uint8.
        engine: The same shape.
        error: The same shape, float32: how far they are apart in grey levels, before
            rounding, so that it can be seen where rounding leaves nothing.
        reference_marks: How the reference's were made, one each.
        engine_marks: How the engine's were made, one each.

    Raises:
        InputError: The four do not fit each other, or are no pictures.
    """

    reference: Pixels
    engine: Pixels
    error: npt.NDArray[np.float32]
    reference_marks: Sequence[PictureMark]
    engine_marks: Sequence[PictureMark]

    def __post_init__(self) -> None:
        count = len(self.engine)
        marks = (self.reference_marks, self.engine_marks)
        if (
            self.reference.shape != self.engine.shape
            or self.error.shape != self.engine.shape
            or count == 0
            or any(len(m) != count for m in marks)
        ):
            raise InputError(
                "a report needs as many marks as pictures on either side",
                why=f"reference {list(self.reference.shape)}, engine "
                f"{list(self.engine.shape)}, {len(marks[0])} and {len(marks[1])} marks",
            )
        check_pixels(self.reference[0])
        check_pixels(self.engine[0])


@dataclass(frozen=True)
class ShownPictures:
    """The bytes of PNG files for the page, one of each list per sample shown."""

    names: Sequence[str]
    reference: Sequence[bytes]
    engine: Sequence[bytes]
    difference: Sequence[bytes]
    amplification: int
    differ: bool
    total: int


def difference_pixels(error: npt.NDArray[np.float32]) -> tuple[Pixels, int]:
    """Errors enlarged to be seen.

    Args:
        error: Any shape, in grey levels, at least 0.

    Returns:
        uint8 of that shape, and the whole number it was multiplied by: the largest
        power of two, up to 2**24, at which nothing is cut off.
    """
    largest = float(error.max(initial=0.0))
    doublings = _MOST_DOUBLINGS
    while doublings and largest * 2**doublings > 255:
        doublings -= 1
    factor = 2**doublings
    shown = np.minimum(error.astype(np.float64) * factor, 255)
    return np.rint(shown).astype(np.uint8), factor


def shown_pictures(pairs: PicturePairs) -> ShownPictures:
    """The first :data:`SHOWN` pairs and their differences, encoded and marked."""
    reference, engine = pairs.reference[:SHOWN], pairs.engine[:SHOWN]
    difference, factor = difference_pixels(pairs.error[:SHOWN])
    ours = pairs.engine_marks[:SHOWN]
    theirs = pairs.reference_marks[:SHOWN]
    return ShownPictures(
        names=[f"sample {mark.sample}" for mark in ours],
        reference=[encode_png(p, m) for p, m in zip(reference, theirs, strict=True)],
        engine=[encode_png(p, m) for p, m in zip(engine, ours, strict=True)],
        difference=[encode_png(p, m) for p, m in zip(difference, ours, strict=True)],
        amplification=factor,
        differ=bool(pairs.error.any()),
        total=len(pairs.engine),
    )


def comparison_sheet(
    pairs: Sequence[PicturePairs], names: Sequence[str], title: str
) -> Image.Image:
    """Reference, engine and difference of each trajectory in three rows.

    Args:
        pairs: At least one; all of the same size of picture.
        names: One for each trajectory, shown where there are several.
        title: A line above everything.
    """
    columns = min(SHOWN, max(len(one.engine) for one in pairs))
    rows: list[Pixels] = []
    labels = []
    for one, name in zip(pairs, names, strict=True):
        difference, factor = difference_pixels(one.error[:columns])
        for row in (one.reference[:columns], one.engine[:columns], difference):
            blank = np.full((columns, *row.shape[1:]), 255, np.uint8)
            blank[: len(row)] = row
            rows.extend(blank)
        first = f"{name}\n" if len(pairs) > 1 else ""
        labels += [
            f"{first}reference",
            "engine",
            f"|difference|\nx {factor}",
        ]
    marks = pairs[0].engine_marks
    samples = [marks[i].sample if i < len(marks) else i for i in range(columns)]
    return contact_sheet(
        rows,
        columns=columns,
        row_labels=labels,
        column_labels=[f"sample {sample}" for sample in samples],
        title=title,
    )


def sheet_mark(pairs: Sequence[PicturePairs]) -> PictureMark:
    """The mark of a sheet of several samples."""
    return replace(pairs[0].engine_marks[0], sample=None)
