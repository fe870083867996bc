"""Exact resume: processes, pieces, averages, precision, the log, and kill -9."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import SMALL, MeanColour, _faces

from id3pm_deploy.errors import InputError
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.training import run
from id3pm_deploy.training.config import TrainingConfig
from id3pm_deploy.training.journal import Journal
from id3pm_deploy.training.run import train
from id3pm_deploy.training.trainer import Trainer
from id3pm_deploy.training.work import work_folder

# The same rate at a step whatever the number of steps, so that a run of fewer steps is
# the beginning of a longer one.
STEADY = dataclasses.replace(
    SMALL,
    steps=4,
    final_learning_rate=SMALL.learning_rate,
    learned_variance=True,
    model_dropout=0.1,
    ema_decays=(0.1,),
)


@pytest.fixture(autouse=True)
def _fake_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())


def trained(out: Path, config: TrainingConfig, **how: Any) -> dict[str, torch.Tensor]:
    """All that a run keeps, by name."""
    train([out.parent], out, config, MeanColour(), **how)
    return load_file(work_folder(out) / "state.safetensors")


def in_two_parts(out: Path, config: TrainingConfig) -> dict[str, torch.Tensor]:
    trained(out, dataclasses.replace(config, steps=2))
    return trained(out, config, resume=True)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


@pytest.mark.parametrize("change", [{}, {"accumulation": 2}, {"precision": "bfloat16"}])
def test_resume_is_exact(tmp_path: Path, change: dict[str, Any]) -> None:
    config = dataclasses.replace(STEADY, **change)
    whole = trained(tmp_path / "whole", config)
    assert_same(whole, in_two_parts(tmp_path / "parts", config))
    assert not torch.equal(
        whole["ema.unet.conv_in.weight"], whole["ema1.unet.conv_in.weight"]
    )


def assert_same_gradient(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]
) -> None:
    """After one step, AdamW's first moments are the clipped gradient times 0.1."""
    for name in (name for name in a if name.endswith(".exp_avg")):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_pieces_train_like_one_batch(tmp_path: Path) -> None:
    config = dataclasses.replace(STEADY, model_dropout=0.0, steps=1)
    pieces = dataclasses.replace(config, accumulation=4)
    alone = trained(tmp_path / "alone", config)
    assert_same_gradient(alone, trained(tmp_path / "pieces", pieces))
    # A finished run: nothing to do is no loss, and no failure.
    again = train([tmp_path], tmp_path / "pieces", pieces, MeanColour(), resume=True)
    assert (again.steps, again.loss) == (1, None)


@pytest.mark.slow
def test_processes_train_like_one_and_resume_exactly(tmp_path: Path) -> None:
    config = dataclasses.replace(STEADY, model_dropout=0.0, steps=3)
    shared = dataclasses.replace(config, processes=2, accumulation=2)
    alone = trained(tmp_path / "alone", dataclasses.replace(config, steps=1))
    whole, out = trained(tmp_path / "whole", shared), tmp_path / "parts"
    first = trained(out, dataclasses.replace(shared, steps=1))
    assert_same_gradient(alone, first)
    assert_same(whole, trained(out, shared, resume=True))


def test_every_average_is_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(out, STEADY)
    fast = load_checkpoint(work_folder(out) / "ema-0.1")
    slow = load_checkpoint(out)
    assert fast.spec.origin["ema_decay"] == 0.1
    assert slow.spec.origin["ema_decay"] == 0.9
    assert fast.spec.function() == slow.spec.function()
    weights = slow.network.state_dict()
    assert any(
        not torch.equal(tensor, weights[name])
        for name, tensor in fast.network.state_dict().items()
    )


def test_another_average_cannot_join_a_run(tmp_path: Path) -> None:
    trained(tmp_path / "run", STEADY)
    other = dataclasses.replace(STEADY, ema_decays=(0.1, 0.6))
    with pytest.raises(InputError, match="other settings: ema_decays"):
        trained(tmp_path / "run", other, resume=True)


def test_the_log_says_how_it_goes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(out, STEADY)
    path = work_folder(out) / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    for line in lines:
        assert line["learning_rate"] == SMALL.learning_rate
        assert line["variational"] > 0
        assert line["gradient_norm"] > 0
        parts = line["simple"] + line["variational"]
        assert line["loss"] == pytest.approx(parts, rel=1e-3)


def test_the_log_forgets_what_a_killed_run_did_not_keep(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 3}\nno JSON\n{"step": 6}\n[]\n')
    journal = Journal(tmp_path, 3)
    journal.add({"loss": 2.0, "gradient_norm": float("inf")})
    journal.add({"loss": 1.0})
    journal.keep(6, seconds=1.5)
    last = path.read_text().splitlines()
    assert last[0] == '{"step": 3}'
    assert len(last) == 2
    assert json.loads(last[1]) == pytest.approx(
        {"step": 6, "loss": 1.98, "seconds": 1.5}
    )


def test_two_trainings_in_one_process_may_differ(tmp_path: Path) -> None:
    trained(tmp_path / "a", dataclasses.replace(STEADY, steps=1))
    half = dataclasses.replace(STEADY, steps=1, precision="bfloat16")
    seen: list[torch.dtype] = []
    forward = Trainer.train_step

    def watched(self: Trainer, *batch: torch.Tensor) -> dict[str, float]:
        layer: Any = self.network.unet.conv_in
        layer.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        return forward(self, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", watched)
        trained(tmp_path / "b", half)
    assert seen[0] == torch.bfloat16
    assert seen[-1] == torch.float32  # the contact sheet
