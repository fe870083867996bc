"""Gather faces of people who do not exist, from packages anyone can install.

``python -m id3pm_deploy.training.sources OUT`` writes folders of pictures that
``id3pm-deploy train`` takes: ``people/PXXX`` cut from openpeople's photos and sheets,
``gan`` drawn from the generator of gan-face-generate (install it with ``--no-deps``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..errors import MissingPackageError
from ..files import atomic_path, make_folder
from ..identity.alignment import FaceDetector, align
from ..identity.embed import read_photo
from ..progress import progress

_CUT_SIZE = 160
_CUT_MARGIN = 1.8
_MIN_SCORE = 0.8
_MIN_SCORE_GAN = 0.85


def package_folder(name: str) -> Path:
    """Folder of an installed package that is not imported.

    Raises:
        MissingPackageError: The package is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise MissingPackageError(
            f"the package {name} is not installed",
            fix=f"pip install --no-deps {name.replace('_', '-')}",
        )
    return Path(next(iter(found.submodule_search_locations)))


def _save_picture(path: Path, rgb: Any) -> None:
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG")


def looks_ahead(points: Any) -> bool:
    """Whether the nose [2] lies well between the eyes [0] and [1], seen across."""
    across = points[1] - points[0]
    position = float((points[2] - points[0]) @ across) / float(across @ across)
    return 0.2 < position < 0.8


def cut_people(out: Path) -> int:
    """Cut every clear face out of openpeople's pictures, a folder for each person."""
    detector = FaceDetector()
    root = package_folder("openpeople") / "data" / "curated"
    paths = sorted(root.glob("P*/assets/*.jpg"))
    count = 0
    with progress(len(paths), "people") as tick:
        for path in paths:
            person = make_folder(out / path.parent.parent.name)
            rgb = read_photo(path)
            for index, face in enumerate(detector.detect(rgb)):
                if face.score >= _MIN_SCORE and looks_ahead(face.points):
                    cut = align(rgb, face.points, _CUT_SIZE, _CUT_MARGIN)
                    _save_picture(person / f"{path.stem}-{index:02d}.png", cut)
                    count += 1
            tick()
    return count


def draw_from_gan(out: Path, wanted: int, seed: int = 0) -> int:
    """Draw ``wanted`` 64x64 faces that the detector is sure of.

    The weights file is read with weights-only unpickling.
    """
    import torch

    folder = package_folder("gan_face_generate")
    state = torch.load(folder / "weights.tar", map_location="cpu", weights_only=True)
    generator = _dcgan(state["netG_state_dict"])
    detector = FaceDetector()
    make_folder(out)
    torch.manual_seed(seed)
    count = 0
    with progress(wanted, "drawn faces") as tick, torch.inference_mode():
        while count < wanted:
            made = generator(torch.randn(64, 100, 1, 1)).clamp(-1, 1)
            batch = ((made + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
            for rgb in batch:
                if count < wanted and _is_clear_face(rgb, detector):
                    _save_picture(out / f"{count:05d}.png", rgb)
                    count += 1
                    tick()
    return count


def _is_clear_face(rgb: Any, detector: FaceDetector) -> bool:
    enlarged = np.ascontiguousarray(np.kron(rgb, np.ones((4, 4, 1), rgb.dtype)))
    faces = detector.detect(enlarged)
    if len(faces) != 1 or faces[0].score < _MIN_SCORE_GAN:
        return False
    return looks_ahead(faces[0].points)


def _dcgan(tensors: dict[str, Any]) -> Any:
    """DCGAN's generator (Radford et al. 2016), widths read from the weights."""
    from torch import nn

    layers: list[nn.Module] = []
    convolutions = sorted(
        (int(name.split(".")[1]), t) for name, t in tensors.items() if t.ndim == 4
    )
    for index, (_, weight) in enumerate(convolutions):
        wide, narrow = weight.shape[:2]
        stride, padding = (1, 0) if index == 0 else (2, 1)
        layers.append(nn.ConvTranspose2d(wide, narrow, 4, stride, padding, bias=False))
        if index + 1 < len(convolutions):
            layers += [nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)]
    network = nn.Sequential(*layers, nn.Tanh())
    network.load_state_dict(
        {name.removeprefix("main."): t for name, t in tensors.items()}
    )
    return network.eval()


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--gan", "wanted", default=0, help="Faces to draw from the DCGAN.")
def main(out: Path, wanted: int) -> None:
    """Write folders of synthetic faces under OUT."""
    click.echo(f"{cut_people(make_folder(out / 'people'))} faces of ten people")
    if wanted:
        click.echo(f"{draw_from_gan(out / 'gan', wanted)} drawn faces")


if __name__ == "__main__":
    main()
