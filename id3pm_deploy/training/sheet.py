"""A contact sheet of what the averaged weights can do so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..images import PictureMark, contact_sheet, save_sheet, to_uint8
from ..reference.sampling import guided_denoiser, reference_trajectory
from ..reference.step import with_enlarged
from ..reference.unet import IdentityUNet
from ..spec import DiffusionSpec
from .low_res import reduce_pictures

_PEOPLE = 8
_STEPS = 20
_GUIDANCE = 2.0
_FIRST_TIMESTEP = 995


def save_training_sheet(
    path: Path,
    network: IdentityUNet,
    averaged: dict[str, Tensor],
    spec: DiffusionSpec,
    pictures: Any,
    vectors: Any,
    folders: Any,
    step: int,
) -> None:
    """Sample eight people spread over the folders with the averaged weights.

    The upper row shows training pictures, so the sheet is readable by the run's
    owner only (mode of the folder it lies in).

    Args:
        path: Where the PNG goes.
        network: The network in training; its weights are put back afterwards.
        averaged: The EMA of its parameters, by name.
        spec: Facts of the model.
        pictures: [n, S, S, 3] uint8.
        vectors: [n, D] float32, conditions: normalised identities, and attributes.
        folders: [n] int, the folder each face came from.
        step: Shown in the title.
    """
    rows = spread_over_folders(folders, _PEOPLE)
    shown = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2) / 127.5 - 1.0
    made = _sample(network, averaged, spec, torch.from_numpy(vectors[rows]), shown)
    mark = PictureMark(
        tool_version=__version__,
        seed=0,
        sample=0,
        solver="ddim",
        steps=_STEPS,
        guidance=_GUIDANCE,
        backend="torch",
        precision="float32",
        composite=True,
    )
    sheet = contact_sheet(
        [*pictures[rows], *made],
        columns=_PEOPLE,
        row_labels=["photo", "model"],
        scale=3,
        title=f"step {step}",
    )
    save_sheet(path, sheet, mark)


def spread_over_folders(folders: Any, count: int) -> Any:
    """Indices of ``count`` faces, as many of each folder, the folder's first leading.

    Args:
        folders: [n] int, the folder of each face.
        count: How many; of more folders than that, some are left out.

    Returns:
        int [count]; a face comes twice where its folder has too few.
    """
    present = np.unique(folders)
    places = np.arange(count) * len(present) // count
    if len(present) > count:
        places = np.linspace(0, len(present) - 1, count).astype(int)
    rows = []
    for place, wanted in zip(*np.unique(places, return_counts=True), strict=True):
        faces = np.flatnonzero(folders == present[place])
        rows.append(faces[np.linspace(0, len(faces) - 1, wanted).astype(int)])
    return np.concatenate(rows)


def _sample(
    network: IdentityUNet,
    averaged: dict[str, Tensor],
    spec: DiffusionSpec,
    identity: Tensor,
    pictures: Tensor,
) -> Any:
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(averaged)
    network.eval()
    try:
        device = next(network.parameters()).device
        shape = (len(identity), spec.model.image_channels, *[spec.model.image_size] * 2)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(device)
        denoise = guided_denoiser(
            _enlarging(network, pictures.to(device)),
            identity.to(device),
            _GUIDANCE,
            guide_variance=False,
        )
        last = min(_FIRST_TIMESTEP, spec.schedule.timesteps - 1)
        times = np.rint(np.linspace(last, 0, _STEPS)).astype(int).tolist()
        steps = reference_trajectory(
            spec, denoise, x, times, lambda _: x, solver="ddim"
        )
        for made in steps:
            x = made
    finally:
        network.load_state_dict(kept)
        network.train()
    return to_uint8(x.cpu().numpy())


def _enlarging(network: IdentityUNet, pictures: Tensor) -> Any:
    """The network; a second stage with what it enlarges, the ``pictures`` reduced."""
    size = network.spec.low_res_size
    if size is None:
        return network
    small = reduce_pictures(pictures, size)

    def run(x: Tensor, timesteps: Tensor, identity: Tensor) -> Tensor:
        out: Tensor = network(with_enlarged(x, small), timesteps, identity)
        return out

    run.spec = network.spec  # type: ignore[attr-defined]
    return run
