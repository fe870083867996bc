"""Identity files that lie, through the command line, with little memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crafted import Zip, deflated_zeros, identity_members, npy, npy_header, npy_of, npz
from sandbox import Sandbox, check_done, check_refused

VECTORS = np.arange(1, 33, dtype="<f4").tobytes()
GIGABYTE = 1 << 30


def vectors(header: str, data: bytes = VECTORS, **rest: int) -> bytes:
    """An identity file with vectors of any header."""
    return npz(vectors=npy(header, data, **rest))


def others() -> dict[str, bytes]:
    """The members beside the vectors."""
    return {k: v for k, v in identity_members().items() if k != "vectors.npy"}


def bomb(size: int, said: int | None = None) -> bytes:
    """An identity file whose vectors unpack to ``size`` zero bytes, whole MiB."""
    said = size if said is None else said
    archive = Zip().add_all(others())
    packed = deflated_zeros(size)
    archive.add("vectors.npy", b"", deflate=True, packed=packed, size=said)
    return archive.bytes()


def with_vectors(**lies: Any) -> bytes:
    """An identity file with lies about the member of the vectors."""
    data = identity_members()["vectors.npy"]
    return Zip().add_all(others()).add("vectors.npy", data, **lies).bytes()


def many(count: int) -> bytes:
    """A valid identity file and a great number of empty members."""
    archive = Zip().add_all(identity_members())
    for number in range(count):
        archive.add(f"{number}.npy", b"")
    return archive.bytes()


FLOAT = "'<f4'"
CASES: dict[str, Callable[[], bytes]] = {
    "a shape that overflows": lambda: vectors(npy_header(FLOAT, "(4294967296,) * 2")),
    "a product of 2**64": lambda: vectors(
        npy_header(FLOAT, "(4294967296, 4294967296)")
    ),
    "nothing of 10**30": lambda: vectors(npy_header(FLOAT, f"(0, {10**30})"), b""),
    "negative sizes": lambda: vectors(npy_header(FLOAT, "(-2, -16)")),
    "truth values as sizes": lambda: vectors(npy_header(FLOAT, "(True, True)")),
    "100 dimensions": lambda: vectors(npy_header(FLOAT, f"({'1, ' * 100})"), b"abcd"),
    "text of 2 GiB": lambda: vectors(npy_header("'<U536870911'", "()")),
    "a pickle": lambda: vectors(npy_header("'|O'", "(2,)"), b"cos\nsystem\n(S'true'\n"),
    "records": lambda: vectors(npy_header("[('a', '<f4'), ('b', '<f4')]", "(2, 8)")),
    "dates": lambda: vectors(npy_header("'<M8[ns]'", "(2, 8)")),
    "complex numbers": lambda: vectors(npy_header("'<c8'", "(2, 8)")),
    "a header that calls": lambda: vectors("__import__('os').system('true')"),
    "a header that multiplies": lambda: vectors("{'descr': '<f4'} * 10**9"),
    "a header of brackets": lambda: vectors("(" * 9_000),
    "a header of signs": lambda: vectors("-" * 9_000 + "1"),
    "a header of 60 kB": lambda: vectors(
        npy_header(FLOAT, "(2, 16)") + " " * 60_000, version=1
    ),
    "a header of 4 GiB": lambda: vectors("{}", version=2, length=0xFFFFFFFF),
    "a header past the end": lambda: vectors("{}", length=0xFFFF),
    "a header of another version": lambda: vectors("{}", version=9),
    "a zip bomb of 1 GiB": lambda: bomb(GIGABYTE),
    "a zip bomb that says it is small": lambda: bomb(GIGABYTE, said=2176),
    "a member that says it is large": lambda: with_vectors(size=GIGABYTE // 8),
    "encrypted": lambda: with_vectors(flags=1),
    "a wrong checksum": lambda: with_vectors(crc=1),
    "overlapping members": lambda: with_vectors(central_offset=0),
    "a member outside the file": lambda: with_vectors(central_offset=0x7FFFFFFF),
    "a member twice": lambda: (
        Zip()
        .add_all(identity_members())
        .add("ids.npy", identity_members()["ids.npy"])
        .bytes()
    ),
    "40 members": lambda: many(40),
    "two million members in the directory": lambda: (
        Zip().add_all(identity_members()).repeat_last(2_000_000).bytes()
    ),
    "half a surrogate pair as a name": lambda: npz(
        model_name=npy(npy_header("'<U1'", "()"), b"\x00\xd8\x00\x00")
    ),
    "a name past Unicode": lambda: npz(
        model_name=npy(npy_header("'<U1'", "()"), b"\xff\xff\xff\x7f")
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_identity_file_that_lies(device: Sandbox, case: str) -> None:
    path = device.work / "who.npz"
    path.write_bytes(CASES[case]())
    found = device.run("inspect", path)
    check_refused(found, "who.npz", peak=GIGABYTE, seconds=10)
    assert found.stdout == ""
    assert device.files() == ["work/who.npz"]


@pytest.mark.parametrize(
    "data",
    [
        npz(),
        vectors(npy_header(FLOAT, "(2, 16)")),
        vectors(npy_header(FLOAT, "(2, 16)", "True")),
        vectors(npy_header(FLOAT, "(2, 16)"), version=2),
        with_vectors(),
        Zip()
        .add_all(others())
        .add("vectors.npy", npy_of(np.ones((2, 16), np.float32)), deflate=True)
        .bytes(),
        many(20),
    ],
    ids=["plain", "own header", "fortran", "version 2", "own zip", "deflated", "more"],
)
def test_a_valid_file_of_the_same_making(device: Sandbox, data: bytes) -> None:
    path = device.work / "who.npz"
    path.write_bytes(data)
    found = device.run("inspect", path)
    check_done(found)
    assert "test model" in found.stdout


def test_the_largest_file_that_is_let_in(device: Sandbox) -> None:
    """It holds too many vectors, which is seen only when they have been unpacked."""
    path = device.work / "who.npz"
    size = 255 << 20
    head = npy(npy_header(FLOAT, f"({size // 64}, 16)"))
    packed = deflated_zeros(size, head)
    archive = Zip().add_all(others())
    archive.add("vectors.npy", head + bytes(size), deflate=True, packed=packed)
    path.write_bytes(archive.bytes())
    assert path.stat().st_size < 300_000
    check_refused(device.run("inspect", path), "at most 1000000", seconds=10)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_what_is_no_file(
    device: Sandbox, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = device.work / "who.npz"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as one:
            monkeypatch.chdir(device.work)  # the name of a socket must be short
            one.bind("who.npz")
    check_refused(device.run("inspect", path))
