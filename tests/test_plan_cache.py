"""The plan cache: who builds, what is served, what is thrown away."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from id3pm_deploy.builders import cache as cache_module
from id3pm_deploy.builders import cache_entry, cache_files
from id3pm_deploy.builders.cache import DEFAULT_LIMIT_BYTES, PlanCache, Served
from id3pm_deploy.builders.cache_entry import Facts
from id3pm_deploy.cli import main
from id3pm_deploy.errors import BuildError, OutputError
from id3pm_deploy.user_folders import cache_folder

PLAN = b"native code" * 100
KEYS = tuple(digit * 64 for digit in "0123456789abcdef")
KEY = KEYS[10]


class Caller:
    """Asks a cache for plans and counts how often it has to build one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cache"
        self.file = folder / "file"
        self.built = 0

    def ask(
        self, key: str = KEY, plan: bytes = PLAN, limit: int = 1 << 20
    ) -> tuple[bool, list[str]]:
        """Whether the plan was taken from the cache, and what was noted."""
        cache = PlanCache(self.folder, limit)
        self.file.unlink(missing_ok=True)

        def build() -> Facts:
            self.built += 1
            self.file.write_bytes(plan)
            return {"key": key, "seconds": 1.5}

        served = cache.get_or_build(key, build, self.file, lambda _: None)
        assert self.file.read_bytes() == plan
        assert served.facts == {"key": key, "seconds": 1.5}
        digest = hashlib.sha256(plan).hexdigest()
        assert served.sha256 == (digest if served.from_cache else "")
        return served.from_cache, cache.notes


