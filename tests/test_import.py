"""``id3pm-deploy import``: flags as people have them, and what has to be given."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from golden_imports import IDENTITY_DIM, flags_of, network_of
from models import contents, save_tiny_checkpoint
from safetensors.torch import save_file

from id3pm_deploy.cli import main
from id3pm_deploy.errors import InputError
from id3pm_deploy.identity.preprocessing import SFACE_SHA256
from id3pm_deploy.importing.flag_text import flags_from_command_line, load_flags
from id3pm_deploy.importing.pickle_file import ImportLimits
from id3pm_deploy.reference.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)

GIVEN = ("--identity-model", "an FR model", "--normalisation", "unit_sqrt_dim")


def command_line(case: str) -> str:
    """The flags of a golden case as the command that trained it."""
    flags = flags_of(case)
    words = " ".join(f"--{name} {shlex.quote(str(v))}" for name, v in flags.items())
    return f"mpiexec -n 8 python scripts/image_train.py --data_dir faces {words}"


def run_import(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["import", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of the case ``identity``."""
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    save_file(dict(network_of("identity")[0].weights), path)
    return path


# Flags


def test_a_command_line_says_what_json_says() -> None:
    flags = flags_of("identity")
    found = flags_from_command_line(command_line("identity"))
    assert found.pop("data_dir") == "faces"
    assert found == flags
    assert load_flags(json.dumps(flags)) == flags


def test_a_script_with_variables() -> None:
    text = """#!/bin/bash
# python other.py --image_size 32
MODEL_FLAGS="--image_size 64 --num_channels 192 --num_head_channels -1"
export TRAIN_FLAGS='--lr 1e-4 --ema_rate 0.9999,0.99'
RESUME=--predict_xstart=False
OPENAI_LOGDIR=logs python train.py $MODEL_FLAGS ${TRAIN_FLAGS} $RESUME \\
    --learn_sigma True --identity_scale None --dropout 0.1  # the rest
"""
    assert flags_from_command_line(text) == {
        "image_size": 64,
        "num_channels": 192,
        "num_head_channels": -1,
        "lr": 1e-4,
        "ema_rate": "0.9999,0.99",
        "predict_xstart": False,
        "learn_sigma": True,
        "identity_scale": None,
        "dropout": 0.1,
    }


@pytest.mark.parametrize("word", ["yes", "true", "T", "y", "1", "True"])
def test_truth_is_written_as_guided_diffusion_reads_it(word: str) -> None:
    assert flags_from_command_line(f"--learn_sigma {word}") == {"learn_sigma": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--image_size 64 --image_size 32", "--image_size is stated twice"),
        ("--image_size --num_heads 4", "--image_size has no value"),
        ("--image_size", "--image_size has no value"),
        ("--image_size large", "--image_size is 'large'"),
        ("--learn_sigma maybe", "--learn_sigma is 'maybe'"),
        ("--image_size 64 128", "holds '128'"),
        ("--image_size 64; rm -rf x", "holds 'rm'"),
        ("--image_size 64;", "--image_size is '64;'"),
        ("python x.py --image_size $SIZE", "uses $SIZE"),
        ("--a 'b", "cannot be read"),
        ("{", "not JSON"),
        ('{"a": 1, "a": 2}', "not JSON"),
        ("# --nothing here", "no flags"),
        ("no such file", "cannot read the flags"),
        ("A=x\n" + "A=$A$A\n" * 40 + "python $A", "too long"),
    ],
)
def test_what_is_no_command_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_flags(text)
    assert message in str(caught.value)


def test_a_command_line_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"A=$(touch {canary}) --x `touch {canary}` --y 1 ; touch {canary}"
    with pytest.raises(InputError):
        load_flags(text)
    assert not canary.exists()


@pytest.mark.parametrize("form", ["json file", "text file", "text", "json"])
def test_flags_in_every_form(form: str, source: Path, tmp_path: Path) -> None:
    flags = json.dumps(flags_of("identity"))
    text = flags if form.startswith("json") else command_line("identity")
    given: object = text
    if form.endswith("file"):
        given = tmp_path / "flags"
        (tmp_path / "flags").write_text(text)
    out = tmp_path / "out"
    done = run_import(source, "--flags", given, "--out", out, *GIVEN, "--title", "x")
    assert done.exit_code == 0, done.output
    spec = load_checkpoint(out).spec
    assert spec.model.num_heads == 4
    assert spec.identity.dim == IDENTITY_DIM
    assert spec.identity.model_name == "an FR model"
    assert spec.identity.model_sha256 is None
    assert spec.identity.normalisation == "unit_sqrt_dim"
    assert (spec.title, spec.prediction_type) == ("x", "epsilon")
    assert spec.origin == {
        "converted_from": "guided-diffusion",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }


