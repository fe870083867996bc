"""The exported graphs: valid, dynamic, and the same function as PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import tiny_network, tiny_spec

from id3pm_deploy.backends.onnxruntime import make_session
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.builders.build import build_engine, export_bundle, export_unet
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.builders.graph_inputs import step_inputs
from id3pm_deploy.builders.onnx import export_graph
from id3pm_deploy.builders.widened import widened
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import (
    BuildError,
    EngineError,
    InputError,
    ParityError,
    RecipeError,
)
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.reference.step import step_module
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.solvers import CARRY_COLUMN, CLIP_COLUMN, RESCALE_COLUMN

UNTRACED = [(1, 1), (1, 2), (3, 3), (4, 8), (7, 5)]


def _graph_bytes(bundle: Path, kind: str, precision: str) -> bytes:
    opened = open_bundle(bundle)
    graph = opened.graph(kind, precision)
    assert graph is not None
    return opened.read(graph.file)


@pytest.mark.parametrize("size", UNTRACED)
def test_float32_graph_at_sizes_that_were_not_traced(
    tiny_bundle: Path, tiny_checkpoint: Path, size: tuple[int, int]
) -> None:
    loaded = load_checkpoint(tiny_checkpoint)
    inputs = step_inputs(loaded.spec, *size, seed=99)
    session = make_session(_graph_bytes(tiny_bundle, "step", "float32"), 1)
    made = session.run(None, inputs)
    module = step_module(loaded.network, BodyForm())
    with torch.inference_mode():
        wanted = module(*(torch.from_numpy(v) for v in inputs.values()))
    for actual, expected in zip(made, wanted, strict=True):
        assert compare(actual, expected.numpy()).passes(1e-5)


def test_inputs_exercise_guidance_and_rescale() -> None:
    """Otherwise neither the check of an export nor golden data could notice them."""
    inputs = step_inputs(tiny_spec(), 2, 3, seed=5)
    first, second = inputs["mix"]
    assert inputs["row"].tolist() == [0, 1, 0]
    assert first.tolist() == [[2, 0, -1], [0, 1, 0]]
    assert second.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert not inputs["identity"][2].any()
    for size in UNTRACED:
        inputs = step_inputs(tiny_spec(), *size, seed=5)
        phi = inputs["step"][:, RESCALE_COLUMN]
        assert ((phi > 0.1) & (phi < 0.9)).all()
        carried = inputs["step"][:, CARRY_COLUMN]
        assert ((carried > 0.1) & (carried < 0.9)).all()
        sums = inputs["mix"].sum(axis=2)
        assert sums[:, : size[1]] == pytest.approx(1)
        assert not sums[:, size[1] :].any()
    three = step_inputs(tiny_spec(), 2, 6, seed=5)["mix"]
    assert three[0, 1].tolist() == [0, 2, 0, -0.5, 0, -0.5]


def test_the_graph_rescales(tiny_bundle: Path) -> None:
    """φ moves what ONNX Runtime makes, by more than any rounding."""
    spec = open_bundle(tiny_bundle).manifest.diffusion
    inputs = step_inputs(spec, 2, 3, seed=5)
    inputs["step"][:, CARRY_COLUMN] = 0
    session = make_session(_graph_bytes(tiny_bundle, "step", "float32"), 1)
    made = session.run(None, inputs)[1]
    inputs["step"][:, RESCALE_COLUMN] = 0
    plain = session.run(None, inputs)[1]
    moved = np.abs(made - plain).max(axis=(1, 2, 3))
    assert moved[0] > 1e-2, "the guided sample"
    assert moved[1] == 0, "the one that is not guided"


def test_graph_has_the_documented_interface(tiny_bundle: Path) -> None:
    proto = onnx.load_from_string(_graph_bytes(tiny_bundle, "step", "float32"))
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 20

    def shape(value: Any) -> list[Any]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    assert {v.name: shape(v) for v in proto.graph.input} == {
        "state": [4, "B", 3, 16, 16],
        "noise": ["B", 3, 16, 16],
        "identity": ["R", 16],
        "row": ["R"],
        "mix": [2, "B", "R"],
        "step": ["B", 33],
    }
    assert [v.name for v in proto.graph.output] == ["state_next", "x0", "finite"]
    assert not any(node.metadata_props for node in proto.graph.node)


@pytest.mark.slow
def test_float16_graph_is_typed_half_and_smaller(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = export_bundle(tiny_checkpoint, "float16", tmp_path / "b")
    proto = onnx.load_from_string(bundle.read(bundle.manifest.graphs[0].file))
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    convolutions = [
        kinds[node.input[1]]
        for node in proto.graph.node
        if node.op_type == "Conv" and node.input[1] in kinds
    ]
    half = convolutions.count(onnx.TensorProto.FLOAT16)
    assert half == len(convolutions) - 1, "all but the output head"
    assert 0 < bundle.manifest.graphs[0].max_relative_error <= 1e-2
    again = export_bundle(tiny_checkpoint, "float32", tmp_path / "b")
    assert {g.precision for g in again.manifest.graphs} == {"float16", "float32"}
    sizes = {
        g.precision: again.manifest.file_entry(g.file).size
        for g in again.manifest.graphs
    }
    assert sizes["float16"] < 0.7 * sizes["float32"]


@pytest.mark.slow
def test_bfloat16_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_bundle(tiny_checkpoint, "bfloat16", tmp_path / "b")
    graph = bundle.manifest.graphs[0]
    assert graph.precision == "bfloat16"
    data = bundle.read(graph.file)
    proto = onnx.load_from_string(data)
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    convolutions = [
        kinds[node.input[1]] for node in proto.graph.node if node.op_type == "Conv"
    ]
    narrow = convolutions.count(onnx.TensorProto.BFLOAT16)
    assert narrow == len(convolutions) - 1, "all but the output head"
    # Coarser than float16 by three bits; above 0, so it was really computed so.
    assert 1e-4 < graph.max_relative_error <= 8e-2
    path = tmp_path / "graph.onnx"
    path.write_bytes(data)
    with pytest.raises(EngineError, match="cannot load the graph"):
        make_session(data, 1)
    wide = onnx.load_from_string(widened(path))
    onnx.checker.check_model(wide, full_check=True)
    assert not any(
        t.data_type == onnx.TensorProto.BFLOAT16 for t in wide.graph.initializer
    )
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in wide.graph.initializer}
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).astype(weights[tensor.name].dtype)
        assert (values == weights[tensor.name]).all()


@pytest.mark.slow
def test_a_form_of_its_own_exports(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An island by its name at the beginning of the residual stream, which makes skip
    connections of two types, and every setting that is not the default."""
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'summary = "x"\nprecision = "float16"\nopset = 21\n'
        'islands = ["norm", "softmax", "unet.conv_in", "unet.mid_block.resnets.0"]\n'
        'attention = "plain"\nnormalisation = "native"\nembeddings = "apart"\n'
        'upsampling = "transposed"\ntolerance_step = 1e-2\n'
        "tolerance_trajectory = 2e-2\n"
    )
    bundle = export_bundle(tiny_checkpoint, str(mine), tmp_path / "b")
    graph = bundle.manifest.graphs[0]
    assert 0 < graph.max_relative_error <= 1e-2
    proto = onnx.load_from_string(bundle.read(graph.file))
    kinds = {node.op_type for node in proto.graph.node}
    assert {"GroupNormalization", "ConvTranspose"} <= kinds
    assert "InstanceNormalization" not in kinds


