"""A disk that is full or read-only: every writer says so and leaves what was there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from bundles import GOLDEN
from crafted_onnx import step_model, write_bundle
from disks import Disk, small_disk
from faces import photo
from sandbox import Finished, Sandbox, check_done

LEAVES = (0, 1, 3, 8, 20)
"""Free pages of 4 KiB, so that writing stops at different places."""


@dataclass(frozen=True)
class Writer:
    """A command that writes to the disk, which its working folder calls ``disk``.

    Attributes:
        command: What is run, words separated by blanks.
        inputs: Which things to put into the working folder.
        earlier: Commands that make an older result first.
        options: Added to ``command`` where there is an older result.
        build: Whether it needs torch.
        whole: What may be new after a failure: folders, and files (or patterns) that
            are complete and from which a run is resumed.
    """

    command: str
    inputs: str = ""
    earlier: tuple[str, ...] = ()
    options: str = ""
    build: bool = False
    whole: tuple[str, ...] = ()


SAMPLE = "sample b --unconditional --out disk/out --steps 2 --count 2"
TRAIN = (
    "train faces --out disk/run --image-size 8 --base-channels 32 --residual-blocks 1 "
    "--channel-multipliers 1 --attention-resolutions 8 --num-head-channels 32 "
    "--batch-size 1 --save-every 1 --sheet-every 1 --model makers:colour --steps"
)
WORK = "run.training"
RESUMED = tuple(
    f"{WORK}/{name}" for name in ("settings.json", "log.jsonl", "state.safetensors")
)
WRITERS = {
    "embed": Writer("embed face.jpg --out disk/who.npz", "face"),
    "embed again": Writer(
        "embed face.jpg --out disk/who.npz",
        "face",
        ("embed face.jpg --out disk/who.npz",),
        "--force",
    ),
    "sample": Writer(SAMPLE, "bundle"),
    "sample again": Writer(SAMPLE, "bundle", (SAMPLE,), "--force --seed 3"),
    "export": Writer("export model --out disk/b", "model", build=True),
    "export again": Writer(
        "export model --out disk/b",
        "model",
        ("export model --out disk/b",),
        "--graph unet",
        build=True,
    ),
    "build-engine": Writer("build-engine model --out disk/b", "model", build=True),
    "build-engine again": Writer(
        "build-engine disk/b", "model", ("export model --out disk/b",), build=True
    ),
    "parity": Writer("parity b --against b --steps 2 --out disk/report", "bundle"),
    "parity again": Writer(
        "parity b --against b --steps 2 --out disk/report",
        "bundle",
        ("parity b --against b --steps 2 --out disk/report",),
        "--seed 3",
    ),
    "parity --record": Writer(
        "parity model --record disk/golden.npz --steps 2 --count 1",
        "model",
        build=True,
    ),
    "pack": Writer("bundle pack b disk/b.tar", "bundle"),
    "pack again": Writer(
        "bundle pack b disk/b.tar",
        "bundle other",
        ("bundle pack other disk/b.tar",),
        "--force",
    ),
    "unpack": Writer("bundle unpack b.tar disk/b", "tar"),
    "keygen": Writer("bundle keygen disk/key"),
    "sign": Writer(
        "bundle sign disk/b --key key", "key", ("bundle unpack b.tar disk/b",)
    ),
    "sign again": Writer(
        "bundle sign disk/b --key key",
        "key",
        ("bundle unpack b.tar disk/b", "bundle sign disk/b --key other-key"),
    ),
    "trust": Writer(
        "bundle trust key.pub",
        "key",
        whole=("id3pm-deploy", "id3pm-deploy/trusted-keys"),
    ),
    "migrate": Writer("bundle migrate disk/v1", "v1"),
    "train": Writer(
        f"{TRAIN} 1",
        "faces",
        build=True,
        whole=(WORK, f"{WORK}/faces", f"{WORK}/faces/*", *RESUMED),
    ),
    "train on": Writer(
        f"{TRAIN} 2 --resume",
        "faces",
        (f"{TRAIN} 1",),
        build=True,
        whole=RESUMED,
    ),
}


def put(sandbox: Sandbox, disk: Disk, inputs: str, weights: Path | None) -> None:
    """Put what a writer needs into the working folder, or onto the disk."""
    (sandbox.work / "disk").symlink_to(disk.path)
    sandbox.variables["XDG_CONFIG_HOME"] = str(disk.path)
    for name in inputs.split():
        _PUT[name](sandbox, disk)
    if weights is not None:
        shutil.copytree(weights.parent, sandbox.work / "model")


def _bundle(sandbox: Sandbox, _disk: Any) -> None:
    write_bundle(sandbox.work / "b", step_model())


def _other(sandbox: Sandbox, _disk: Any) -> None:
    from onnx import helper

    node = helper.make_node("Neg", ["first"], ["other"])
    write_bundle(sandbox.work / "other", step_model(node))


def _tar(sandbox: Sandbox, disk: Any) -> None:
    _bundle(sandbox, disk)
    check_done(sandbox.run("bundle", "pack", "b", "b.tar"))


def _key(sandbox: Sandbox, disk: Any) -> None:
    _tar(sandbox, disk)
    for name in ("key", "other-key"):
        check_done(sandbox.run("bundle", "keygen", name))


def _face(sandbox: Sandbox, _disk: Any) -> None:
    shutil.copy(photo(), sandbox.work / "face.jpg")


def _faces(sandbox: Sandbox, _disk: Any) -> None:
    (sandbox.work / "faces").mkdir()
    shutil.copy(photo(), sandbox.work / "faces")


def _v1(_sandbox: Sandbox, disk: Any) -> None:
    shutil.copytree(GOLDEN / "bundle-v1", disk.path / "v1")


_PUT: dict[str, Callable[[Sandbox, Any], None]] = {
    "bundle": _bundle,
    "other": _other,
    "tar": _tar,
    "key": _key,
    "face": _face,
    "faces": _faces,
    "v1": _v1,
    "model": lambda sandbox, _disk: _canned(sandbox),
}


def _canned(sandbox: Sandbox) -> None:
    from makers import write_canned

    write_canned(sandbox.root / "canned")
    sandbox.before = ("makers:canned_export",)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 8 MiB."""
    with small_disk(tmp_path / "disk") as made:
        yield made


