"""Engines on a GPU, and what of them can be tried without one.

The contract over torch on a GPU is in ``test_engine_contract.py``. Here: the same over
stand-ins, ONNX Runtime's providers, and what only a GPU can show (marked ``gpu``).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from engine_contract import EngineContract, Make
from fakes.torch_cuda import FakeCuda
from models import random_identity

from id3pm_deploy.backends import torch_rig
from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.ort_device import OnnxDeviceEngine
from id3pm_deploy.backends.ort_providers import CPU, Target
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.backends.torch_rig import TorchRig
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.checkpoint_config import load_spec
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import EngineError
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.spec import DiffusionSpec

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(_FOLDER))
gpu_evidence: Any = importlib.import_module("gpu_evidence")

Float32 = npt.NDArray[np.float32]


class TestTorchReplayedOverAStandIn(EngineContract):
    """Everything but CUDA itself: graphs are captured and replayed on the CPU."""

    @pytest.fixture
    def make(
        self,
        tiny_checkpoint: Path,
        spec: DiffusionSpec,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Make:
        monkeypatch.setattr(torch_rig, "_CUDA", FakeCuda())
        monkeypatch.setattr(TorchRig, "_find_gpu", lambda self: None)
        network = load_checkpoint(tiny_checkpoint).network

        def made() -> Engine:
            rig = TorchRig(network, step_shapes(spec), device="cpu")
            rig._on_gpu = True
            return ReplayEngine(rig, 3)

        return made


class TestOnnxRuntimeWithArraysOfItsOwn(EngineContract):
    """The engine of ONNX Runtime's GPU providers, on the CPU."""

    company = 0.0

    @pytest.fixture
    def make(self, tiny_bundle: Path) -> Make:
        bundle = open_bundle(tiny_bundle)
        graph = bundle.graph("step", "float32")
        assert graph is not None
        data, shapes = bundle.read(graph.file), step_shapes(bundle.manifest.diffusion)
        target = Target(CPU, "cpu")
        return lambda: OnnxDeviceEngine(data, shapes, "float32", target)

    @staticmethod
    def addresses(engine: Engine) -> dict[object, int] | None:
        assert isinstance(engine, OnnxDeviceEngine)
        held = engine._buffers()
        found: dict[object, int] = {
            i: one.data_ptr() for i, one in enumerate(held.states)
        }
        found |= {name: one.data_ptr() for name, one in held.values.items()}
        for rows, its in engine._by_rows.items():
            for name, one in its.values.items():
                found[name, rows] = one.data_ptr()
        return found


@pytest.mark.gpu
class TestOnnxRuntimeOnAGpu(EngineContract):
    company = 1e-3
    tolerance = 1e-3

    @pytest.fixture
    def make(self, tiny_bundle: Path) -> Make:
        try:
            open_engine(open_model(tiny_bundle), "onnxruntime-cuda").close()
        except EngineError as error:
            pytest.skip(error.what)
        return lambda: open_engine(open_model(tiny_bundle), "onnxruntime-cuda")


# What only a GPU shows


def pictures(engine: Engine, spec: DiffusionSpec, seed: int = 3) -> Float32:
    table = solver_table(spec, SolverSettings("ddpm", 9))
    job = SampleJob(
        random_identity(2, spec), table, GuidanceSettings(2.0), SeededNoise(seed)
    )
    found = run_trajectory(engine, job, [0, 1])
    assert not found.failed.any()
    return found.images


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 1e-4), ("float16", 5e-2)]
)
def test_a_gpus_pictures_are_the_references(
    tiny_checkpoint: Path, precision: str, tolerance: float
) -> None:
    spec, model = load_spec(tiny_checkpoint), open_model(tiny_checkpoint)
    with open_engine(model, "torch") as reference:
        expected = pictures(reference, spec)
    with open_engine(model, "torch", device="cuda", precision=precision) as engine:
        assert compare(pictures(engine, spec), expected).passes(tolerance)
        assert engine.replay_note.startswith("graphs of")
        assert "cuda:0" in engine.info.device


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_replayed_trajectories_are_those_of_row_by_row(
    tiny_checkpoint: Path, precision: str, rows: int
) -> None:
    spec, model = load_spec(tiny_checkpoint), open_model(tiny_checkpoint)
    made = []
    for replay_rows in (-1, rows):
        with open_engine(
            model,
            "torch",
            device="cuda",
            precision=precision,
            replay_rows=replay_rows,
        ) as engine:
            made.append([pictures(engine, spec, seed) for seed in (3, 4)])
            assert ("no graphs" in engine.replay_note) == (replay_rows < 0)
    for plain, replayed in zip(*made, strict=True):
        np.testing.assert_array_equal(replayed, plain)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_compiled_step_is_replayed(tiny_checkpoint: Path) -> None:
    spec, model = load_spec(tiny_checkpoint), open_model(tiny_checkpoint)
    with open_engine(model, "torch") as reference:
        expected = pictures(reference, spec)
    with open_engine(model, "torch", device="cuda", compiled=True) as engine:
        assert compare(pictures(engine, spec), expected).passes(1e-3)
        assert engine.replay_note.startswith("graphs of")


# The script for a lent machine


def test_the_evidence_script_runs_from_start_to_end(tmp_path: Path) -> None:
    given = ["--dry-run", "--device", "cpu", "--precision", "float32"]
    ran = CliRunner().invoke(
        gpu_evidence.command,
        [*given, "--steps", "3", "--results", str(tmp_path)],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0
    found = json.loads((tmp_path / "gpu-evidence-toy-dry.json").read_text())
    measured = found["measured"]
    names = [name for name in measured if name.startswith("replay: ")]
    assert len(names) == 4, "without graphs, and with 1, 2 and 3 rows in one"
    for name in ("parity: torch eager float32", *names):
        assert measured[name]["status"] == "ok", name
    assert measured["parity: torch eager float32"]["end_relative_error"] < 1e-5
    for name in names:
        assert 0.0 <= measured[name]["host_gap_median"] < 1.0
    missing = measured["parity: onnxruntime-cuda float32"]["status"]
    assert missing == "ok" or "has no CUDAExecutionProvider" in missing


def test_the_evidence_script_stops_in_time(tmp_path: Path) -> None:
    given = ["--dry-run", "--device", "cpu", "--budget", "0", "--part", "replay"]
    ran = CliRunner().invoke(
        gpu_evidence.command,
        [*given, "--results", str(tmp_path)],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0
    found = json.loads((tmp_path / "gpu-evidence-toy-dry.json").read_text())
    states = {one["status"] for one in found["measured"].values()}
    assert states == {"not run: out of time"}


def test_rows_in_graphs() -> None:
    assert gpu_evidence.rows_in_graphs(9) == [1, 2, 4, 8, 9]
    assert gpu_evidence.rows_in_graphs(8) == [1, 2, 4, 8]
    assert gpu_evidence.rows_in_graphs(1) == [1]


def test_the_host_gap_is_what_lies_between_chunks() -> None:
    class Rig:
        _on_gpu = False

        def stage(self, *_: Any) -> None: ...

        def finish(self, *_: Any) -> None: ...

    watched = gpu_evidence.Watched(Rig())
    watched.chunks = [(0.0, 2.0), (3.0, 5.0), (5.0, 10.0)]
    assert watched.take() == (10.0, 0.1)
    assert watched.chunks == []
