"""Damaged and hostile checkpoint folders: each one is refused by name."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import contents, save_tiny_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from id3pm_deploy.checkpoint_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    is_checkpoint,
    load_spec,
)
from id3pm_deploy.errors import CheckpointError
from id3pm_deploy.reference.checkpoint import load_checkpoint

SOME_TENSOR = "unet.mid_block.attentions.0.to_q.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_checkpoint(tmp_path / "good")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / CONFIG_NAME).read_text())
    changed = change(values)
    text = json.dumps(values if changed is None else changed)
    (folder / CONFIG_NAME).write_text(text)


def grow(tensors: dict[str, Tensor]) -> None:
    tensors[SOME_TENSOR] = torch.zeros(32, 33)


def to_dtype(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[SOME_TENSOR] = tensors[SOME_TENSOR].to(dtype)

    return change


def to_value(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[SOME_TENSOR][-1, -1] = value

    return change


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda t: t.pop(SOME_TENSOR),
        f"missing: {SOME_TENSOR}; unexpected: none",
    ),
    "unexpected": (
        lambda t: t.update(surprise=torch.zeros(2)),
        "missing: none; unexpected: surprise",
    ),
    "shape": (grow, rf"tensor {SOME_TENSOR} .* has shape \(32, 33\)"),
    "nan": (to_value(math.nan), f"tensor {SOME_TENSOR} .* holds NaN"),
    "infinity": (to_value(-math.inf), f"tensor {SOME_TENSOR} .* holds NaN or inf"),
    "float64": (to_dtype(torch.float64), f"tensor {SOME_TENSOR} .* torch.float64"),
    "int8": (to_dtype(torch.int8), f"tensor {SOME_TENSOR} .* torch.int8"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_weights_that_do_not_fit(folder: Path, case: str) -> None:
    change, message = TENSORS[case]
    change_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert WEIGHTS_NAME in str(caught.value)


def test_many_wrong_names_are_not_all_listed(folder: Path) -> None:
    change_tensors(folder, dict.clear)
    with pytest.raises(CheckpointError, match=r"missing: .* and \d+ more") as caught:
        load_checkpoint(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kept", [0, 4, 8, 1000, -1000, -1])
def test_truncated_weights(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_checkpoint(folder)


class Explosive:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_weights_that_are_something_else(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "exploded"
    torch.save({"weight": torch.zeros(2)}, tmp_path / "torch.pt")
    files = [pickle.dumps(Explosive(marker)), (tmp_path / "torch.pt").read_bytes()]
    for data in (*files, b"\xff" * 4096, b"{}"):
        (folder / WEIGHTS_NAME).write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot read the weights"):
            load_checkpoint(folder)
    assert not marker.exists()


def test_weights_that_are_not_there(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_checkpoint(folder)
    (folder / WEIGHTS_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_checkpoint(folder)


def set_in(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = to

    return change


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "list": (lambda v: [v], "does not describe an ID3PM checkpoint"),
    "null": (lambda v: "null", "does not describe an ID3PM checkpoint"),
    "another format": (set_in("format", to="id3pm-bundle"), "does not describe"),
    "no format": (drop("format"), "does not describe"),
    "version 3": (set_in("format_version", to=3), "format version 3; .* reads 1 to 2"),
    "version 2": (set_in("format_version", to=2), "not of format version 2"),
    "version as text": (set_in("format_version", to="1"), "format version '1'"),
    "unknown key": (set_in("flavour", to=1), "unknown keys: flavour"),
    "unknown key below": (
        set_in("model", "depth", to=1),
        "unknown keys: depth",
    ),
    "missing key": (
        drop("model", "image_size"),
        "lacks image_size",
    ),
    "missing table": (drop("identity"), "lacks identity"),
    "text for a number": (set_in("model", "image_size", to="16"), "must be int"),
    "truth for a number": (set_in("model", "image_size", to=True), "must be int"),
    "float for a number": (set_in("model", "image_size", to=16.0), "must be int"),
    "number for a list": (
        set_in("model", "channel_multipliers", to=1),
        "must be a list",
    ),
    "null for a number": (set_in("model", "base_channels", to=None), "must be int"),
    "infinite number": (set_in("model", "dropout", to=math.inf), "finite number"),
    "enormous number": (set_in("model", "dropout", to=10**400), "finite number"),
    "unknown schedule": (
        set_in("schedule", "name", to="sigmoid"),
        "must be one of",
    ),
    "unknown prediction": (set_in("prediction_type", to="flow"), "must be one of"),
    "both head modes": (set_in("model", "num_heads", to=1), "exactly one of num_heads"),
    "no head mode": (
        set_in("model", "num_head_channels", to=None),
        "exactly one of num_heads",
    ),
    "short schedule": (set_in("schedule", "timesteps", to=1), "from 2 to 100000"),
    "no identity": (set_in("identity", "dim", to=0), "unexpected: identity_projection"),
    "less than none": (set_in("identity", "dim", to=-1), "identity dimension must be"),
    "another size": (set_in("identity", "dim", to=17), "identity_projection.weight"),
    "one more block": (set_in("model", "residual_blocks", to=2), "missing: unet.down"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_do_not_fit(folder: Path, case: str) -> None:
    change, message = CONFIGS[case]
    change_config(folder, change)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"format": ', b"\xff\xfe", b"[" * 100_000, b"9" * 5000],
    ids=["empty", "brace", "cut", "not UTF-8", "deep", "long number"],
)
def test_configs_that_are_not_json(folder: Path, data: bytes) -> None:
    (folder / CONFIG_NAME).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        load_checkpoint(folder)


def test_a_config_of_megabytes(folder: Path) -> None:
    (folder / CONFIG_NAME).write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(CheckpointError, match="too large to be a config"):
        load_checkpoint(folder)


@pytest.mark.parametrize("multipliers", [[1, 1], [1, 16384], [1, 1, 1, 1, 16384]])
def test_a_config_that_asks_for_terabytes(folder: Path, multipliers: list[int]) -> None:
    """Refused for names or shapes before memory is asked for: this runs anywhere."""
    change_config(folder, set_in("model", "base_channels", to=16384))
    change_config(folder, set_in("model", "channel_multipliers", to=multipliers))
    message = r"has shape|are not those of its config|cannot be built"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_folders_that_are_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    nothing, empty = tmp_path / "nothing", tmp_path / "empty"
    empty.mkdir()
    assert is_checkpoint(folder)
    assert load_spec(folder).title == "a test"
    for place in (nothing, empty, folder / CONFIG_NAME):
        assert not is_checkpoint(place)
        with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
            load_checkpoint(place)
    assert list(empty.iterdir()) == []
