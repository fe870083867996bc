"""The identity file: round trip, mode, contents, hostile files, matching."""

from __future__ import annotations

import io
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.errors import IdentityError, InputError, OutputError
from id3pm_deploy.identity import vectors as module
from id3pm_deploy.identity.vectors import (
    IdentityFile,
    check_identities,
    identity_file,
    load_identities,
    normalise_identities,
    save_identities,
)

SHA = "ab" * 32


def random_vectors(n: int = 3, dim: int = 8) -> Any:
    return np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32) * 5


def members() -> dict[str, Any]:
    return {
        "format_version": np.int64(1),
        "vectors": random_vectors(),
        "ids": np.array(["a1", "b2", "c3"]),
        "model_name": np.array("sface"),
        "model_sha256": np.array(SHA),
    }


def test_five_arrays_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "who.npz"
    with pytest.MonkeyPatch.context() as patch:
        # NumPy before 2.1 stores any unknown keyword as one more array.
        given: list[str] = []
        patch.setattr(np, "savez", lambda _, **arrays: given.extend(arrays))
        save_identities(path, identity_file(random_vectors(), "sface", SHA))
    assert sorted(given) == sorted(members())


def save(path: Path, **changes: Any) -> Path:
    values = {**members(), **changes}
    np.savez(path, **{k: v for k, v in values.items() if v is not None})
    return path


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    file = identity_file(random_vectors(), "sface", SHA)
    path = tmp_path / "who.npz"
    save_identities(path, file)
    back = load_identities(path)
    assert back.vectors.dtype == np.float32
    assert back.vectors.tobytes() == file.vectors.tobytes()
    assert (back.ids, back.model_name, back.model_sha256) == (file.ids, "sface", SHA)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["who.npz"]


def test_a_model_without_hash_stays_without(tmp_path: Path) -> None:
    path = tmp_path / "who.npz"
    save_identities(path, identity_file(random_vectors(), "pkg.mod:fr", None))
    assert load_identities(path).model_sha256 is None


def test_an_existing_file_becomes_private(tmp_path: Path) -> None:
    path = tmp_path / "who.npz"
    path.write_bytes(b"old")
    path.chmod(0o644)
    save_identities(path, identity_file(random_vectors(), "sface", SHA))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_ids_are_random(tmp_path: Path) -> None:
    one = identity_file(random_vectors(), "sface", SHA)
    two = identity_file(random_vectors(), "sface", SHA)
    assert len({*one.ids, *two.ids}) == 6
    assert all(len(name) == 16 for name in one.ids)


def test_only_the_five_members_are_in_it_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "who.npz"
    save_identities(path, identity_file(random_vectors(), "sface", SHA))
    with zipfile.ZipFile(path) as archive:
        assert {m.filename for m in archive.infolist()} == {
            f"{name}.npy" for name in members()
        }
        assert {m.date_time for m in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vectors": None}, "no vectors"),
        ({"ids": None}, "no ids"),
        ({"model_name": None, "model_sha256": None}, "no model_name, model_sha256"),
        ({"format_version": np.int64(2)}, "format"),
        ({"format_version": np.float64(1)}, "format"),
        ({"vectors": random_vectors().astype(np.float64)}, "float64"),
        ({"vectors": random_vectors()[0]}, r"shape \[8\]"),
        ({"vectors": np.zeros((0, 8), np.float32), "ids": np.zeros(0, "U2")}, "shape"),
        ({"vectors": random_vectors() * np.float32(np.nan)}, "NaN"),
        ({"vectors": random_vectors() * np.float32(np.inf)}, "infinity"),
        ({"vectors": random_vectors() * np.float32(0)}, "zero"),
        ({"ids": np.array(["a1", "b2"])}, "ids"),
        ({"ids": np.array(["a1", "a1", "b2"])}, "different ids"),
        ({"ids": np.array(["a1", "b2", "me.jpg"])}, "hexadecimal"),
        ({"ids": np.array([1, 2, 3])}, "text"),
        ({"model_name": np.array("")}, "printable"),
        ({"model_name": np.array("a\x1b[2Jb")}, "printable"),
        ({"model_name": np.array("x" * 5000)}, "printable"),
        ({"model_sha256": np.array("123")}, "SHA-256"),
        ({"vectors": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
    ],
)
def test_bad_contents_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    path = save(tmp_path / "bad.npz", **changes)
    with pytest.raises(IdentityError, match=says):
        load_identities(path)


def test_good_contents_of_the_same_making_are_accepted(tmp_path: Path) -> None:
    fortran = np.asfortranarray(random_vectors())
    swapped = random_vectors().astype(">f4")
    for vectors in (fortran, swapped):
        path = save(tmp_path / "good.npz", vectors=vectors)
        assert np.array_equal(load_identities(path).vectors, random_vectors())


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="does not exist"):
        load_identities(tmp_path / "none.npz")
    with pytest.raises(IdentityError, match="regular file"):
        load_identities(tmp_path)
    text = tmp_path / "text.npz"
    text.write_text("not a zip")
    with pytest.raises(IdentityError, match=r"not a readable \.npz"):
        load_identities(text)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = save(tmp_path / "good.npz").read_bytes()
    path = tmp_path / "cut.npz"
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(IdentityError):
            load_identities(path)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    data = save(tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bent.npz"
    refused = 0
    for place in range(0, len(data), 13):
        bent = bytearray(data)
        bent[place] ^= 0x41
        path.write_bytes(bytes(bent))
        try:
            load_identities(path)
        except IdentityError:
            refused += 1
    assert refused > len(data) // 13 // 2


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def with_vectors_member(path: Path, data: bytes, packing: int) -> Path:
    save(path, vectors=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("vectors.npy", data, packing)
    return path


def test_a_header_that_asks_for_terabytes_takes_no_memory(tmp_path: Path) -> None:
    data = npy((10**6, 10**6), b"1234")
    path = with_vectors_member(tmp_path / "huge.npz", data, zipfile.ZIP_STORED)
    with pytest.raises(IdentityError, match="not what its header says"):
        load_identities(path)


def test_what_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 100_000)
    data = npy((1000, 1000), bytes(4_000_000))
    path = with_vectors_member(tmp_path / "bomb.npz", data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(IdentityError, match="unpacks to more"):
        load_identities(path)


def test_packing_that_unpacks_all_at_once_is_refused(tmp_path: Path) -> None:
    data = npy((3, 8), random_vectors().tobytes())
    path = with_vectors_member(tmp_path / "xz.npz", data, zipfile.ZIP_LZMA)
    with pytest.raises(IdentityError, match="packed"):
        load_identities(path)


def test_too_many_vectors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_VECTORS", 2)
    with pytest.raises(IdentityError, match="at most 2"):
        load_identities(save(tmp_path / "many.npz"))


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.full((1, 4), np.nan)])
def test_bad_vectors_are_not_written(tmp_path: Path, bad: Any) -> None:
    file = IdentityFile(bad.astype(np.float32), ("a1",), "sface", SHA)
    with pytest.raises(IdentityError):
        save_identities(tmp_path / "no.npz", file)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    file = identity_file(random_vectors(), "sface", SHA)
    with pytest.raises(OutputError):
        save_identities(tmp_path / "none" / "who.npz", file)


