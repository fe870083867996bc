"""Training a second stage: what it sees, and that it leaves a model that enlarges."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_training import SMALL, MeanColour, _faces
from torch import Tensor

from id3pm_deploy.enlarging import low_res_from_pixels
from id3pm_deploy.errors import CheckpointError, InputError
from id3pm_deploy.images import to_uint8
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.training import run
from id3pm_deploy.training.draws import draw_low_res_noise
from id3pm_deploy.training.losses import DiffusionLoss
from id3pm_deploy.training.low_res import reduce_pictures
from id3pm_deploy.training.run import train
from id3pm_deploy.training.start import diffusion_spec
from id3pm_deploy.training.work import work_folder

SECOND = dataclasses.replace(SMALL, low_res_size=8, low_res_noise=0.2, steps=2)


def test_small_pictures_are_the_grey_levels_of_a_first_stage() -> None:
    large = torch.rand(2, 3, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    small = reduce_pictures(large, 8)
    handed_over = torch.from_numpy(low_res_from_pixels(to_uint8(small.numpy())))
    torch.testing.assert_close(small, handed_over)
    mean = large.view(2, 3, 8, 2, 8, 2).mean(dim=(3, 5))
    assert (small - mean).abs().max() <= 1 / 255 + 1e-6


def test_the_network_sees_the_small_picture_behind_the_noisy_one() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, _: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x[:, :3])

    spec = diffusion_spec(SECOND, MeanColour())
    assert spec.model.low_res_size == 8
    x0, small = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 8, 8), 0.5)
    times, noise = torch.tensor([3, 900]), torch.ones(2, 3, 16, 16)
    DiffusionLoss(spec)(network, x0, torch.zeros(2, 8), times, noise, small)
    assert seen[0].shape == (2, 6, 16, 16)
    assert (seen[0][:, 3:] == 0.5).all()
    assert (seen[0][:, :3] > 0).all()


def test_noise_of_small_pictures_has_a_level_for_each_sample() -> None:
    noise = draw_low_res_noise(0, 5, range(200), (3, 8, 8), 0.2)
    levels = noise.std(dim=(1, 2, 3))
    assert levels.max() < 0.23
    assert levels.mean() == pytest.approx(0.1, abs=0.02)
    part = draw_low_res_noise(0, 5, range(200)[1::2], (3, 8, 8), 0.2)
    assert torch.equal(noise[1::2], part)
    assert not draw_low_res_noise(0, 5, range(2), (3, 8, 8), 0.0).any()


def test_a_second_stage_is_trained_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    given: list[Tensor] = []
    loss = DiffusionLoss.__call__

    def watched(self: DiffusionLoss, *batch: Tensor) -> object:
        given.append(batch[-1])
        return loss(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(DiffusionLoss, "__call__", watched)
    out = tmp_path / "run"
    train([tmp_path], out, SECOND, MeanColour())
    assert [tuple(small.shape) for small in given] == [(4, 3, 8, 8)] * 2
    assert len({float(x.std()) for x in given[0]}) == 4  # a noise level each
    checkpoint = load_checkpoint(out)
    assert checkpoint.spec.model.low_res_size == 8
    x = torch.zeros(1, 6, 16, 16)
    assert checkpoint.network(x, torch.zeros(1), torch.zeros(1, 8)).shape[1] == 3
    assert (work_folder(out) / "sheet-0000002.png").is_file()
    more = dataclasses.replace(SECOND, low_res_noise=0.1)
    with pytest.raises(InputError, match="other settings: low_res_noise"):
        train([tmp_path], out, more, MeanColour(), resume=True)


def test_what_no_second_stage_can_be() -> None:
    with pytest.raises(InputError, match="second stage"):
        dataclasses.replace(SMALL, low_res_noise=0.1)
    large = dataclasses.replace(SMALL, low_res_size=32)
    with pytest.raises(CheckpointError, match="low_res_size"):
        diffusion_spec(large, MeanColour())
