"""Memory by model size and batch: the estimate, runs, and what is done with it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from models import tiny_model

from id3pm_deploy import memory
from id3pm_deploy.backends.memory_limit import limit_memory
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.cli import main
from id3pm_deploy.enlarging import Enlarging
from id3pm_deploy.errors import EngineError
from id3pm_deploy.generate import Conditions, SampleSettings
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.memory import Memory, check_memory, graph_memory, live_numbers
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.solvers import SolverSettings

sample_command: Any = importlib.import_module("id3pm_deploy.commands.sample")

ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "benchmarks" / "memory_check_child.py"
MARGIN = 0.2
NEEDED = Memory(base=100, weights=200, loading=250, activations=600, buffers=100)


def test_the_total_is_the_larger_of_loading_and_running() -> None:
    assert NEEDED.total == 1000
    assert Memory(100, 200, 950, 600, 100).total == 1050


def test_live_numbers_of_a_model_by_hand() -> None:
    """16x16, channels 32 and 64, one block: the finest level on the way up, whose
    input is the 64 channels below and a skip of 32, beside the skip that is left."""
    finest = 16 * 16
    assert live_numbers(tiny_model()) == 4 * (64 + 32) * finest + 32 * finest


def test_attention_counts_and_more_so_where_it_is_cast() -> None:
    model = tiny_model(image_size=64, attention_resolutions=(32,), num_head_channels=16)
    scores = 64 // 16 * 32**4
    plain = live_numbers(model)
    assert plain > 2 * scores
    assert live_numbers(model, cast=True) == plain + scores


def test_activations_grow_with_rows_and_weights_do_not(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    graph = bundle.graph("step", "float32")
    assert graph is not None
    one, four = (graph_memory(bundle, graph, n, 2 * n) for n in (1, 4))
    assert four.activations == 4 * one.activations
    assert four.buffers == 4 * one.buffers
    assert (four.weights, four.base) == (one.weights, one.base)


@pytest.mark.parametrize(
    ("free", "swap", "warned", "refused"),
    [
        (None, 0, False, False),
        (1000, 0, False, False),
        (999, 0, True, False),
        (500, 0, True, False),
        (499, 0, False, True),
        (100, 400, True, False),
        (349, 0, False, True),
    ],
)
def test_what_is_warned_of_and_what_refused(
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    swap: int,
    warned: bool,
    refused: bool,
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    monkeypatch.setattr(memory, "free_swap", lambda: swap)
    said: list[str] = []
    if refused:
        with pytest.raises(EngineError, match="far too little memory") as caught:
            check_memory(NEEDED, said.append, ["--this", "--that"])
        enough = NEEDED.base + NEEDED.loading <= (free or 0)
        told = "use --this or --that" if enough else "end other programs"
        assert caught.value.fix.startswith(told)
    else:
        check_memory(NEEDED, said.append)
    assert bool(said) == warned


def test_sample_refuses_before_it_loads(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 8 << 20)
    monkeypatch.setattr(memory, "free_swap", lambda: 0)
    options = ["--unconditional", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, ["sample", str(tiny_bundle), *options])
    assert done.exit_code == 1
    assert "far too little memory" in done.stderr
    assert "8 MiB are free" in done.stderr
    assert not (tmp_path / "out").exists()


def stage_of(bundle: Path, batch_size: int, guidance: GuidanceSettings) -> Enlarging:
    """A model with settings for up to 8 samples."""
    model = open_model(bundle)
    solver = SolverSettings("ddim", 2)
    settings = SampleSettings(solver, guidance, batch_size=batch_size)
    identity = np.ones((8, model.spec.identity.dim), np.float32)
    wanted = Conditions(identity, ("id",) * 8)
    return Enlarging(model, lambda: open_engine(model, "onnxruntime"), settings, wanted)


VALUES: dict[str, Any] = {"backend": "auto", "precision": None}
SCALE_2 = GuidanceSettings(2.0)
SEQUENTIAL = GuidanceSettings(2.0, rows="sequential")


@pytest.mark.parametrize(
    ("batch_size", "guidance", "rows", "less"),
    [
        (4, SCALE_2, 8, ["a smaller --batch-size", "--guidance-rows sequential"]),
        (4, SEQUENTIAL, 4, ["a smaller --batch-size"]),
        (4, GuidanceSettings(1.0), 4, ["a smaller --batch-size"]),
        (1, SCALE_2, 2, ["--guidance-rows sequential"]),
        (1, SEQUENTIAL, 1, []),
        (64, SEQUENTIAL, 8, ["a smaller --batch-size"]),
    ],
)
def test_what_would_take_less(
    tiny_bundle: Path,
    batch_size: int,
    guidance: GuidanceSettings,
    rows: int,
    less: list[str],
) -> None:
    stage = stage_of(tiny_bundle, batch_size, guidance)
    of = (stage.model, stage.settings, stage.wanted)
    found = sample_command.stage_memory(*of, VALUES, "--batch-size")
    assert found is not None
    bundle = open_bundle(tiny_bundle)
    graph = bundle.graph("step", "float32")
    assert graph is not None
    samples = min(batch_size, 8)
    assert found == (graph_memory(bundle, graph, samples, rows), less)


@pytest.mark.parametrize(("first", "second"), [(2, 4), (4, 2)])
def test_of_two_stages_the_larger_counts(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(memory, "check_memory", lambda *given: told.append(given))
    base, large = (stage_of(tiny_bundle, n, SEQUENTIAL) for n in (first, second))
    of = (base.model, base.settings, base.wanted)
    sample_command.check_stages(*of, large, VALUES)
    ((needed, _, less),) = told
    bundle = open_bundle(tiny_bundle)
    graph = bundle.graph("step", "float32")
    assert graph is not None
    assert needed == graph_memory(bundle, graph, 4, 4)
    assert less == [f"a smaller --{'sr-' * (second > first)}batch-size"]


def test_inspect_tells_it(tiny_bundle: Path) -> None:
    options = ["--memory", "--batch-size", "4", "--json"]
    done = CliRunner().invoke(main, ["inspect", str(tiny_bundle), *options])
    (found,) = json.loads(done.stdout)["memory"]
    assert (found["samples"], found["unet_rows"]) == (4, 8)
    parts = ("weights", "activations", "buffers")
    assert found["total"] == found["base"] + sum(found[name] for name in parts)


def test_no_block_is_planned_beside_the_first_run() -> None:
    runtime: Any = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    assert options.enable_mem_pattern
    limit_memory(runtime, options)
    assert not options.enable_mem_pattern


@pytest.fixture(scope="module")
def faces_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's."""
    from id3pm_deploy.builders.build import build_engine

    folder = tmp_path_factory.mktemp("faces") / "bundle"
    build_engine(ROOT / "id3pm_deploy" / "assets" / "faces32", "cpu", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_bundle", "faces_bundle"])
@pytest.mark.parametrize("samples", [1, 12])
def test_a_run_takes_what_is_predicted(
    name: str, samples: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    command = [sys.executable, str(CHILD), "sample", str(folder), "--unconditional"]
    command += ["--count", str(samples), "--batch-size", str(samples)]
    command += ["--solver", "ddim", "--steps", "3", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    bundle = open_bundle(folder)
    graph = bundle.graph("step", "float32")
    assert graph is not None
    predicted = graph_memory(bundle, graph, samples, samples).total
    measured = int(done.stdout.split()[-1])
    assert abs(predicted / measured - 1) < MARGIN, (predicted, measured)
