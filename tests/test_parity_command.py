"""`parity` as a person calls it, and on a device that has no PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from id3pm_deploy.cli import main

SMALL = ["--solver", "ddim", "--steps", "3", "--count", "2"]
BLOCKED = ("torch", "diffusers", "onnx", "safetensors", "accelerate", "cv2")
PROBE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
sys.argv[0] = "id3pm-deploy"
runpy.run_module("id3pm_deploy", run_name="__main__", alter_sys=True)
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["parity", *(str(a) for a in arguments)])


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process that can import nothing of the build tier."""
    probe = PROBE.replace("BLOCKED", repr(BLOCKED))
    command = [sys.executable, "-W", "error", "-c", probe, "parity"]
    return subprocess.run(
        [*command, *(str(a) for a in arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "golden.npz"
    result = run(tiny_checkpoint, "--record", path, *SMALL)
    assert result.exit_code == 0, result.output + result.stderr
    assert str(path) in result.stdout
    return path


def test_two_bundles_without_torch(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    done = without_torch(tiny_bundle, "--against", tiny_bundle, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASS")
    assert "not compared: ddim, 3 steps" in done.stdout
    assert (out / "index.html").is_file()


def test_a_bundle_and_golden_data_without_torch(
    tiny_bundle: Path, recorded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r"
    done = without_torch(tiny_bundle, "--golden", recorded, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is True
    assert 0 < found["forward_max_rel"] <= 1e-5
    assert 0 < found["state_max_rel"] <= 1e-4
    assert 0 < found["single_max_rel"] <= 1e-5
    assert "Oracle" not in found["subject"]


def test_a_checkpoint_without_torch_says_what_to_install(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The blocked import is real, and the message is ours."""
    out = tmp_path / "r"
    command = (tiny_bundle, "--reference", tiny_checkpoint, "--out", out, *SMALL)
    done = without_torch(*command)
    assert done.returncode == 1
    assert "id3pm-deploy[export]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_checkpoint_against_itself(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run(tiny_checkpoint, "--out", tmp_path / "r", *SMALL)
    assert result.exit_code == 0, result.output + result.stderr
    assert "diffusers' scheduler" in result.stdout


def test_failing_is_an_exit_status_of_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    half = [tiny_checkpoint, "--precision", "float16", "--out", tmp_path / "r", *SMALL]
    result = run(*half, "--tolerance-step", "1e-9", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert "past their tolerance" in result.stderr


def test_nothing_loosens_a_tolerance(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for option in ("--tolerance-step", "--tolerance-trajectory"):
        result = run(tiny_checkpoint, "--out", tmp_path / "r", *SMALL, option, "0.5")
        assert result.exit_code == 2
        assert "can only tighten" in result.stderr
    assert not (tmp_path / "r").exists()


def test_reference_and_against_are_one_option(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = []
    for option in ("--reference", "--against"):
        out = tmp_path / option
        result = run(tiny_bundle, option, tiny_checkpoint, "--out", out, *SMALL)
        assert result.exit_code == 0, result.output + result.stderr
        found.append((out / "parity.json").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BUNDLE", "--out", "OUT"], "--golden FILE"),
        (["BUNDLE", "--against", "BUNDLE"], "--out is missing"),
        (["BUNDLE", "--golden", "FILE", "--out", "OUT", "--steps", "3"], "--steps"),
        (["BUNDLE", "--golden", "FILE", "--out", "OUT", "--seed", "3"], "--seed"),
        (["BUNDLE", "--golden", "FILE", "--out", "OUT", "--judge", "sface"], "--judge"),
        (["CHECKPOINT", "--record", "FILE", "--out", "OUT"], "--out"),
        (["CHECKPOINT", "--record", "FILE", "--identity", "FILE"], "--identity"),
        (["CHECKPOINT", "--record", "FILE", "--golden", "FILE"], "--golden"),
        (["CHECKPOINT", "--record", "FILE", "--reference", "BUNDLE"], "--against"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    recorded: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    places: dict[str, object] = {
        "BUNDLE": tiny_bundle,
        "CHECKPOINT": tiny_checkpoint,
        "FILE": recorded,
        "OUT": tmp_path / "out",
    }
    before = recorded.read_bytes()
    result = run(*(places.get(a, a) for a in arguments))
    assert result.exit_code == 2, result.output + result.stderr
    assert message in result.stderr
    assert recorded.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_golden_data_that_is_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_text("hello")
    out = tmp_path / "r"
    result = run(tiny_checkpoint, "--golden", tmp_path / "bad.npz", "--out", out)
    assert result.exit_code == 1
    assert "not a readable .npz" in result.stderr
    assert not out.exists()
