"""``--rebuild-if-stale``, and plans that TensorRT never sees."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import (
    edit_manifest,
    files_in,
    new_engine,
    new_writer,
    plan_builder,
    write_chain,
)
from click.testing import CliRunner, Result
from fakes import EARLY, library_path, pretend_here, put_driver, put_tensorrt

from id3pm_deploy.builders import engine_entries, tensorrt
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.bundle import EngineEntry, open_bundle
from id3pm_deploy.bundle.ledger import record_plan, why_not_built_here
from id3pm_deploy.cli import main
from id3pm_deploy.doctor.probes import tiny_graph
from id3pm_deploy.errors import EngineError
from id3pm_deploy.models import open_model, with_fresh_plans
from id3pm_deploy.preflight import Gpu, Here, rebuild_if_stale
from id3pm_deploy.preflight.commands import entry_recipe
from id3pm_deploy.recipes import load_recipe, recipe_names, recipe_text

ADA = Gpu("NVIDIA RTX 4090", "8.9", 128)
HOPPER = Gpu("NVIDIA H100", "9.0", 132)
NOW = Here((ADA,), "13.0", versions={"tensorrt_rtx": "1.8"})
NO_GPU = dataclasses.replace(NOW, gpus=(), gpu_problem="there is no NVIDIA driver")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for kind in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / "home" / kind.lower()))
    return tmp_path / "home"


def settings(name: str = "rtx", **changes: Any) -> dict[str, Any]:
    """The recipe of that name in float32, as a manifest keeps it."""
    recipe = load_recipe("engines", name, EngineRecipe)
    changes = {"precision": "float32", "export": "float32", **changes}
    values = dataclasses.asdict(dataclasses.replace(recipe, **changes))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def planned(folder: Path, *targets: str, **changes: Any) -> None:
    """A bundle with plans of version 1.8 that the user built here."""
    writer = new_writer(folder, tiny_graph())
    graph = writer.commit().manifest.graphs[0].file
    for target in targets:
        file = writer.add_file(target, ".plan", f"plan of {target}".encode())
        fields = {"version": "1.8", "settings": settings(), **changes}
        entry = dataclasses.replace(new_engine(target, graph, file), **fields)
        writer.add_engine(entry)
        record_plan(writer.file_entry(file).sha256)
    writer.commit()


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """A bundle with a plan of an older version."""
    planned(tmp_path / "b", "rtx", version="0.9")
    return tmp_path / "b"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[EngineRecipe]:
    """Replaces the builder of plans; lists the recipes that it was given."""
    recipes: list[EngineRecipe] = []
    build = plan_builder(b"a new plan", version="1.8")

    def build_plan(graph: Path, recipe: EngineRecipe, *others: Any) -> Any:
        recipes.append(recipe)
        return build(graph, recipe, *others)

    for module in (tensorrt, engine_entries):
        if hasattr(module, "build_plan"):
            monkeypatch.setattr(module, "build_plan", build_plan)
    return recipes


def plans(folder: Path) -> dict[str, EngineEntry]:
    return {entry.target: entry for entry in open_bundle(folder).manifest.plans}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_recipe_is_read_back_from_its_toml(tmp_path: Path) -> None:
    odd = settings(summary='a "quoted" \\ line\n\x7f ü 🙂 \t')
    recipes = [load_recipe("engines", n, EngineRecipe) for n in recipe_names("engines")]
    entry = EngineEntry(
        "x", "tensorrt", "tensorrt_rtx", "1", "float32", "g", "f", settings=odd
    )
    for recipe in [*recipes, entry_recipe(entry)]:
        path = tmp_path / "one.toml"
        path.write_text(recipe_text(recipe), encoding="utf-8")
        assert load_recipe("engines", str(path), EngineRecipe) == recipe


def test_a_stale_plan_is_built_again_with_its_own_settings(
    stale: Path, built: list[EngineRecipe]
) -> None:
    mine = settings(workspace_bytes=1 << 30, static_samples=[2])
    edit_manifest(stale, lambda m: m["engines"][0].update(settings=mine))
    before = plans(stale)["rtx"]
    said: list[str] = []
    assert rebuild_if_stale(stale, say=said.append, machine=NOW) is True
    after = plans(stale)["rtx"]
    assert (after.version, after.target) == ("1.8", "rtx")
    assert after.file != before.file
    assert after.settings == mine
    assert [one.workspace_bytes for one in built] == [1 << 30]
    assert open_bundle(stale).read(after.file) == b"a new plan"
    assert (
        why_not_built_here(open_bundle(stale).manifest.files[after.file]["sha256"])
        == ""
    )
    assert "'rtx' is stale" in said[0]
    assert "tensorrt_rtx 0.9" in said[0]
    assert "tensorrt_rtx 1.8," in said[0]
    assert after.file in said[-1]
    # Now it runs here, and nothing is done.
    assert rebuild_if_stale(stale, say=said.append, machine=NOW) is False
    assert len(built) == 1


def test_a_recipe_of_the_users_own_is_taken_from_the_manifest(
    tmp_path: Path, built: list[EngineRecipe]
) -> None:
    planned(tmp_path / "b", "mine-1.5", version="0.9")
    assert rebuild_if_stale(tmp_path / "b", say=lambda _: None, machine=NOW)
    assert set(plans(tmp_path / "b")) == {"mine-1.5"}


def test_a_bundle_of_an_older_release_takes_the_recipe_of_that_name(
    tmp_path: Path, built: list[EngineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path / "b", "rtx", version="0.9", settings={})
    with pytest.raises(EngineError, match="not the one that it was built with"):
        rebuild_if_stale(tmp_path / "b", say=print, machine=NOW)
    planned(tmp_path / "c", "gone", version="0.9", settings={})
    with pytest.raises(EngineError, match="does not say how the engine 'gone' was"):
        rebuild_if_stale(tmp_path / "c", say=print, machine=NOW)
    assert built == []


def test_nothing_is_built_where_a_plan_runs_or_building_would_not_help(
    tmp_path: Path, built: list[EngineRecipe]
) -> None:
    planned(tmp_path / "runs", "old", "rtx")
    edit_manifest(tmp_path / "runs", lambda m: m["engines"][0].update(version="0.9"))
    planned(tmp_path / "other", "rtx", compute_capabilities=("7.5",))
    new_writer(tmp_path / "none").commit()
    for name in ("runs", "other", "none"):
        before = files_in(tmp_path / name)
        assert not rebuild_if_stale(tmp_path / name, say=print, machine=NOW)
        assert files_in(tmp_path / name) == before
    assert built == []


def test_the_plan_that_will_run_is_built_first(
    tmp_path: Path, built: list[EngineRecipe]
) -> None:
    planned(tmp_path / "b", "turing", "rtx", version="0.9")
    turing: dict[str, Any] = {"compute_capabilities": ["7.5"]}
    edit_manifest(
        tmp_path / "b",
        lambda m: m["engines"][0].update(settings=settings(**turing), **turing),
    )
    assert rebuild_if_stale(tmp_path / "b", say=lambda _: None, machine=NOW)
    assert plans(tmp_path / "b")["rtx"].version == "1.8"
    assert plans(tmp_path / "b")["turing"].version == "0.9"


PLAIN = {
    "flavour": "tensorrt",
    "settings": settings("l4"),
    "compute_capabilities": ("8.9",),
    "version": "10.3.0",
}


@pytest.mark.parametrize(
    ("changes", "machine", "said"),
    [
        (PLAIN, Here((), versions={"tensorrt": "10.9"}), "it needs an NVIDIA GPU"),
        (
            PLAIN,
            Here((HOPPER,), versions={"tensorrt": "10.9"}),
            "compute capability 8.9; here: 9.0",
        ),
        (
            {"settings": {"backend": "tensorrt"}},
            NOW,
            "lacks summary",
        ),
        ({"settings": settings(precision="float16", export="float16")}, NOW, "float16"),
        ({"target": "../../x"}, NOW, "no plain name"),
    ],
)
def test_where_it_cannot_be_built_the_error_says_why(
    tmp_path: Path,
    built: list[EngineRecipe],
    changes: dict[str, Any],
    machine: Here,
    said: str,
) -> None:
    planned(tmp_path / "b", "rtx", version="0.9")
    changed = json.loads(json.dumps({"version": "0.9", **changes}))
    edit_manifest(tmp_path / "b", lambda m: m["engines"][0].update(changed))
    before = files_in(tmp_path / "b")
    with pytest.raises(EngineError, match="is stale and cannot be built") as caught:
        rebuild_if_stale(tmp_path / "b", say=print, machine=machine)
    assert said in str(caught.value)
    assert "it was built for" in caught.value.why
    assert caught.value.fix
    assert files_in(tmp_path / "b") == before
    assert built == []


def test_a_graph_that_is_not_there(tmp_path: Path, built: list[EngineRecipe]) -> None:
    half = settings(precision="float16", export="float16")
    planned(tmp_path / "b", "rtx", version="0.9", precision="float16", settings=half)
    with pytest.raises(EngineError, match="no step graph in float16") as caught:
        rebuild_if_stale(tmp_path / "b", say=print, machine=NOW)
    assert "--recipe float16" in caught.value.fix


def test_a_bundle_that_may_not_be_written_to(
    stale: Path, built: list[EngineRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(EngineError, match="may not be written to"):
        rebuild_if_stale(stale, say=print, machine=NOW)
    assert built == []


def test_sample_and_parity_rebuild_and_go_on(
    stale: Path,
    tmp_path: Path,
    built: list[EngineRecipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_here(monkeypatch, NOW)
    kept = shutil.copytree(stale, tmp_path / "kept")
    for bundle, command in (
        (stale, ["sample", stale, "--unconditional", "--out", tmp_path / "out"]),
        (kept, ["parity", kept, "--against", kept, "--out", tmp_path / "out"]),
    ):
        arguments = [*command, "--backend", "tensorrt"]
        refused = run(*arguments)
        assert refused.exit_code == 1
        assert "--rebuild-if-stale does it for you" in refused.stderr
        assert plans(bundle)["rtx"].version == "0.9"
        went_on = run(*arguments, "--rebuild-if-stale")
        assert "building it again" in went_on.stderr
        assert "NVIDIA driver" in went_on.stderr or "cuda.bindings" in went_on.stderr
        assert went_on.stdout == ""
        assert plans(bundle)["rtx"].version == "1.8"
    assert len(built) == 2


def test_what_is_still_missing_is_said_afterwards(
    stale: Path,
    tmp_path: Path,
    built: list[EngineRecipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_here(monkeypatch, NO_GPU)
    arguments = ["sample", stale, "--unconditional", "--out", tmp_path / "out"]
    result = run(*arguments, "--backend", "tensorrt", "--rebuild-if-stale")
    assert result.exit_code == 1
    assert "building it again" in result.stderr
    assert "cannot run here: there is no NVIDIA driver" in result.stderr
    assert plans(stale)["rtx"].version == "1.8"


def test_a_second_stage_is_opened_again_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_chain(tmp_path / "b")

    def rebuild(path: Path, stage: str, precision: str | None, **_: Any) -> bool:
        asked.append((stage, precision))
        edit_manifest(path, lambda m: m["engines"][1].update(version="new"))
        return True

    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr("id3pm_deploy.preflight.rebuild_if_stale", rebuild)
    second = open_model(tmp_path / "b").second_stage
    assert second is not None
    again = with_fresh_plans(second, "tensorrt", "float16", print)
    assert asked == [("super_resolution", "float16")]
    assert (again.stage, again.spec) == (second.stage, second.spec)
    assert again.bundle is not None
    assert again.bundle.manifest.engines[1].version == "new"


def test_without_a_plan_to_use_it_says_that_there_is_nothing_to_do(
    stale: Path, tmp_path: Path, built: list[EngineRecipe]
) -> None:
    arguments = ["sample", stale, "--unconditional", "--out", tmp_path / "out"]
    result = run(*arguments, "--rebuild-if-stale")
    assert "the backend auto uses no plan" in result.stderr
    assert built == []


# TensorRT is never imported for a plan that is refused: in real processes.


def plain_bundle(folder: Path) -> None:
    """A bundle with a plan of the fake TensorRT for the fake driver's GPU."""
    facts = {
        "flavour": "tensorrt",
        "version": EARLY,
        "gpu_name": "Orin",
        "compute_capability": "8.7",
        "multiprocessors": 8,
        "cuda": "12.6",
        "settings": settings("orin-nano"),
    }
    planned(folder, "orin-nano", "two", **facts)
    edit_manifest(folder, lambda m: m["engines"][1].update(flavour="other"))


