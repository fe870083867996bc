"""The second stage: a super-resolution model enlarges pictures.

It is fed grey levels of 8 bits, as guided-diffusion feeds what its base wrote to a
file, and not the base's floats: so a chain makes, bit for bit, what its second model
makes of the pictures that the first one wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .images import Pixels
from .marks import PictureMark, read_mark
from .noise import BASE_STAGE, SUPER_RESOLUTION_STAGE
from .spec import DiffusionSpec

if TYPE_CHECKING:
    from .backends.base import Engine
    from .generate import Conditions, SampleSettings
    from .models import Model

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Enlarging:
    """How the second stage of a run enlarges what the first one made.

    ``open_engine`` is called when the first stage is done and its engine closed, so
    that a machine need not hold both; before, if the first stage runs on a device that
    may hand its pictures over (``chain.py``). Of ``settings``, the seed and the count
    are the first stage's, too.
    """

    model: Model
    open_engine: Callable[[], Engine]
    settings: SampleSettings
    wanted: Conditions


@dataclass(frozen=True)
class GivenPictures:
    """Pictures that a super-resolution model shall enlarge.

    Attributes:
        low_res: [n, 3, h, w] float32.
        generated: Whether all of them carry this tool's mark.
    """

    low_res: Float32
    generated: bool


def low_res_from_pixels(pixels: Pixels) -> Float32:
    """What a super-resolution model is fed: x/127.5 - 1 in float32, as guided-diffusion
    computes it.

    Args:
        pixels: [n, h, w, 3] uint8.

    Returns:
        [n, 3, h, w] float32.
    """
    levels = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    return np.ascontiguousarray(levels / np.float32(127.5) - np.float32(1))


def noise_stage(spec: DiffusionSpec) -> int:
    """The noise stage of a model, whether it runs in a chain or alone."""
    enlarges = spec.model.low_res_size is not None
    return SUPER_RESOLUTION_STAGE if enlarges else BASE_STAGE


def read_pictures(path: Path, spec: DiffusionSpec, sheet: str = "") -> GivenPictures:
    """Pictures for a super-resolution model.

    Args:
        path: A picture, or a folder whose PNG files are taken in the order of their
            names.
        spec: Facts of the model.
        sheet: Name of a file in the folder that is none of them.

    Raises:
        InputError: There are none, one cannot be read, or has another size than the
            model takes.
    """
    from .identity.embed import read_photo

    size = spec.model.low_res_size
    assert size is not None, "only a super-resolution model is given pictures"
    files = [path]
    if path.is_dir():
        files = sorted(one for one in path.glob("*.png") if one.name != sheet)
    if not files:
        raise InputError(
            f"{path} holds no PNG file", fix="give a picture, or a folder of them"
        )
    pixels = []
    for one in files:
        pixels.append(read_photo(one))
        height, width = pixels[-1].shape[:2]
        if (height, width) != (size, size):
            raise InputError(
                f"{one} is not of the size that the model enlarges",
                why=f"it is {width}x{height} pixels, the model takes {size}x{size}",
                fix="scale it to that size first",
            )
    marked = all(_is_marked(one) for one in files)
    return GivenPictures(low_res_from_pixels(np.stack(pixels)), marked)


def _is_marked(path: Path) -> bool:
    with contextlib.suppress(InputError):
        return not read_mark(path).composite
    return False


def enlarged_mark(small: PictureMark, large: PictureMark) -> PictureMark:
    """What a picture of two stages says: how the first made it, and the second."""
    return dataclasses.replace(
        small,
        sr_solver=large.solver,
        sr_steps=large.steps,
        sr_guidance=large.guidance,
        sr_backend=large.backend,
        sr_precision=large.precision,
        sr_checkpoint=large.checkpoint,
    )
