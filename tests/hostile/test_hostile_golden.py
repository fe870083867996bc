"""Golden data that lies, in bundles whose hashes are right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from crafted import Zip, deflated_zeros, npy, npy_header, npy_of
from crafted_onnx import golden_arrays, golden_npz, step_model, write_bundle
from sandbox import Sandbox, check_done, check_refused

GIGABYTE = 1 << 30

GOLDEN: dict[str, Callable[[], bytes]] = {
    "a million samples": lambda: golden_npz(mix=np.zeros((2, 1_000_000, 1))),
    "no rows": lambda: golden_npz(row=np.zeros(0, np.int32)),
    "rows of nobody": lambda: golden_npz(row=np.array([7, -1], np.int32)),
    "rows in float32": lambda: golden_npz(row=np.zeros(2, np.float32)),
    "objects": lambda: golden_npz(step=np.array([{}], dtype=object)),
    "not a number": lambda: golden_npz(
        expected__state_next=np.full((4, 2, 3, 16, 16), np.nan, np.float32)
    ),
    "other numbers": lambda: golden_npz(
        expected__state_next=np.ones((4, 2, 3, 16, 16), np.float32)
    ),
    "pictures of another size": lambda: golden_npz(
        state=np.zeros((4, 2, 3, 8, 8), np.float32),
        noise=np.zeros((2, 3, 8, 8), np.float32),
        expected__state_next=np.zeros((4, 2, 3, 8, 8), np.float32),
        expected__x0=np.zeros((2, 3, 8, 8), np.float32),
    ),
    "cut": lambda: golden_npz()[:2000],
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_data_that_lies(device: Sandbox, case: str) -> None:
    bundle = write_bundle(device.work / "b", step_model(), GOLDEN[case]())
    before = device.files()
    found = device.run("inspect", bundle, "--self-test")
    check_refused(found, peak=GIGABYTE // 4, seconds=5)
    assert found.stdout == ""
    assert device.files() == before


def test_golden_data_that_unpacks_to_a_gigabyte(device: Sandbox) -> None:
    size = 1000 << 20
    head = npy(npy_header("'<f4'", f"({size // 4},)"))
    archive = Zip()
    for name, array in golden_arrays().items():
        if name != "noise":
            archive.add(f"{name}.npy", npy_of(array))
    packed = deflated_zeros(size, head)
    archive.add("noise.npy", b"", deflate=True, packed=packed, size=size + len(head))
    data = archive.bytes()
    assert len(data) < 2_000_000
    bundle = write_bundle(device.work / "b", step_model(), data)
    found = device.run("inspect", bundle, "--self-test")
    check_refused(found, "golden data", peak=GIGABYTE // 4, seconds=5)


def test_valid_golden_data_of_the_same_making(device: Sandbox) -> None:
    archive = Zip()
    for name, array in golden_arrays().items():
        archive.add(f"{name}.npy", npy_of(array))
    bundle = write_bundle(device.work / "b", step_model(), archive.bytes())
    check_done(device.run("inspect", bundle, "--self-test"))
