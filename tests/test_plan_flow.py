"""`build-engine` with plans: a plan is the one of its graph and recipe, or none."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import plan_fakes
import pytest
from bundles import GOLDEN, edit_manifest
from click.testing import CliRunner
from models import contents

from id3pm_deploy.builders import onnx as onnx_module
from id3pm_deploy.builders import plan_key as plan_key_module
from id3pm_deploy.builders import tensorrt as tensorrt_module
from id3pm_deploy.builders.build import build_engine
from id3pm_deploy.builders.cache import PlanCache
from id3pm_deploy.builders.onnx import ExportedGraph
from id3pm_deploy.builders.plan_key import Builder
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.builders.tensorrt import build_plan
from id3pm_deploy.bundle import Bundle, EngineEntry, open_bundle
from id3pm_deploy.bundle.migrate import migrate_bundle
from id3pm_deploy.bundle.trust import plan_trust
from id3pm_deploy.bundle.writer import BundleWriter, write_manifest
from id3pm_deploy.cli import main
from id3pm_deploy.errors import BuildError, BundleError
from id3pm_deploy.files import ScratchFile
from id3pm_deploy.recipes import load_recipe
from id3pm_deploy.selftest import load_golden

SETTINGS = ("--set", "export=float32", "--set", "precision=float32")
ANOTHER = b"\x32\x07another"
"""Appended to an ONNX file: another text for people, and so other bytes."""


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a ledger for each test; TensorRT is a fake."""
    for kind in ("CACHE", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind.lower()))
    monkeypatch.setenv("SPAWNS", str(tmp_path / "spawns"))
    plan_fakes.install(monkeypatch.setattr)
    return tmp_path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle without plans whose graph is real."""
    folder = Path(shutil.copytree(GOLDEN / "bundle-v1", tmp_path / "b"))
    migrate_bundle(folder)
    return folder


def with_another_graph(folder: Path, out: Path) -> Path:
    """A copy of a bundle whose graph has other bytes."""
    shutil.copytree(folder, out)
    writer = BundleWriter(out, open_bundle(out).manifest)
    graph = writer.manifest.graphs[0]
    data = writer.read(graph.file) + ANOTHER
    file = writer.add_file("step-float32", ".onnx", data)
    writer.add_graph(dataclasses.replace(graph, file=file))
    writer.commit()
    return out


def build(source: Path, *options: str) -> dict[str, Any]:
    """Run the command; returns the entry that it prints."""
    arguments = ["build-engine", str(source), "--target", "rtx", *SETTINGS, "--json"]
    result = CliRunner().invoke(main, [*arguments, *options])
    assert result.exit_code == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    facts["stderr"] = result.stderr
    return facts


def without_plan(folder: Path) -> Path:
    """Take the plan out of a bundle, so that only the cache can have it."""
    found = open_bundle(folder).manifest
    for entry in found.plans:
        (folder / entry.file).unlink()
    kept = {e.file: None for e in found.plans}
    files = {name: entry for name, entry in found.files.items() if name not in kept}
    engines = tuple(e for e in found.engines if e.file not in kept)
    write_manifest(folder, dataclasses.replace(found, files=files, engines=engines))
    return folder


def check_plan(folder: Path) -> EngineEntry:
    """Fail unless the bundle's plan is the one of its graph and its settings."""
    found = open_bundle(folder)
    found.verify()
    (entry,) = found.manifest.plans
    wanted = plan_fakes.plan_of(found.read(entry.graph), entry.settings)
    assert found.read(entry.file) == wanted
    assert plan_trust(found, entry).trusted
    return entry


def test_a_plan_is_built_once_and_taken_ever_after(bundle: Path) -> None:
    first = build(bundle)
    assert (first["from_cache"], first["stderr"]) == (False, "")
    before = contents(bundle)
    again = build(bundle)
    assert (again["from_cache"], again["stderr"]) == (True, "")
    assert contents(bundle) == before
    assert plan_fakes.spawns() == 1
    entry = check_plan(bundle)
    assert entry.plan_key == first["plan_key"] == again["plan_key"]
    assert entry.settings["precision"] == "float32"
    assert entry.settings["dynamic_samples"] == [1, 4, 8]
    assert (entry.gpu_name, entry.cuda) == (None, None)
    assert entry.build_seconds == 1.0


def test_a_plan_from_the_cache_counts_as_built_here(
    bundle: Path, tmp_path: Path
) -> None:
    build(bundle)
    shutil.rmtree(tmp_path / "state")
    opened = open_bundle(bundle)
    assert not plan_trust(opened, opened.manifest.plans[0]).trusted
    assert build(bundle)["from_cache"]
    check_plan(bundle)


