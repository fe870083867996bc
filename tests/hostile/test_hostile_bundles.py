"""What a bundle can still ask for when its manifest breaks no rule of the format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted_onnx import golden_npz, step_model, write_bundle
from sandbox import ROOT, Sandbox, check_done, check_refused

GIGABYTE = 1 << 30
SAMPLE = ("sample", "b", "--unconditional", "--steps", "2", "--count", "2", "--out")


def edited(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the manifest of a bundle; sizes and hashes of files stay right."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def model(**changes: int) -> Callable[[Any], object]:
    """A change of numbers of the model."""
    return lambda values: values["diffusion"]["model"].update(changes)


CASES: dict[str, Callable[[Any], object]] = {
    "pictures of 3 GB": model(image_size=16384),
    "pictures of 400 GB": model(image_size=2048, image_channels=16384),
    "pictures that the graph does not make": model(image_size=32),
    "vectors that the graph does not take": (
        lambda values: values["diffusion"]["identity"].update(dim=65536)
    ),
    "one channel": model(image_channels=1),
    "no vectors for a graph that takes them": (
        lambda values: values["diffusion"]["identity"].update(dim=0)
    ),
    "small pictures that the graph does not take": model(low_res_size=4),
    "a graph of another kind": (
        lambda values: values["graphs"][0].update(kind="unet", precision="float32")
    ),
    "golden data as the graph": (
        lambda values: (
            values["graphs"][0].update(file=values["graphs"][0]["golden"]),
            values["engines"][0].update(
                file=values["graphs"][0]["golden"], graph=values["graphs"][0]["golden"]
            ),
        )
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_manifest_that_keeps_the_rules(device: Sandbox, case: str) -> None:
    folder = write_bundle(device.work / "b", step_model())
    edited(folder, CASES[case])
    before = device.files()
    device.limits["memory"] = None
    found = device.run(*SAMPLE, "out")
    check_refused(found, peak=GIGABYTE // 4, seconds=5)
    assert device.files() == before


def test_it_was_valid_before_and_many_threads_are_no_harm(device: Sandbox) -> None:
    """A bundle may have been built for more cores than there are here."""
    folder = write_bundle(device.work / "b", step_model())
    check_done(device.run(*SAMPLE, "out"))
    edited(folder, lambda values: values["engines"][0].update(threads=1024))
    device.limits["memory"] = GIGABYTE
    found = device.run(*SAMPLE, "more")
    check_done(found)
    assert found.peak < GIGABYTE // 8


def test_a_graph_that_takes_no_room_on_disk(device: Sandbox) -> None:
    """Seven gigabytes of nothing, in a file without blocks."""
    folder = write_bundle(device.work / "b", step_model())
    values = json.loads((folder / "manifest.json").read_text())
    name = values["graphs"][0]["file"]
    os.truncate(folder / name, 7 * GIGABYTE)
    assert (folder / name).stat().st_blocks < 100
    edited(folder, lambda one: one["files"][name].update(size=7 * GIGABYTE))
    check_refused(device.run(*SAMPLE, "out"), peak=GIGABYTE // 4, seconds=5)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link", "hard link"])
def test_what_stands_in_for_a_graph(device: Sandbox, kind: str) -> None:
    folder = write_bundle(device.work / "b", step_model())
    path = next(folder.glob("*.onnx"))
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        os.mknod(path, 0o020644, os.makedev(1, 5)) if not os.geteuid() else (
            pytest.skip("only root makes devices")
        )
    else:
        (device.work / "there").write_bytes(data)
        if kind == "link":
            path.symlink_to("../there")
        else:
            path.hardlink_to(device.work / "there")
    found = device.run(*SAMPLE, "out")
    if kind == "hard link":  # it is a plain file, and its bytes are the right ones
        check_done(found)
    else:
        check_refused(found, "plain file", seconds=5, peak=GIGABYTE // 4)


NAMES = [b"\xff\xfe", b"a\nb", b"\x1b[2J", b"a b", "σ".encode(), b"x" * 300]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_that_a_user_may_give(device: Sandbox, name: bytes) -> None:
    """A name that is no text, or is too long, ends in a picture or in a message."""
    write_bundle(device.work / "b", step_model(), golden_npz())
    out = os.fsdecode(name)
    found = device.run(*SAMPLE, out)
    if len(name) < 256:
        check_done(found)
        assert (device.work / out / "sample-00001.png").is_file()
    else:
        check_refused(found, "cannot")
    check_refused(device.run("inspect", out + "-absent"))
    check_refused(device.run("sample", out, "--unconditional", "--out", "z"))


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict"])
def test_a_terminal_that_lacks_characters(tmp_path: Path, encoding: str) -> None:
    """In a process of its own: the streams of the fork server are what they are."""
    write_bundle(tmp_path / "b", step_model())
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    names = (os.fsdecode(name) for name in (b"\xff", "σ".encode()))
    for command in (
        *([*SAMPLE, name] for name in names),
        ["sample", "--help"],
        ["sample", os.fsdecode(b"\xff-absent"), "--unconditional", "--out", "z"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "id3pm_deploy", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        assert done.returncode == (2 if "z" in command else 0)


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", step_model())
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "id3pm_deploy", "inspect", "b"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_printing_to_a_full_disk(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", step_model())
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "id3pm_deploy", "inspect", "b"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: cannot use: No space left on device")
