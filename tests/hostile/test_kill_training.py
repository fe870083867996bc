"""kill -9 in a training: the CHECKPOINT loads, and the run ends with the same bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from faces import photo
from sandbox import Sandbox, check_done
from test_kill import own_files

from id3pm_deploy.reference.checkpoint import load_checkpoint

SHAPE = (
    *("--image-size", "8", "--base-channels", "32", "--residual-blocks", "1"),
    *("--channel-multipliers", "1", "--attention-resolutions", "8"),
    *("--num-head-channels", "32", "--learned-variance", "--model", "makers:colour"),
)
TRAIN = (
    *("train", "faces", "--out", "run", *SHAPE, "--batch-size", "2"),
    *("--accumulation", "2", "--final-learning-rate", "5e-4", "--save-every", "1"),
    *("--sheet-every", "9", "--steps"),
)
RUN = ("run", "run.training")


@pytest.fixture
def training(build: Sandbox) -> Sandbox:
    """A sandbox with a face to train on."""
    (build.work / "faces").mkdir()
    shutil.copy(photo(), build.work / "faces")
    return build


def remove_run(sandbox: Sandbox) -> None:
    for name in RUN:
        shutil.rmtree(sandbox.work / name, ignore_errors=True)


def state(sandbox: Sandbox) -> Path:
    return sandbox.work / "run.training" / "state.safetensors"


@pytest.mark.slow
def test_going_on_with_a_run(training: Sandbox) -> None:
    """At every moment there is a CHECKPOINT that loads, and a run to go on with."""
    check_done(training.run(*TRAIN, "2"))
    whole, wanted = state(training).read_bytes(), own_files(training)
    remove_run(training)
    check_done(training.run(*TRAIN, "1"))
    for name in RUN:
        shutil.move(training.work / name, training.root / "old" / name)
    again = (*TRAIN, "2", "--resume")

    def kill_before(number: int | None) -> int:
        remove_run(training)
        for name in RUN:
            shutil.copytree(training.root / "old" / name, training.work / name)
        training.start(*again, kill_before=number)
        return training.finish().status

    assert kill_before(None) == 0
    seen, changes = set(), training.changes()
    assert len(changes) >= 10
    for number, change in list(enumerate(changes))[::2]:
        assert kill_before(number) == -signal.SIGKILL, change
        seen.add(load_checkpoint(training.work / "run").spec.origin["steps"])
        if number % 6:
            continue
        check_done(training.run(*again))
        assert load_checkpoint(training.work / "run").spec.origin["steps"] == 2
        assert state(training).read_bytes() == whole
        assert set(wanted) <= set(own_files(training)), change
    assert seen == {1, 2}


@pytest.mark.slow
def test_a_new_run(training: Sandbox) -> None:
    """Killed before its first save it starts anew, later it goes on."""
    out = training.work / "run"
    check_done(training.run(*TRAIN, "1"))
    changes, whole = training.changes(), state(training).read_bytes()
    for number in range(0, len(changes), 5):
        remove_run(training)
        training.start(*TRAIN, "1", kill_before=number)
        assert training.finish().status == -signal.SIGKILL, changes[number]
        if (out / "config.json").exists():
            load_checkpoint(out)
        again = ["--resume"] if state(training).exists() else []
        done = training.run(*TRAIN, "1", *again)
        assert done.status == 0, (changes[number], done.stderr)
        load_checkpoint(out)
        assert state(training).read_bytes() == whole