def test_another_recipe_of_the_same_name_is_another_plan(bundle: Path) -> None:
    first = build(bundle)
    second = build(bundle, "--set", "optimization_level=2")
    assert not second["from_cache"]
    assert (first["target"], second["target"]) == ("rtx", "rtx")
    assert first["file"] != second["file"]
    assert not (bundle / first["file"]).exists()
    assert check_plan(bundle).settings["optimization_level"] == 2
    assert build(bundle)["from_cache"]
    assert check_plan(bundle).settings["optimization_level"] is None
    assert plan_fakes.spawns() == 2


def test_an_edited_recipe_file_is_another_plan(bundle: Path, tmp_path: Path) -> None:
    text = (
        'summary = "s"\nbackend = "tensorrt"\nflavour = "tensorrt_rtx"\n'
        'export = "float32"\nprecision = "float32"\ndynamic_samples = [1, 2, 4]\n'
    )
    recipe = tmp_path / "mine.toml"
    for line, taken in (
        ("", False),
        ("auxiliary_streams = 0", False),
        ("max_opset = 25", True),
    ):
        recipe.write_text(f"{text}{line}\n")
        assert build(bundle, "--target", str(recipe))["from_cache"] == taken
        assert [e.target for e in open_bundle(bundle).manifest.plans] == ["mine"]
    assert plan_fakes.spawns() == 2


def test_another_graph_is_another_plan(bundle: Path, tmp_path: Path) -> None:
    first = build(bundle)
    other = with_another_graph(bundle, tmp_path / "other")
    second = build(other)
    assert not second["from_cache"]
    assert first["plan_key"] != second["plan_key"]
    check_plan(bundle)
    check_plan(other)


