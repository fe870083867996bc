"""The CHECKPOINT folder: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from models import (
    checkpoint_spec,
    contents,
    save_tiny_checkpoint,
    tiny_network,
    tiny_spec,
)
from safetensors import SafetensorError

from id3pm_deploy.checkpoint_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    load_spec,
    weights_sha256,
)
from id3pm_deploy.errors import CheckpointError, OutputError
from id3pm_deploy.reference import checkpoint
from id3pm_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from id3pm_deploy.spec import DiffusionSpec

SPEC = checkpoint_spec()
SOME_TENSOR = "unet.mid_block.attentions.0.to_q.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "good")


class TestRoundTrip:
    def test_float32_is_exact(self, folder: Path) -> None:
        network = tiny_network(SPEC)
        found = load_checkpoint(folder)
        assert found.spec == SPEC == load_spec(folder)
        assert not found.network.training
        after = found.network.state_dict()
        assert list(after) == list(network.state_dict())
        for name, tensor in network.state_dict().items():
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name], tensor)
        weights = (folder / WEIGHTS_NAME).read_bytes()
        assert found.weights_sha256 == hashlib.sha256(weights).hexdigest()
        assert sorted(contents(folder)) == [CONFIG_NAME, WEIGHTS_NAME]

    def test_the_loaded_network_computes_the_same(self, folder: Path) -> None:
        times, identity = torch.tensor([5.0, 400.0]), torch.randn(2, 16)
        inputs = (torch.randn(2, 3, 16, 16), times, identity)
        with torch.inference_mode():
            found = load_checkpoint(folder).network(*inputs)
            assert torch.equal(found, tiny_network(SPEC)(*inputs))

    def test_the_loaded_network_can_be_trained(self, folder: Path) -> None:
        network = load_checkpoint(folder).network
        out = network(torch.randn(1, 3, 16, 16), torch.tensor([5.0]), torch.ones(1, 16))
        out.square().mean().backward()
        for name, weight in network.named_parameters():
            assert weight.grad is not None, name

    def test_float16_storage(self, tmp_path: Path, folder: Path) -> None:
        tensors = tiny_network(SPEC).state_dict()
        save_checkpoint(tmp_path / "half", SPEC, tensors, "float16")
        sizes = [len(contents(f)[WEIGHTS_NAME]) for f in (tmp_path / "half", folder)]
        assert 0.45 < sizes[0] / sizes[1] < 0.55
        after = load_checkpoint(tmp_path / "half").network.state_dict()
        for name, tensor in tensors.items():
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name], tensor.half().float())

    @pytest.mark.parametrize("mode", [{"num_heads": 4}, {"num_head_channels": 16}])
    def test_the_head_mode_is_kept(self, mode: dict[str, int], tmp_path: Path) -> None:
        spec = tiny_spec(channel_multipliers=(1, 2), **mode)
        save_checkpoint(tmp_path, spec, tiny_network(spec).state_dict())
        found = load_checkpoint(tmp_path)
        assert found.spec.model == spec.model
        heads = {
            "num_heads": found.spec.model.num_heads,
            "num_head_channels": found.spec.model.num_head_channels,
        }
        assert heads == {"num_heads": None, "num_head_channels": None, **mode}

    def test_a_save_replaces_the_one_before(self, folder: Path) -> None:
        other = dataclasses.replace(SPEC, title="later")
        save_checkpoint(folder, other, tiny_network(SPEC, seed=1).state_dict())
        found = load_checkpoint(folder)
        assert found.spec.title == "later"
        weight = found.network.state_dict()[SOME_TENSOR]
        assert torch.equal(weight, tiny_network(SPEC, seed=1).state_dict()[SOME_TENSOR])
        assert sorted(contents(folder)) == [CONFIG_NAME, WEIGHTS_NAME]

    def test_the_config_says_what_shapes_do_not(self, folder: Path) -> None:
        config = json.loads((folder / CONFIG_NAME).read_text())
        assert (config["format"], config["format_version"]) == ("id3pm-checkpoint", 1)
        assert config["model"]["num_head_channels"] == 32
        assert config["model"]["num_heads"] is None
        assert config["prediction_type"] == "v"
        assert config["schedule"] == {"name": "linear", "timesteps": 500}
        assert config["identity"] == {
            "dim": 16,
            "model_name": "model of a test",
            "model_sha256": "ab" * 32,
            "normalisation": "unit",
        }

    def test_the_hash_alone(self, folder: Path) -> None:
        assert weights_sha256(folder) == load_checkpoint(folder).weights_sha256
        (folder / WEIGHTS_NAME).unlink()
        with pytest.raises(CheckpointError, match="cannot read"):
            weights_sha256(folder)

    def test_loading_leaves_torchs_generator_alone(self, folder: Path) -> None:
        before = torch.get_rng_state()
        load_checkpoint(folder)
        assert torch.equal(torch.get_rng_state(), before)


class TestSaving:
    @pytest.mark.parametrize("value", [65520.0, -1e6, math.inf, math.nan])
    def test_what_float16_cannot_hold(self, tmp_path: Path, value: float) -> None:
        tensors = tiny_network(SPEC).state_dict()
        tensors[SOME_TENSOR][3, 4] = value
        with pytest.raises(CheckpointError, match=f"{SOME_TENSOR} cannot be stored"):
            save_checkpoint(tmp_path / "new", SPEC, tensors, "float16")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("value", [math.inf, math.nan])
    def test_a_diverged_training(self, folder: Path, value: float) -> None:
        before = contents(folder)
        tensors = tiny_network(SPEC).state_dict()
        tensors[SOME_TENSOR][0, 0] = value
        with pytest.raises(CheckpointError, match=SOME_TENSOR):
            save_checkpoint(folder, SPEC, tensors)
        assert contents(folder) == before

    @pytest.mark.parametrize(
        "error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()]
    )
    def test_a_save_that_fails_keeps_the_old_files(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fail(*_: Any) -> None:
            raise error

        before = contents(folder)
        monkeypatch.setattr(os, "replace", fail)
        expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            save_checkpoint(folder, SPEC, tiny_network(SPEC, 1).state_dict())
        assert contents(folder) == before

    def test_a_disk_that_fills_up_keeps_the_old_files(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the config, in the middle of the weights."""

        def fill_up(tensors: Any, path: Path) -> None:
            path.write_bytes(b"half")
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device "
                f"(os error {errno.ENOSPC})"
            )

        before = contents(folder)
        monkeypatch.setattr(checkpoint, "save_file", fill_up)
        other = dataclasses.replace(SPEC, title="never seen")
        with pytest.raises(OutputError, match=WEIGHTS_NAME) as caught:
            save_checkpoint(folder, other, tiny_network(SPEC, 1).state_dict())
        assert "free some space" in str(caught.value)
        assert contents(folder) == before

    def test_facts_that_are_no_json_keep_the_old_files(self, folder: Path) -> None:
        before = contents(folder)
        wrong = dataclasses.replace(SPEC, origin={"loss": math.nan})
        with pytest.raises(ValueError, match="JSON compliant"):
            save_checkpoint(folder, wrong, tiny_network(SPEC, 1).state_dict())
        assert contents(folder) == before

    def test_a_place_that_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("here already")
        for place in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(OutputError, match="cannot write"):
                save_checkpoint(place, SPEC, tiny_network(SPEC).state_dict())
        assert (tmp_path / "file").read_text() == "here already"


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_loading_writes_nothing(
    tmp_path: Path, storage: Literal["float32", "float16"]
) -> None:
    save_checkpoint(tmp_path, SPEC, tiny_network(SPEC).state_dict(), storage)
    before = contents(tmp_path)
    load_checkpoint(tmp_path)
    assert contents(tmp_path) == before


def test_a_spec_survives_json() -> None:
    values = json.loads(json.dumps(SPEC.to_json()))
    assert values["model"]["channel_multipliers"] == [1, 1]
    assert isinstance(SPEC, DiffusionSpec)
    names = {field.name for field in dataclasses.fields(SPEC)}
    assert set(values) == names - {"attributes"}, "which it has none of"
