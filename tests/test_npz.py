"""Reading arrays that nobody vouches for."""

from __future__ import annotations

import io
import os
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.npz import NpzError, array_from_npy, open_npz

MOST = 1 << 20


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def refused(data: bytes, message: str, name: str = "a") -> None:
    with open_npz(data, MOST) as reader, pytest.raises(NpzError, match=message):
        reader.read(name)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(4, dtype=">i4"),
        np.array(7, np.int64),
        np.array("text"),
        np.zeros((0, 3), np.uint8),
    ],
)
def test_good_arrays_come_back(array: Any) -> None:
    with open_npz(npz(a=array), MOST) as reader:
        assert reader.names == ("a",)
        assert reader.header("a").shape == array.shape
        found = reader.read("a")
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, array)


def test_from_a_path_and_only_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(zipped({"b/x.npy": npy((1,), b"\0\0\0\0"), "readme": b"hello"}))
    with open_npz(path, MOST) as reader:
        assert reader.names == ("b/x",)
        assert reader.read("b/x").tolist() == [0.0]


def test_nothing_is_unpickled() -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os._exit, (3,)

    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Evil()], dtype=object))
    refused(buffer.getvalue(), "unexpected type object")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy((10**6, 10**6), b"1234"), "not what its header says"),
        (npy((3,), b"\0" * 8), "not what its header says"),
        (npy((3,), b"\0" * 16), "not what its header says"),
        (npy((1,), b"\0" * 16, "<c16"), "unexpected type complex128"),
        (npy((1,), b"", "|V0"), "unexpected type"),
        (npy((1,), b"\0", "|b1"), "unexpected type bool"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x07\x00", "version"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "cannot be read"),
    ],
)
def test_headers_that_lie_are_refused(data: bytes, message: str) -> None:
    refused(zipped({"a.npy": data}), message)


def test_a_huge_header_takes_no_memory() -> None:
    """80 bytes that ask for a terabyte are refused before anything is allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(zipped({"a.npy": npy((1 << 38,), b"1234")}), "not what its header says")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 64 << 10  # KiB


def test_sizes_counts_and_packing_are_checked_first() -> None:
    bomb = zipped({"a.npy": npy((MOST,), b"\0" * 4 * MOST)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < MOST
    many = zipped({f"{i}.npy": b"" for i in range(40)})
    strange = zipped({"a.npy": npy((1,), b"1234")}, zipfile.ZIP_LZMA)
    for data, message in (
        (bomb, "unpacks to more"),
        (many, "too many or doubled"),
        (strange, "packed"),
        (b"PK no archive", "not a readable"),
        (b"", "not a readable"),
    ):
        with pytest.raises(NpzError, match=message), open_npz(data, MOST):
            pass


def test_a_doubled_member_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", npy((1,), b"1234"))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy((1,), b"5678"))
    with pytest.raises(NpzError, match="doubled"), open_npz(buffer.getvalue(), MOST):
        pass


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NpzError, match="regular file"), open_npz(tmp_path, MOST):
        pass
    with pytest.raises(FileNotFoundError), open_npz(tmp_path / "no.npz", MOST):
        pass
    large = tmp_path / "large.npz"
    large.write_bytes(bytes(MOST + 1))
    with pytest.raises(NpzError, match="more than"), open_npz(large, MOST):
        pass


def test_a_missing_array_is_named() -> None:
    refused(npz(a=np.zeros(1)), "it has no b", "b")


def test_an_encrypted_or_damaged_member_is_refused() -> None:
    good = npz(a=np.arange(100.0))
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\x01\x02") + 8] |= 1
    refused(bytes(encrypted), "cannot be read")
    damaged = bytearray(good)
    damaged[400] ^= 0xFF  # data: the checksum notices
    refused(bytes(damaged), "cannot be read")


def test_one_array_alone() -> None:
    assert array_from_npy(npy((2,), b"\0" * 8)).tolist() == [0.0, 0.0]
    with pytest.raises(NpzError):
        array_from_npy(npy((2,), b"\0" * 7))