def test_defaults_are_an_option(source: Path, tmp_path: Path) -> None:
    """What is left out of a command line is guided-diffusion's default, if the user
    says so."""
    flags = flags_of("identity")
    kept = {k: v for k, v in flags.items() if k not in ("num_heads", "predict_xstart")}
    arguments = (source, "--out", tmp_path / "out", *GIVEN, "--flags", json.dumps(kept))
    done = run_import(*arguments)
    assert done.exit_code == 1
    assert "num_heads (default 4), predict_xstart (default False)" in done.output
    assert "--defaults" in done.output
    assert run_import(*arguments, "--defaults").exit_code == 0


# What has to be given beside flags


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--identity-model and --normalisation must be given"),
        (("--identity-model", "x"), "--normalisation must be given"),
        (("--normalisation", "raw"), "--identity-model must be given"),
        ((*GIVEN, "--identity-sha256", "12"), "is no SHA-256"),
        (("--identity-model", "\x1b", "--normalisation", "raw"), "no name"),
        ((*GIVEN, "--projection", "x"), "--projection"),
    ],
)
def test_the_identity_is_not_guessed(
    source: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    flags = json.dumps(flags_of("identity"))
    done = run_import(source, "--flags", flags, "--out", tmp_path / "out", *more)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_the_fr_model_can_be_a_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(b"any bytes")
    flags, out = json.dumps(flags_of("identity")), tmp_path / "out"
    more = ("--identity-model", str(file), "--normalisation", "raw")
    done = run_import(source, "--flags", flags, "--out", out, *more)
    assert done.exit_code == 0, done.output
    identity = load_checkpoint(out).spec.identity
    assert identity.model_name == "net"
    assert identity.model_sha256 == hashlib.sha256(b"any bytes").hexdigest()
    more = ("--identity-model", "sface", "--normalisation", "unit_sqrt_dim")
    assert run_import(source, "--flags", flags, "--out", out, "--force", *more)
    assert load_checkpoint(out).spec.identity.model_sha256 == SFACE_SHA256


def test_an_identity_for_a_model_without(tmp_path: Path) -> None:
    source = tmp_path / "w.safetensors"
    save_file(dict(network_of("unconditional")[0].weights), source)
    flags, out = json.dumps(flags_of("unconditional")), tmp_path / "out"
    done = run_import(source, "--flags", flags, "--out", out, *GIVEN)
    assert done.exit_code == 2
    assert "cannot be used here" in done.output
    assert run_import(source, "--flags", flags, "--out", out).exit_code == 0
    assert load_checkpoint(out).spec.identity.dim == 0


def test_no_flags(source: Path, tmp_path: Path) -> None:
    done = run_import(source, "--out", tmp_path / "out", *GIVEN)
    assert done.exit_code == 2
    assert "give --flags" in done.output


def test_a_class_conditional_original_is_refused(tmp_path: Path) -> None:
    weights = dict(network_of("unconditional")[0].weights)
    source = tmp_path / "w.safetensors"
    save_file({**weights, "label_emb.weight": torch.zeros(1000, 128)}, source)
    flags = json.dumps({**flags_of("unconditional"), "class_cond": True})
    done = run_import(source, "--flags", flags, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "class-conditional" in done.output
    assert "label_emb.weight, of shape (1000, 128)" in done.output


def test_a_renamed_tensor_is_named_twice(tmp_path: Path) -> None:
    weights = dict(network_of("unconditional")[0].weights)
    weights["time_embed.1.weight"] = weights.pop("time_embed.0.weight")
    source = tmp_path / "w.safetensors"
    save_file(weights, source)
    flags = json.dumps(flags_of("unconditional"))
    done = run_import(source, "--flags", flags, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "missing: time_embed.0.weight; unexpected: time_embed.1.weight" in (
        done.output
    )


def test_nan_is_refused(tmp_path: Path) -> None:
    weights = dict(network_of("unconditional")[0].weights)
    weights["out.2.bias"] = weights["out.2.bias"] * float("nan")
    source = tmp_path / "w.safetensors"
    save_file(weights, source)
    flags = json.dumps(flags_of("unconditional"))
    done = run_import(source, "--flags", flags, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "unet.conv_out.bias" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


# The file and its neighbours


def test_raw_weights_beside_averaged_ones(tmp_path: Path) -> None:
    source = tmp_path / "model200000.safetensors"
    save_file(dict(network_of("unconditional")[0].weights), source)
    arguments = ("--flags", json.dumps(flags_of("unconditional")), "--out")
    assert "warning" not in run_import(source, *arguments, tmp_path / "a").output
    for name in ("ema_0.9999_100000.pt", "ema_0.9999_200000.pt", "ema_0.99_200000.pt"):
        (tmp_path / name).touch()
    done = run_import(source, *arguments, tmp_path / "b")
    assert done.exit_code == 0
    assert "raw weights; ema_0.9999_200000.pt, ema_0.99_200000.pt" in done.output
    assert str(tmp_path) not in done.output.split("warning:")[1].splitlines()[0]


def test_an_older_checkpoint_is_kept_unless_forced(
    source: Path, tmp_path: Path
) -> None:
    out = save_tiny_checkpoint(tmp_path / "out")
    before = contents(out)
    arguments = (source, "--flags", command_line("identity"), "--out", out, *GIVEN)
    done = run_import(*arguments)
    assert done.exit_code == 2
    assert "--force" in done.output
    bad = run_import(*arguments, "--force", "--flags", "--image_size 64")
    assert bad.exit_code == 1
    assert contents(out) == before
    assert run_import(*arguments, "--force").exit_code == 0
    assert load_checkpoint(out).spec.model.image_size == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_result_as_json(source: Path, tmp_path: Path) -> None:
    flags, out = json.dumps(flags_of("identity")), tmp_path / "out"
    done = run_import(source, "--flags", flags, "--out", out, *GIVEN, "--json")
    found = json.loads(done.output)
    assert found["imported_from"] == "guided-diffusion"
    assert found["parameters"] == sum(
        tensor.numel() for tensor in network_of("identity")[0].weights.values()
    )
    assert found["config"]["model"]["num_heads"] == 4


def test_a_missing_file(tmp_path: Path) -> None:
    done = run_import(tmp_path / "no.pt", "--flags", "--a 1", "--out", tmp_path / "o")
    assert done.exit_code == 1
    assert "does not exist" in done.output


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.pt")
    done = run_import(tmp_path / "m.pt", "--flags", "--a 1", "--out", tmp_path / "o")
    assert done.exit_code == 1
    assert "not a plain file" in done.output


def test_limits_follow_the_size_of_the_file() -> None:
    memory, seconds = ImportLimits().of(1200 << 20)
    assert memory == (2 * 1200 + 512) << 20
    assert seconds == pytest.approx(240)
    assert ImportLimits(5, 6.0).of(1200 << 20) == (5, 6.0)


# Our own


class TestOurOwn:
    @staticmethod
    def check_same(found: Checkpoint, wanted: Checkpoint) -> None:
        theirs = wanted.network.state_dict()
        for name, tensor in found.network.state_dict().items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)

    @pytest.mark.parametrize("storage", ["float32", "float16"])
    def test_a_checkpoint_is_written_anew(self, storage: Any, tmp_path: Path) -> None:
        first = save_tiny_checkpoint(tmp_path / "first")
        loaded = load_checkpoint(first)
        state = loaded.network.state_dict()
        save_checkpoint(first, loaded.spec, state, storage)
        out = tmp_path / "out"
        done = run_import(first, "--out", out)
        assert done.exit_code == 0, done.output
        assert load_checkpoint(out).spec == loaded.spec
        self.check_same(load_checkpoint(out), load_checkpoint(first))
        assert re.search(r"\(from checkpoint\)", done.output)
        sizes = [(one / "model.safetensors").stat().st_size for one in (first, out)]
        assert sizes[0] == sizes[1]

    def test_in_its_own_place_and_with_a_title(self, tmp_path: Path) -> None:
        folder = save_tiny_checkpoint(tmp_path / "first")
        before = load_checkpoint(folder)
        done = run_import(folder, "--out", folder, "--force", "--title", "new")
        assert done.exit_code == 0, done.output
        after = load_checkpoint(folder)
        assert after.spec.title == "new"
        assert after.spec.function() == before.spec.function()

    @pytest.mark.parametrize(
        "more", [("--flags", "--a 1"), GIVEN, ("--defaults",)], ids=lambda more: more[0]
    )
    def test_what_it_says_itself_is_not_given(
        self, tmp_path: Path, more: tuple[str, ...]
    ) -> None:
        folder = save_tiny_checkpoint(tmp_path / "first")
        done = run_import(folder, "--out", tmp_path / "out", *more)
        assert done.exit_code == 2
        assert "config.json says all of it" in done.output
        assert more[0] in done.output

    def test_a_damaged_one_is_refused(self, tmp_path: Path) -> None:
        folder = save_tiny_checkpoint(tmp_path / "first")
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        done = run_import(folder, "--out", tmp_path / "out")
        assert done.exit_code == 1
        assert not (tmp_path / "out").exists()
