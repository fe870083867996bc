"""How much pictures look like an identity, to an FR model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FaceError
from .alignment import FaceDetector
from .embed import embed_images
from .embedders import Embedder


def picture_similarity(
    vectors: npt.NDArray[np.float32], embedder: Embedder, detector: FaceDetector
) -> Callable[[Sequence[Any]], tuple[float, ...]]:
    """A function from n pictures to the cosines between each and its identity.

    Args:
        vectors: [n, D], the identity asked of each picture.
        embedder: The FR model that judges, the one the vectors are of.
        detector: Finds the face; a picture without one scores NaN.
    """

    def judge(pictures: Sequence[Any]) -> tuple[float, ...]:
        scores = []
        for wanted, picture in zip(vectors, pictures, strict=True):
            try:
                found = embed_images([picture], embedder, detector, largest=True)[0]
            except FaceError:
                scores.append(float("nan"))
                continue
            norms = np.linalg.norm(found) * np.linalg.norm(wanted)
            scores.append(float(np.dot(found, wanted) / norms))
        return tuple(scores)

    return judge
