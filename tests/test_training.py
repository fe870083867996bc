"""Training: it learns, resumes exactly, drops conditions, and leaves nothing broken."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from id3pm_deploy.errors import InputError, TrainingError
from id3pm_deploy.identity.embedders import Embedder
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.training import run
from id3pm_deploy.training.batches import Batches
from id3pm_deploy.training.config import TrainingConfig
from id3pm_deploy.training.ema import Ema
from id3pm_deploy.training.faces import TrainingFaces
from id3pm_deploy.training.losses import DiffusionLoss, Losses
from id3pm_deploy.training.run import train
from id3pm_deploy.training.sheet import spread_over_folders
from id3pm_deploy.training.trainer import Trainer
from id3pm_deploy.training.work import work_folder

SMALL = TrainingConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 1),
    residual_blocks=1,
    attention_resolutions=(),
    steps=6,
    batch_size=4,
    warmup_steps=2,
    save_every=3,
    sheet_every=100,
    ema_decay=0.9,
)


class MeanColour(Embedder):
    """An FR model for tests: eight numbers that tell the invented people apart."""

    name = "mean colour"
    sha256 = "ab" * 32

    @property
    def dim(self) -> int:
        return 8

    def _forward(self, aligned: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        means = aligned.astype(np.float64).mean(axis=(1, 2)) / 255
        return np.concatenate([means, means**2, means[:, :2] + 0.1], axis=1)


def _faces(count: int = 8, folders: int = 1) -> TrainingFaces:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8)
    pictures = np.broadcast_to(colours, (count, 16, 16, 3))
    both = np.stack([pictures, pictures[:, :, ::-1]], axis=1).copy()
    vectors = np.repeat(rng.normal(size=(count, 1, 1, 8)), 2, axis=1)
    which = np.arange(count) % folders
    return TrainingFaces(both, vectors.astype(np.float32), which, skipped=0)


@pytest.fixture
def fake_faces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder, and a loader that invents its faces."""
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    folder = tmp_path / "faces"
    folder.mkdir()
    return folder


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint).network.state_dict()


