"""The build flow: what is reused, repaired or refused, and what a stop leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import plan_builder
from models import contents

from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine
from id3pm_deploy.builders import engine_entries
from id3pm_deploy.builders import onnx as onnx_module
from id3pm_deploy.builders import tensorrt as tensorrt_module
from id3pm_deploy.builders.build import build_engine, export_bundle
from id3pm_deploy.builders.onnx import ExportedGraph
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.bundle import MANIFEST_NAME, GraphEntry, open_bundle
from id3pm_deploy.errors import BuildError, BundleError, ParityError, RecipeError
from id3pm_deploy.inspection import self_tests
from id3pm_deploy.selftest import Arrays, golden_bytes, load_golden

Exports = list[str]


def _step_graph(folder: Path) -> GraphEntry:
    graph = open_bundle(folder).graph("step", "float32")
    assert graph is not None
    return graph


def _golden(folder: Path) -> Arrays:
    return load_golden(open_bundle(folder), _step_graph(folder))


@pytest.fixture
def exports(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Exports:
    """Replaces the export by the tiny bundle's graph; lists the precisions asked."""
    graph = _step_graph(tiny_bundle)
    data = open_bundle(tiny_bundle).read(graph.file)
    made = ExportedGraph(data, _golden(tiny_bundle), 1, graph.max_relative_error, ())
    asked: Exports = []

    def export(network: Any, spec: Any, recipe: Any, near: Any) -> ExportedGraph:
        asked.append(recipe.precision)
        return made

    monkeypatch.setattr(onnx_module, "export_graph", export)
    return asked


def _stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_an_intact_graph_is_reused(
    tiny_checkpoint: Path, bundle_copy: Path, exports: Exports
) -> None:
    built = build_engine(tiny_checkpoint, "cpu", bundle_copy)
    assert exports == []
    assert len(built.bundle.manifest.engines) == 1
    built.bundle.verify()


@pytest.mark.parametrize("kind", ["file", "golden"])
def test_a_damaged_file_is_made_again_from_a_checkpoint_alone(
    tiny_checkpoint: Path, bundle_copy: Path, exports: Exports, kind: str
) -> None:
    path = bundle_copy / getattr(_step_graph(bundle_copy), kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="not the file that the manifest describes"):
        build_engine(bundle_copy, "cpu", None)
    build_engine(tiny_checkpoint, "cpu", bundle_copy).bundle.verify()
    assert exports == ["float32"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("opset", 21),
        ("tolerance_step", 0.5),
        ("tolerance_trajectory", 0.5),
        ("step_width", 30),
        ("step_width", 34),
        ("step_width", 31),
        ("step_width", 32),
        ("state_slots", 3),
    ],
)
def test_a_graph_of_another_recipe_or_release_is_exported_anew(
    tiny_checkpoint: Path, bundle_copy: Path, exports: Exports, field: str, value: Any
) -> None:
    wanted = getattr(_step_graph(bundle_copy), field)
    path = bundle_copy / MANIFEST_NAME
    _edit(path, lambda values: values["graphs"][0].update({field: value}))
    if field in ("step_width", "state_slots") and value not in (31, 32):
        with pytest.raises(BuildError, match="of another release"):
            build_engine(bundle_copy, "cpu", None)
    build_engine(tiny_checkpoint, "cpu", bundle_copy)
    assert exports == ["float32"]
    assert getattr(_step_graph(bundle_copy), field) == wanted


