"""kill -9 while a plan is built, kept, taken or removed: nothing wrong is left."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from crafted_onnx import step_model, write_bundle
from sandbox import ROOT, Sandbox, check_done
from test_kill import kill_at_moments, kill_before_every_change, own_files

from id3pm_deploy.builders.cache import PlanCache
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.files import sha256_of_file

pytestmark = pytest.mark.slow
PIECES = 10
SETTINGS = ("--set", "export=float32", "--set", "precision=float32")
BUILD = ("build-engine", "b", "--target", "rtx", *SETTINGS)


@pytest.fixture
def plans(device: Sandbox) -> Sandbox:
    """A sandbox with a bundle ``b``; building its plan takes no time."""
    device.path = (str(ROOT / "tests"),)
    device.before = ("plan_fakes:install",)
    device.variables["SPAWNS"] = str(device.root / "log" / "spawns")
    write_bundle(device.root / "old", step_model())
    reset(device)
    return device


def cache_folder(sandbox: Sandbox) -> Path:
    return sandbox.root / "home" / ".cache" / "id3pm-deploy" / "plans"


def reset(sandbox: Sandbox, cache: str | None = None) -> None:
    """A bundle without a plan, no ledger, and the cache that was saved by a name."""
    shutil.rmtree(sandbox.work / "b", ignore_errors=True)
    shutil.copytree(sandbox.root / "old", sandbox.work / "b")
    for name in (".local", ".cache"):
        shutil.rmtree(sandbox.root / "home" / name, ignore_errors=True)
    if cache is not None:
        shutil.copytree(
            sandbox.root / cache, sandbox.root / "home" / ".cache", symlinks=True
        )


def save(sandbox: Sandbox, name: str) -> None:
    shutil.copytree(sandbox.root / "home" / ".cache", sandbox.root / name)


def check(sandbox: Sandbox) -> None:
    """The bundle and every plan in the cache are whole."""
    bundle = open_bundle(sandbox.work / "b")
    bundle.verify()
    folder = cache_folder(sandbox)
    for entry in PlanCache(folder).entries():
        assert entry.plan is not None, entry.problem
        found = sha256_of_file(folder / entry.key / "plan")
        assert found == entry.plan.sha256


def targets(sandbox: Sandbox) -> list[str]:
    return [e.target for e in open_bundle(sandbox.work / "b").manifest.engines]


def two_plans(sandbox: Sandbox) -> int:
    """Keep two other plans; returns the bytes of one."""
    for samples in (5, 6):
        arguments = (*BUILD, "--set", f"dynamic_samples=[1, 2, {samples}]")
        check_done(sandbox.run(*arguments))
    return PlanCache(cache_folder(sandbox)).entries()[0].size


def test_before_every_change_of_a_build(plans: Sandbox) -> None:
    kills = kill_before_every_change(
        plans, lambda: reset(plans), lambda: check(plans), *BUILD
    )
    assert kills >= PIECES
    assert targets(plans) == ["cpu", "rtx"]


def test_before_every_change_of_pruning(plans: Sandbox) -> None:
    """By the limit of a build, whose last change that is, and by the command."""
    limit = 2 * two_plans(plans) + 200
    check_done(plans.run(*BUILD))
    save(plans, "full")
    taken = (*BUILD, "--cache-limit", str(limit))
    for arguments, left in ((taken, 2), (("cache", "prune", "--all"), 0)):
        kills = kill_before_every_change(
            plans,
            lambda: reset(plans, "full"),
            lambda: check(plans),
            *arguments,
        )
        assert kills >= PIECES
        assert len(os.listdir(cache_folder(plans))) == left


def die_at(plans: Sandbox, step: str, cache: str | None = None) -> None:
    """Kill a build at ten moments of a step; the next one works, every time."""
    for number in range(PIECES):
        reset(plans, cache)
        plans.variables["DIE_AT"] = f"{step}:{number}"
        assert plans.run(*BUILD).status == -signal.SIGKILL, number
        check(plans)
        assert targets(plans) == ["cpu"]
        plans.variables["DIE_AT"] = ""
        check_done(plans.run(*BUILD))
        check(plans)
        assert targets(plans) == ["cpu", "rtx"]
        assert [len(name) for name in os.listdir(cache_folder(plans))] == [64]
        assert not [n for n in own_files(plans) if n.startswith("temporary/")]


@pytest.mark.parametrize("step", ["building", "copying", "entry.json", "commit"])
def test_in_the_middle_of(plans: Sandbox, step: str) -> None:
    """A plan that is being written, copied to the cache, described there, or copied to
    the bundle."""
    die_at(plans, step)


def test_in_the_middle_of_taking_a_plan(plans: Sandbox) -> None:
    check_done(plans.run(*BUILD))
    save(plans, "with-plan")
    die_at(plans, "copying", "with-plan")


def test_at_any_moment(plans: Sandbox) -> None:
    check_done(plans.run(*BUILD))  # from now on the plan is taken, each time
    kill_at_moments(plans, lambda: check(plans), *BUILD)
    kill_at_moments(plans, lambda: check(plans), *BUILD, "--no-cache")
    assert targets(plans) == ["cpu", "rtx"]
    assert not list((plans.work / "b").glob(".*.tmp"))
