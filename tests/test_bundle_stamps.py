"""The verified stamp: a large file is hashed once, and again when it may be another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import edit_manifest, new_writer, with_plan

from id3pm_deploy.bundle import Bundle, open_bundle
from id3pm_deploy.bundle import reader as reader_module
from id3pm_deploy.bundle import stamps as stamps_module
from id3pm_deploy.bundle.stamps import sight
from id3pm_deploy.errors import BundleError

LARGE = bytes(stamps_module.LEAST_BYTES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; files need not settle, unless a test wants them to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stamps_module, "SETTLED_NS", -(10**18))
    return tmp_path / "cache" / "id3pm-deploy" / "stamps"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every hash that reading a bundle begins."""
    begun: list[int] = []

    def sha256(*data: Any) -> Any:
        begun.append(1)
        return hashlib.sha256(*data)

    monkeypatch.setattr(reader_module, "hashlib", SimpleNamespace(sha256=sha256))
    return begun


@pytest.fixture
def large(tmp_path: Path) -> Bundle:
    return new_writer(tmp_path / "b", LARGE).commit()


def graph_of(bundle: Bundle) -> str:
    return bundle.manifest.graphs[0].file


def test_an_unchanged_large_file_is_hashed_once(
    large: Bundle, hashed: list[int], cache: Path
) -> None:
    name = graph_of(large)
    for _ in range(3):
        assert large.read(name) == LARGE
        assert large.path_of(name).read_bytes() == LARGE
        assert open_bundle(large.folder).read(name) == LARGE
    assert len(hashed) == 1
    (stamp,) = cache.iterdir()
    assert stamp.stat().st_size == 0
    assert stamp.stat().st_mode & 0o777 == 0o600
    for folder in (cache, cache.parent, cache.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_path_of_stamps_too(large: Bundle, hashed: list[int]) -> None:
    for _ in range(2):
        large.path_of(graph_of(large))
        large.read(graph_of(large))
    assert len(hashed) == 1


def test_small_files_are_hashed_every_time(large: Bundle, hashed: list[int]) -> None:
    for _ in range(2):
        large.read(large.manifest.graphs[0].golden)
    assert len(hashed) == 2


def test_verify_hashes_in_full_and_leaves_no_stamp(
    large: Bundle, hashed: list[int], cache: Path
) -> None:
    large.verify()
    assert not cache.exists()
    large.read(graph_of(large))
    before = len(hashed)
    large.verify()
    assert len(hashed) == before + len(large.manifest.files)


def test_plans_are_never_stamped(
    tmp_path: Path, hashed: list[int], cache: Path
) -> None:
    entry = with_plan(tmp_path / "b", LARGE)
    bundle = open_bundle(tmp_path / "b")
    for _ in range(2):
        bundle.read(entry.file)
        bundle.path_of(entry.file)
    assert len(hashed) == 4
    assert not cache.exists()


def _same_size(path: Path) -> None:
    with open(path, "r+b") as handle:
        handle.seek(1000)
        handle.write(b"\1")


def _another_inode(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)


def _renamed_over(path: Path) -> None:
    other = path.with_name("other")
    shutil.copyfile(path, other)
    _same_size(other)
    os.replace(other, path)


@pytest.mark.parametrize("change", [_same_size, _another_inode, _renamed_over])
def test_a_change_with_the_old_size_and_time_is_seen(
    large: Bundle, hashed: list[int], change: Callable[[Path], None]
) -> None:
    name = graph_of(large)
    path = large.folder / name
    large.read(name)
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert path.stat().st_size == status.st_size
    for check in (large.read, large.path_of):
        with pytest.raises(BundleError, match="not the file that the manifest"):
            check(name)
    assert len(hashed) == 3


def test_a_stamp_is_of_one_hash(large: Bundle, hashed: list[int]) -> None:
    """A manifest that claims another hash for the same file gains nothing."""
    name = graph_of(large)
    large.read(name)
    edit_manifest(
        large.folder, lambda values: values["files"][name].update(sha256="0" * 64)
    )
    with pytest.raises(BundleError, match="not the file that the manifest"):
        open_bundle(large.folder).read(name)


def test_a_file_that_changes_after_it_was_opened_is_hashed(
    large: Bundle, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stamp holds for what was opened; the bytes are read after that."""
    name = graph_of(large)
    large.read(name)
    calls = iter(range(10))

    def change_after_first(descriptor: int) -> Any:
        seen = sight(descriptor)
        if next(calls) == 0:
            _same_size(large.folder / name)
        return seen

    monkeypatch.setattr(reader_module, "sight", change_after_first)
    with pytest.raises(BundleError, match="not the file that the manifest"):
        large.read(name)


def test_a_file_that_has_just_been_written_gets_no_stamp(
    large: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another write in the same tick of the clock would not show in its ctime."""
    monkeypatch.setattr(stamps_module, "SETTLED_NS", 3_600_000_000_000)
    large.read(graph_of(large))
    assert not cache.exists()


def test_a_cache_that_others_may_write_to_is_not_believed(
    large: Bundle, hashed: list[int], cache: Path
) -> None:
    name = graph_of(large)
    large.read(name)
    (stamp,) = cache.iterdir()
    for path in (cache, stamp):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        large.read(name)
        path.chmod(mode)
    assert len(hashed) == 3
    large.read(name)
    assert len(hashed) == 3


@pytest.mark.parametrize("home", ["a file", "relative", "nowhere"])
def test_a_cache_that_cannot_be_used_is_no_error(
    large: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    (tmp_path / "file").touch()
    places = {"a file": str(tmp_path / "file"), "nowhere": "/proc/nothing"}
    monkeypatch.setenv("XDG_CACHE_HOME", places.get(home, "relative/path"))
    monkeypatch.setenv("HOME", "relative/home")
    for _ in range(2):
        assert large.read(graph_of(large)) == LARGE
    assert not Path("relative").exists()


def test_the_cache_does_not_grow_without_end(
    large: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps_module, "MOST_STAMPS", 8)
    path = large.folder / graph_of(large)
    for second in range(20):
        os.utime(path, (second, second))
        large.read(path.name)
        assert len(os.listdir(cache)) <= 8
