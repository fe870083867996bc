"""``id3pm-deploy benchmark`` on a tiny model, and what it does with bad input."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from id3pm_deploy.backends import onnxruntime as engine_module
from id3pm_deploy.benchmark import plain_runtime
from id3pm_deploy.benchmark import run as run_module
from id3pm_deploy.benchmark.case import CaseSettings, open_case, settings_from_json
from id3pm_deploy.benchmark.cold_start import cold_start
from id3pm_deploy.benchmark.columns import BY_NAME, COLUMNS
from id3pm_deploy.benchmark.plain_runtime import PlainRuntimeRunner
from id3pm_deploy.benchmark.rates import Rates
from id3pm_deploy.benchmark.result import load_result
from id3pm_deploy.cli import main
from id3pm_deploy.errors import EngineError
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.solvers import SolverSettings

CPU = "onnxruntime,plain-onnxruntime"
QUICK = ["--steps", "3", "--rounds", "2", "--batch-sizes", "1,2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates take seconds; here they are of a machine that does not exist."""
    rates = Rates("CPU", 1e12, 1e11, "made up", {})
    monkeypatch.setattr(run_module, "cpu_rates", lambda threads: rates)


def _benchmark(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["benchmark", *map(str, words)])


def test_a_device_measures_what_it_has(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _benchmark(tiny_bundle, "--columns", CPU, *QUICK, "--out", out)
    assert done.exit_code == 0, done.output
    found = load_result(out)
    assert list(found["columns"]) == CPU.split(",")
    for column in found["columns"].values():
        assert column["status"] == "timed"
        assert column["step_error"] < 1e-5
        start = column["cold_starts"][0]
        assert 0 < start["opened"] < start["seconds"] < 60
        assert start["peak_bytes"] > 10 << 20
        for samples in ("1", "2"):
            batch = column["batches"][samples]
            assert batch["unet_rows"] == 2 * int(samples)
            assert [len(of) for of in batch["row_seconds"]] == [5, 5]
            assert [len(of) for of in batch["trajectory_seconds"]] == [1, 1]
            assert batch["pictures_per_second"]["value"] > 0
            assert batch["limit_share"]["value"] > 0
    ours, plain = found["columns"].values()
    assert 0 <= ours["batches"]["1"]["outside_engine"]["value"] < 1
    assert plain["batches"]["1"]["outside_engine"] is None
    assert plain["trajectory_errors"]["2"] < 1e-4
    assert found["reference"] == {"1": "onnxruntime", "2": "onnxruntime"}
    page = (out / "benchmark.md").read_text()
    assert page in done.stdout
    assert "A dry run" in page
    assert str(tmp_path) not in (out / "benchmark.json").read_text()


def test_columns_that_cannot_run_stay_with_their_reason(tiny_bundle: Path) -> None:
    words = [*QUICK, "--cold-starts", "0", "--json"]
    done = _benchmark(tiny_bundle, *words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found["columns"]) == [column.name for column in COLUMNS]
    assert found["columns"]["onnxruntime"]["status"] == "timed"
    for name in ("torch", "eager-float32", "compiled", "diffusers-float32"):
        column = found["columns"][name]
        assert column["status"] == "absent"
        assert "--checkpoint" in column["reason"]
    if not found["machine"]["gpus"]:
        for name in ("tensorrt", "torch-replayed", "eager-float16", "compiled-graphs"):
            assert found["columns"][name]["reason"].startswith("no NVIDIA")


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_pytorch_and_diffusers_compute_the_same(
    tiny_bundle: Path, tiny_checkpoint: Path, solver: str
) -> None:
    names = "onnxruntime,torch,eager-float32,diffusers-float32"
    words: list[str | Path] = ["--checkpoint", tiny_checkpoint, "--columns", names]
    words += ["--solver", solver]
    words += ["--device", "cpu", "--cold-starts", "0", "--spacing", "leading"]
    done = _benchmark(tiny_bundle, *words, *QUICK, "--steps", "4", "--json")
    assert done.exit_code == 0, done.output
    columns = json.loads(done.stdout)["columns"]
    for name in names.split(",")[1:]:
        assert columns[name]["status"] == "timed", columns[name]["reason"]
        assert columns[name]["trajectory_errors"]["2"] < 1e-4
    assert columns["eager-float32"]["step_error"] < 1e-5


def test_what_diffusers_users_would_not_write_has_a_reason(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    case = open_case(
        tiny_bundle,
        tiny_checkpoint,
        CaseSettings(SolverSettings("dpmpp-2m", 4), device="cpu"),
    )
    with pytest.raises(EngineError, match="ddpm and ddim"):
        BY_NAME["diffusers-float32"].open(case)
    with pytest.raises(EngineError, match="no fair baseline"):
        BY_NAME["diffusers-float16"].open(
            open_case(tiny_bundle, tiny_checkpoint, CaseSettings(device="cpu"))
        )
    with pytest.raises(EngineError, match="replayed on a CPU"):
        BY_NAME["torch-replayed"].open(case)


# Wrong, dead and absent


def test_a_column_with_another_trajectory_is_not_timed(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PlainRuntimeRunner.check
    timed: list[int] = []

    def wrong(self: PlainRuntimeRunner) -> Any:
        return right(self) + np.float32(1e-3)

    monkeypatch.setattr(PlainRuntimeRunner, "check", wrong)
    monkeypatch.setattr(PlainRuntimeRunner, "run_row", lambda self: timed.append(1))
    words = ["--columns", CPU, *QUICK, "--cold-starts", "0", "--json"]
    done = _benchmark(tiny_bundle, *words)
    assert done.exit_code == 1
    assert "plain-onnxruntime computes something else" in done.stderr
    columns = json.loads(done.stdout)["columns"]
    assert columns["plain-onnxruntime"]["status"] == "wrong"
    assert columns["plain-onnxruntime"]["batches"] == {}
    assert columns["onnxruntime"]["status"] == "timed"
    assert timed == []


def test_a_column_with_another_step_is_no_reference(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine_module.OnnxRuntimeEngine.state

    def wrong(self: Any) -> Any:
        return run(self) * np.float32(1.001)

    monkeypatch.setattr(engine_module.OnnxRuntimeEngine, "state", wrong)
    words = ["--columns", CPU, *QUICK, "--cold-starts", "0", "--json"]
    done = _benchmark(tiny_bundle, *words)
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["columns"]["onnxruntime"]["status"] == "wrong"
    assert "golden" in found["columns"]["onnxruntime"]["reason"]
    assert found["reference"]["1"] == "plain-onnxruntime"


def test_a_column_that_runs_out_of_memory_leaves_the_others(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = plain_runtime.PlainRuntimeRunner.run_trajectory

    def dies(self: PlainRuntimeRunner) -> None:
        if self._samples == 2:
            raise MemoryError("not enough for two")
        right(self)

    monkeypatch.setattr(PlainRuntimeRunner, "run_trajectory", dies)
    words = ["--columns", CPU, *QUICK, "--cold-starts", "0", "--json"]
    done = _benchmark(tiny_bundle, *words)
    assert done.exit_code == 0, done.output
    columns = json.loads(done.stdout)["columns"]
    assert "row_ms" in columns["plain-onnxruntime"]["batches"]["1"]
    assert columns["plain-onnxruntime"]["batches"]["2"] == {
        "reason": "not enough for two"
    }
    assert "row_ms" in columns["onnxruntime"]["batches"]["2"]


def test_a_process_that_is_killed_is_a_reason(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = open_case(tiny_bundle, None, CaseSettings(SolverSettings("ddpm", 2)))
    module = importlib.import_module("id3pm_deploy.benchmark.cold_start")
    boot = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(module, "_BOOT", boot)
    with pytest.raises(EngineError, match="SIGKILL, as the system does"):
        cold_start(case, "onnxruntime")
    monkeypatch.setattr(module, "_BOOT", "raise SystemExit('gone')")
    with pytest.raises(EngineError, match="status 1: gone"):
        cold_start(case, "onnxruntime")


def test_where_nothing_can_be_timed_it_fails(tiny_bundle: Path) -> None:
    words = ["--columns", "eager-float32", *QUICK, "--cold-starts", "0"]
    done = _benchmark(tiny_bundle, *words)
    assert done.exit_code == 1
    assert "no column could be timed" in done.stderr


# Input


def test_bad_input_is_refused_before_any_work(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    for words, said in (
        ([tmp_path / "none"], "neither a CHECKPOINT nor a BUNDLE"),
        ([tiny_checkpoint], "benchmark takes a BUNDLE"),
        ([tiny_bundle, "--columns", "gpu"], "no column 'gpu'"),
        ([tiny_bundle, "--rounds", "0"], "rounds must be from 1"),
        ([tiny_bundle, "--batch-sizes", "0"], "from 1 to 64"),
        ([tiny_bundle, "--batch-sizes", "65"], "from 1 to 64"),
        ([tiny_bundle, "--batch-sizes", "2,2"], "different"),
        ([tiny_bundle, "--batch-sizes", "two"], "no list"),
        ([tiny_bundle, "--out", full], "is not empty"),
        ([tiny_bundle, "--checkpoint", tiny_bundle], "is a BUNDLE"),
        ([tiny_bundle, "--compare", tmp_path / "no.json"], "cannot read"),
        ([tiny_bundle, "--fail-on-regression"], "needs --compare"),
        ([tiny_bundle, "--stage", "super-resolution"], "no second stage"),
        ([tiny_bundle, "--guidance", "1,2", "--steps", "3"], "3 guidance scales"),
    ):
        done = _benchmark(*words)
        assert (done.exit_code, said in done.stderr) == (2, True), done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_checkpoint_has_to_be_the_bundles(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = _benchmark(tiny_bundle, "--checkpoint", other)
    assert done.exit_code == 2
    assert "was not made from the checkpoint" in done.stderr


def test_settings_survive_the_way_to_a_process() -> None:
    guidance = GuidanceSettings(scales=(1.0, 2.0), interval=(100.0, 900.0))
    settings = CaseSettings(SolverSettings("ddim", 2, eta=0.5), guidance, seed=3)
    told = json.loads(json.dumps(settings.to_json()))
    assert settings_from_json(told) == settings


def test_ctrl_c_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--columns", "onnxruntime", "--cold-starts", "0", "--rounds", "9999"]
    command = [sys.executable, "-m", "id3pm_deploy", "benchmark", str(tiny_bundle)]
    with subprocess.Popen(
        [*command, *words, "--out", str(out)], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("checking the outputs"):
                break
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        process.stderr.read()
    assert process.returncode not in (0, None)
    assert list(tmp_path.iterdir()) == []


# Comparing


def _slower(path: Path, factor: float) -> None:
    """Make the benchmark in ``path`` say that everything took less, or more."""
    found = json.loads(path.read_text())
    for column in found["columns"].values():
        for batch in column["batches"].values():
            for key in ("row_seconds", "trajectory_seconds"):
                batch[key] = [[factor * v for v in of] for of in batch[key]]
    path.write_text(json.dumps(found))


def test_a_regression_fails_only_where_that_is_wanted(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words: list[str | Path] = [tiny_bundle, "--columns", "onnxruntime", *QUICK]
    words += ["--cold-starts", "0"]
    assert _benchmark(*words, "--out", out).exit_code == 0
    earlier = out / "benchmark.json"
    _slower(earlier, 1e-3)
    done = _benchmark(*words, "--compare", earlier)
    assert done.exit_code == 0, done.output
    assert "**slower**" in done.stdout
    done = _benchmark(*words, "--compare", earlier, "--fail-on-regression")
    assert done.exit_code == 1
    assert "slower than the earlier benchmark" in done.stderr
    _slower(earlier, 1e6)
    done = _benchmark(*words, "--compare", out, "--fail-on-regression")
    assert done.exit_code == 0, done.output
    assert "**faster**" in done.stdout
    done = _benchmark(*words, "--seed", "1", "--compare", out, "--fail-on-regression")
    assert done.exit_code == 1
    assert "another machine, model or settings" in done.stderr


def test_a_device_needs_neither_torch_nor_onnx(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    absent = ("torch", "onnx", "diffusers", "safetensors", "cv2")
    code = (
        "import sys\n"
        f"for name in {absent!r}: sys.modules[name] = None\n"
        "from id3pm_deploy.cli import main\n"
        "main(sys.argv[1:], prog_name='id3pm-deploy')\n"
    )
    words = ["benchmark", str(tiny_bundle), *QUICK, "--cold-starts", "0", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    columns = json.loads(done.stdout)["columns"]
    assert columns["onnxruntime"]["status"] == "timed"
    assert columns["plain-onnxruntime"]["status"] == "timed"
    assert columns["eager-float32"]["status"] == "absent"
