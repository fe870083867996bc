"""Parity as a whole: it passes where it should and fails where it must."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import tiny_network

from id3pm_deploy.errors import BundleError, InputError
from id3pm_deploy.generate import SampleSettings
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.parity import random_conditions, run_parity
from id3pm_deploy.parity_run import ParityRequest, parity_to_folder
from id3pm_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from id3pm_deploy.report import Tolerances
from id3pm_deploy.solvers import SolverSettings

FLOAT32 = Tolerances(step=1e-5, trajectory=1e-4)


def _settings(solver: str, steps: int, count: int = 2) -> SampleSettings:
    return SampleSettings(SolverSettings(solver, steps), guidance=2.0, count=count)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp-2m"])
def test_onnxruntime_agrees_with_torch_and_with_diffusers(
    tiny_bundle: Path, tiny_checkpoint: Path, solver: str
) -> None:
    model = open_model(tiny_bundle)
    network = load_checkpoint(tiny_checkpoint).network
    settings = _settings(solver, 6)
    wanted = random_conditions(model.spec, 2, seed=3)
    with open_engine(model) as engine:
        result = run_parity(engine, model, network, settings, wanted, FLOAT32)
    report = result.report
    assert report.passed, report.failures
    assert len(report.per_step) == 6
    assert all(step.single is not None for step in report.per_step)
    assert report.oracle is not None
    assert 0 < report.oracle.max_rel <= 1e-4
    assert 0 < report.final.max_rel <= 1e-4
    assert report.uint8_max <= 1
    assert result.engine.std() > 5


def test_another_network_fails(tiny_bundle: Path) -> None:
    model = open_model(tiny_bundle)
    wanted = random_conditions(model.spec, 2, seed=3)
    with open_engine(model) as engine:
        result = run_parity(
            engine,
            model,
            tiny_network(model.spec, seed=5),
            _settings("ddim", 3),
            wanted,
            FLOAT32,
        )
    assert not result.report.passed
    assert any("one step" in failure for failure in result.report.failures)


def test_a_slightly_wrong_weight_is_noticed(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    model = open_model(tiny_bundle)
    network = load_checkpoint(tiny_checkpoint).network
    with torch.no_grad():
        network.identity_projection.weight *= 1.001
    wanted = random_conditions(model.spec, 1, seed=3)
    with open_engine(model) as engine:
        result = run_parity(
            engine, model, network, _settings("ddim", 3), wanted, FLOAT32
        )
    assert not result.report.passed


def test_torch_in_half_is_compared_with_float32(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = open_model(tiny_checkpoint)
    request = ParityRequest(
        tiny_checkpoint,
        None,
        _settings("dpmpp-2m", 4),
        tolerance_step=0.05,
        tolerance_trajectory=0.5,
    )
    with open_engine(model, "torch", precision="float16") as engine:
        report = parity_to_folder(tmp_path / "half", model, engine, request)
    assert report.passed, report.failures
    assert report.oracle is not None
    assert report.oracle.max_rel <= 1e-4
    assert 1e-5 < report.final.max_rel < 0.5
    names = {path.name for path in (tmp_path / "half").iterdir()}
    assert names == {"parity.json", "parity.png", "index.html"}
    found = json.loads((tmp_path / "half" / "parity.json").read_text())
    assert found["passed"] is True
    assert "float16" in found["subject"]["Engine"]
    assert "float32" in found["subject"]["Reference"]


def test_a_report_does_not_go_into_a_folder_of_yours(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    model = open_model(tiny_checkpoint)
    request = ParityRequest(tiny_checkpoint, None, _settings("ddim", 2))
    with (
        open_engine(model, "torch") as engine,
        pytest.raises(InputError, match="something else than an earlier report"),
    ):
        parity_to_folder(tmp_path, model, engine, request)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt"}


def test_a_bundle_of_another_checkpoint_is_refused(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    model = open_model(tiny_bundle)
    other = tmp_path / "other"
    spec = model.spec
    save_checkpoint(other, spec, tiny_network(spec, seed=9).state_dict())
    request = ParityRequest(other, None, _settings("ddim", 2))
    with (
        open_engine(model) as engine,
        pytest.raises(BundleError, match="not made from"),
    ):
        parity_to_folder(tmp_path / "out", model, engine, request)
    assert not (tmp_path / "out").exists()


def test_random_conditions_are_nobodys(tiny_bundle: Path) -> None:
    spec = open_model(tiny_bundle).spec
    found = random_conditions(spec, 3, seed=1)
    norms = np.linalg.norm(found.identity, axis=1)
    np.testing.assert_allclose(norms, np.sqrt(spec.identity.dim), rtol=1e-6)
    assert found.ids == ("random",) * 3
    with pytest.raises(InputError, match="at least 1"):
        random_conditions(spec, 0, seed=1)
