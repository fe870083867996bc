"""The bundle: what is written is what is read, and anything else is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from bundles import (
    SHA,
    SPEC,
    edit_manifest,
    files_in,
    new_engine,
    new_writer,
    targets,
)

from id3pm_deploy import bundle as bundle_module
from id3pm_deploy.bundle import MANIFEST_NAME, is_bundle, open_bundle
from id3pm_deploy.bundle import reader as reader_module
from id3pm_deploy.bundle import writer as writer_module
from id3pm_deploy.bundle.stamps import sight
from id3pm_deploy.bundle.writer import BundleWriter, bundle_writer
from id3pm_deploy.errors import BundleError, EngineError, OutputError
from id3pm_deploy.files import write_bytes
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.spec import ScheduleSpec


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A bundle of a few bytes with one engine."""
    writer = new_writer(tmp_path / "small")
    writer.commit()
    writer = BundleWriter(writer.folder, open_bundle(writer.folder).manifest)
    writer.add_engine(new_engine("cpu", writer.manifest.graphs[0].file))
    return writer.commit().folder


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
    for name, data in files_in(tiny_bundle).items():
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
def test_a_manifest_cannot_name_files_outside(small: Path, name: str) -> None:
    def rename(values: dict[str, Any]) -> None:
        old = values["graphs"][0]["file"]
        values["files"][name] = values["files"].pop(old)
        values["graphs"][0]["file"] = name

    edit_manifest(small, rename)
    with pytest.raises(BundleError, match="plain names"):
        open_bundle(small)


def _golden(values: Any) -> Any:
    return values["graphs"][0]["golden"]


def _file(values: Any) -> Any:
    return next(iter(values["files"].values()))


def _many_files(values: Any, count: int, size: int) -> None:
    files = {f"f{i}": {"size": size, "sha256": SHA} for i in range(count)}
    values["files"].update(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=99), "format version 99"),
        (lambda v: v.update(format="zip"), "does not describe"),
        (lambda v: v.update(format_version=5), "not of format version 5"),
        (lambda v: v.update(format_version=6), "format version 6; .* reads 4 to 5"),
        (lambda v: v.update(format_version=2.0), "format version 2.0"),
        (lambda v: v.update(format_version=True), "format version True"),
        (lambda v: v.update(surprise=1), "unknown keys: surprise"),
        (lambda v: v.pop("diffusion"), "lacks diffusion"),
        (lambda v: v["graphs"][0].update(file="absent.onnx"), "does not describe"),
        (lambda v: v["graphs"][0].update(opset="20"), "opset must be int"),
        (lambda v: v["diffusion"]["model"].update(num_heads=2), "exactly one"),
        (lambda v: v.update(checkpoint_sha256="A" * 64), "in lower case"),
        (lambda v: v["graphs"].append(v["graphs"][0]), "two entries of the graph"),
        (lambda v: v["engines"].append(v["engines"][0]), "two entries of the engine"),
        (lambda v: v["engines"][0].update(graph=_golden(v)), "that is not listed"),
        (lambda v: v["engines"][0].update(threads=-1), "threads must be from 0"),
        (lambda v: v["engines"][0].update(peak_memory_bytes=0), "must be from 1"),
        (lambda v: v["engines"][0].update(made_with={"a": 1}), "names to versions"),
        (
            lambda v: v["engines"][0].update(peak_device_memory_bytes=0),
            "peak_device_memory_bytes must be from 1",
        ),
        (
            lambda v: v["engines"][0].update(hardware_compatibility="all"),
            "hardware_compatibility must be one of none, ampere_plus",
        ),
        (
            lambda v: v["engines"][0].update(version_compatible=1),
            "version_compatible must be bool",
        ),
        (lambda v: v["engines"][0].update(plan_key="x"), "plan_key must be 64"),
        (lambda v: v["engines"][0].update(settings=[]), "settings must be dict"),
        (lambda v: v["engines"][0].update(plan_types=None), "plan_types must be dict"),
        (lambda v: v["graphs"][0].update(step_width=1 << 40), "step_width must be"),
        (lambda v: v["graphs"][0].update(tolerance_step=2), "tolerance_step must be"),
        (lambda v: _file(v).update(size=-1), "size must be from 0"),
        (lambda v: _file(v).update(size=8 << 30), "size must be from 0 to 8589934591"),
        (lambda v: _file(v).update(size=True), "size must be int"),
        (lambda v: _file(v).update(sha256="0" * 63), "64 hexadecimal digits"),
        (lambda v: _file(v).update(link="x"), "unknown keys: link"),
        (lambda v: v["files"].update(x=7), "must be a table"),
        (lambda v: _many_files(v, 1025, 1), "more than 1024 files"),
        (lambda v: _many_files(v, 9, (8 << 30) - 1), "more than 68719476736 bytes"),
    ],
)
def test_a_wrong_manifest_is_refused(small: Path, change: Any, message: str) -> None:
    edit_manifest(small, change)
    with pytest.raises(Exception, match=message) as caught:
        open_bundle(small)
    assert type(caught.value).__module__ == "id3pm_deploy.errors"


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '{"format": 1', "[" * 100_000])
def test_a_damaged_manifest_is_refused(small: Path, text: str) -> None:
    (small / MANIFEST_NAME).write_text(text)
    with pytest.raises(BundleError):
        open_bundle(small)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"title": ""', '"title": "", "title": "b"', "'title' is there twice"),
        ('"title": ""', '"title": "\\ud800"', "surrogates not allowed"),
        ('"title": ""', '"title": "t\x01"', "control character"),
        ('"origin": {}', '"origin": {"loss": NaN}', "NaN is not a finite number"),
        ('"origin": {}', '"origin": {"loss": -Infinity}', "not a finite number"),
        ('"origin": {}', '"origin": {"loss": 1e999}', "not a finite number"),
        ('"origin": {}', '"origin": {"n": 9007199254740992}', r"past 2\*\*53"),
        ('"origin": {}', '"origin": {"n": ' + "9" * 5000 + "}", r"past 2\*\*53"),
        ('"origin": {}', '"origin": {"n": ' + "[" * 40 + "]" * 40 + "}", "32 levels"),
        ('"origin": {}', '"origin": {}, // a comment', "not JSON"),
        ('{\n  "format"', '\ufeff{\n  "format"', "not JSON"),
    ],
)
def test_json_that_readers_take_differently_is_refused(
    small: Path, old: str, new: str, message: str
) -> None:
    path = small / MANIFEST_NAME
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace('"origin": {}', '"origin": {"n": 9007199254740991}'))
    open_bundle(small)
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        open_bundle(small)


