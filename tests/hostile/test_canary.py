"""No identity vector and no name of a photo is written anywhere but where it should be.

Every command that touches an identity runs in a sandbox, with logs at their most
verbose and with errors on the way; then every file and everything printed is searched.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import stat
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from canary import DIM, FOLDER, MODEL, PHOTO, traces, vector
from crafted import config, png, png_chunk
from crafted_onnx import step_model, write_bundle
from faces import photo
from onnx import helper
from sandbox import Finished, Sandbox, check_done

from id3pm_deploy.spec import IdentitySpec

IDENTITY = IdentitySpec(DIM, MODEL, None)


def npz() -> bytes:
    """The vector as NumPy packs it."""
    stream = io.BytesIO()
    np.savez_compressed(stream, vectors=vector()[None])
    return stream.getvalue()


def zipped() -> bytes:
    """A zip with the vector as text in it, packed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", json.dumps(vector().astype(float).tolist()))
    return stream.getvalue()


def packed_text(data: bytes) -> bytes:
    """A PNG with packed text in it."""
    return png(4, 4, extra=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(data)))


UNIT = vector().astype(np.float64) / np.linalg.norm(vector().astype(np.float64))
PLANTED: dict[str, bytes] = {
    "float32": b"x" + vector().tobytes(),
    "two elements": vector()[2:4].tobytes(),
    "float64": vector().astype(">f8")[3:4].tobytes(),
    "float16": (UNIT * 4).astype(np.float16).tobytes(),
    "unit float32": UNIT.astype(np.float32).tobytes(),
    "JSON": json.dumps(vector().astype(float).tolist()).encode(),
    "one element": f"min {vector()[5]}".encode(),
    "six digits": f"{UNIT[2]:.6f} {UNIT[9]:.6f}".encode(),
    "exponents": f"{vector()[7]:.6e} {vector()[8]:.6e}".encode(),
    "four digits": np.array2string(vector(), precision=4).encode(),
    "repr": repr(vector()).encode(),
    "base64": b"k " + base64.b64encode(b"12" + vector().tobytes()),
    "URL": base64.urlsafe_b64encode(vector().tobytes()),
    "hexadecimal": vector().tobytes().hex().encode(),
    "npz": npz(),
    "zip": zipped(),
    "gzip": gzip.compress(vector().tobytes()),
    "PNG": packed_text(str(vector().tolist()).encode()),
    "page": (
        b'<img src="data:image/png;base64,'
        + base64.b64encode(packed_text(PHOTO.encode()))
        + b'">'
    ),
    "photo": f"photos/{PHOTO}.jpg".encode(),
    "folder": FOLDER.encode("utf-16-le"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_search_finds_what_was_planted(case: str) -> None:
    assert traces(PLANTED[case])


def test_the_search_finds_nothing_in_other_numbers() -> None:
    other = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    assert traces(other.tobytes()) == []
    assert traces(json.dumps(other[:500].astype(float).tolist()).encode()) == []


def with_canary(sandbox: Sandbox) -> Sandbox:
    """A sandbox with the photo, verbose logs, and a bundle that fits the FR model."""
    folder = sandbox.work / FOLDER
    folder.mkdir()
    shutil.copy(photo(), folder / f"{PHOTO}.jpg")
    sandbox.before = ("makers:verbose_logs",)
    return sandbox


def search(sandbox: Sandbox, *allowed: str) -> None:
    """Fail if a file of the sandbox holds the canary, but for the ``allowed`` ones."""
    found = {}
    for name in sandbox.files():
        path = sandbox.root / name
        if path.is_file() and PHOTO not in path.name:
            found[name] = traces(path.read_bytes())
    for name in allowed:
        assert any("f4" in one for one in found.pop(f"work/{name}")), name
    assert {name: what for name, what in found.items() if what} == {}


def check_silent(found: Finished, *, photo_named: bool = False) -> None:
    """Fail if what was printed holds the canary; a photo's name only where allowed."""
    for text in (found.stdout, found.stderr):
        shown = traces(text.encode())
        if photo_named:
            shown = [one for one in shown if one.split()[0] not in ("photo", "folder")]
        assert shown == [], text


def embed(sandbox: Sandbox) -> None:
    """Make ``who.npz``, which holds the vector and is the control of the search."""
    picture = f"{FOLDER}/{PHOTO}.jpg"
    arguments = ("embed", picture, "--model", MODEL, "--out", "who.npz")
    found = sandbox.run(*arguments)
    check_done(found)
    check_silent(found)
    path = sandbox.work / "who.npz"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert any(one.startswith("raw <f4") for one in traces(path.read_bytes()))
    assert not any("photo" in one for one in traces(path.read_bytes()))


def test_on_a_device(device: Sandbox) -> None:
    box = with_canary(device)
    embed(box)
    write_bundle(box.work / "b", step_model(), identity=IDENTITY)
    sample = ("sample", "b", "--identity", "who.npz", "--steps", "2", "--count", "2")
    parity = ("parity", "b", "--against", "b", "--identity", "who.npz", "--steps", "2")
    for command in (
        (*sample, "--out", "out"),
        (*sample, "--out", "out", "--force", "--json", "--seed", "1"),
        ("inspect", "who.npz"),
        ("inspect", "who.npz", "--json"),
        ("inspect", "out/sample-00001.png"),
        ("inspect", "b", "--self-test", "--json"),
        (*parity, "--out", "report"),
        (*parity, "--out", "report", "--json"),
        ("build-engine", "b"),
        ("bundle", "pack", "b", "b.tar"),
        ("bundle", "verify", "b.tar"),
    ):
        found = box.run(*command)
        check_done(found)
        check_silent(found)
    search(box, "who.npz")
    # No runtime keeps a device id or a queue of reports to its maker.
    home = [name for name in box.files() if name.startswith("home/")]
    assert [name for name in home if "id3pm-deploy" not in name and "/." in name] == []


def test_when_things_go_wrong_on_a_device(device: Sandbox) -> None:
    """Errors of ours, of the runtime, of the disk, and a bug with its traceback."""
    box = with_canary(device)
    embed(box)
    write_bundle(box.work / "b", step_model(), identity=IDENTITY)
    write_bundle(box.work / "other", step_model())
    nan = step_model(
        helper.make_node("Div", ["none", "none"], ["more"]),
        helper.make_node("ReduceMax", ["more"], ["nan"], keepdims=0),
        helper.make_node("Mul", ["state", "nan"], ["bad"]),
        state_next="bad",
    )
    write_bundle(box.work / "nan", nan, identity=IDENTITY)
    bogus = step_model(helper.make_node("Bogus", ["first"], ["more"]), x0="more")
    write_bundle(box.work / "bogus", bogus, identity=IDENTITY)
    short = step_model(inputs={"identity": (1, ("R", DIM + 1))})
    write_bundle(box.work / "short", short, identity=IDENTITY)
    (box.work / "cut.npz").write_bytes((box.work / "who.npz").read_bytes()[:-30])
    (box.work / FOLDER / f"{PHOTO}.txt").write_text("no picture")
    one = ("--steps", "2", "--count", "1", "--out")
    for model in ("other", "nan", "bogus", "short"):
        found = box.run("sample", model, "--identity", "who.npz", *one, f"out-{model}")
        assert found.status == 1, found.stdout
        check_silent(found)
    for command in (
        ("sample", "b", "--identity", "cut.npz", *one, "out"),
        ("sample", "b", "--identity", "who.npz", *one, "/proc/nowhere"),
        ("parity", "b", "--against", "nan", "--identity", "who.npz", *one, "report"),
        ("inspect", "cut.npz"),
    ):
        found = box.run(*command)
        assert found.status in (1, 2), found.stdout
        check_silent(found)
    for name in (f"{PHOTO}.txt", f"{PHOTO}-absent.jpg"):
        found = box.run("embed", f"{FOLDER}/{name}", "--model", MODEL, "--out", "x.npz")
        assert found.status in (1, 2)
        assert PHOTO in found.stderr, "the message names what the user named"
        check_silent(found, photo_named=True)
    box.before = ("makers:verbose_logs", "makers:broken_engine")
    found = box.run("sample", "b", "--identity", "who.npz", *one, "out")
    assert "Traceback" in found.stderr
    check_silent(found)
    (box.work / "cut.npz").unlink()
    search(box, "who.npz")


def test_with_pytorch(build: Sandbox, tiny_weights: Path) -> None:
    """A CHECKPOINT that is sampled, compared and trained on."""
    box = with_canary(build)
    box.limits["memory"] = None
    embed(box)
    shutil.copytree(tiny_weights.parent, box.work / "model")
    identity = {"dim": DIM, "model_name": MODEL, "model_sha256": None}
    (box.work / "model" / "config.json").write_text(
        json.dumps(config(identity=identity))
    )
    common = ("--identity", "who.npz", "--steps", "2", "--count", "1", "--out")
    train = (
        *("train", FOLDER, "--out", "run", "--model", MODEL, "--image-size", "8"),
        *("--base-channels", "32", "--channel-multipliers", "1", "--batch-size", "2"),
        *("--residual-blocks", "1", "--save-every", "1", "--sheet-every", "1"),
    )
    for command in (
        ("sample", "model", *common, "out"),
        ("parity", "model", *common, "report"),
        (*train, "--steps", "2"),
        (*train, "--steps", "3", "--resume"),
    ):
        found = box.run(*command)
        check_done(found)
        check_silent(found)
    (cache,) = (box.work / "run.training" / "faces").iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    for folder in (cache.parent, cache.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    search(box, "who.npz", f"run.training/faces/{cache.name}")