def test_an_interrupted_run_ends_with_the_same_weights(
    fake_faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fr, parts = MeanColour(), tmp_path / "parts"
    train([fake_faces], tmp_path / "whole", SMALL, fr)
    one_step = Trainer.train_step

    def interrupted(self: Trainer, *batch: torch.Tensor) -> dict[str, float]:
        if self.step == 4:
            raise KeyboardInterrupt
        return one_step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train([fake_faces], parts, SMALL, fr)
    middle = _weights(parts)
    monkeypatch.undo()
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    assert train([fake_faces], parts, SMALL, fr, resume=True).steps == 6
    whole, resumed = _weights(tmp_path / "whole"), _weights(parts)
    assert any(not torch.equal(middle[name], whole[name]) for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_learned_variance_is_trained_and_told(fake_faces: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, learned_variance=True, min_snr_gamma=5.0)
    train([fake_faces], tmp_path / "run", config, MeanColour())
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.spec.model.learned_variance
    assert (
        checkpoint.network(
            torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 8)
        ).shape[1]
        == 6
    )
    assert (work_folder(tmp_path / "run") / "sheet-0000006.png").is_file()


def test_what_a_run_leaves(fake_faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train([fake_faces], out, SMALL, MeanColour())
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    work = work_folder(out)
    assert stat.S_IMODE(work.stat().st_mode) == 0o700
    log = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [3, 6]
    assert (work / "sheet-0000006.png").is_file()
    assert not list(work.glob("*.tmp"))
    spec = load_checkpoint(out).spec
    assert spec.identity.model_name == "mean colour"
    assert spec.identity.model_sha256 == "ab" * 32
    assert spec.prediction_type == "v"
    assert spec.origin["faces"] == 8


def test_what_stopped_a_process_is_told(
    fake_faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = (
        "Traceback:\n  File x\nid3pm_deploy.errors.TrainingError: it is NaN\n  fix: y"
    )

    def failing(*_: Any) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr(torch.multiprocessing, "spawn", failing)
    settings = dataclasses.replace(SMALL, processes=2)
    with pytest.raises(TrainingError) as error:
        train([fake_faces], tmp_path / "two", settings, MeanColour())
    assert str(error.value) == "it is NaN\n  fix: y"


def test_used_folders_and_other_settings_are_refused(
    fake_faces: Path, tmp_path: Path
) -> None:
    fr, out = MeanColour(), tmp_path / "run"
    with pytest.raises(TrainingError, match="nothing to resume"):
        train([fake_faces], out, SMALL, fr, resume=True)
    train([fake_faces], out, SMALL, fr)
    before = _weights(out)
    with pytest.raises(InputError, match="already holds"):
        train([fake_faces], out, SMALL, fr)
    other = dataclasses.replace(SMALL, learning_rate=1e-3)
    with pytest.raises(InputError, match="other settings: learning_rate"):
        train([fake_faces], out, other, fr, resume=True)
    for name, tensor in _weights(out).items():
        assert torch.equal(tensor, before[name])


def test_a_damaged_state_is_named(fake_faces: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train([fake_faces], out, SMALL, MeanColour())
    state = work_folder(out) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot resume"):
        train([fake_faces], out, SMALL, MeanColour(), resume=True)


def test_weights_that_are_not_finite_do_not_replace_the_state(
    fake_faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train([fake_faces], out, SMALL, MeanColour())
    state = work_folder(out) / "state.safetensors"
    before = state.read_bytes()
    one_step = Trainer.train_step

    def broken(self: Trainer, *batch: torch.Tensor) -> dict[str, float]:
        loss = one_step(self, *batch)
        if self.step == 9:
            with torch.no_grad():
                next(self.network.parameters()).fill_(float("nan"))
        return loss

    monkeypatch.setattr(Trainer, "train_step", broken)
    more = dataclasses.replace(SMALL, steps=9)
    with pytest.raises(TrainingError, match="not finite at step 9"):
        train([fake_faces], out, more, MeanColour(), resume=True)
    assert state.read_bytes() == before


def test_storage_and_title_are_of_the_checkpoint_only(
    fake_faces: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    config = dataclasses.replace(SMALL, storage="float16", title="A title")
    out = tmp_path / "Anna Example"
    train([fake_faces], out, config, MeanColour())
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    state = load_file(work_folder(out) / "state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert load_checkpoint(out).spec.title == "A title"
    plain = dataclasses.replace(SMALL, steps=7)
    train([fake_faces], out, plain, MeanColour(), resume=True)
    assert load_checkpoint(out).spec.title == ""
    assert "Anna" not in (out / "config.json").read_text()


def test_the_sheet_is_spread_over_the_folders() -> None:
    folders = np.repeat([0, 1, 2], [100, 3, 10])
    rows = spread_over_folders(folders, 8)
    assert folders[rows].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert rows[[0, 3, 6]].tolist() == [0, 100, 103]
    many = np.arange(50) // 2
    rows = spread_over_folders(many, 8)
    assert len(set(many[rows].tolist())) == 8
    assert (rows % 2 == 0).all()
    assert spread_over_folders(np.zeros(1, int), 8).tolist() == [0] * 8


def test_the_sheet_says_that_photos_are_on_it(fake_faces: Path, tmp_path: Path) -> None:
    train([fake_faces], tmp_path / "run", SMALL, MeanColour())
    sheet = work_folder(tmp_path / "run") / "sheet-0000006.png"
    assert b"compositeWithTrainedAlgorithmicMedia" in sheet.read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(
    fake_faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DiffusionLoss.__call__

    def broken(*given: Any) -> Losses:
        found = original(*given)
        return found._replace(total=found.total / 0)

    monkeypatch.setattr(DiffusionLoss, "__call__", broken)
    with pytest.raises(TrainingError, match="loss is"):
        train([fake_faces], tmp_path / "run", SMALL, MeanColour())


def test_batches_follow_seed_step_shares_and_dropout() -> None:
    faces = _faces(8, folders=2)
    config = dataclasses.replace(
        SMALL, batch_size=64, condition_dropout=0.5, shares=(1.0, 0.0)
    )
    batches = Batches(faces, config)
    x, identity = batches.at(7)
    again, same = batches.at(7)
    assert torch.equal(x, again)
    assert torch.equal(identity, same)
    assert not torch.equal(x, batches.at(8)[0])
    assert x.shape == (64, 3, 16, 16)
    assert x.min() >= -1
    assert x.max() <= 1
    dropped = (identity == 0).all(dim=1)
    assert 0.25 < dropped.float().mean() < 0.75
    kept = identity[~dropped]
    assert torch.allclose(kept.norm(dim=1), torch.tensor(8.0).sqrt(), atol=1e-5)
    allowed = {tuple(p[0, 0, 0].tolist()) for p in faces.pictures[faces.folders == 0]}
    seen = ((x[:, :, 0, 0] + 1) * 127.5).round().int()
    assert {tuple(row.tolist()) for row in seen} <= allowed


def test_identity_noise_keeps_the_norm_and_the_direction() -> None:
    faces = _faces(4)
    plain = Batches(faces, dataclasses.replace(SMALL, condition_dropout=0.0))
    noisy = Batches(
        faces, dataclasses.replace(SMALL, condition_dropout=0.0, identity_noise=0.3)
    )
    a, b = plain.at(0)[1], noisy.at(0)[1]
    assert not torch.equal(a, b)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=1), atol=1e-4)
    assert torch.nn.functional.cosine_similarity(a, b).min() > 0.6


def test_ema_and_learning_rate() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(network, 0.75)
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight += 1.0
    ema.update(network, 10**6)
    assert torch.allclose(ema.tensors["weight"], before + 0.25)
    assert Ema(network, 0.999).decay_at(0) == 0.1
    assert Ema(network, 0.999).decay_at(10**6) == 0.999
    config = TrainingConfig(steps=1000, warmup_steps=100)
    assert config.learning_rate_at(0) == pytest.approx(5e-6)
    assert config.learning_rate_at(300) == 5e-4
    assert config.learning_rate_at(1000) == pytest.approx(5e-5)