def test_graphs_compute_no_shapes(tiny_bundle: Path) -> None:
    """Nothing in the UNet asks for sizes: they are known but for R, which is first."""
    proto = onnx.load_from_string(_graph_bytes(tiny_bundle, "step", "float32"))
    kinds = [node.op_type for node in proto.graph.node]
    # Two are the solver's, which unfolds coefficients over B samples.
    assert kinds.count("Shape") <= 2
    assert kinds.count("Gemm") <= 5, "embeddings: two, identity, all blocks' at once"


@pytest.mark.slow
def test_bare_unet_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export_unet(tiny_checkpoint, "float32", tmp_path / "b")
    graph = bundle.manifest.graphs[0]
    assert (graph.kind, graph.precision) == ("unet", "float32")
    session = make_session(bundle.read(graph.file), 1)
    loaded = load_checkpoint(tiny_checkpoint)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 16, 16)).astype(np.float32)
    t = np.array([0, 3, 500, 998.5, 999], np.float32)
    identity = rng.normal(size=(5, 16)).astype(np.float32)
    made = session.run(None, {"x": x, "timestep": t, "identity": identity})[0]
    with torch.inference_mode():
        wanted = loaded.network(*map(torch.from_numpy, (x, t, identity)))
    assert made.shape == (5, 6, 16, 16)
    assert compare(made, wanted.numpy()).passes(1e-5)
    with pytest.raises(BuildError, match="no step graph"):
        build_engine(bundle.folder, "cpu", None)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"num_heads": 2}, {"num_head_channels": 16}])
