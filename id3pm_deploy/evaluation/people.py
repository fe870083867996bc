"""The people that pictures are made of and compared with: one photo each, or more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FaceError, InputError, some_of
from ..identity.alignment import FaceDetector, Points, align
from ..identity.embed import read_photo
from ..images import Pixels
from ..training.pictures import picture_paths


@dataclass(frozen=True)
class Cut:
    """What is cut out of a photo.

    Attributes:
        sizes: Of the crops for FR models, in pixels.
        size: Of the picture that the model could at best make.
        margin: How much that shows around the face (see ``align``).
    """

    sizes: frozenset[int]
    size: int
    margin: float


@dataclass(frozen=True)
class Photos:
    """Faces of photos; the photos themselves are not kept.

    Attributes:
        crops: By size, [m, size, size, 3] uint8 for FR models.
        small: [m, S, S, 3] uint8, as the model could show them at best.
        own: [m], the number of each one's person.
        skipped: How many had no single usable face, or could not be read.
    """

    crops: dict[int, Pixels]
    small: Pixels
    own: np.ndarray[tuple[int], np.dtype[np.intp]]
    skipped: int

    def __len__(self) -> int:
        return len(self.small)


def people_in(folder: Path, limit: int = 0) -> list[list[Path]]:
    """The photos of each person in ``folder``, sorted.

    A picture that lies in it directly is a person of its own; all below one of its
    subfolders are of one person.

    Args:
        folder: With the photos.
        limit: Take that many people, evenly spread; 0: all.

    Raises:
        InputError: There are fewer than two people.
    """
    found: dict[Path, list[Path]] = {}
    for path in picture_paths(folder):
        found.setdefault(folder / path.relative_to(folder).parts[0], []).append(path)
    people = [found[name] for name in sorted(found)]
    if limit:
        chosen = np.linspace(0, len(people) - 1, min(limit, len(people)))
        people = [people[i] for i in chosen.astype(int)]
    if len(people) < 2:
        raise InputError(
            f"{folder} shows {len(people)} person, and two are needed at least",
            fix="give a folder with a photo of each person, or a subfolder of each",
        )
    return people


def read_faces(
    people: Sequence[Sequence[Path]],
    detector: FaceDetector,
    cut: Cut,
    *,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_done: Callable[[], object] = lambda: None,
) -> Photos:
    """Find and cut out the face of every photo.

    Args:
        people: Photos of each.
        detector: Finds the face.
        cut: What to cut out.
        skip_bad: Leave out, and name to the user, what has no single usable face or
            cannot be read; else that is an error.
        say: Called with a line for each photo that is left out.
        on_done: Called after each photo.

    Raises:
        InputError, FaceError: A photo cannot be used, or too few can.
    """
    crops: dict[int, list[Pixels]] = {size: [] for size in cut.sizes}
    small, own, bad = [], [], []
    for person, paths in enumerate(people):
        for path in paths:
            try:
                rgb, points = _one_face(path, detector)
            except (InputError, FaceError) as error:
                bad.append(f"{error.what}{error.why and f' ({error.why})'}")
            else:
                small.append(align(rgb, points, cut.size, cut.margin))
                own.append(person)
                for size, rows in crops.items():
                    rows.append(align(rgb, points, size))
            on_done()
    if bad and not skip_bad:
        raise FaceError(
            f"{len(bad)} of {sum(map(len, people))} photos cannot be used",
            why=some_of(bad),
            fix="remove them, or leave them out with --skip-bad",
        )
    for line in bad:
        say(f"skipped: {line}")
    kept, numbers = np.unique(np.array(own, np.intp), return_inverse=True)
    if len(kept) < 2:
        raise InputError(f"usable photos of two people are needed, not of {len(kept)}")
    stacked = {size: np.stack(rows) for size, rows in crops.items()}
    return Photos(stacked, np.stack(small), numbers.astype(np.intp), len(bad))


def _one_face(path: Path, detector: FaceDetector) -> tuple[Pixels, Points]:
    rgb = read_photo(path)
    return rgb, detector.find_face(rgb, name=str(path)).points
