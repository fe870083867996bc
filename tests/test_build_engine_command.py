"""``id3pm-deploy build-engine``: settings, what it prints, NVIDIA's command."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from id3pm_deploy.builders import build as build_module
from id3pm_deploy.builders.cache import DEFAULT_LIMIT_BYTES, PlanCache
from id3pm_deploy.cli import main
from id3pm_deploy.commands.build_engine import _table

FLOAT32 = ("--set", "export=float32", "--set", "precision=float32")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["build-engine", *map(str, arguments)])


def dry(*arguments: object) -> dict[str, Any]:
    result = run("no such folder", *arguments, "--dry-run")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(message: str, *arguments: object, status: int) -> str:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert message in result.stderr
    return result.stderr


def test_a_dry_run_shows_what_settings_make_of_a_recipe() -> None:
    plain = dry("--target", "orin-nano")
    assert plain["workspace_bytes"] == 512 << 20
    changed = dry(
        *("--target", "orin-nano"),
        *("--set", "workspace_bytes=100_000_000"),
        *("--set", "dynamic_samples=[1, 2, 4]"),
        *("--set", "hardware_compatibility=same_compute_capability"),
    )
    different = {key for key in plain if plain[key] != changed[key]}
    assert different == {"workspace_bytes", "dynamic_samples", "hardware_compatibility"}
    assert changed["dynamic_samples"] == [1, 2, 4]


def test_a_dry_run_refuses_an_export_that_does_not_fit() -> None:
    more = ("--set", "export=bfloat16", "--set", "precision=bfloat16", "--dry-run")
    assert dry("--target", "thor", *more)["export"] == "bfloat16"
    text = refused(
        "export recipe bfloat16", "a", "--target", "orin-agx", *more, status=2
    )
    assert "opset 22, the parser takes 20" in text
    own = ("--target", "orin-agx", "--set", "export=a/b.toml")
    assert dry(*own)["export"] == "a/b.toml"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("colour=1", "the setting 'colour=1' has an unknown key"),
        ("refit=true", "the setting 'refit=true' has an unknown key"),
        ("workspace_bytes=1_000_000", "raise it to 16777216 at least"),
        ("threads", "the setting 'threads' is not KEY=VALUE"),
        ("workspace_share=lots", "the setting 'workspace_share=lots' must be float"),
        ("optimization_level=6", "optimization_level = 6: optimization_level must be"),
        ("dynamic_samples=[8, 1, 2]", "dynamic_samples must be three rising"),
    ],
)
@pytest.mark.parametrize("more", [("--dry-run",), ("--print-trtexec",), ()])
def test_a_bad_setting_is_refused_before_anything_is_read(
    setting: str, message: str, more: tuple[str, ...]
) -> None:
    arguments = ("no such folder", "--target", "rtx", "--set", setting)
    refused(message, *arguments, *more, status=2)


def test_nvidias_command_for_a_bundle(tiny_bundle: Path) -> None:
    result = run(tiny_bundle, "--target", "h100", *FLOAT32, "--print-trtexec")
    assert result.exit_code == 0, result.stderr
    words = shlex.split(result.stdout.replace("\\\n", ""))
    assert words[0] == "trtexec"
    options = dict(word.split("=", 1) for word in words if "=" in word)
    assert Path(options["--onnx"]).is_file()
    assert options["--saveEngine"] == "h100.plan"
    assert "--stronglyTyped" in words
    assert words.count("--profile=5") == 1
    assert options["--maxShapes"].startswith("state:4x8x3x16x16,noise:8x3x16x16,")
    assert "workspace_share = 0.5 has no option" in result.stderr


def test_nvidias_command_needs_a_graph(
    tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    more = ("--target", "rtx", "--print-trtexec")
    text = refused("holds no step graph in float16", tiny_bundle, *more, status=1)
    assert "--recipe float16" in text
    text = refused("is no BUNDLE", tiny_checkpoint, *more, status=2)
    assert "export" in text
    refused("makes no plan", tiny_bundle, "--print-trtexec", status=2)


class Built(Exception):
    """Says with what the builder was called."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []

    def build(*arguments: Any) -> None:
        found.append(arguments)
        raise Built

    monkeypatch.setattr(build_module, "build_engine", build)
    return found


