"""A real TensorRT-RTX plan from a checkpoint, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import pretend_here

from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.cli import main
from id3pm_deploy.preflight import Gpu, Here

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs tensorrt_rtx (x86-64 Linux)",
)


@pytest.mark.slow
def test_build_engine_for_rtx(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    arguments = ["build-engine", str(tiny_checkpoint), "--target", "rtx"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.stderr
    entry = json.loads(result.stdout)
    assert entry["flavour"] == "tensorrt_rtx"
    assert entry["precision"] == "float16"
    assert entry["self_test_error"] is None, "a plan cannot be run without its GPU"
    assert entry["peak_memory_bytes"] > 1 << 20
    convolutions = entry["layer_types"]["multiply_accumulates"]["CONVOLUTION"]
    assert convolutions["HALF"] > 0.9 * sum(convolutions.values())
    bundle = open_bundle(out)
    bundle.verify()
    assert bundle.manifest.file_entry(entry["file"]).size > 100_000
    # A second engine joins the same bundle; the first stays.
    result = CliRunner().invoke(
        main, ["build-engine", str(tiny_checkpoint), "--out", str(out)]
    )
    assert result.exit_code == 0, result.stderr
    assert {e.target for e in open_bundle(out).manifest.engines} == {"rtx", "cpu"}
    # On a machine with nothing to run it on, and on one with a GPU that it is for.
    versions = {"tensorrt_rtx": entry["version"]}
    gpu = Gpu("NVIDIA RTX 4090", "8.9", 128)
    sample = ["sample", str(out), "--unconditional", "--backend", "tensorrt"]
    for gpus, said in (((), "no NVIDIA GPU"), ((gpu,), "no NVIDIA driver")):
        pretend_here(monkeypatch, Here(gpus, versions=versions))
        pictures = ["--out", str(tmp_path / "pictures")]
        refused = CliRunner().invoke(main, [*sample, *pictures])
        assert refused.exit_code == 1
        assert said in refused.stderr


@pytest.mark.slow
def test_a_plan_in_bfloat16(tiny_checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "narrow.toml"
    recipe.write_text(
        'summary = "a test"\nbackend = "tensorrt"\nflavour = "tensorrt_rtx"\n'
        'export = "bfloat16"\nprecision = "bfloat16"\ndynamic_samples = [1, 1, 2]\n'
        'compute_capabilities = ["8.6"]\n'
    )
    built = build_engine(tiny_checkpoint, str(recipe), tmp_path / "bundle")
    assert built.entry.precision == built.graph.precision == "bfloat16"
    convolutions = built.entry.layer_types["multiply_accumulates"]["CONVOLUTION"]
    assert convolutions["BF16"] > 0.9 * sum(convolutions.values())
    assert built.bundle.manifest.file_entry(built.entry.file).size > 100_000