def test_a_manifest_of_megabytes_is_refused(small: Path) -> None:
    path = small / MANIFEST_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b" " * ((4 << 20) - len(whole)))
    open_bundle(small)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="too large to be a manifest"):
        open_bundle(small)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(BundleError, match="not a bundle"):
        bundle_writer(tmp_path, SPEC, SHA, "0")
    assert files_in(tmp_path) == {"mine.txt": b"keep me"}


def test_another_checkpoints_bundle_is_not_written_over(bundle_copy: Path) -> None:
    before = files_in(bundle_copy)
    with pytest.raises(BundleError, match="another checkpoint"):
        bundle_writer(bundle_copy, SPEC, SHA, "0")
    assert files_in(bundle_copy) == before


def test_a_failed_commit_leaves_the_old_bundle(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle_copy / MANIFEST_NAME).read_bytes()
    graph = open_bundle(bundle_copy).manifest.graphs[0].file
    writer = BundleWriter(bundle_copy, open_bundle(bundle_copy).manifest)
    writer.add_engine(new_engine("mine", graph, writer.add_file("x", ".plan", b"more")))

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
    with pytest.raises(EngineError, match="holds no TensorRT plan"):
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
        new_writer(tmp_path / "new").commit()
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert new_writer(tmp_path / "new").commit().manifest.graphs


def test_ctrl_c_after_the_manifest_keeps_the_new_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, data: bytes) -> None:
        write_bytes(path, data)
        if path.name == MANIFEST_NAME:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer_module, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_writer(tmp_path / "new").commit()
    open_bundle(tmp_path / "new").verify()


def test_what_a_killed_first_write_left_is_replaced(tmp_path: Path) -> None:
    left = {".lock", ".x.ab.tmp", f"step-float32-{'a' * 12}.onnx"}
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    new_writer(tmp_path).commit().verify()
    assert not (left - {".lock"}) & {*os.listdir(tmp_path)}
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(BundleError, match="not a bundle"):
        new_writer(tmp_path)


def test_two_writers_keep_each_others_entries(tmp_path: Path) -> None:
    first, second = new_writer(tmp_path / "b"), new_writer(tmp_path / "b")
    first.commit()
    second.commit()
    manifest = open_bundle(tmp_path / "b").manifest
    graph = manifest.graphs[0].file
    writers = [BundleWriter(tmp_path / "b", manifest) for _ in range(2)]
    for number, writer in enumerate(writers):
        plan = writer.add_file("plan", ".plan", b"%d" % number)
        writer.add_engine(new_engine(str(number), graph, plan))
    for writer in writers:
        writer.commit()
    assert targets(tmp_path / "b") == ["0", "1"]
    open_bundle(tmp_path / "b").verify()


def test_a_writer_waits_for_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    thread = threading.Thread(target=new_writer(folder).commit)
    with writer_module.locked(folder):
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
    writer = new_writer(tmp_path / "b")
    (tmp_path / "b" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="lock"):
        writer.commit()
    assert (tmp_path / "elsewhere").read_text() == "keep me"
    assert os.listdir(tmp_path / "b") == [".lock"]


