"""A plan cache on a disk that is full or read-only: a warning, and a build."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from crafted_onnx import step_model, write_bundle
from disks import Disk, small_disk
from sandbox import ROOT, Finished, Sandbox

from id3pm_deploy.builders.cache import PlanCache
from id3pm_deploy.bundle import open_bundle

BUILD = (
    *("build-engine", "b", "--target", "rtx"),
    *("--set", "export=float32", "--set", "precision=float32"),
)
LEAVES = (0, 1, 2, 3, 4)
"""Free pages of 4 KiB; the plan takes two, what is known of it another."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "disk", 1 << 20) as made:
        yield made


@pytest.fixture
def plans(device: Sandbox, disk: Disk) -> Sandbox:
    """A sandbox for a bundle ``b``, with the user's cache on the disk."""
    device.path = (str(ROOT / "tests"),)
    device.before = ("plan_fakes:install",)
    device.variables["SPAWNS"] = str(device.root / "log" / "spawns")
    device.variables["XDG_CACHE_HOME"] = str(disk.path)
    return device


def build(plans: Sandbox, *more: str) -> Finished:
    """Build it for the bundle as it was at first, which holds no plan."""
    shutil.rmtree(plans.work / "b", ignore_errors=True)
    write_bundle(plans.work / "b", step_model())
    return plans.run(*BUILD, *more)


def check_built(plans: Sandbox, found: Finished, spawns: int) -> None:
    assert found.status == 0, found.stderr
    bundle = open_bundle(plans.work / "b")
    bundle.verify()
    assert [e.target for e in bundle.manifest.engines] == ["cpu", "rtx"]
    assert len((plans.root / "log" / "spawns").read_text().split()) == spawns


def test_a_full_disk(plans: Sandbox, disk: Disk) -> None:
    """It is full at once, or while the plan is copied there."""
    warned = 0
    for number, pages in enumerate(LEAVES, 1):
        disk.fill(pages)
        found = build(plans)
        check_built(plans, found, number)
        folder = disk.path / "id3pm-deploy" / "plans"
        if "the plan was not kept" in found.stderr or "without" in found.stderr:
            assert "No space left on device" in found.stderr
            assert PlanCache(folder).entries() == []
            warned += 1
        disk.drain()
        if folder.exists():
            assert PlanCache(folder).prune(0).plans <= 1
    assert warned >= 2


def test_a_disk_that_is_read_only(plans: Sandbox, disk: Disk) -> None:
    """What is kept there is taken; what is not is built."""
    disk.writable(False)
    found = build(plans)
    check_built(plans, found, 1)
    assert "Read-only file system" in found.stderr
    assert str(disk.path) in found.stderr
    disk.writable(True)
    check_built(plans, build(plans), 2)
    disk.writable(False)
    before = disk.contents()
    found = build(plans)
    check_built(plans, found, 2)
    assert found.stderr == ""
    found = build(plans, "--set", "optimization_level=1")
    check_built(plans, found, 3)
    assert "Read-only file system" in found.stderr
    assert disk.contents() == before
    disk.writable(True)
