"""Kernel timings between builds, with a builder configuration that is made up."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from id3pm_deploy.builders import timing_cache
from id3pm_deploy.builders.timing_cache import TimingCache, timing_cache_path

GPU = {"name": "NVIDIA Orin (8 GB)", "compute_capability": "8.7", "multiprocessors": 8}


class Cache:
    """``ITimingCache``: a set of words."""

    def __init__(self, words: set[bytes]) -> None:
        self.words = words

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.words |= other.words
        return True

    def serialize(self) -> bytes:
        return b" ".join([b"TIMINGS", *sorted(self.words)])


class Config:
    """``IBuilderConfig``, as far as timings go."""

    def __init__(self, takes: bool = True) -> None:
        self.cache: Cache | None = None
        self.takes = takes

    def create_timing_cache(self, data: bytes) -> Cache | None:
        if data and not data.startswith(b"TIMINGS"):
            return None
        return Cache(set(data.split()[1:]))

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if not self.takes or b"other-gpu" in cache.words:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def build(path: Path | None, *timed: bytes) -> tuple[TimingCache, set[bytes]]:
    """One build that times kernels; returns what it started with, too."""
    config: Any = Config()
    timings = TimingCache(path)
    timings.load(config)
    known = set(config.cache.words) if config.cache else set()
    if config.cache:
        config.cache.words |= set(timed)
    timings.save(config)
    return timings, known


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "timings" / "x.cache"


def test_each_library_and_gpu_has_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = timing_cache_path("tensorrt", "10.3.0", GPU)
    name = "tensorrt-10.3.0-NVIDIA_Orin__8_GB_-8.7-8.cache"
    assert found == tmp_path / "id3pm-deploy" / "timings" / name
    others = [
        timing_cache_path("tensorrt", "10.16.1", GPU),
        timing_cache_path("tensorrt", "10.3.0", {**GPU, "multiprocessors": 16}),
        timing_cache_path("tensorrt", "10.3.0", {**GPU, "name": "../../x"}),
    ]
    assert len({found, *others}) == 4
    assert {each.parent for each in others if each} == {found.parent}


def test_where_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing_cache_path("tensorrt_rtx", "1.7", GPU) is None
    assert timing_cache_path("tensorrt", "10.3.0", None) is None
    monkeypatch.setattr(timing_cache, "cache_folder", lambda: None)
    assert timing_cache_path("tensorrt", "10.3.0", GPU) is None


def test_a_build_knows_what_earlier_ones_timed(path: Path) -> None:
    first, known = build(path, b"a")
    assert (first.problem, known) == ("", set())
    assert build(path, b"b")[1] == {b"a"}
    assert build(path)[1] == {b"a", b"b"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_two_builds_at_once_keep_both_timings(path: Path) -> None:
    ours: Any = Config()
    timings = TimingCache(path)
    timings.load(ours)
    build(path, b"theirs")
    ours.cache.words.add(b"ours")
    timings.save(ours)
    assert build(path)[1] == {b"ours", b"theirs"}


@pytest.mark.parametrize("data", [b"", b"garbage", b"TIMINGS other-gpu"])
def test_a_file_the_library_does_not_take_is_replaced(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    timings, known = build(path, b"new")
    assert (timings.problem, known) == ("", set())
    assert b"new" in path.read_bytes()


def test_a_library_that_takes_none(path: Path) -> None:
    config: Any = Config(takes=False)
    timings = TimingCache(path)
    timings.load(config)
    assert "takes none" in timings.problem
    timings.save(config)
    assert not path.exists()


def test_a_library_without_timings(path: Path) -> None:
    config: Any = SimpleNamespace()
    timings = TimingCache(path)
    timings.load(config)
    timings.save(config)
    assert timings.problem == ""
    assert not path.parent.exists()


def test_without_a_place_nothing_happens() -> None:
    timings, known = build(None, b"a")
    assert (timings.problem, known) == ("", set())


def _link(path: Path) -> None:
    (path.parent.parent / "elsewhere").mkdir(parents=True)
    path.parent.symlink_to(path.parent.parent / "elsewhere")


def _link_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    (path.parent / "victim").write_bytes(b"TIMINGS victim")
    path.symlink_to(path.parent / "victim")


def _link_lock(path: Path) -> None:
    path.parent.mkdir(parents=True)
    (path.parent / "victim").write_bytes(b"TIMINGS victim")
    Path(f"{path}.lock").symlink_to(path.parent / "victim")


def _shared(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o777)


def _pipe(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def _large(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with open(path, "wb") as handle:
        handle.truncate(timing_cache.MOST_BYTES + 1)


@pytest.mark.parametrize("spoil", [_link, _link_file, _link_lock, _shared, _large])
@pytest.mark.parametrize("when", ["load", "save"])
def test_a_place_that_cannot_be_believed_is_left_alone(
    path: Path, spoil: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing_cache, "MOST_BYTES", 1000)
    config: Any = Config()
    timings = TimingCache(path)
    if when == "save":
        timings.load(config)
        path.unlink(missing_ok=True)
        Path(f"{path}.lock").unlink()
        path.parent.rmdir()
    spoil(path)
    timings.load(config) if when == "load" else timings.save(config)
    assert timings.problem
    assert str(path.parent) not in timings.problem
    timings.save(config)
    victim = path.parent / "victim"
    assert not victim.exists() or victim.read_bytes() == b"TIMINGS victim"
    assert list(path.parent.parent.glob("elsewhere/*")) == []


def test_a_pipe_is_no_file_of_timings(path: Path) -> None:
    _pipe(path)
    timings, _ = build(path)
    assert "not a plain file" in timings.problem


def test_the_lock_is_polygraphys(path: Path) -> None:
    """Its tools and our builds can be given the same file."""
    util = pytest.importorskip("polygraphy.util", reason="needs polygraphy")
    path.parent.mkdir(parents=True)
    # A lock of this kind belongs to a process, so that another one has to hold it.
    child = os.fork()
    if child == 0:
        with util.LockFile(str(path)):
            path.with_suffix(".held").touch()
            time.sleep(0.4)
            path.write_bytes(b"TIMINGS polygraphy")
        os._exit(0)
    end = time.monotonic() + 10
    while not path.with_suffix(".held").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    _, known = build(path)
    os.waitpid(child, 0)
    assert known == {b"polygraphy"}