def test_a_folder_that_changed_hands_is_refused(tmp_path: Path) -> None:
    mine = new_writer(tmp_path)
    theirs = bundle_writer(tmp_path, SPEC, "1" * 64, "0")
    theirs.commit()
    before = files_in(tmp_path)
    with pytest.raises(BundleError, match="another checkpoint") as caught:
        mine.commit()
    assert caught.value.why == "these differ: weights"
    assert files_in(tmp_path) == before


_HEADS = dataclasses.replace(SPEC.model, num_heads=4, num_head_channels=None)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": _HEADS}, "model.num_heads, model.num_head_channels"),
        ({"schedule": ScheduleSpec("linear")}, "schedule.name"),
        ({"prediction_type": "x0"}, "prediction_type"),
    ],
)
def test_the_same_weights_with_other_settings_are_refused(
    tmp_path: Path, change: dict[str, Any], names: str
) -> None:
    new_writer(tmp_path).commit()
    renamed = dataclasses.replace(SPEC, title="renamed", origin={"steps": 1})
    assert bundle_writer(tmp_path, renamed, SHA, "0").manifest.graphs
    with pytest.raises(BundleError, match="or with other settings") as caught:
        bundle_writer(tmp_path, dataclasses.replace(SPEC, **change), SHA, "0")
    assert caught.value.why == f"these differ: {names}"


@pytest.mark.parametrize("damage", ["flip", "cut", "link", "remove"])
def test_writing_again_repairs_a_damaged_file(tmp_path: Path, damage: str) -> None:
    bundle = new_writer(tmp_path / "b").commit()
    path = bundle.folder / bundle.manifest.graphs[0].file
    path.unlink()
    if damage == "link":
        (tmp_path / "same").write_bytes(b"graph")
        path.symlink_to(tmp_path / "same")
    elif damage != "remove":
        path.write_bytes(b"gra" if damage == "cut" else b"grapi")
    with pytest.raises(BundleError):
        bundle.verify()
    new_writer(tmp_path / "b").commit().verify()


def test_a_new_graph_drops_engines_of_the_old_one(tmp_path: Path) -> None:
    writer = new_writer(tmp_path)
    old = writer.commit().manifest.graphs[0].file
    writer = BundleWriter(tmp_path, open_bundle(tmp_path).manifest)
    plan = writer.add_file("my gpu!", ".plan", b"plan")
    assert plan.startswith("my-gpu-")
    writer.add_engine(new_engine("rtx", old, plan))
    writer.commit()
    late = BundleWriter(tmp_path, open_bundle(tmp_path).manifest)
    late.add_engine(new_engine("cpu", old))
    new_writer(tmp_path).commit()
    assert targets(tmp_path) == ["rtx"]
    new_writer(tmp_path, b"other").commit().verify()
    assert targets(tmp_path) == []
    assert not (tmp_path / plan).exists()
    assert not (tmp_path / old).exists()
    with pytest.raises(BundleError, match="no longer in"):
        late.commit()
    open_bundle(tmp_path).verify()


def test_an_unreadable_file_is_a_bundle_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = new_writer(tmp_path).commit()
    name = bundle.manifest.graphs[0].file

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reader_module, "open_plain", refuse)
    for check in (bundle.read, bundle.path_of, lambda _: bundle.verify()):
        with pytest.raises(BundleError, match="is missing or cannot be read") as caught:
            check(name)
        assert caught.value.why == "Permission denied"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link"])
def test_only_plain_files_are_opened(tmp_path: Path, kind: str) -> None:
    bundle = new_writer(tmp_path / "b").commit()
    name = bundle.manifest.graphs[0].file
    for path in (bundle.folder / name, bundle.folder / MANIFEST_NAME):
        moved = path.rename(tmp_path / path.name)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(moved)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="cannot be read") as caught:
        bundle.read(name)
    assert caught.value.why == "not a plain file"
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(bundle.folder)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is hashed is what is returned, not what lay there when it was opened."""
    bundle = new_writer(tmp_path).commit()
    name = bundle.manifest.graphs[0].file

    def change(descriptor: int) -> Any:
        (tmp_path / name).write_bytes(b"grapi")
        return sight(descriptor)

    assert bundle.path_of(name) == tmp_path / name
    monkeypatch.setattr(reader_module, "sight", change)
    for check in (bundle.read, bundle.path_of):
        with pytest.raises(BundleError, match="not the file that the manifest"):
            check(name)


def test_leftovers_of_a_killed_write_go_with_the_next(tmp_path: Path) -> None:
    bundle = new_writer(tmp_path).commit()
    left = (".manifest.json.ab.tmp", f"rtx-{'a' * 12}.plan")
    for name in (*left, "mine.txt"):
        (tmp_path / name).write_bytes(b"half")
    new_writer(tmp_path).commit()
    there = {*os.listdir(tmp_path)}
    assert there == {*bundle.manifest.files, MANIFEST_NAME, ".lock", "mine.txt"}