def _flip(folder: Path) -> None:
    path = folder / plans(folder)["orin-nano"].file
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def _shorten(folder: Path) -> None:
    path = folder / plans(folder)["orin-nano"].file
    path.write_bytes(path.read_bytes()[:-1])


def _swap(folder: Path) -> None:
    one, two = (folder / entry.file for entry in plans(folder).values())
    one.write_bytes(two.read_bytes())


def _edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_manifest(folder, lambda m: m["engines"][0].update(changes))

    return change


def _forget(folder: Path) -> None:
    shutil.rmtree(folder.parent / "home")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (_flip, "is not the file that the manifest describes"),
    "truncated": (_shorten, "is not the file that the manifest describes"),
    "swapped": (_swap, "is not the file that the manifest describes"),
    "version": (_edit(version="10.9.0"), "runs on the version that built it"),
    "gpu": (_edit(gpu_name="NVIDIA Thor"), "it was tuned for another GPU"),
    "size": (_edit(multiprocessors=16), "it was tuned for another GPU"),
    "cuda": (_edit(cuda="13.0"), "the driver runs no CUDA 13"),
    "untrusted": (_forget, "is not trusted"),
}


@pytest.mark.parametrize("kind", [*REFUSED, "fine"])
@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_tensorrt_never_sees_a_refused_plan(
    tmp_path: Path, kind: str, command: str
) -> None:
    imported = tmp_path / "imported"
    site = put_tensorrt(tmp_path / "site", tell=imported)
    libraries = put_driver(tmp_path / "lib")
    bundle = tmp_path / "b"
    plain_bundle(bundle)
    change, said = REFUSED.get(kind, (lambda _: None, "no NVIDIA driver"))
    change(bundle)
    arguments = [command, str(bundle)]
    if command == "sample":
        arguments += ["--unconditional", "--out", str(tmp_path / "out")]
        arguments += ["--backend", "tensorrt"]
    elif kind in ("untrusted", "fine"):
        said = "runs here"
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "id3pm_deploy", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "LD_LIBRARY_PATH": library_path(libraries),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    damaged = kind in ("flipped", "truncated", "swapped")
    assert done.returncode == (1 if command == "sample" or damaged else 0)
    assert not imported.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs tensorrt_rtx (x86-64 Linux)",
)
def test_a_real_plan_is_built_again_on_a_cpu(
    tiny_checkpoint: Path, tmp_path: Path, home: Path
) -> None:
    bundle = tmp_path / "bundle"
    target = ("--target", "rtx", "--out", bundle, "--no-cache")
    made = run("build-engine", tiny_checkpoint, *target)
    assert made.exit_code == 0, made.stderr
    version = plans(bundle)["rtx"].version
    edit_manifest(bundle, lambda m: m["engines"][0].update(version="1.0.0"))
    sample = ["sample", bundle, "--unconditional", "--out", tmp_path / "out"]
    sample += ["--backend", "tensorrt", "--rebuild-if-stale"]
    done = subprocess.run(
        [sys.executable, "-m", "id3pm_deploy", *map(str, sample)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "tensorrt_rtx 1.0.0" in done.stderr
    assert f"tensorrt_rtx {version}" in done.stderr
    assert "building it again" in done.stderr
    after = plans(bundle)["rtx"]
    assert after.version == version
    found = open_bundle(bundle)
    found.verify()
    assert found.read(after.file)[:4] == b"vtrt"
    assert "cannot run here: " in done.stderr
    assert "GPU" in done.stderr
