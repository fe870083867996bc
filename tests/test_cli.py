"""The commands as a person calls them, with good input and with bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from models import checkpoint_spec, contents, random_identity, save_tiny_checkpoint

from id3pm_deploy.cli import main
from id3pm_deploy.defaults import SOLVER
from id3pm_deploy.identity.vectors import identity_file, save_identities
from id3pm_deploy.images import read_mark


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + result.stderr
    return result


def refused(message: str, *arguments: object, status: int | None = None) -> None:
    """The command fails with our message, not with a traceback."""
    result = run(*arguments)
    assert result.exit_code not in (0, None), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    if status is not None:
        assert result.exit_code == status


@pytest.fixture
def identity(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Two random vectors of the FR model that the tiny checkpoint names."""
    from id3pm_deploy.bundle import open_bundle

    spec = open_bundle(tiny_bundle).manifest.diffusion
    path = tmp_path / "two.npz"
    vectors = random_identity(2, spec) * 3.7
    who = spec.identity
    save_identities(path, identity_file(vectors, who.model_name, who.model_sha256))
    return path


def test_sample_from_a_bundle(
    tiny_bundle: Path, identity: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--identity", identity, "--steps", "4", "--seed", "5", "--count", "3"]
    result = ok("sample", tiny_bundle, *arguments, "--out", out, "--json")
    record = json.loads(result.stdout)
    assert record == json.loads((out / "record.json").read_text())
    pictures = sorted(p.name for p in out.glob("sample-*.png"))
    assert pictures == [f"sample-{i:05d}.png" for i in range(6)]
    assert (out / "sheet.png").is_file()
    mark = read_mark(out / "sample-00004.png")
    assert (mark.seed, mark.sample, mark.solver, mark.steps) == (5, 4, SOLVER, 4)
    assert mark.backend == "onnxruntime"
    assert record["table_rows"] == 4
    assert len({s["identity"] for s in record["samples"]}) == 2
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_batch_size_does_not_change_a_byte(
    tiny_bundle: Path, identity: Path, tmp_path: Path
) -> None:
    for size in ("1", "4"):
        arguments = ["--identity", identity, "--steps", "3", "--batch-size", size]
        ok("sample", tiny_bundle, *arguments, "--out", tmp_path / size)
    first = {
        n: d for n, d in contents(tmp_path / "1").items() if n.startswith("sample")
    }
    other = {
        n: d for n, d in contents(tmp_path / "4").items() if n.startswith("sample")
    }
    assert len(first) == 8
    assert first == other


def test_nothing_of_the_identity_is_written(
    tiny_bundle: Path, identity: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    common = ["--identity", identity, "--steps", "2", "--count", "1"]
    ok("sample", tiny_bundle, *common, "--out", out)
    with np.load(identity) as file:
        vectors = file["vectors"]
    numbers = [vectors.tobytes(), vectors[0].tobytes()[:32]]
    texts = [f"{vectors[0, 0]:.6f}", repr(float(vectors[0, 0])), identity.name]
    for name, data in contents(out).items():
        for needle in [*numbers, *(text.encode() for text in texts)]:
            assert needle not in data, name


def test_sample_from_a_checkpoint_with_torch(
    tiny_checkpoint: Path, tiny_bundle: Path, identity: Path, tmp_path: Path
) -> None:
    common = ["--identity", identity, "--steps", "3", "--count", "1"]
    ok("sample", tiny_checkpoint, *common, "--out", tmp_path / "torch")
    ok("sample", tiny_bundle, *common, "--out", tmp_path / "onnx")
    from PIL import Image

    for name in ("sample-00000.png", "sample-00001.png"):
        a = np.asarray(Image.open(tmp_path / "torch" / name), dtype=int)
        b = np.asarray(Image.open(tmp_path / "onnx" / name), dtype=int)
        assert np.abs(a - b).max() <= 1
        assert a.std() > 5


_DEVICE_ONLY = """
import sys

class Refuse:
    names = {"torch", "diffusers", "onnx", "onnxscript", "polygraphy", "cv2",
             "safetensors", "accelerate"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not on this device")

sys.meta_path.insert(0, Refuse())
from id3pm_deploy.cli import main
main(sys.argv[1:])
"""


def test_a_device_install_samples_and_inspects(
    tiny_bundle: Path, identity: Path, tmp_path: Path
) -> None:
    """Without torch, onnx, diffusers and OpenCV, as on an embedded machine."""
    out = tmp_path / "out"
    common = ["--identity", str(identity), "--steps", "2", "--out", str(out)]
    for arguments in (
        ["sample", str(tiny_bundle), *common],
        ["inspect", str(tiny_bundle), "--self-test"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", _DEVICE_ONLY, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert len(list(out.glob("sample-*.png"))) == 8
    refused_here = subprocess.run(
        [sys.executable, "-c", _DEVICE_ONLY, "export", str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert refused_here.returncode == 1
    assert "id3pm-deploy[export]" in refused_here.stderr
    assert "Traceback" not in refused_here.stderr


def test_unconditional_and_zero_vectors(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("sample", tiny_bundle, "--unconditional", "--steps", "2", "--out", out)
    record = json.loads((out / "record.json").read_text())
    assert {s["identity"] for s in record["samples"]} == {"unconditional"}
    zero = tmp_path / "zero.npz"
    ids, text = np.array(["00" * 8]), np.array("test model")
    np.savez(
        zero,
        format_version=np.array(1),
        vectors=np.zeros((1, 16), np.float32),
        ids=ids,
        model_name=text,
        model_sha256=np.array("0" * 64),
    )
    again = tmp_path / "again"
    refused("zero", "sample", tiny_bundle, "--identity", zero, "--out", again)
    refused("either --identity", "sample", tiny_bundle, "--out", again, status=2)
    assert not again.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be from 1"),
        (["--steps", "5000"], "steps must be from 1"),
        (["--steps", "many"], "not a valid integer"),
        (["--solver", "magic"], "magic"),
        (["--guidance", "-1"], "guidance scale must be"),
        (["--guidance", "nan"], "guidance scale must be"),
        (["--eta", "0.5"], "eta is a setting of ddim"),
        (["--count", "0"], "count must be"),
        (["--batch-size", "0"], "batch size must be"),
        (["--seed", "-1"], "seed must be"),
        (["--threads", "-1"], "threads must be"),
        (["--clip", "-1"], "clip must be"),
        (["--lambda-min", "50"], "no timestep has"),
        (["--lambda-min=-inf"], "must be a finite number"),
        (["--batch-size", "65"], "batch size must be"),
        (["--device", "cuda"], "setting of the torch backend"),
        (["--solver", "ddim", "--variance", "learned"], "variance is a setting of"),
        (["--backend", "torch"], "no PyTorch weights"),
        (["--backend", "tensorrt"], "holds no TensorRT plan"),
        (["--precision", "float16"], "no step graph"),
    ],
)
def test_bad_options_write_nothing(
    tiny_bundle: Path,
    identity: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "deep" / "out"
    common = ["sample", tiny_bundle, "--identity", identity, "--out", out]
    refused(message, *common, *arguments)
    assert not out.parent.exists()


def test_vectors_of_another_model_are_refused(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    cases: list[tuple[int, str, str | None, str]] = [
        (16, "arcface", "1" * 64, "another FR model"),
        (16, "arcface", None, "another FR model"),
        (16, "test model", "1" * 64, "another FR model"),
        (16, "test model", None, "cannot be shown"),
        (17, "test model", "0" * 64, "17 elements"),
    ]
    for number, (dim, name, sha, message) in enumerate(cases):
        path = tmp_path / f"{number}.npz"
        vectors = rng.normal(size=(1, dim)).astype(np.float32)
        save_identities(path, identity_file(vectors, name, sha))
        out = tmp_path / "out"
        refused(message, "sample", tiny_bundle, "--identity", path, "--out", out)
        assert not out.exists()


def test_bad_identity_files_and_models(
    tiny_bundle: Path, identity: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    absent = tmp_path / "absent.npz"
    refused("absent.npz", "sample", tiny_bundle, "--identity", absent, "--out", out)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(identity.read_bytes()[:200])
    refused("cut.npz", "sample", tiny_bundle, "--identity", cut, "--out", out)
    nowhere = tmp_path / "nowhere"
    refused("neither a CHECKPOINT", "sample", nowhere, "--unconditional", "--out", out)
    assert not out.exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "c")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    out = tmp_path / "bundle"
    weights.write_bytes(whole[:-100])
    refused("model.safetensors", "build-engine", folder, "--out", out)
    weights.unlink()
    refused("model.safetensors", "build-engine", folder, "--out", out)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["identity"]["dim"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    refused("identity_projection", "build-engine", folder, "--out", out)
    (folder / "config.json").write_text("{")
    refused("not JSON", "export", folder, "--out", out)
    assert not out.exists()
    assert checkpoint_spec().identity.dim == 16


def test_a_flipped_bit_reaches_the_user(bundle_copy: Path, tmp_path: Path) -> None:
    path = next(bundle_copy.glob("*.onnx"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    out = tmp_path / "out"
    refused("manifest", "sample", bundle_copy, "--unconditional", "--out", out)
    refused("manifest", "inspect", bundle_copy)
    assert not out.exists()


def test_unwritable_places(tiny_bundle: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("mine")
    out = blocker / "out"
    common = ["sample", tiny_bundle, "--unconditional", "--steps", "2"]
    refused("cannot", *common, "--out", out)
    refused("is a file", *common, "--out", blocker)
    assert blocker.read_text() == "mine"
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    refused("not empty", *common, "--out", full, status=2)
    refused("no earlier run's", *common, "--out", full, "--force", status=2)
    assert contents(full) == {"thesis.txt": b"mine"}
    again = tmp_path / "again"
    ok(*common, "--out", again, "--count", "2")
    refused("give --force", *common, "--out", again, status=2)
    ok(*common, "--out", again, "--count", "1", "--force")
    assert len(list(again.glob("sample-*.png"))) == 1


def test_the_current_folder_as_a_path(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    ok("sample", tiny_bundle, "--unconditional", "--steps", "2", "--out", ".")
    assert len(list(here.glob("sample-*.png"))) == 4


def test_the_system_s_errors_become_messages(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root no permission is refused, so the refusal is acted."""

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("id3pm_deploy.models.open_bundle", deny)
    refused(
        "cannot use somewhere: Permission denied",
        "sample",
        tiny_bundle,
        "--unconditional",
        "--out",
        tmp_path / "out",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        out = tmp_path / "out"
        refused("cannot write", "sample", tiny_bundle, "--unconditional", "--out", out)
    finally:
        tmp_path.chmod(0o700)


def test_parity_command(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    common = ["parity", tiny_bundle, "--reference", tiny_checkpoint, "--steps", "3"]
    result = ok(*common, "--count", "2", "--out", tmp_path / "good", "--json")
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert 0 < found["final_max_rel"] <= 1e-4
    strict = ["--tolerance-trajectory", "1e-12"]
    refused(
        "past their tolerance", *common, "--out", tmp_path / "bad", *strict, status=1
    )
    failed = json.loads((tmp_path / "bad" / "parity.json").read_text())
    assert failed["passed"] is False
    assert failed["failures"]
    refused("--reference", "parity", tiny_bundle, "--out", tmp_path / "x", status=2)


def test_inspect(
    tiny_bundle: Path, tiny_checkpoint: Path, identity: Path, tmp_path: Path
) -> None:
    bundle = json.loads(ok("inspect", tiny_bundle, "--self-test", "--json").stdout)
    assert bundle["kind"] == "bundle"
    assert 0 < bundle["self_test"]["cpu"] <= 1e-5
    checkpoint = json.loads(ok("inspect", tiny_checkpoint, "--json").stdout)
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["parameters"] > 100_000
    text = ok("inspect", identity).stdout
    with np.load(identity) as file:
        first = float(file["vectors"][0, 0])
    assert "test model" in text
    assert f"{first:.3f}" not in text
    refused("no CHECKPOINT", "inspect", tmp_path, status=2)


def test_build_engine_dry_run_and_unknown_target(tiny_bundle: Path) -> None:
    before = contents(tiny_bundle)
    recipe = json.loads(ok("build-engine", tiny_bundle, "--dry-run").stdout)
    assert recipe["backend"] == "onnxruntime"
    refused("no recipe 'toaster'", "build-engine", tiny_bundle, "--target", "toaster")
    assert contents(tiny_bundle) == before


def test_a_bundle_without_the_graph_says_how_to_get_it(bundle_copy: Path) -> None:
    refused("no step graph in float16", "build-engine", bundle_copy, "--target", "rtx")


def test_ctrl_c_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command: list[Any] = [sys.executable, "-m", "id3pm_deploy", "sample", tiny_bundle]
    command += [
        "--unconditional",
        "--solver",
        "ddpm",
        "--steps",
        "900",
        "--count",
        "64",
    ]
    process = subprocess.Popen(
        [str(part) for part in [*command, "--out", out]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(4)
    assert process.poll() is None, process.stderr and process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


SLEEPER = """
import os, signal, sys, time
import click
from id3pm_deploy.cli import main
from id3pm_deploy.commands import doctor

@click.command()
def command():
    ready, begun = os.pipe()
    child = os.fork()
    try:
        if not child:
            os.write(begun, b"!")  # Python drops what comes during a fork
            time.sleep(60)
        os.read(ready, 1)
        print(child, flush=True)
        time.sleep(60)
    finally:
        print("tidied" if child else "tidied by the child", flush=True)

doctor.command = command
if "ignore" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
main(["doctor"])
"""


def sleeper(*arguments: str) -> tuple[subprocess.Popen[str], int]:
    """A command that sleeps, and the child that it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_command_that_is_told_to_end_tidies_up(name: str, status: int) -> None:
    process, child = sleeper()
    os.kill(child, getattr(signal, name))  # which ends on the spot, as ever
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert stdout == "tidied\n"
    assert stderr == f"stopped by {name}; nothing half-written was left\n"


def test_who_ignores_the_end_of_the_terminal_goes_on() -> None:
    process, child = sleeper("ignore")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.kill(child, signal.SIGKILL)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "tidied\n"
    assert process.returncode == 143