def check_message(found: Finished, *words: str) -> None:
    """Fail unless the command says in our words that it cannot write."""
    assert found.status in (1, 2), (found.status, found.stdout, found.stderr)
    lines = [one for one in found.stderr.splitlines() if not one.startswith("warning:")]
    assert lines[0].startswith("error: cannot write"), found.stderr
    assert any(word in found.stderr for word in words), found.stderr
    assert "fix: " in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_or_read_only(
    request: pytest.FixtureRequest, disk: Disk, name: str
) -> None:
    """At several amounts of room; then it works as if nothing had been."""
    writer = WRITERS[name]
    sandbox: Sandbox = request.getfixturevalue("build" if writer.build else "device")
    weights = request.getfixturevalue("tiny_weights") if writer.build else None
    put(sandbox, disk, writer.inputs, weights)
    for earlier in writer.earlier:
        check_done(sandbox.run(*earlier.split()))
    command = [*writer.command.split(), *writer.options.split()]
    before, others = disk.contents(), sandbox.files()
    refusals = 0
    for pages in LEAVES:
        disk.fill(pages)
        found = sandbox.run(*command)
        disk.drain()
        if found.status == 0:
            break
        check_message(found, "No space left", "not enough room")
        check_intact(disk, before, writer.whole)
        refusals += 1
    else:
        assert refusals
        check_done(sandbox.run(*command))
    assert refusals, "it takes no room, so this test shows nothing"
    assert disk.contents() != before
    assert sandbox.files() == others
    check_read_only(sandbox, disk, name)


def check_intact(
    disk: Disk, before: dict[str, bytes | None], whole: tuple[str, ...]
) -> None:
    """Fail unless everything is what it was but for locks and what is ``whole``."""
    now = disk.contents()
    changed = {
        name for name in {*now, *before} if now.get(name, "") != before.get(name, "")
    }
    others = {name for name in changed if Path(name).name != ".lock"}
    assert [n for n in others if not any(fnmatch(n, one) for one in whole)] == []
    for name in changed & {f"{WORK}/settings.json", f"{WORK}/log.jsonl"}:
        text = (now[name] or b"").decode()
        for part in text.splitlines() if name.endswith("l") else [text]:
            json.loads(part)


def check_read_only(sandbox: Sandbox, disk: Disk, name: str) -> None:
    """The same command, or one that makes a new thing, on a read-only disk."""
    writer = WRITERS[name]
    command = [word.replace("disk/", "disk/new-") for word in writer.command.split()]
    if writer.earlier:
        command = [*writer.command.split(), *writer.options.split()]
    if name == "migrate":
        shutil.rmtree(disk.path / "v1")
        shutil.copytree(GOLDEN / "bundle-v1", disk.path / "v1")
        command = writer.command.split()
    if name == "train on":
        command = f"{TRAIN} 3 --resume".split()
    before = disk.contents()
    disk.writable(False)
    found = sandbox.run(*command)
    disk.writable(True)
    check_message(found, "Read-only file system", "not a folder you may write to")
    assert disk.contents() == before


@pytest.mark.parametrize("name", ["embed", "sample", "pack", "parity"])
def test_a_limit_of_the_size_of_files(device: Sandbox, name: str) -> None:
    """What stands in for a full disk where nobody may mount one."""
    writer = WRITERS[name]
    (device.work / "disk").mkdir()
    for one in writer.inputs.split():
        _PUT[one](device, None)
    before = device.files()
    device.limits["file_size"] = 512
    found = device.run(*writer.command.split())
    check_message(found, "File too large")
    assert device.files() == before
    device.limits["file_size"] = None
    check_done(device.run(*writer.command.split()))