@pytest.fixture
def caller(tmp_path: Path) -> Caller:
    return Caller(tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_a_plan_is_built_once(caller: Caller) -> None:
    assert caller.ask() == (False, [])
    assert caller.ask() == (True, [])
    assert caller.ask(KEYS[1], b"another") == (False, [])
    assert caller.ask() == (True, [])
    assert caller.built == 2
    assert names(caller.folder) == [KEYS[1], KEY]
    assert names(caller.folder / KEY) == ["entry.json", "plan"]
    modes = [caller.folder, caller.folder / KEY, caller.folder / KEY / "plan"]
    assert [path.stat().st_mode & 0o777 for path in modes] == [0o700, 0o700, 0o600]


def test_a_build_that_fails_leaves_nothing(caller: Caller) -> None:
    def fail() -> Facts:
        raise BuildError("no")

    cache = PlanCache(caller.folder)
    with pytest.raises(BuildError, match="no"):
        cache.get_or_build(KEY, fail, caller.file, lambda _: None)
    assert names(caller.folder) == []
    assert caller.ask() == (False, [])


def test_what_is_no_key_is_a_bug(caller: Caller) -> None:
    for key in ("", "../../x", KEY.upper(), KEY + "\n"):
        with pytest.raises(ValueError, match="no key"):
            caller.ask(key)


def edit_entry(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "entry.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


def flip(folder: Path) -> None:
    data = bytearray((folder / "plan").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "plan").write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / "plan", len(PLAN) - 1)


def lengthen(folder: Path) -> None:
    with open(folder / "plan", "ab") as handle:
        handle.write(b"x")


def swap_plans(folder: Path) -> None:
    other = folder.parent / KEYS[1]
    (folder / "plan").rename(folder / "between")
    (other / "plan").rename(folder / "plan")
    (folder / "between").rename(other / "plan")


def swap_entries(folder: Path) -> None:
    other, between = folder.parent / KEYS[1], folder.parent / "between"
    folder.rename(between)
    other.rename(folder)
    between.rename(other)


def make_link(folder: Path) -> None:
    """A plan that is all right, but lies elsewhere."""
    away = folder.parent.parent / "elsewhere"
    (folder / "plan").rename(away)
    (folder / "plan").symlink_to(away)


def link_folder(folder: Path) -> None:
    away = folder.parent.parent / "elsewhere"
    folder.rename(away)
    folder.symlink_to(away)


def make_pipe(folder: Path) -> None:
    (folder / "plan").unlink()
    os.mkfifo(folder / "plan")


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"no folder")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": truncate,
    "longer": lengthen,
    "swapped with another's plan": swap_plans,
    "swapped with another": swap_entries,
    "a link": make_link,
    "folder is a link": link_folder,
    "a pipe": make_pipe,
    "a file": replace_by_a_file,
    "no plan": lambda folder: (folder / "plan").unlink(),
    "no entry": lambda folder: (folder / "entry.json").unlink(),
    "empty folder": empty,
    "open to others": lambda folder: (folder / "plan").chmod(0o666),
    "folder open to others": lambda folder: folder.chmod(0o777),
    "entry open to others": lambda folder: (folder / "entry.json").chmod(0o602),
    "entry cut": lambda folder: os.truncate(folder / "entry.json", 100),
    "entry of another key": edit_entry(lambda v: v.update(key=KEYS[1])),
    "entry of another version": edit_entry(lambda v: v.update(format_version=2)),
    "entry of another format": edit_entry(lambda v: v.update(format="id3pm-bundle")),
    "entry with another hash": edit_entry(lambda v: v.update(sha256="0" * 64)),
    "entry with another size": edit_entry(lambda v: v.update(size=1)),
    "entry with more": edit_entry(lambda v: v.update(more=1)),
    "entry too large": edit_entry(lambda v: v["facts"].update(x="x" * (4 << 20))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_never_served(
    caller: Caller, damage: Callable[[Path], None]
) -> None:
    caller.ask()
    caller.ask(KEYS[1], b"another plan" * 90)
    damage(caller.folder / KEY)
    taken, notes = caller.ask()
    assert not taken
    assert len(notes) == 1
    assert "cannot be used" in notes[0]
    assert KEY[:12] in notes[0]
    assert caller.ask() == (True, [])
    assert caller.built == 3
    assert not [name for name in names(caller.folder) if len(name) != 64]


def test_facts_that_are_not_to_be_used_are_built_again(caller: Caller) -> None:
    caller.ask()

    def build() -> Facts:
        caller.file.write_bytes(b"new")
        return {"new": True}

    def check(facts: Facts) -> None:
        if "new" not in facts:
            raise BuildError("of another release")

    cache = PlanCache(caller.folder)
    assert cache.get_or_build(KEY, build, caller.file, check) == Served({"new": True})
    assert "of another release" in cache.notes[0]
    again = cache.get_or_build(KEY, build, caller.file, check)
    assert (again.facts, again.from_cache) == ({"new": True}, True)


def spoil_by_link(folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


def spoil_by_mode(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (spoil_by_link, "it is a symbolic link"),
    "open to others": (spoil_by_mode, "others may write to it"),
    "a file": (lambda folder: folder.write_bytes(b""), "Not a directory"),
    "a link to nothing": (lambda folder: folder.symlink_to("nothing"), "link"),
}


@pytest.mark.parametrize(("spoil", "reason"), SPOILT.values(), ids=SPOILT)
def test_a_build_goes_on_without_a_cache_that_cannot_be_used(
    caller: Caller, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(caller.folder)
    for _ in range(2):
        taken, notes = caller.ask()
        assert not taken
        assert len(notes) == 1
        assert reason in notes[0] or "File exists" in notes[0]
        assert str(caller.folder) in notes[0]
        assert "--no-cache" in notes[0]
    assert caller.built == 2
    assert not (caller.folder.parent / "elsewhere" / KEY).exists()


def test_plans_are_not_taken_from_a_folder_that_became_open_to_others(
    caller: Caller,
) -> None:
    caller.ask()
    caller.folder.chmod(0o777)
    taken, notes = caller.ask()
    assert (taken, len(notes)) == (False, 1)
    assert "others may write to it" in notes[0]


def test_without_a_home_there_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "not/absolute")
    cache = PlanCache.default()
    file = tmp_path / "plan"

    def build() -> Facts:
        file.write_bytes(b"plan")
        return {}

    for _ in range(2):
        assert cache.get_or_build(KEY, build, file, lambda _: None) == Served({})
    assert "there is no home folder" in cache.notes[0]
    assert len(cache.notes) == 1
    assert cache.entries() == []
    assert cache.prune().plans == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    cache = PlanCache.default()
    assert cache.folder == tmp_path / "x" / "id3pm-deploy" / "plans"
    assert cache.limit_bytes == DEFAULT_LIMIT_BYTES == 10 << 30


def test_a_disk_that_fails_while_the_plan_is_kept_costs_a_note(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutputError("cannot write it", why="No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_entry, "copy_hashed", fail)
        taken, notes = caller.ask()
    assert (taken, len(notes)) == (False, 1)
    assert notes[0].startswith("the plan was not kept in the plan cache")
    assert "No space left on device" in notes[0]
    assert names(caller.folder) == []


def test_the_bundles_own_disk_being_full_is_no_damage(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller.ask()
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OutputError, match="cannot write"):
        PlanCache(caller.folder).get_or_build(KEY, dict, full, lambda _: None)
    assert caller.ask() == (True, [])


def age(caller: Caller) -> None:
    """Let all that is in the cache be a minute older."""
    for path in caller.folder.glob("*/entry.json"):
        moment = path.stat().st_mtime - 60
        os.utime(path, (moment, moment))


def test_the_least_recently_used_go_first(caller: Caller) -> None:
    plan = bytes(1000)
    one = 0
    for key in KEYS[:3]:
        caller.ask(key, plan)
        age(caller)
        one = one or sum(e.size for e in PlanCache(caller.folder).entries())
    assert caller.ask(KEYS[0], plan) == (True, [])  # used again
    age(caller)
    assert caller.ask(KEYS[3], plan, limit=3 * one + 100) == (False, [])
    assert names(caller.folder) == [KEYS[0], KEYS[2], KEYS[3]]
    listed = [entry.key for entry in PlanCache(caller.folder).entries()]
    assert listed == [KEYS[3], KEYS[0], KEYS[2]]


def test_a_plan_that_is_larger_than_the_limit_is_not_kept(caller: Caller) -> None:
    caller.ask(KEYS[1], b"small")
    taken, notes = caller.ask(limit=len(PLAN) - 1)
    assert not taken
    assert "larger than the cache may be" in notes[0]
    assert names(caller.folder) == [KEYS[1]]


def test_pruning(caller: Caller) -> None:
    for key in KEYS[:4]:
        caller.ask(key, bytes(1000))
        age(caller)
    flip_entry = caller.folder / KEYS[3] / "entry.json"
    flip_entry.write_bytes(b"{}")
    (caller.folder / f".{KEYS[5]}.0123456789ab.tmp").mkdir()
    (caller.folder / f"{KEYS[5]}.lock").touch()
    (caller.folder / "not mine").touch()
    cache = PlanCache(caller.folder)
    size = next(e.size for e in cache.entries() if e.key == KEYS[0])
    damaged = [e for e in cache.entries() if e.problem]
    assert [e.key for e in damaged] == [KEYS[3]]
    assert damaged[0].plan is None
    assert cache.prune(2 * size).plans == 2
    assert names(caller.folder) == [KEYS[1], KEYS[2], "not mine"]
    assert cache.prune() == cache_module.Pruned(0, 0)
    assert cache.prune(0) == cache_module.Pruned(2, 2 * size)


def test_pruning_disturbs_no_build(caller: Caller) -> None:
    """Neither one that builds nor one that keeps what it built."""
    cache = PlanCache(caller.folder)

    def build() -> Facts:
        caller.file.write_bytes(PLAN)
        cache.prune(0)
        return {}

    assert cache.get_or_build(KEY, build, caller.file, lambda _: None) == Served({})
    assert names(caller.folder) == [KEY]
    assert cache.notes == []


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = cache_folder()
    assert place is not None

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["cache", *arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "0 plans, 0.0 MB" in run("list")
    assert run("prune") == "removed 0 plans, 0.0 MB\n"
    facts = {
        "flavour": "tensorrt_rtx",
        "version": "1.7",
        "precision": "float16",
        "compute_capabilities": ["8.6", "8.9"],
        "build_seconds": 12.25,
    }
    file = tmp_path / "file"
    for key in KEYS[:2]:

        def build() -> Facts:
            file.write_bytes(bytes(2_000_000))
            return facts

        PlanCache(place / "plans").get_or_build(key, build, file, lambda _: None)
    (place / "plans" / KEYS[1] / "entry.json").write_text("{")
    said = run("list")
    assert "tensorrt_rtx 1.7, float16, for 8.6, 8.9, built in 12 s" in said
    assert f"{KEYS[1][:12]}       2.0 MB" in said
    assert "DAMAGED: " in said
    assert f"2 plans, 4.0 MB, in {place / 'plans'}" in said
    found = json.loads(run("list", "--json"))
    assert found["limit_bytes"] == 10 << 30
    plans = {plan["key"]: plan for plan in found["plans"]}
    assert plans[KEYS[0]]["plan"]["facts"] == facts
    assert plans[KEYS[1]]["plan"] is None
    assert run("prune", "--max-size", "1GB") == "removed 1 plan, 2.0 MB\n"
    assert run("prune", "--max-size", "1MB") == "removed 1 plan, 2.0 MB\n"
    result = CliRunner().invoke(main, ["cache", "prune", "--all", "--max-size", "1"])
    assert result.exit_code == 2
    (place / "plans").chmod(0o777)
    result = CliRunner().invoke(main, ["cache", "prune", "--all"])
    assert result.exit_code == 1
    assert "others may write to it" in result.stderr


# Several processes.

SCRIPT = Path(__file__).with_name("cache_process.py")


class Processes:
    """Processes that ask one cache for plans; each has a file of its own."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.log = folder / "log"
        self.running: list[subprocess.Popen[str]] = []

    def start(self, seconds: float = 0.5, key: str = KEY) -> subprocess.Popen[str]:
        """Start one; if it has to build, that takes so long."""
        file = self.folder / f"plan-{len(self.running)}"
        file.touch()
        arguments = [self.folder / "cache", key, file, self.log, seconds]
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def builders(self) -> list[int]:
        """Processes that have begun to build, in order."""
        if not self.log.exists():
            return []
        return [int(line) for line in self.log.read_text().split()]

    def wait_for_builders(self, count: int) -> None:
        end = time.monotonic() + 30
        while len(self.builders()) < count:
            assert time.monotonic() < end
            time.sleep(0.01)

    def finish(self) -> list[str]:
        """What all of them said, those that were killed left out."""
        said = []
        for process in self.running:
            out, err = process.communicate(timeout=60)
            if process.returncode >= 0:
                assert process.returncode == 0, err
                said.append(out.strip())
        return said

    def plans(self) -> set[bytes]:
        """Different plans that those have which were not killed."""
        return {
            (self.folder / f"plan-{index}").read_bytes()
            for index, process in enumerate(self.running)
            if process.returncode == 0
        }


@pytest.fixture
def processes(tmp_path: Path, root: Path) -> Iterator[Processes]:
    made = Processes(tmp_path, root)
    yield made
    for process in made.running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


WHOLE = b"half a plan, " + b"and the other half" * 1000


def test_eight_processes_that_want_one_plan_build_it_once(
    processes: Processes,
) -> None:
    for _ in range(8):
        processes.start(seconds=1)
    said = processes.finish()
    assert sorted(said) == ["built", *["taken"] * 7]
    assert len(processes.builders()) == 1
    assert processes.plans() == {WHOLE}
    assert names(processes.folder / "cache") == [KEY]


def test_different_plans_do_not_wait_for_each_other(processes: Processes) -> None:
    processes.start(seconds=30)
    processes.wait_for_builders(1)
    other = processes.start(seconds=0, key=KEYS[1])
    out, _ = other.communicate(timeout=20)
    assert out == "built\n"


def test_when_a_builder_is_killed_the_next_one_builds(processes: Processes) -> None:
    first = processes.start(seconds=60)
    processes.wait_for_builders(1)
    for _ in range(3):
        processes.start()
    time.sleep(0.5)
    assert len(processes.builders()) == 1
    first.kill()
    said = processes.finish()
    assert sorted(said) == ["built", "taken", "taken"]
    assert len(processes.builders()) == 2
    assert processes.plans() == {WHOLE}
    assert names(processes.folder / "cache") == [KEY]


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_waiter_that_is_stopped_disturbs_nobody(
    processes: Processes, name: str
) -> None:
    processes.start(seconds=3)
    processes.wait_for_builders(1)
    waiter = processes.start()
    lock = processes.folder / "cache" / f"{KEY}.lock"
    while str(lock) not in open_files(waiter.pid):
        time.sleep(0.01)
    waiter.send_signal(getattr(signal, name))
    _, said = waiter.communicate(timeout=2)
    assert waiter.returncode != 0
    assert ("KeyboardInterrupt" in said) == (name == "SIGINT")
    builder = processes.running[0]
    assert builder.communicate(timeout=30)[0] == "built\n"
    assert names(processes.folder / "cache") == [KEY]


def open_files(process: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(path))
    return found


def test_who_waits_says_so(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    other = Caller(caller.folder.parent)

    @contextlib.contextmanager
    def progress(total: int | None, label: str) -> Iterator[None]:
        said.append(label)
        held.close()  # the other process is done
        yield

    monkeypatch.setattr(cache_files, "progress", progress)
    assert other.ask(KEYS[1]) == (False, [])
    assert said == []
    held = contextlib.ExitStack()
    held.enter_context(PlanCache(caller.folder)._locked(KEY))
    assert caller.ask() == (False, [])
    assert said == ["waiting for the process that builds this plan"]
