"""The bundle: what is written is what is read, and anything else is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from models import contents, tiny_spec

from id3pm_deploy import bundle as bundle_module
from id3pm_deploy import bundle_writer as writer_module
from id3pm_deploy.bundle import (
    MANIFEST_NAME,
    EngineEntry,
    GraphEntry,
    is_bundle,
    open_bundle,
)
from id3pm_deploy.bundle_writer import BundleWriter, bundle_writer
from id3pm_deploy.errors import BundleError, EngineError, OutputError
from id3pm_deploy.files import write_json
from id3pm_deploy.models import open_engine, open_model

SHA = "0" * 64
GRAPH = GraphEntry("", "step", "float32", 20, 4, 31, 1e-6, 1e-5, 1e-4, "")


def _writer(folder: Path, graph: bytes = b"graph") -> BundleWriter:
    """A writer with a step graph of these bytes, of a checkpoint of zeros."""
    writer = bundle_writer(folder, tiny_spec(), SHA, "0")
    file = writer.add_file("step-float32", ".onnx", graph)
    golden = writer.add_file("golden", ".npz", b"golden")
    writer.add_graph(dataclasses.replace(GRAPH, file=file, golden=golden))
    return writer


def _engine(target: str, graph: str, file: str | None = None) -> EngineEntry:
    file = graph if file is None else file
    return EngineEntry(
        target, "onnxruntime", "cpu", "1", "float32", graph=graph, file=file
    )


def _targets(folder: Path) -> list[str]:
    return [entry.target for entry in open_bundle(folder).manifest.engines]


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
    (engine,) = bundle.manifest.engines
    assert (engine.target, engine.warnings) == ("cpu", ())
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
    graph = open_bundle(bundle_copy).manifest.graphs[0].file
    writer = BundleWriter(bundle_copy, open_bundle(bundle_copy).manifest)
    writer.add_engine(_engine("mine", graph, writer.add_file("x", ".plan", b"more")))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match="cannot write"):
        writer.commit()
    monkeypatch.undo()
    assert (bundle_copy / MANIFEST_NAME).read_bytes() == before
    open_bundle(bundle_copy).verify()
    assert not list(bundle_copy.glob(".*.tmp"))
    assert not list(bundle_copy.glob("*.plan"))


def test_commit_removes_what_nothing_uses(bundle_copy: Path) -> None:
    writer = BundleWriter(bundle_copy, open_bundle(bundle_copy).manifest)
    name = writer.add_file("unused", ".bin", b"nobody wants me")
    assert writer.read(name) == b"nobody wants me"
    writer.commit()
    assert name not in open_bundle(bundle_copy).manifest.files
    assert not (bundle_copy / name).exists()
    open_bundle(bundle_copy).verify()


def test_an_engine_that_cannot_run_is_refused(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    with pytest.raises(EngineError, match="no PyTorch weights"):
        open_engine(model, "torch")
    with pytest.raises(EngineError, match="no runtime for them yet"):
        open_engine(model, "tensorrt")
    with pytest.raises(EngineError, match="no step graph"):
        open_engine(model, precision="float16")


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_failed_first_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    replace, calls = os.replace, iter(range(3))

    def fail(source: Any, target: Any) -> None:
        if next(calls) == at:
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        _writer(tmp_path / "new").commit()
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert _writer(tmp_path / "new").commit().manifest.graphs


def test_ctrl_c_after_the_manifest_keeps_the_new_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*values: Any) -> None:
        write_json(*values)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer_module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _writer(tmp_path / "new").commit()
    open_bundle(tmp_path / "new").verify()


def test_what_a_killed_first_write_left_is_replaced(tmp_path: Path) -> None:
    left = {".lock", ".x.ab.tmp", f"step-float32-{'a' * 12}.onnx"}
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    _writer(tmp_path).commit().verify()
    assert not (left - {".lock"}) & {*os.listdir(tmp_path)}
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(BundleError, match="not a bundle"):
        _writer(tmp_path)


def test_two_writers_keep_each_others_entries(tmp_path: Path) -> None:
    first, second = _writer(tmp_path / "b"), _writer(tmp_path / "b")
    first.commit()
    second.commit()
    manifest = open_bundle(tmp_path / "b").manifest
    graph = manifest.graphs[0].file
    writers = [BundleWriter(tmp_path / "b", manifest) for _ in range(2)]
    for number, writer in enumerate(writers):
        plan = writer.add_file("plan", ".plan", b"%d" % number)
        writer.add_engine(_engine(str(number), graph, plan))
    for writer in writers:
        writer.commit()
    assert _targets(tmp_path / "b") == ["0", "1"]
    open_bundle(tmp_path / "b").verify()


def test_a_writer_waits_for_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    thread = threading.Thread(target=_writer(folder).commit)
    with writer_module._locked(folder):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not is_bundle(folder)
        # As after another's failed first write: the lock and its folder are gone.
        shutil.rmtree(folder)
    thread.join(60)
    open_bundle(folder).verify()


def test_a_lock_that_cannot_be_taken_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("keep me")
    (tmp_path / "b").mkdir()
    writer = _writer(tmp_path / "b")
    (tmp_path / "b" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="lock"):
        writer.commit()
    assert (tmp_path / "elsewhere").read_text() == "keep me"
    assert os.listdir(tmp_path / "b") == [".lock"]


def test_a_folder_that_changed_hands_is_refused(tmp_path: Path) -> None:
    mine = _writer(tmp_path)
    theirs = bundle_writer(tmp_path, tiny_spec(), "1" * 64, "0")
    theirs.commit()
    before = contents(tmp_path)
    with pytest.raises(BundleError, match="another checkpoint") as caught:
        mine.commit()
    assert caught.value.why == "these differ: weights"
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"num_heads": 4}, "model"),
        ({"schedule": "linear"}, "schedule"),
        ({"prediction_type": "x0"}, "prediction_type"),
    ],
)
def test_the_same_weights_with_other_settings_are_refused(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    _writer(tmp_path).commit()
    renamed = tiny_spec(title="renamed", origin={"steps": 1})
    assert bundle_writer(tmp_path, renamed, SHA, "0").manifest.graphs
    with pytest.raises(BundleError, match="or with other settings") as caught:
        bundle_writer(tmp_path, tiny_spec(**change), SHA, "0")
    assert name in caught.value.why


@pytest.mark.parametrize("damage", ["flip", "cut", "link", "remove"])
def test_writing_again_repairs_a_damaged_file(tmp_path: Path, damage: str) -> None:
    bundle = _writer(tmp_path / "b").commit()
    path = bundle.folder / bundle.manifest.graphs[0].file
    path.unlink()
    if damage == "link":
        (tmp_path / "same").write_bytes(b"graph")
        path.symlink_to(tmp_path / "same")
    elif damage != "remove":
        path.write_bytes(b"gra" if damage == "cut" else b"grapi")
    with pytest.raises(BundleError):
        bundle.verify()
    _writer(tmp_path / "b").commit().verify()


def test_a_new_graph_drops_engines_of_the_old_one(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    old = writer.commit().manifest.graphs[0].file
    writer = BundleWriter(tmp_path, open_bundle(tmp_path).manifest)
    plan = writer.add_file("my gpu!", ".plan", b"plan")
    assert plan.startswith("my-gpu-")
    writer.add_engine(_engine("rtx", old, plan))
    writer.commit()
    late = BundleWriter(tmp_path, open_bundle(tmp_path).manifest)
    late.add_engine(_engine("cpu", old))
    _writer(tmp_path).commit()
    assert _targets(tmp_path) == ["rtx"]
    _writer(tmp_path, b"other").commit().verify()
    assert _targets(tmp_path) == []
    assert not (tmp_path / plan).exists()
    assert not (tmp_path / old).exists()
    with pytest.raises(BundleError, match="no longer in"):
        late.commit()
    open_bundle(tmp_path).verify()


@pytest.mark.parametrize("function", ["lstat", "open"])
def test_an_unreadable_file_is_a_bundle_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    bundle = _writer(tmp_path).commit()
    name = bundle.manifest.graphs[0].file

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "lstat" if function == "lstat" else "read_bytes", refuse)
    monkeypatch.setattr(bundle_module, "sha256_of_file", refuse)
    with pytest.raises(BundleError, match=f"{name} is missing or cannot be read"):
        bundle.read(name)
    with pytest.raises(BundleError, match="missing or cannot be read"):
        bundle.verify()
