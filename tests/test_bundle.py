"""The bundle: what is written is what is read, and anything else is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from models import contents, tiny_spec

from id3pm_deploy import bundle as bundle_module
from id3pm_deploy.bundle import MANIFEST_NAME, BundleWriter, bundle_writer, open_bundle
from id3pm_deploy.errors import BundleError, EngineError, OutputError
from id3pm_deploy.models import open_engine, open_model

SHA = "0" * 64


def _edit(folder: Path, change: Any) -> None:
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_built_bundle_verifies_and_names_files_by_content(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    bundle.verify()
    names = set(bundle.manifest.files)
    on_disk = {p.name for p in tiny_bundle.iterdir() if not p.name.startswith(".")}
    assert on_disk == names | {MANIFEST_NAME}
    for name in names:
        assert bundle.manifest.file_entry(name).sha256[:12] in name
    graph = bundle.graph("step", "float32")
    assert graph is not None
    assert graph.opset == 20
    assert 0 < graph.max_relative_error <= graph.tolerance_step == 1e-5
    engine = bundle.engine("cpu")
    assert engine.file == graph.file
    assert engine.self_test_error is not None
    assert engine.self_test_error <= graph.tolerance_step


def test_no_path_of_this_machine_is_inside(tiny_bundle: Path) -> None:
    package = str(Path(bundle_module.__file__).parent).encode()
    home = str(Path.home()).encode()
    for name, data in contents(tiny_bundle).items():
        for path in (package, b"site-packages", home + b"/"):
            assert path not in data, name


@pytest.mark.parametrize("where", [0, 1000, -1])
def test_a_flipped_bit_is_refused_before_parsing(bundle_copy: Path, where: int) -> None:
    path = next(bundle_copy.glob("*.onnx"))
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="not the file that the manifest describes"):
        open_engine(open_model(bundle_copy))
    with pytest.raises(BundleError, match=path.name):
        open_bundle(bundle_copy).verify()


def test_truncated_missing_and_linked_files_are_refused(bundle_copy: Path) -> None:
    path = next(bundle_copy.glob("*.onnx"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="SHA-256"):
        open_bundle(bundle_copy).verify()
    path.unlink()
    with pytest.raises(BundleError, match="missing"):
        open_bundle(bundle_copy).verify()
    elsewhere = bundle_copy.parent / "elsewhere.onnx"
    elsewhere.write_bytes(whole)
    path.symlink_to(elsewhere)
    with pytest.raises(BundleError, match="plain file"):
        open_bundle(bundle_copy).verify()
    path.unlink()
    path.write_bytes(whole)
    open_bundle(bundle_copy).verify()


@pytest.mark.parametrize(
    "name", ["../x.onnx", "/etc/passwd", "a/b", "", ".hidden", MANIFEST_NAME, "x" * 200]
)
def test_a_manifest_cannot_name_files_outside(bundle_copy: Path, name: str) -> None:
    def rename(values: dict[str, Any]) -> None:
        old = values["graphs"][0]["file"]
        values["files"][name] = values["files"].pop(old)
        values["graphs"][0]["file"] = name

    _edit(bundle_copy, rename)
    with pytest.raises(BundleError, match="plain names"):
        open_bundle(bundle_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=99), "format version 99"),
        (lambda v: v.update(format="zip"), "does not describe"),
        (lambda v: v.update(surprise=1), "unknown keys: surprise"),
        (lambda v: v.pop("diffusion"), "lacks diffusion"),
        (lambda v: v["graphs"][0].update(file="absent.onnx"), "does not describe"),
        (lambda v: v["graphs"][0].update(opset="20"), "opset must be int"),
        (lambda v: v["diffusion"]["model"].update(num_heads=2), "exactly one"),
    ],
)
def test_a_wrong_manifest_is_refused(
    bundle_copy: Path, change: Any, message: str
) -> None:
    _edit(bundle_copy, change)
    with pytest.raises(Exception, match=message) as caught:
        open_bundle(bundle_copy)
    assert type(caught.value).__module__ == "id3pm_deploy.errors"


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '{"format": 1', "[" * 100_000])
def test_a_damaged_manifest_is_refused(bundle_copy: Path, text: str) -> None:
    (bundle_copy / MANIFEST_NAME).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(bundle_copy)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(BundleError, match="not a bundle"):
        bundle_writer(tmp_path, tiny_spec(), SHA, "0")
    assert contents(tmp_path) == {"mine.txt": b"keep me"}


def test_another_checkpoints_bundle_is_not_written_over(bundle_copy: Path) -> None:
    before = contents(bundle_copy)
    with pytest.raises(BundleError, match="another checkpoint"):
        bundle_writer(bundle_copy, tiny_spec(), SHA, "0")
    assert contents(bundle_copy) == before


def test_a_failed_commit_leaves_the_old_bundle(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle_copy / MANIFEST_NAME).read_bytes()
    writer = BundleWriter(bundle_copy, open_bundle(bundle_copy).manifest)
    writer.add_file("extra", ".bin", b"more")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="cannot write"):
        writer.commit()
    monkeypatch.undo()
    assert (bundle_copy / MANIFEST_NAME).read_bytes() == before
    open_bundle(bundle_copy).verify()
    assert not list(bundle_copy.glob("*.tmp"))


def test_commit_removes_what_nothing_uses(bundle_copy: Path) -> None:
    writer = BundleWriter(bundle_copy, open_bundle(bundle_copy).manifest)
    name = writer.add_file("unused", ".bin", b"nobody wants me")
    writer.commit()
    assert name not in open_bundle(bundle_copy).manifest.files
    open_bundle(bundle_copy).verify()


def test_an_engine_that_is_not_there_is_named(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="no engine for rtx"):
        open_bundle(tiny_bundle).engine("rtx")
    model = open_model(tiny_bundle)
    with pytest.raises(EngineError, match="no PyTorch weights"):
        open_engine(model, "torch")
    with pytest.raises(EngineError, match="no runtime for them yet"):
        open_engine(model, "tensorrt")
    with pytest.raises(EngineError, match="no step graph"):
        open_engine(model, precision="float16")
