"""A small world for `evaluate` and `audit`: photos of noise, and what sees in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from id3pm_deploy.cli import main
from id3pm_deploy.errors import FaceError
from id3pm_deploy.evaluation import audit, measure, run
from id3pm_deploy.identity.alignment import ARCFACE_112
from id3pm_deploy.identity.embedders import Embedder
from id3pm_deploy.models import open_model

QUICK = ["--solver", "ddim", "--steps", "1", "--guidance", "1"]


class Detector:
    """Sees a face everywhere, but none where the first pixel is black."""

    def find_face(self, rgb: Any, *, name: str = "it", largest: bool = False) -> Any:
        if rgb[0, 0].max() == 0:
            raise FaceError(f"no face was found in {name}")
        return SimpleNamespace(points=ARCFACE_112 * len(rgb) / 112)


class Grid(Embedder):
    """Colours of a 4x4 grid, turned into ``dim`` numbers."""

    def __init__(self, name: str, sha256: str | None, dim: int) -> None:
        self.name, self.sha256, self._size = name, sha256, dim
        self._mix = np.random.default_rng(dim).normal(size=(48, dim))

    @property
    def dim(self) -> int:
        return self._size

    def _forward(self, aligned: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        n, size = aligned.shape[:2]
        part = size // 4
        cells = aligned.reshape(n, 4, part, 4, part, 3).mean(axis=(2, 4))
        return np.asarray((cells.reshape(n, -1) / 128 - 1) @ self._mix)


def picture(number: int, shade: int = 0) -> npt.NDArray[np.uint8]:
    """A person's photo: coarse colours, by number, a little lighter by ``shade``."""
    coarse = np.random.default_rng(number).integers(20, 200, (4, 4, 3))
    return np.kron(coarse + shade, np.ones((16, 16, 1), int)).astype(np.uint8)


def people(folder: Path, count: int, each: int = 1) -> Path:
    """Photos: one of each, or a subfolder of each."""
    for number in range(count):
        for shade in range(each):
            one = folder if each == 1 else folder / f"p{number:02d}"
            one.mkdir(parents=True, exist_ok=True)
            name = f"{number:02d}-{shade}.png"
            Image.fromarray(picture(number, 9 * shade)).save(one / name)
    return folder


def install(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """FR models called ``own`` and ``judge``, and no perceptual network."""
    identity = open_model(checkpoint).spec.identity
    known = {
        "own": (identity.model_name, identity.model_sha256, identity.dim),
        "judge": ("judge", "cd" * 32, 24),
        "other": ("other", "ef" * 32, identity.dim),
    }
    monkeypatch.setattr(run, "load_embedder", lambda spec: Grid(*known[spec]))
    monkeypatch.setattr(run, "FaceDetector", Detector)
    monkeypatch.setattr(audit, "FaceDetector", Detector)
    monkeypatch.setattr(measure, "PerceptualFeatures", Features)


class Features:
    """In place of the perceptual network: colours of a 2x2 grid."""

    name = "a grid"

    def __call__(self, pictures: Any, on_done: Any = lambda _: None) -> Any:
        found = []
        for one in pictures:
            half = len(one) // 2
            cells = one.reshape(2, half, 2, half, 3).mean(axis=(1, 3))
            found.append(cells.reshape(-1) - 100.0)
            on_done(1)
        return np.array(found)


def command(*arguments: object) -> Result:
    """The command line."""
    return CliRunner().invoke(main, [str(one) for one in arguments])