def test_the_same_weights_with_another_config_are_another_checkpoint(
    tiny_checkpoint: Path, bundle_copy: Path, exports: Exports, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    _edit(other / "config.json", lambda values: values.update(title="renamed"))
    build_engine(other, "cpu", bundle_copy)
    _edit(other / "config.json", lambda v: v.update(prediction_type="x0"))
    before = contents(bundle_copy)
    for make in (
        lambda: build_engine(other, "cpu", bundle_copy),
        lambda: export_bundle(other, "float32", bundle_copy),
    ):
        with pytest.raises(BundleError, match="or with other settings") as caught:
            make()
        assert caught.value.why == "these differ: prediction_type"
    assert contents(bundle_copy) == before
    assert exports == []


@pytest.mark.parametrize("where", ["export", "self-test"])
def test_ctrl_c_leaves_no_new_folder_and_no_changed_bundle(
    tiny_checkpoint: Path,
    bundle_copy: Path,
    exports: Exports,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    # A damaged golden file makes the build into the bundle export first.
    (bundle_copy / _step_graph(bundle_copy).golden).write_bytes(b"damaged")
    before = contents(bundle_copy)
    if where == "export":
        monkeypatch.setattr(onnx_module, "export_graph", _stop)
    else:
        monkeypatch.setattr(engine_entries, "self_test", _stop)
    for out in (bundle_copy.parent / "a" / "new", bundle_copy):
        with pytest.raises(KeyboardInterrupt):
            build_engine(tiny_checkpoint, "cpu", out)
    assert not (bundle_copy.parent / "a").exists()
    assert contents(bundle_copy) == before


def test_a_checkpoint_here_gets_its_bundle_beside_it(
    tiny_checkpoint: Path,
    tmp_path: Path,
    exports: Exports,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "mine"))
    monkeypatch.chdir(folder)
    build_engine(Path("."), "cpu", None).bundle.verify()
    assert sorted(os.listdir(tmp_path)) == ["mine", "mine.bundle"]
    monkeypatch.chdir(tmp_path / "mine.bundle")
    build_engine(Path("."), "cpu", None).bundle.verify()


def test_a_plans_warnings_are_kept(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = plan_builder(b"plan", warnings=("slow here",))
    monkeypatch.setattr(tensorrt_module, "build_plan", build)
    recipe = tmp_path / "my gpu.toml"
    recipe.write_text(
        'summary = "s"\nbackend = "tensorrt"\nflavour = "tensorrt_rtx"\n'
        'export = "float32"\nprecision = "float32"\ndynamic_samples = [1, 2, 4]\n'
    )
    build_engine(bundle_copy, str(recipe), None)
    bundle = open_bundle(bundle_copy)
    assert [e.warnings for e in bundle.manifest.engines] == [(), ("slow here",)]
    assert bundle.read(bundle.manifest.engines[1].file) == b"plan"


def test_recipes_that_cannot_work_are_refused_before_anything_is_made(
    tiny_checkpoint: Path, tmp_path: Path, exports: Exports
) -> None:
    values = {
        "summary": "s",
        "backend": "onnxruntime",
        "flavour": "cpu",
        "export": "float32",
        "precision": "float32",
    }
    for change, message in (
        ({"precision": "float16"}, "makes no step graph in float16"),
        ({"flavour": "cuda"}, "no engine of flavour 'cuda'"),
    ):
        recipe = tmp_path / "mine.toml"
        lines = [f'{name} = "{text}"' for name, text in {**values, **change}.items()]
        recipe.write_text("\n".join(lines))
        with pytest.raises(BuildError, match=message):
            build_engine(tiny_checkpoint, str(recipe), tmp_path / "b")
    assert exports == []
    with pytest.raises(RecipeError, match="dynamic_rows_per_sample is a setting of"):
        EngineRecipe(**values, dynamic_rows_per_sample=(1, 1, 2))  # type: ignore[arg-type]


def test_a_bundle_without_the_graph_says_which_export_is_missing(
    bundle_copy: Path, tmp_path: Path
) -> None:
    for change, message in (
        ("precision=float16", "export recipe float32 makes no step graph in float16"),
        ("export=float16", "holds no step graph in float16"),
        (f'export="{tmp_path}/gone.toml"', "holds no step graph in float16"),
    ):
        settings = (change, "precision=float16")
        with pytest.raises(BuildError, match=message):
            build_engine(bundle_copy, "cpu", None, settings=settings)


def test_an_engine_without_its_graph_is_explained(bundle_copy: Path) -> None:
    def dangle(values: Any) -> None:
        values["engines"][0]["graph"] = values["graphs"][0]["golden"]

    _edit(bundle_copy / MANIFEST_NAME, dangle)
    with pytest.raises(BundleError, match="graph that is not listed") as caught:
        self_tests(bundle_copy)
    assert "build-engine" in caught.value.fix


def test_a_manifest_cannot_loosen_the_self_test(bundle_copy: Path) -> None:
    """Golden data that is off by 1e-3 and a manifest that calls this tolerable."""

    def loosen(values: Any) -> None:
        graph = values["graphs"][0]
        golden = bundle_copy / graph["golden"]
        with np.load(golden) as data:
            arrays = dict(data)
        arrays["expected.state_next"] *= np.float32(1.001)
        np.savez(golden, **arrays)
        content = golden.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        values["files"][graph["golden"]] = {"size": len(content), "sha256": digest}
        graph["tolerance_step"] = graph["tolerance_trajectory"] = 0.5

    _edit(bundle_copy / MANIFEST_NAME, loosen)
    with pytest.raises(ParityError, match="does not compute what PyTorch") as caught:
        self_tests(bundle_copy)
    assert "tolerance 1e-05" in caught.value.why


class _Bytes:
    """Golden data that is not what it should be."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, name: str, /) -> bytes:
        return self._data


def _refused(data: bytes, graph: GraphEntry, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        load_golden(_Bytes(data), graph)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state", lambda a: a[0]),
        ("state", lambda a: a[:3]),
        ("noise", lambda a: a.astype(np.float64)),
        ("row", lambda a: a.astype(np.int64)),
        ("row", lambda a: a[:0]),
        ("row", lambda a: a[None]),
        ("identity", lambda a: a[:-1]),
        ("identity", lambda a: a[:, :0]),
        ("mix", lambda a: a[:1]),
        ("step", lambda a: a[:, :-3]),
        ("expected.state_next", lambda a: a[..., :1]),
        ("expected.x0", lambda a: a.astype(np.complex64)),
        ("expected.finite", lambda a: a.astype(object)),
    ],
)
def test_golden_arrays_of_another_shape_or_type_are_refused(
    tiny_bundle: Path, name: str, change: Callable[[Any], Any]
) -> None:
    golden = _golden(tiny_bundle)
    data = golden_bytes({**golden, name: change(golden[name])})
    _refused(data, _step_graph(tiny_bundle), "golden data (has a wrong|is damaged)")


def test_damaged_golden_archives_are_refused(tiny_bundle: Path) -> None:
    graph, golden = _step_graph(tiny_bundle), _golden(tiny_bundle)
    good = golden_bytes(golden)
    load_golden(_Bytes(good), graph)
    packed = io.BytesIO()
    np.savez_compressed(packed, **golden)  # type: ignore[arg-type]
    broken = bytearray(packed.getvalue())
    broken[60:200] = b"\xff" * 140
    strange = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(good)) as old,
        zipfile.ZipFile(strange, "w", zipfile.ZIP_LZMA) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\x01\x02") + 8] |= 1
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as new:
        for name in golden:
            new.writestr(f"{name}.npy", b"")
    for data in (
        b"",
        b"PK",
        good[:-30],
        bytes(broken),
        strange.getvalue(),
        bytes(encrypted),
        empty.getvalue(),
    ):
        _refused(data, graph, "golden data is damaged")
    del golden["mix"]
    _refused(golden_bytes(golden), graph, "lacks mix")


def test_a_build_that_fails_its_self_test_writes_nothing(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle_copy)
    state = OnnxRuntimeEngine.state
    monkeypatch.setattr(OnnxRuntimeEngine, "state", lambda self: state(self) * 1.01)
    with pytest.raises(Exception, match="does not compute what PyTorch computed"):
        build_engine(bundle_copy, "cpu", None)
    assert contents(bundle_copy) == before
