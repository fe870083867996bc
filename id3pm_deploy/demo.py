"""The whole way in one call: photo, identity, engine, pictures, parity page."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import __version__
from .builders.build import build_engine
from .errors import InputError, MissingPackageError
from .files import make_folder, write_json
from .generate import (
    Pictures,
    SampleSettings,
    conditions,
    sample_to_folder,
)
from .identity.alignment import FaceDetector, align
from .identity.embed import embed_photos, read_photo
from .identity.embedders import load_embedder
from .identity.vectors import IdentityFile, save_identities
from .images import contact_sheet, save_sheet
from .models import open_engine, open_model
from .parity.run import ParityRequest, parity_to_folder
from .parity.sides import SideRequest
from .progress import progress
from .shipped import shipped_checkpoint

_PERSON = "P001/assets/studio_portrait.jpg"
_SHOWN_SIZE = 128
_PHOTO_MARGIN = 1.15
_PARITY_PICTURES = 3
_MARKER = "demo.json"
_FOLDERS = ("bundle", "pictures", "parity")


@dataclass(frozen=True)
class DemoResult:
    """Where things are and whether the engine agrees with PyTorch."""

    overview: Path
    pictures: Path
    bundle: Path
    parity_page: Path
    parity_passed: bool
    seconds: float


def synthetic_photo() -> Path:
    """A photo of a person who does not exist, from the package openpeople.

    Raises:
        MissingPackageError: The package is not installed.
    """
    found = importlib.util.find_spec("openpeople")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "data" / "curated" / _PERSON
        if path.is_file():
            return path
    raise MissingPackageError(
        "the demo's photo is in the package openpeople, which is not installed",
        fix="pip install 'id3pm-deploy[demo]', or give --photo FILE",
    )


def run_demo(
    out: Path,
    *,
    photo: Path | None = None,
    checkpoint: Path | None = None,
    target: str = "cpu",
    settings: SampleSettings | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Photo to identity to engine to pictures to parity page, under ``out``.

    Args:
        out: Folder for everything; an earlier demo in it is replaced.
        photo: Photo of one person; None: a synthetic person's.
        checkpoint: None: the shipped one.
        target: Recipe in ``engines/`` that runs on this machine.
        settings: How to sample; None: defaults.
        say: Called with a line for each stage.

    Raises:
        Id3pmError: Any stage's own error.
    """
    begun = time.monotonic()
    source = photo or synthetic_photo()
    source_checkpoint = checkpoint or shipped_checkpoint()
    settings = settings or SampleSettings(count=6)
    _claim(out)
    say("1/4  photo to identity vector")
    file = _embed(source, out / "identity.npz")
    say("2/4  checkpoint to engine")
    built = build_engine(source_checkpoint, target, out / "bundle")
    say("3/4  identity vector to pictures")
    made = _sample(built.bundle.folder, settings, file, out / "pictures")
    _save_overview(out / "overview.png", source, made)
    say("4/4  engine against PyTorch")
    passed = _compare(built.bundle.folder, source_checkpoint, settings, out)
    return DemoResult(
        overview=out / "overview.png",
        pictures=out / "pictures",
        bundle=built.bundle.folder,
        parity_page=out / "parity" / "index.html",
        parity_passed=passed,
        seconds=time.monotonic() - begun,
    )


def _claim(out: Path) -> None:
    """Make ``out`` a demo's folder, unless something else lies in it."""
    earlier = (out / _MARKER).is_file()
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} holds something else than an earlier demo",
            fix="give another --out",
        )
    make_folder(out)
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / _MARKER, {"format": "id3pm-demo", "tool_version": __version__})


def _embed(photo: Path, out: Path) -> IdentityFile:
    with progress(1, "embedding") as tick:
        file = embed_photos([photo], load_embedder("sface"), FaceDetector())
        tick()
    save_identities(out, file)
    return file


def _sample(
    bundle: Path, settings: SampleSettings, file: IdentityFile, out: Path
) -> Pictures:
    model = open_model(bundle)
    wanted = conditions(model.spec, file, settings.count)
    made, _ = sample_to_folder(out, model, open_engine(model), settings, wanted)
    return made


def _compare(
    bundle: Path, checkpoint: Path, settings: SampleSettings, out: Path
) -> bool:
    request = ParityRequest(
        engine=SideRequest(bundle),
        reference=SideRequest(checkpoint),
        settings=dataclasses.replace(settings, count=_PARITY_PICTURES),
        identity=out / "identity.npz",
        judge="sface",
    )
    return parity_to_folder(out / "parity", request).passed


def _save_overview(path: Path, photo: Path, made: Pictures) -> None:
    """The aligned photo beside the pictures, marked as the composite it is."""
    rgb = read_photo(photo)
    points = FaceDetector().find_face(rgb).points
    factor = max(1, _SHOWN_SIZE // made.pixels.shape[1])
    shown = [np.kron(p, np.ones((factor, factor, 1), np.uint8)) for p in made.pixels]
    first = align(rgb, points, shown[0].shape[0], _PHOTO_MARGIN)
    sheet = contact_sheet(
        [first, *shown],
        columns=len(shown) + 1,
        column_labels=["photo", *(f"sample {i}" for i in range(len(shown)))],
        scale=1,
        title="photo of a person, and pictures made from its identity vector",
    )
    mark = dataclasses.replace(made.marks[0], sample=None, composite=True)
    save_sheet(path, sheet, mark)
