"""What a bundle can still ask for when its manifest breaks no rule of the format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted_onnx import golden_npz, step_model, write_bundle
from sandbox import Sandbox, check_done, check_refused

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
    "an engine of tomorrow": (
        lambda values: values["engines"][0].update(backend="quantum")
    ),
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


NAMES = [b"\xff\xfe", b"a\nb", b"\x1b[2J", b"a b", "σ".encode(), b"x" * 300, b"a/../c"]


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
