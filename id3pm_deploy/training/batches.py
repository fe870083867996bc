"""Random training batches, a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InputError
from ..identity.vectors import normalise_identities
from .config import TrainingConfig
from .faces import TrainingFaces


class Batches:
    """Random training batches, a pure function of (seed, step).

    Args:
        faces: The data.
        config: Batch size, noise and dropout of the condition, shares of the folders.
    """

    def __init__(self, faces: TrainingFaces, config: TrainingConfig) -> None:
        self.config = config
        self.pictures = faces.pictures
        n, flips, jitter, dim = faces.vectors.shape
        flat = normalise_identities(
            faces.vectors.reshape(-1, dim), config.normalisation
        )
        self.vectors = flat.reshape(n, flips, jitter, dim)
        self.attributes = np.zeros((n, 0), np.float32)
        if faces.attributes is not None:
            self.attributes = faces.attributes
        self.weights = face_weights(faces.folders, config.shares)

    @property
    def conditions(self) -> npt.NDArray[np.float32]:
        """What each face's picture is conditioned on, [n, D], nothing dropped."""
        return np.concatenate([self.vectors[:, 0, 0], self.attributes], axis=1)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures [N, 3, S, S] in [-1, 1] and conditions [N, D] of ``step``."""
        config = self.config
        rng = np.random.default_rng([config.seed, step])
        count, (n, _, jitter, dim) = config.batch_size, self.vectors.shape
        rows = rng.choice(n, size=count, p=self.weights)
        flip = rng.integers(0, 2, size=count)
        pictures = self.pictures[rows, flip].astype(np.float32) / 127.5 - 1.0
        which = rng.integers(0, jitter, size=count)
        vectors = self.vectors[rows, flip, which].astype(np.float64)
        if config.identity_noise:
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            spread = norms / np.sqrt(dim) * config.identity_noise
            vectors = vectors + spread * rng.standard_normal(vectors.shape)
            vectors *= norms / np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[rng.random(count) < config.condition_dropout] = 0.0
        columns = self.attributes[rows]
        if columns.size:
            self._drop(rng, vectors, columns)
        condition = np.concatenate([vectors, columns], axis=1).astype(np.float32)
        x0 = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
        return x0, torch.from_numpy(condition)

    def _drop(self, rng: np.random.Generator, vectors: Any, columns: Any) -> None:
        """Take attributes away, each on its own, and of some samples everything."""
        count, start = len(columns), 0
        for spec in self.config.attribute_specs:
            lost = rng.random(count) < self.config.attribute_dropout
            columns[lost, start : start + spec.columns] = 0.0
            start += spec.columns
        nothing = rng.random(count) < self.config.joint_dropout
        vectors[nothing], columns[nothing] = 0.0, 0.0


def face_weights(folders: Any, shares: Sequence[float]) -> Any:
    """Probability of each face, so that folder i is drawn with share i.

    Args:
        folders: [n] int, the folder each face came from.
        shares: One number a folder; none: as many faces as each has.

    Returns:
        float64 [n], of sum 1.

    Raises:
        InputError: Too few shares, or only folders without a usable face have one.
    """
    counts = np.bincount(folders)
    wanted = np.array(shares or counts, dtype=np.float64)
    if len(wanted) < len(counts):
        raise InputError(
            f"{len(counts)} folders of faces need {len(counts)} shares",
            why=f"given: {list(shares)}",
            fix="give one share of at least 0 for each folder",
        )
    weights = (wanted[: len(counts)] / np.maximum(counts, 1))[folders]
    if not weights.sum() > 0:
        raise InputError(
            "no folder with a share above 0 has a usable face",
            why=f"given: {list(shares)}; faces a folder: {counts.tolist()}",
            fix="give a share to a folder that has faces",
        )
    return weights / weights.sum()