@pytest.mark.parametrize(("how", "norm"), [("unit", 1.0), ("unit_sqrt_dim", 8**0.5)])
def test_normalised_length(how: str, norm: float) -> None:
    raw = random_vectors()
    made = normalise_identities(raw, how)
    assert made.dtype == np.float32
    exact = raw.astype(np.float64)
    wanted = exact / np.linalg.norm(exact, axis=1, keepdims=True) * norm
    assert np.array_equal(made, wanted.astype(np.float32))


def test_normalising_survives_extreme_lengths() -> None:
    raw = np.array([[3e30, 4e30], [3e-30, 4e-30]], dtype=np.float32)
    assert np.allclose(normalise_identities(raw, "unit"), [[0.6, 0.8]] * 2)


def test_raw_is_unchanged() -> None:
    assert np.array_equal(
        normalise_identities(random_vectors(), "raw"), random_vectors()
    )


def test_normalising_refuses() -> None:
    with pytest.raises(InputError, match="unit_sqrt_dim"):
        normalise_identities(random_vectors(), "whitened")
    with pytest.raises(IdentityError, match="zero"):
        normalise_identities(np.zeros((1, 4)), "unit")
    with pytest.raises(IdentityError, match="shape"):
        normalise_identities(np.ones(4), "unit")


def test_the_same_fr_model_is_accepted() -> None:
    file = identity_file(random_vectors(), "sface", SHA)
    check_identities(file, dim=8, model_name="sface", model_sha256=SHA)
    check_identities(file, dim=8, model_name="sface", model_sha256=None)
    check_identities(file, dim=8, model_name="renamed", model_sha256=SHA)
    hashless = identity_file(random_vectors(), "pkg:fr", None)
    check_identities(hashless, dim=8, model_name="pkg:fr", model_sha256=None)


@pytest.mark.parametrize(
    ("dim", "name", "sha", "says"),
    [
        (9, "sface", SHA, "8 elements"),
        (9, "renamed", SHA, "8 elements"),
        (8, "arcface", "cd" * 32, "arcface"),
        (8, "arcface", None, "arcface"),
        (8, "sface", "cd" * 32, "differ"),
    ],
)
def test_another_fr_model_is_refused(
    dim: int, name: str, sha: str | None, says: str
) -> None:
    file = identity_file(random_vectors(), "sface", SHA)
    with pytest.raises(IdentityError, match=says):
        check_identities(file, dim=dim, model_name=name, model_sha256=sha)


def test_vectors_without_hash_are_refused_where_the_checkpoint_has_one() -> None:
    file = identity_file(random_vectors(), "sface", None)
    with pytest.raises(IdentityError, match="callable"):
        check_identities(file, dim=8, model_name="sface", model_sha256=SHA)
