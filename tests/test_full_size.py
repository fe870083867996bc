"""The script that takes full-size models through all stages, on toys."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models import tiny_spec

from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.errors import InputError
from id3pm_deploy.reference.guided_diffusion import convert_guided_diffusion
from id3pm_deploy.spec import NO_IDENTITY, DiffusionSpec, IdentitySpec

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(_FOLDER))
full_size: Any = importlib.import_module("full_size")
child: Any = importlib.import_module("full_size_child")
machine: Any = importlib.import_module("machine")
process_tree: Any = importlib.import_module("process_tree")
random_model: Any = importlib.import_module("random_model")

TINY = """
title = "tiny, random weights"
prediction_type = "epsilon"
[model]
image_size = 16
base_channels = 32
channel_multipliers = [1, 2]
residual_blocks = 1
attention_resolutions = [8]
num_head_channels = 16
[identity]
dim = 16
model_name = "random vectors"
"""


@pytest.mark.parametrize(
    ("name", "weights"),
    [("identity64-full", 295_530_438), ("superres256", 311_027_910)],
)
def test_the_recipes_are_the_published_models(name: str, weights: int) -> None:
    assert random_model.parameter_count(random_model.load_model(name)) == weights


@pytest.mark.parametrize(
    "spec",
    [
        tiny_spec(learned_variance=True, schedule="cosine"),
        tiny_spec(
            num_heads=4,
            image_size=32,
            low_res_size=8,
            attention_resolutions=(16,),
            identity=NO_IDENTITY,
            schedule="linear",
        ),
    ],
)
def test_the_source_is_imported_as_the_same_model(spec: DiffusionSpec) -> None:
    identity = spec.identity
    if identity.dim:
        identity = IdentitySpec(16, "random vectors", None, "raw")
    theirs = child.their_tensors(spec)
    made = convert_guided_diffusion(child.flags_of(spec), theirs, identity)
    assert made.spec.model == spec.model
    assert made.spec.schedule == spec.schedule
    wanted = random_model.random_network(spec).state_dict()
    assert made.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(made.tensors[name], tensor), name


_TREE = """
import subprocess, sys, time
held = b"x" * 80_000_000
code = "import time; held = b'x' * 60_000_000; time.sleep(2)"
subprocess.run([sys.executable, "-c", code], check=True)
print("done")
sys.exit(3)
"""


def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TREE]
    ran = process_tree.run_measured(command, tmp_path / "log", tmp_path)
    assert (ran.status, ran.output.strip()) == (3, "done")
    assert 140e6 < ran.peak_bytes < 300e6
    assert 140e6 < ran.anonymous_bytes <= ran.peak_bytes
    assert ran.seconds > 2 > ran.processor_seconds > 0


def test_a_command_that_never_ends_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    ran = process_tree.run_measured(command, tmp_path / "log", tmp_path, limit=0.5)
    assert ran.status == -9
    assert ran.seconds < 30


def test_goals_name_what_was_missed() -> None:
    good = {"status": "ok", "peak_bytes": 7 << 30, "seconds": 119.0}
    assert full_size.goal("export float32", good) == "met"
    assert full_size.goal("parity", good | {"seconds": 999.0}) == "met"
    slow = good | {"seconds": 121.0}
    assert full_size.goal("export float16", slow) == "missed: time"
    large = slow | {"peak_bytes": (8 << 30) + 1, "status": "exit status 2"}
    found = full_size.goal("export float16", large)
    assert found == "missed: failed, memory, time"


def test_stages_are_chosen_by_name_and_keep_their_order() -> None:
    names = [s.name for s in full_size.chosen_stages(["parity", "import"])]
    assert names == ["import", "parity"]
    assert len(full_size.chosen_stages([])) == len(full_size.STAGES) == 6
    with pytest.raises(InputError, match="no stage 'exprt'"):
        full_size.chosen_stages(["exprt"])


def _run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    (tmp_path / "tiny.toml").write_text(TINY)
    given = ["--model", str(tmp_path / "tiny.toml"), "--work", str(tmp_path / "work")]
    results = ["--results", str(tmp_path / "results")]
    done = CliRunner().invoke(full_size.command, [*given, *results, *arguments])
    kept = json.loads((tmp_path / "results" / "full-size-tiny.json").read_text())
    assert str(tmp_path) not in json.dumps(kept)
    return done.exit_code, kept["measured"], done.output


@pytest.mark.slow
def test_a_stage_that_lacks_something_says_so(tmp_path: Path) -> None:
    status, measured, output = _run(tmp_path, "--stage", "export float32")
    assert status == 1
    assert measured == {"export float32": {"status": "not run: there is no checkpoint"}}
    assert "| export float32 | not run: there is no checkpoint" in output


@pytest.mark.slow
def test_dry_run_of_the_import(tmp_path: Path) -> None:
    status, measured, output = _run(tmp_path, "--stage", "import", "--keep")
    found = measured["import"]
    assert (status, found["status"], found["goal"]) == (0, "ok", "met")
    size = (tmp_path / "work" / "checkpoint" / "model.safetensors").stat().st_size
    assert found["bytes_made"] == size > 3e6
    assert found["peak_bytes"] > found["anonymous_bytes"] > 50e6
    assert "| import | " in output


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX"
)
@pytest.mark.skipif(
    (machine.facts()["memory_gib"] or 0) < 10, reason="needs 10 GiB of memory"
)
def test_the_full_size_model_becomes_a_plan(tmp_path: Path) -> None:
    """Once for real: 295.5 M parameters, imported, exported in float16 and built."""
    stages = ("import", "export float16", "build rtx")
    work, results = tmp_path / "work", tmp_path / "results"
    command = ["--work", str(work), "--results", str(results), "--keep"]
    for name in stages:
        command += ["--stage", name]
    done = CliRunner().invoke(full_size.command, command)
    assert done.exit_code == 0, done.output
    kept = json.loads((results / "full-size-identity64-full.json").read_text())
    for name in stages:
        assert kept["measured"][name]["status"] == "ok"
        assert kept["measured"][name]["peak_bytes"] <= full_size.MOST_MEMORY
    bundle = open_bundle(work / "bundle")
    (entry,) = bundle.manifest.plans
    assert bundle.manifest.file_entry(entry.file).size > 590e6
    work_by_type = entry.layer_types["multiply_accumulates"]["CONVOLUTION"]
    # 109.7 GMAC a row, R = 8: the convolutions are most of it.
    assert 8 * 60e9 < work_by_type["HALF"] < 8 * 109.7e9
    assert work_by_type["HALF"] > 0.99 * sum(work_by_type.values())
    shutil.rmtree(work)