def test_a_changed_checkpoint_is_another_plan(
    tiny_checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_bundle(bundle)
    graph = opened.manifest.graphs[0]
    data, golden = opened.read(graph.file), load_golden(opened, graph)

    def export(network: Any, *_: Any) -> ExportedGraph:
        weight = next(iter(network.parameters())).flatten()[0].item()
        text = f"{weight:+.6e}".encode()
        file = ScratchFile(tmp_path)
        file.write([data, b"\x32", bytes([len(text)]), text])
        return ExportedGraph(file, golden, 1, 1e-7, ())

    monkeypatch.setattr(onnx_module, "export_graph", export)
    mine = Path(shutil.copytree(tiny_checkpoint, tmp_path / "mine"))
    first = build(mine)
    assert first["bundle"] == str(tmp_path / "mine.bundle")
    assert build(mine)["from_cache"]
    weights = mine / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(changed[:8], "little")
    changed[start:] = bytes(len(changed) - start)  # all weights are 0 now
    weights.write_bytes(changed)
    arguments = ["build-engine", str(mine), "--target", "rtx", *SETTINGS]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "bundle of another checkpoint" in refused.stderr
    second = build(mine, "--out", str(tmp_path / "anew"))
    assert not second["from_cache"]
    assert second["plan_key"] != first["plan_key"]
    check_plan(tmp_path / "anew")
    check_plan(tmp_path / "mine.bundle")
    assert plan_fakes.spawns() == 2


def test_a_graph_that_changes_while_its_plan_is_built(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the old plan nor the new one is kept under the old graph's name."""
    recipe = load_recipe(
        "engines", "rtx", EngineRecipe, ("precision=float32", "export=float32")
    )
    opened = open_bundle(bundle)
    graph, link = tmp_path / "g.onnx", tmp_path / "link.onnx"
    graph.write_bytes(opened.read(opened.manifest.graphs[0].file))
    link.symlink_to(graph)

    def run_child(*arguments: Any) -> dict[str, Any]:
        graph.write_bytes(graph.read_bytes() + ANOTHER)
        return plan_fakes.run_child(*arguments)

    cache, file = PlanCache.default(), tmp_path / "plan"
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_module, "_run_child", run_child)
        with pytest.raises(BuildError, match="has changed while its plan was built"):
            build_plan(link, recipe, cache, file)
    assert cache.entries() == []
    assert not file.exists()
    plan = build_plan(link, recipe, cache, file)
    assert [one.key for one in cache.entries()] == [plan.plan_key]


def test_another_library_is_another_plan(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle)
    monkeypatch.setattr(tensorrt_module, "builder_here", lambda _: Builder("1.1"))
    assert not build(bundle)["from_cache"]
    monkeypatch.setattr(tensorrt_module, "builder_here", lambda _: None)
    third = build(bundle)  # it cannot be said what determines the plan
    assert (third["from_cache"], third["plan_key"]) == (False, "")
    assert plan_fakes.spawns() == 3


def test_a_damaged_plan_in_the_bundle_is_replaced(bundle: Path) -> None:
    file = bundle / build(bundle)["file"]
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert build(bundle)["from_cache"]
    check_plan(bundle)


def test_a_damaged_plan_in_the_cache_is_built_again(
    bundle: Path, tmp_path: Path
) -> None:
    build(bundle)
    (plan,) = tmp_path.glob("cache/id3pm-deploy/plans/*/plan")
    data = bytearray(plan.read_bytes())
    data[100] ^= 1
    plan.write_bytes(data)
    second = build(without_plan(bundle))
    assert not second["from_cache"]
    assert "in the cache cannot be used" in second["stderr"]
    check_plan(bundle)
    assert build(without_plan(bundle))["from_cache"]


def test_the_bundles_own_plan_needs_no_cache(bundle: Path, tmp_path: Path) -> None:
    first = build(bundle)
    before = contents(bundle)
    shutil.rmtree(tmp_path / "cache")
    again = build(bundle, "--set", "summary='other words'")
    assert (again["from_cache"], again["stderr"]) == (True, "")
    assert not (tmp_path / "cache" / "id3pm-deploy" / "plans").exists()
    assert again["file"] == first["file"]
    assert again["settings"] == first["settings"] | {"summary": "other words"}
    build(bundle)
    assert contents(bundle) == before
    check_plan(bundle)
    assert plan_fakes.spawns() == 1


def test_nothing_that_was_just_hashed_is_hashed_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the graph nor a plan, in the bundle that has it or in another one."""
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    build(bundle)

    def hashed(*_: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(plan_key_module, "sha256_of_file", hashed)
    monkeypatch.setattr(ScratchFile, "sha256", hashed)
    for folder in (bundle, other):
        assert build(folder)["from_cache"]
        check_plan(folder)
    assert contents(other) == contents(bundle)
    assert plan_fakes.spawns() == 1


def test_a_plan_that_the_user_did_not_build_is_built_again(
    bundle: Path, tmp_path: Path
) -> None:
    """Its key is the right one, which whoever made the bundle could have written."""
    build(bundle)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "state")
    assert not build(bundle)["from_cache"]
    check_plan(bundle)
    assert plan_fakes.spawns() == 2


def test_a_damaged_plan_in_the_bundle_is_built_again_without_a_cache(
    bundle: Path, tmp_path: Path
) -> None:
    for damage in (lambda data: data[:-1], lambda data: b"x" + data[1:], None):
        file = bundle / build(bundle)["file"]
        shutil.rmtree(tmp_path / "cache")
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage(file.read_bytes()))
        assert not build(bundle)["from_cache"]
        check_plan(bundle)
    assert plan_fakes.spawns() == 4


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.9"},
        {"plan_key": "0" * 64},
        {"compute_capabilities": ["7.5"]},
        {"gpu_name": "a GPU", "compute_capability": "8.6"},
        {"cuda": "12.6"},
        {"profiles": []},
        {"precision": "float16"},
        {"hardware_compatibility": "ampere_plus"},
    ],
)
def test_what_the_manifest_says_of_a_plan_is_not_taken_on_trust(
    bundle: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    build(bundle)
    before = contents(bundle)

    def edit(values: Any) -> None:
        (engine,) = (e for e in values["engines"] if e["target"] == "rtx")
        engine.update(change)

    edit_manifest(bundle, edit)
    assert build(bundle)["from_cache"]  # from there, as it was built
    assert contents(bundle) == before
    edit_manifest(bundle, edit)
    shutil.rmtree(tmp_path / "cache")
    assert not build(bundle)["from_cache"]
    check_plan(bundle)
    assert contents(bundle) == before
    assert plan_fakes.spawns() == 2


def test_a_plan_that_another_process_takes_away_meanwhile(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle)
    check = Bundle.path_of

    def path_of(opened: Bundle, name: str) -> Path:
        path = check(opened, name)
        if name.endswith(".plan"):
            without_plan(bundle)
        return path

    monkeypatch.setattr(Bundle, "path_of", path_of)
    with pytest.raises(BundleError, match="is no longer in") as caught:
        build_engine(
            bundle,
            "rtx",
            None,
            settings=("export=float32", "precision=float32"),
            cache=PlanCache.default(),
        )
    assert "build the engine again" in caught.value.fix
    assert open_bundle(bundle).manifest.plans == ()
    open_bundle(bundle).verify()


def test_facts_of_another_release_in_the_cache_are_built_again(
    bundle: Path, tmp_path: Path
) -> None:
    build(bundle)
    (entry,) = tmp_path.glob("cache/id3pm-deploy/plans/*/entry.json")
    values = json.loads(entry.read_text())
    values["facts"]["surprise"] = 1
    entry.write_text(json.dumps(values))
    assert "unknown keys: surprise" in build(without_plan(bundle))["stderr"]
    assert plan_fakes.spawns() == 2


def test_without_the_cache_everything_is_built(bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert not build(bundle, "--no-cache")["from_cache"]
    assert plan_fakes.spawns() == 2
    assert not (tmp_path / "cache" / "id3pm-deploy" / "plans").exists()
    assert check_plan(bundle).plan_key


def test_a_cache_that_cannot_be_used_is_a_warning(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "id3pm-deploy"
    place.mkdir(parents=True)
    (place / "plans").symlink_to(tmp_path)
    for _ in range(2):
        found = build(without_plan(bundle))
        assert not found["from_cache"]
        assert "warning: the build went on without the plan cache" in found["stderr"]
        assert "it is a symbolic link" in found["stderr"]
    check_plan(bundle)


def test_a_limit_of_nothing_keeps_nothing(bundle: Path, tmp_path: Path) -> None:
    assert "larger than the cache" in build(bundle, "--cache-limit", "0")["stderr"]
    assert os.listdir(tmp_path / "cache" / "id3pm-deploy" / "plans") == []


def test_a_graph_for_another_parser_is_refused_before_anything_is_built(
    bundle: Path,
) -> None:
    before = contents(bundle)
    for settings, message in (
        (("max_opset=19",), "the graph has opset 20, the parser takes 19"),
        (('operators_refused=["Conv"]',), "no operator Conv"),
    ):
        with pytest.raises(BuildError, match="parser does not take") as caught:
            build_engine(
                bundle, "rtx", None, None, ("precision=float32", *settings), None
            )
        assert message in caught.value.why
    assert plan_fakes.spawns() == 0
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        (("flavour=tensorrt", "compute_capabilities=[]"), "all"),
        (("compute_capabilities=['current']",), "all"),
        ((), "nothing"),
        (
            (
                "flavour=tensorrt",
                "compute_capabilities=[]",
                "hardware_compatibility=ampere_plus",
            ),
            "cuda",
        ),
        (
            (
                "flavour=tensorrt",
                "compute_capabilities=[]",
                "hardware_compatibility=same_compute_capability",
            ),
            "capability",
        ),
    ],
)
def test_a_plan_is_bound_to_what_it_was_built_on(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
    bound: str,
) -> None:
    gpu = {
        "name": "a GPU",
        "compute_capability": "8.6",
        "multiprocessors": 82,
        "cuda": "13.0",
    }

    def run_child(*arguments: Any) -> dict[str, Any]:
        more = {"plan_types": {"source": "plan"}, "peak_device_memory_bytes": 7}
        return {**plan_fakes.run_child(*arguments), "gpu": gpu, **more}

    monkeypatch.setattr(tensorrt_module, "_run_child", run_child)
    options = [word for text in settings for word in ("--set", text)]
    build(bundle, *options)
    entry = check_plan(bundle)
    found = {
        "name": entry.gpu_name,
        "compute_capability": entry.compute_capability,
        "multiprocessors": entry.multiprocessors,
        "cuda": entry.cuda,
    }
    kept = {
        "all": set(gpu),
        "nothing": set(),
        "cuda": {"cuda"},
        "capability": {"cuda", "compute_capability"},
    }[bound]
    assert found == {k: v if k in kept else None for k, v in gpu.items()}
    assert entry.plan_types == {"source": "plan"}
    assert entry.peak_device_memory_bytes == 7
    kind = entry.settings["hardware_compatibility"]
    assert entry.hardware_compatibility == kind


def test_the_settings_of_an_engine_without_a_plan_are_kept(bundle: Path) -> None:
    built = build_engine(bundle, "cpu", None, settings=("threads=1",))
    assert built.entry.settings["threads"] == 1
    assert built.entry.settings["backend"] == "onnxruntime"
    assert (built.entry.plan_key, built.from_cache) == ("", False)


COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import plan_fakes
plan_fakes.install()
from id3pm_deploy.cli import main
main()
"""


def test_eight_commands_that_want_one_plan_build_it_once(
    bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them into one bundle, too."""
    monkeypatch.setenv("BUILD_SECONDS", "2")
    arguments = ["build-engine", str(bundle), "--target", "rtx", *SETTINGS, "--json"]
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(root / "tests"), *arguments],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    said = [command.communicate(timeout=120) for command in commands]
    assert [command.returncode for command in commands] == [0] * 8, said
    assert [err for _, err in said] == [""] * 8
    found = [json.loads(out) for out, _ in said]
    assert sorted(facts["from_cache"] for facts in found) == [False, *[True] * 7]
    assert len({facts["file"] for facts in found}) == 1
    assert plan_fakes.spawns() == 1
    check_plan(bundle)
