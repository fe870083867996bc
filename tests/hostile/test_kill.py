"""kill -9 at any moment: what was there stays, what is new is whole, nothing is left.

Two ways to choose the moment. ``kill_before`` ends the process just before it makes,
renames or removes a certain file, so that every state of the disk is seen; the clock
(CPU time, which a busy machine does not stretch) reaches what lies between.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crafted_onnx import step_model, write_bundle
from makers import write_canned
from sandbox import Sandbox, check_done, kill

from id3pm_deploy.bundle import is_bundle, open_bundle
from id3pm_deploy.images import read_mark

MOMENTS = 10
MADE_BY_TORCH = "temporary/torchinductor_"
MADE_BY_PYTHON = re.compile(r"temporary/[a-z0-9_]{8}")
"""With which ``tempfile`` tries whether it may write there."""


def cpu_seconds(process: int) -> float:
    """CPU time of a process so far; infinite when it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return float("inf")
    fields = text.rpartition(")")[2].split()
    if fields[0] == "Z":
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def killed_after(sandbox: Sandbox, seconds: float, *arguments: object) -> bool:
    """Kill a command after some CPU time; False if it ended before."""
    process = sandbox.start(*arguments)
    while cpu_seconds(process) < seconds:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        kill(process)
    return sandbox.finish().status == -signal.SIGKILL


def own_files(sandbox: Sandbox) -> list[str]:
    """What is in the sandbox, without what torch and Python make."""
    return [
        name
        for name in sandbox.files()
        if not name.startswith(MADE_BY_TORCH) and not MADE_BY_PYTHON.fullmatch(name)
    ]


def kill_before_every_change(
    sandbox: Sandbox,
    reset: Callable[[], None],
    check: Callable[[], None],
    *arguments: object,
) -> int:
    """Kill a command before each of its changes; it works the next time, every time.

    Args:
        sandbox: Where to run it.
        reset: Puts everything back as it was before the command.
        check: Fails unless what is there is whole.
        arguments: The command.

    Returns:
        Number of changes, and so of kills.
    """
    reset()
    check_done(sandbox.run(*arguments))
    changes = sandbox.changes()
    check()
    wanted = own_files(sandbox)
    for number in range(len(changes)):
        reset()
        sandbox.start(*arguments, kill_before=number)
        assert sandbox.finish().status == -signal.SIGKILL, changes[number]
        check()
        done = sandbox.run(*arguments)
        assert done.status == 0, (changes[number], done.stderr)
        check()
        assert own_files(sandbox) == wanted, changes[number]
    return len(changes)


def kill_at_moments(
    sandbox: Sandbox, check: Callable[[], None], *arguments: object
) -> None:
    """Kill a command at moments that are spread over its CPU time; nothing is reset.

    A kill that came too late is tried again: all of them have to hit.
    """
    whole = sandbox.run(*arguments)
    check_done(whole)
    for number in range(MOMENTS):
        share = (number + 0.5) / MOMENTS
        for _ in range(20):
            hit = killed_after(sandbox, whole.cpu * share, *arguments)
            check()
            if hit:
                break
            share *= 0.85
        assert hit
    check_done(sandbox.run(*arguments))
    check()


# sample


def check_pictures(out: Path) -> int:
    """Pictures of a whole run; fails for half of one."""
    record = json.loads((out / "record.json").read_text())
    names = {path.name for path in out.iterdir()}
    pictures = {f"sample-{one['sample']:05d}.png" for one in record["samples"]}
    assert names == {*pictures, "sheet.png", "record.json"}
    for name in {*pictures, "sheet.png"}:
        read_mark(out / name)
    return len(pictures)


SAMPLE = ("sample", "b", "--unconditional", "--out", "out")


@pytest.mark.slow
def test_sample_for_the_first_time(device: Sandbox) -> None:
    write_bundle(device.work / "b", step_model())
    out = device.work / "out"

    def check() -> None:
        assert not out.exists() or check_pictures(out) == 2

    kills = kill_before_every_change(
        device,
        lambda: shutil.rmtree(out, ignore_errors=True),
        check,
        *(*SAMPLE, "--steps", "2", "--count", "2", "--force"),
    )
    assert kills >= MOMENTS


