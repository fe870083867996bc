"""Batches with attributes: what is dropped, on its own and together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import SMALL, MeanColour, _faces

from id3pm_deploy.attributes import encode_attributes
from id3pm_deploy.errors import InputError
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.training import run
from id3pm_deploy.training.batches import Batches
from id3pm_deploy.training.config import TrainingConfig
from id3pm_deploy.training.faces import TrainingFaces
from id3pm_deploy.training.run import train

DECLARED = ("age=0..100", "glasses=yes|no|sun")


def config_with(**changes: object) -> TrainingConfig:
    settings = {"attributes": DECLARED, "batch_size": 1000, **changes}
    return dataclasses.replace(SMALL, **settings)  # type: ignore[arg-type]


def labelled(count: int = 8) -> TrainingFaces:
    """Faces with both attributes, but for the first, which states nothing."""
    specs = config_with().attribute_specs
    stated: dict[str, float | str] = {"age": 90.0, "glasses": "sun"}
    columns = encode_attributes(specs, [{}, *[stated] * (count - 1)])
    return dataclasses.replace(_faces(count), attributes=columns)


def kept(config: TrainingConfig, step: int = 0) -> torch.Tensor:
    """Whether each sample of a batch sees identity, age and glasses, [N, 3]."""
    condition = Batches(labelled(), config).at(step)[1]
    assert condition.shape == (config.batch_size, 8 + 2 + 3)
    parts = torch.split(condition, [8, 2, 3], dim=1)
    for part, stated in zip(parts[1:], ([0.8, 1], [0, 0, 1]), strict=True):
        seen = part[part.any(dim=1)]
        assert torch.allclose(seen, torch.tensor(stated).expand_as(seen).float())
    return torch.stack([part.any(dim=1) for part in parts], dim=1)


def test_identity_and_each_attribute_are_dropped_on_their_own() -> None:
    off = {"condition_dropout": 0.0, "attribute_dropout": 0.0, "joint_dropout": 0.0}
    whole = kept(config_with(**off))
    stated = whole[:, 1]
    assert whole[:, 0].all()
    assert torch.equal(stated, whole[:, 2])
    assert 0.8 < stated.float().mean() < 0.95  # one face of eight states nothing
    seen = kept(config_with(**{**off, "attribute_dropout": 0.5}))
    assert seen[:, 0].all()
    both = seen[stated][:, 1:].float()
    assert (both.mean(dim=0) - 0.5).abs().max() < 0.1
    assert abs(both.prod(dim=1).mean() - 0.25) < 0.1  # independent of each other
    seen = kept(config_with(**{**off, "condition_dropout": 0.5}))
    assert 0.4 < seen[:, 0].float().mean() < 0.6
    assert torch.equal(seen[:, 1:], whole[:, 1:])
    seen = kept(config_with(**{**off, "joint_dropout": 0.5}))
    assert 0.4 < seen[:, 0].float().mean() < 0.6
    assert torch.equal(seen[:, 1], seen[:, 0] & stated)
    assert torch.equal(seen[:, 2], seen[:, 0] & stated)


def test_batches_with_attributes_follow_seed_and_step() -> None:
    batches = Batches(labelled(), config_with())
    first, same, other = (batches.at(step)[1] for step in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert (batches.attributes[1:] != 0).any(axis=1).all()  # nothing was dropped there


def test_attributes_do_not_change_what_else_is_drawn() -> None:
    plain = Batches(_faces(8), config_with(attributes=()))
    with_them = Batches(labelled(), config_with(joint_dropout=0.0))
    (x, identity), (same, condition) = plain.at(5), with_them.at(5)
    assert torch.equal(x, same)
    assert torch.equal(identity, condition[:, :8])
    assert np.array_equal(plain.conditions, with_them.conditions[:, :8])


def test_a_checkpoint_knows_its_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: labelled())
    config = config_with(batch_size=4, steps=2)
    train([tmp_path], tmp_path / "run", config, MeanColour())
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.spec.attributes == config.attribute_specs
    assert checkpoint.spec.condition_dim == 13
    assert checkpoint.network.identity_projection.in_features == 13
    assert (tmp_path / "run.training" / "sheet-0000002.png").is_file()
    other = dataclasses.replace(config, attributes=DECLARED[:1])
    with pytest.raises(InputError, match="other settings: attributes"):
        train([tmp_path], tmp_path / "run", other, MeanColour(), resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"attributes": ("age",)},
        {"attributes": ("age=0..1", "age=0..2")},
        {"attribute_dropout": 1.0},
        {"joint_dropout": float("nan")},
    ],
)
def test_attribute_settings_that_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        config_with(**change)