def test_both_head_modes_and_fixed_variance_export(mode: dict[str, int]) -> None:
    spec = tiny_spec(**mode, prediction_type="epsilon")
    recipe = ExportRecipe("test")
    exported = export_graph(tiny_network(spec), spec, recipe)
    assert 0 < exported.worst_error <= recipe.tolerance_step
    assert exported.nodes > 100


@pytest.mark.slow
def test_large_predictions_under_a_small_clip_export() -> None:
    """x0 of an ε model is thousands of times its clip on the first table row; the
    rounding of the one is no error of the other."""
    spec = tiny_spec(prediction_type="epsilon", schedule="cosine")
    network = tiny_network(spec)
    with torch.no_grad():
        network.unet.conv_out.weight.mul_(30)
    exported = export_graph(network, spec, ExportRecipe("test"))
    assert exported.worst_error <= 1e-5
    clip, x0 = exported.golden["step"][:, CLIP_COLUMN], exported.golden["expected.x0"]
    assert np.abs(x0).max(axis=(1, 2, 3)) == pytest.approx(clip, rel=1e-6)
    assert (np.abs(x0).min(axis=(1, 2, 3)) < clip / 2).all(), "not all is clamped"


@pytest.mark.slow
def test_a_graph_that_differs_is_not_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = IdentityUNet.embed

    def other_when_exporting(self: IdentityUNet, t: Any, identity: Any) -> Any:
        out = original(self, t, identity)
        return out * 1.01 if torch.compiler.is_compiling() else out

    monkeypatch.setattr(IdentityUNet, "embed", other_when_exporting)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        export_bundle(tiny_checkpoint, "float32", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_bad_recipes_and_sources(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe 'float99'"):
        export_bundle(tiny_checkpoint, "float99", tmp_path / "b")
    mine = tmp_path / "mine.toml"
    mine.write_text('summary = "x"\nopset = 9\n')
    with pytest.raises(RecipeError, match="opset must be"):
        export_bundle(tiny_checkpoint, str(mine), tmp_path / "b")
    with pytest.raises(RecipeError, match="no recipe 'moon'"):
        build_engine(tiny_checkpoint, "moon", tmp_path / "b")
    with pytest.raises(InputError, match="neither a CHECKPOINT nor a BUNDLE"):
        build_engine(tmp_path, "cpu", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_building_twice_keeps_one_engine_and_one_graph(bundle_copy: Path) -> None:
    built = build_engine(bundle_copy, "cpu", None)
    assert len(built.bundle.manifest.engines) == 1
    assert len(built.bundle.manifest.graphs) == 1
    built.bundle.verify()
    with pytest.raises(InputError, match="built in place"):
        build_engine(bundle_copy, "cpu", bundle_copy.parent / "other")
