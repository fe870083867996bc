"""Atomic writing: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from id3pm_deploy.errors import Id3pmError, OutputError
from id3pm_deploy.files import (
    atomic_path,
    make_folder,
    output_error,
    sha256_of_file,
    write_bytes,
    write_json,
    write_text,
)

OLD = "what was there before"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An existing file, alone in its folder."""
    path = tmp_path / "result.json"
    path.write_text(OLD)
    return path


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def check_untouched(target: Path) -> None:
    assert target.read_text() == OLD
    assert os.listdir(target.parent) == [target.name]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_and_replaced_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for data in (b"first", b"", bytes(range(256)) * 5000):
        write_bytes(path, data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["a.bin"]


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "λ ≥ -5.1\n")
    assert (tmp_path / "a.txt").read_bytes() == "λ ≥ -5.1\n".encode()


def test_json_is_readable_and_strict(target: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"λ": "x"}}
    write_json(target, value)
    text = target.read_text()
    assert json.loads(text) == value
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")
    assert text.count("\n") > 4


@pytest.mark.parametrize("value", [math.nan, math.inf, {"deep": [-math.inf]}, {1j}])
def test_what_is_no_json_leaves_the_old_file(target: Path, value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        write_json(target, value)
    check_untouched(target)


def test_the_old_file_stays_until_the_block_ends(target: Path) -> None:
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_text("half")
        assert target.read_text() == OLD
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize(
    "error", [ValueError("bug"), KeyboardInterrupt(), SystemExit(1), MemoryError()]
)
def test_a_block_that_raises(target: Path, error: BaseException) -> None:
    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    check_untouched(target)


def test_a_block_that_raises_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "new"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["open", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_every_system_call_may_fail(
    target: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OutputError, match="cannot write") as caught:
            write_text(target, "new")
    assert os.strerror(number) in str(caught.value)
    assert str(target) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    check_untouched(target)


def test_an_error_of_our_own_passes_unchanged(target: Path) -> None:
    error = Id3pmError("something else")
    with pytest.raises(Id3pmError) as caught, atomic_path(target):
        raise error
    assert caught.value is error
    check_untouched(target)


def test_a_writer_that_replaces_the_temporary_file(target: Path) -> None:
    """Some libraries write beside the path they are given and rename."""
    with atomic_path(target, 0o600) as temporary:
        other = temporary.with_suffix(".other")
        other.write_text("whole")
        other.chmod(0o666)
        os.replace(other, temporary)
    assert target.read_text() == "whole"
    assert mode_of(target) == 0o600


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_mode_bits(target: Path, mode: int) -> None:
    target.chmod(0o666)
    write_bytes(target, b"x", mode)
    assert mode_of(target) == mode


@pytest.mark.usefixtures("umask")
def test_a_private_file_is_private_from_the_start(target: Path) -> None:
    with atomic_path(target, 0o600) as temporary:
        assert mode_of(temporary) == 0o600
        temporary.write_text("x")


@pytest.mark.usefixtures("umask")
def test_the_umask_is_respected(target: Path) -> None:
    os.umask(0o077)
    write_bytes(target, b"x")
    assert mode_of(target) == 0o600


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(OLD)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for place, fix in (
        (tmp_path / "absent" / "a", "create the folder above it first"),
        (tmp_path / "file" / "a", "a part of the path is a file"),
        (tmp_path / "folder", "choose another place"),
    ):
        with pytest.raises(OutputError, match="cannot write") as caught:
            write_bytes(place, b"x")
        assert fix in caught.value.fix
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "folder" / "inside").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(target: Path) -> None:
    target.parent.chmod(0o500)
    try:
        for path in (target, target.parent / "new"):
            with pytest.raises(OutputError, match="cannot write") as caught:
                write_bytes(path, b"x")
            assert "permissions" in caught.value.fix
        with pytest.raises(OutputError):
            make_folder(target.parent / "below")
        check_untouched(target)
    finally:
        target.parent.chmod(0o700)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "elsewhere").read_text() == OLD
    assert not (tmp_path / "link").is_symlink()


def test_folders(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    assert make_folder(deep) == deep
    assert make_folder(deep) == deep
    assert deep.is_dir()
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot write"):
            make_folder(place)


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "choose another place"),
        (None, "choose another place"),
    ],
)
def test_every_error_says_what_to_do(number: int | None, fix: str) -> None:
    error = OSError("odd") if number is None else OSError(number, os.strerror(number))
    found = output_error(Path("some/place"), error)
    assert "some/place" in found.what
    assert found.why == (os.strerror(number) if number else "odd")
    assert fix in found.fix


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hashes(tmp_path: Path, size: int) -> None:
    data = b"q" * size
    (tmp_path / "a").write_bytes(data)
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
