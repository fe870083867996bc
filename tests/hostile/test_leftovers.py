"""What a killed writer left is removed by the next; what a living one holds is not."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

import pytest

from id3pm_deploy import staging
from id3pm_deploy.errors import OutputError
from id3pm_deploy.files import atomic_path, remove_leftovers, write_bytes
from id3pm_deploy.staging import staged_folder


def left_by_a_dead_one(target: Path, *, folder: bool = False) -> Path:
    """A temporary file or folder of ``target`` that nobody holds."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    if folder:
        path.mkdir()
        (path / "half").write_bytes(b"x")
    else:
        path.write_bytes(b"half")
    return path


def names(folder: Path) -> list[str]:
    """Sorted names of what is in a folder."""
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("folder", [False, True])
def test_the_next_writer_removes_them(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "a.json"
    for _ in range(3):
        left_by_a_dead_one(target, folder=folder)
    write_bytes(target, b"whole")
    assert names(tmp_path) == ["a.json"]
    assert target.read_bytes() == b"whole"


def test_a_living_writer_keeps_its_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    with atomic_path(target) as first:
        first.write_bytes(b"first")
        write_bytes(target, b"second")
        assert target.read_bytes() == b"second"
        assert first.read_bytes() == b"first"
    assert target.read_bytes() == b"first"
    assert names(tmp_path) == ["a.json"]


def test_a_living_writer_keeps_its_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_folder(target) as first:
        (first / "a").write_bytes(b"1")
        with staged_folder(target) as second:
            (second / "b").write_bytes(b"2")
        assert names(target) == ["b"]
        assert names(first) == ["a"]
    assert names(target) == ["a"]
    assert names(tmp_path) == ["out"]


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    kept = {
        ".a.json.tmp",
        ".a.json.0123456789ab.old",
        ".a.json.0123456789AB.tmp",
        ".b.json.0123456789ab.tmp",
        "a.json.0123456789ab.tmp",
    }
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_bytes(b"mine")
    link = tmp_path / ".a.json.00112233aabb.tmp"
    link.symlink_to(elsewhere)
    remove_leftovers(target)
    write_bytes(target, b"whole")
    assert set(names(tmp_path)) >= kept | {"a.json", "elsewhere"}
    assert names(elsewhere) == ["mine"]


def test_a_folder_that_cannot_be_looked_into_is_no_error(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "absent" / "a")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", ["nothing", "empty", "full", "file", "link"])
def test_a_folder_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, before: str
) -> None:
    """With and without a system that exchanges two names at once."""
    target = tmp_path / "out"
    if before in ("empty", "full"):
        target.mkdir()
    if before == "full":
        (target / "old").write_bytes(b"old")
    if before == "file":
        target.write_bytes(b"old")
    if before == "link":
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "mine").write_bytes(b"mine")
        target.symlink_to(tmp_path / "there")
    if not exchange:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    with staged_folder(target) as folder:
        (folder / "new").write_bytes(b"new")
    assert names(target) == ["new"]
    assert not target.is_symlink()
    assert set(names(tmp_path)) == {"out", *(["there"] if before == "link" else [])}
    if before == "link":
        assert names(tmp_path / "there") == ["mine"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failure_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    if not exchange:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    with pytest.raises(OutputError, match="free some space"):
        fail_inside(target)
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    if not exchange:
        monkeypatch.setattr(Path, "rename", refuse)
        with pytest.raises(OutputError), staged_folder(target):
            pass
        assert names(target) == ["old"]
        assert names(tmp_path) == ["out"]


def fail_inside(target: Path) -> None:
    """Run out of room in a staged folder."""
    with staged_folder(target) as folder:
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")


def test_what_must_not_be_replaced_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    with pytest.raises(OutputError), staged_folder(target, replace=False) as folder:
        (folder / "new").write_bytes(b"new")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_folders_of_killed_plan_builds_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from id3pm_deploy.builders.tensorrt import _remove_dead_folders, _work_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, foreign = tmp_path / "id3pm-plan-dead", tmp_path / "id3pm-else"
    for path in (dead, foreign):
        path.mkdir()
        (path / "graph.onnx").write_bytes(b"x")
    with _work_folder() as first, _work_folder() as second:
        (first / "a").touch()
        (second / "b").touch()
        _remove_dead_folders(tmp_path)
        assert not dead.exists()
        assert (first / "a").exists()
        assert (second / "b").exists()
    assert names(tmp_path) == ["id3pm-else"]
