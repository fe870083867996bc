"""The one contract over the engines that are here; see ``engine_contract.py``.

TensorRT's, over a stand-in for the driver, is in ``test_tensorrt_engine.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_contract import EngineContract, Make
from fakes.rig import FakeRig, torch_step

from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.backends.torch_rig import TorchRig
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.spec import DiffusionSpec


class TestOnnxRuntime(EngineContract):
    company = 0.0

    @pytest.fixture
    def make(self, tiny_bundle: Path) -> Make:
        return lambda: open_engine(open_model(tiny_bundle))

    @staticmethod
    def addresses(engine: Engine) -> dict[object, int] | None:
        assert isinstance(engine, OnnxRuntimeEngine)
        assert engine._samples is not None
        found: dict[object, int] = {
            i: state.ctypes.data for i, state in enumerate(engine._samples.states)
        }
        for name, array in engine._samples.arrays.items():
            found[name] = array.ctypes.data
        for rows, held in engine._by_rows.items():
            for name, array in held.arrays.items():
                found[name, rows] = array.ctypes.data
        return found


class TestTorch(EngineContract):
    @pytest.fixture
    def make(self, tiny_checkpoint: Path, spec: DiffusionSpec) -> Make:
        network = load_checkpoint(tiny_checkpoint).network
        return lambda: TorchEngine(network, step_shapes(spec))


class OverTheFakeRig(EngineContract):
    replay_rows, keeps, can_capture = 3, True, 10_000

    @pytest.fixture
    def make(self, tiny_checkpoint: Path, spec: DiffusionSpec) -> Make:
        step = torch_step(load_checkpoint(tiny_checkpoint).network)
        shapes = step_shapes(spec)

        def made() -> Engine:
            rig = FakeRig(shapes, step, keeps=self.keeps, can_capture=self.can_capture)
            return ReplayEngine(rig, self.replay_rows)

        return made

    @staticmethod
    def addresses(engine: Engine) -> dict[object, int] | None:
        assert isinstance(engine.rig, FakeRig)
        places = engine.rig.addresses
        assert all(len(one) == 1 for one in places.values())
        return {key: min(one) for key, one in places.items()}


class TestReplayed(OverTheFakeRig):
    pass


class TestReplayedByTheRow(OverTheFakeRig):
    replay_rows = 1


class TestReplayedOnADeviceWithoutGraphs(OverTheFakeRig):
    can_capture = 0


class TestReplayedOverBuffersThatMove(OverTheFakeRig):
    keeps = False

    @staticmethod
    def addresses(engine: Engine) -> dict[object, int] | None:
        return None


class TestTorchRig(EngineContract):
    """On a CPU, where nothing is captured."""

    @pytest.fixture
    def make(self, tiny_checkpoint: Path, spec: DiffusionSpec) -> Make:
        network = load_checkpoint(tiny_checkpoint).network
        shapes = step_shapes(spec)
        return lambda: ReplayEngine(TorchRig(network, shapes, device="cpu"), 3)


@pytest.mark.gpu
class TestTorchOnAGpu(EngineContract):
    company = 1e-3
    tolerance = 1e-3

    @pytest.fixture
    def make(self, tiny_checkpoint: Path) -> Make:
        return lambda: open_engine(open_model(tiny_checkpoint), "torch", device="cuda")


@pytest.mark.gpu
class TestTorchOnAGpuWithoutGraphs(TestTorchOnAGpu):
    @pytest.fixture
    def make(self, tiny_checkpoint: Path) -> Make:
        model = open_model(tiny_checkpoint)
        return lambda: open_engine(model, "torch", device="cuda", replay_rows=-1)