@pytest.mark.slow
def test_sample_over_an_older_run(device: Sandbox) -> None:
    """The older run or the new one is there, at every moment."""
    write_bundle(device.work / "b", step_model())
    out = device.work / "out"
    check_done(device.run(*SAMPLE, "--steps", "2", "--count", "3"))
    shutil.copytree(out, device.root / "old")

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(device.root / "old", out)

    seen = set()
    kills = kill_before_every_change(
        device,
        reset,
        lambda: seen.add(check_pictures(out)),
        *(*SAMPLE, "--steps", "2", "--count", "2", "--force"),
    )
    assert kills >= MOMENTS
    assert seen == {2, 3}


@pytest.mark.slow
def test_sample_at_any_moment(device: Sandbox) -> None:
    write_bundle(device.work / "b", step_model())
    out = device.work / "out"
    arguments = (*SAMPLE, "--steps", "400", "--count", "12", "--force")
    kill_at_moments(device, lambda: None, *arguments)
    assert check_pictures(out) == 12
    assert not [name for name in device.files() if "/." in name and "lock" not in name]


# build-engine


def bundle_check(folder: Path) -> Callable[[], None]:
    """A check that every file of the bundle is what its manifest says."""

    def check() -> None:
        open_bundle(folder).verify()
        assert open_bundle(folder).manifest.graphs

    return check


def test_build_engine(device: Sandbox) -> None:
    """Before each change, with a bundle that had the engine and one that had none."""
    folder, old = device.work / "b", device.root / "old"
    write_bundle(old, step_model())
    manifest = json.loads((old / "manifest.json").read_text())
    engines = manifest["engines"]
    for count in (1, 0):
        manifest["engines"] = engines[:count]
        (old / "manifest.json").write_text(json.dumps(manifest))

        def reset() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(old, folder)

        arguments = ("build-engine", "b", "--target", "cpu")
        kills = kill_before_every_change(
            device, reset, bundle_check(folder), *arguments
        )
        assert kills >= 3
        assert [one.target for one in open_bundle(folder).manifest.engines] == ["cpu"]


def test_build_engine_at_any_moment(device: Sandbox) -> None:
    folder = write_bundle(device.work / "b", step_model())
    check = bundle_check(folder)
    kill_at_moments(device, check, "build-engine", "b")
    assert not list(folder.glob(".*.tmp"))


# export


@pytest.fixture
def canned(build: Sandbox, tiny_weights: Path) -> Sandbox:
    """A sandbox where exporting a CHECKPOINT takes no time, but is written in full."""
    shutil.copytree(tiny_weights.parent, build.work / "model")
    write_canned(build.root / "canned")
    build.before = ("makers:canned_export",)
    return build


def test_export_to_a_new_bundle(canned: Sandbox) -> None:
    folder = canned.work / "b"

    def check() -> None:
        if is_bundle(folder):
            bundle_check(folder)()

    kills = kill_before_every_change(
        canned,
        lambda: shutil.rmtree(folder, ignore_errors=True),
        check,
        *("export", "model", "--out", "b"),
    )
    assert kills >= MOMENTS


def test_export_into_an_older_bundle(canned: Sandbox) -> None:
    folder, old = canned.work / "b", canned.root / "old"
    check_done(canned.run("export", "model", "--out", "b"))
    shutil.copytree(folder, old)

    def reset() -> None:
        shutil.rmtree(folder)
        shutil.copytree(old, folder)

    seen = set()

    def check() -> None:
        bundle_check(folder)()
        seen.add(tuple(one.kind for one in open_bundle(folder).manifest.graphs))

    arguments = ("export", "model", "--out", "b", "--graph", "unet")
    kills = kill_before_every_change(canned, reset, check, *arguments)
    assert kills >= MOMENTS // 2
    assert seen == {("step",), ("step", "unet")}


@pytest.mark.slow
def test_export_at_any_moment(build: Sandbox, tiny_weights: Path) -> None:
    """The exporter at work; the bundle it adds to stays what it was."""
    shutil.copytree(tiny_weights.parent, build.work / "model")
    build.limits["memory"] = None
    folder = build.work / "b"
    arguments = ("export", "model", "--out", "b", "--graph", "unet")
    kill_at_moments(build, bundle_check(folder), *arguments)
    left = [name for name in own_files(build) if not name.startswith("work/")]
    assert left == []
    assert not list(folder.glob(".*.tmp"))