def test_settings_and_cache_reach_the_builder(called: list[tuple[Any, ...]]) -> None:
    run("a", "--set", "threads=1", "--set", "threads=2")
    source, target, out, second, settings, cache = called.pop()
    assert (source, target, out, second) == (Path("a"), "cpu", None, None)
    assert settings == ("threads=1", "threads=2")
    assert isinstance(cache, PlanCache)
    assert cache.limit_bytes == DEFAULT_LIMIT_BYTES == 10 << 30
    run("a", "--cache-limit", "1.5GiB")
    assert called.pop()[-1].limit_bytes == 3 << 29
    run("a", "--no-cache")
    assert called.pop()[-1] is None
    result = run("a", "--cache-limit", "lots")
    assert result.exit_code == 2
    assert "'lots' is not a size such as 10GiB" in result.stderr
    more = ("--no-cache", "--cache-limit", "1GiB")
    refused("one of --no-cache and --cache-limit", "a", *more, status=2)
    assert not called


def test_settings_are_kept_in_the_manifest(bundle_copy: Path) -> None:
    result = run(bundle_copy, "--set", "threads=1", "--json")
    assert result.exit_code == 0, result.stderr
    entry = json.loads(result.stdout)
    assert entry["target"] == "cpu"
    assert (entry["threads"], entry["settings"]["threads"]) == (1, 1)
    assert entry["from_cache"] is False


class Shown:
    """Just enough of a BuiltEngine for the table."""

    def __init__(self, entry: Any, *, from_cache: bool = False) -> None:
        self.entry, self.from_cache, self.super_resolution = entry, from_cache, None
        self.bundle = self.manifest = self
        self.folder = "a.bundle"

    def file_entry(self, name: str) -> Any:
        return dataclasses.make_dataclass("File", [("size", int, 5_000_000)])()


def counts(**work: int) -> dict[str, Any]:
    return {
        "source": "parsed network",
        "multiply_accumulates": {"samples": 1, "rows": 2, "CONVOLUTION": work},
    }


def test_the_table_says_what_was_built() -> None:
    from id3pm_deploy.bundle import EngineEntry

    entry = EngineEntry(
        target="rtx",
        backend="tensorrt",
        flavour="tensorrt_rtx",
        version="1.7.1",
        precision="float16",
        graph="g.onnx",
        file="rtx.plan",
        compute_capabilities=("8.6", "12.0"),
        layer_types=counts(HALF=998, FLOAT=2),
        plan_types={"source": "plan", "not_counted": "no GPU is here"},
        build_seconds=9.54,
        peak_memory_bytes=589_000_000,
    )
    lines = _table(Shown(entry))
    assert "built in   9.5 s" in lines
    assert "computes   99.8% float16, 0.2% float32 (parsed network)" in lines
    assert "           plan not counted: no GPU is here" in lines
    assert "took       589 MB on the host" in lines
    assert "GPUs       compute capability 8.6, 12.0" in lines
    assert "self-test  not run: this engine needs its GPU" in lines
    entry = dataclasses.replace(
        entry,
        flavour="tensorrt",
        plan_types=counts(HALF=1000) | {"source": "plan"},
        peak_device_memory_bytes=2_100_000_000,
        gpu_name="Orin",
        compute_capability="8.7",
    )
    lines = _table(Shown(entry, from_cache=True))
    assert "built in   9.5 s, before; not built again" in lines
    assert "           100.0% float16 (plan)" in lines
    assert "took       589 MB on the host and 2,100 MB on the GPU" in lines
    assert "GPU        Orin, compute capability 8.7" in lines
