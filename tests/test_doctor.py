"""``id3pm-deploy doctor``: verdicts, exit status, the JSON's shape, and privacy."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click
import packaging
import pytest
from click.testing import CliRunner
from doctor_fakes import (
    ABSENT,
    CORE,
    CPU,
    EXPORT,
    REQUIRES,
    WORKING,
    cuda,
    host,
    prober,
    put,
    runtime,
    site,
)

import id3pm_deploy
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.cli import main
from id3pm_deploy.defaults import BACKENDS
from id3pm_deploy.doctor import flavours, verdicts
from id3pm_deploy.doctor.examine import examine, exit_status
from id3pm_deploy.doctor.packages import Packages
from id3pm_deploy.doctor.probe import Outcome
from id3pm_deploy.doctor.text import lines
from id3pm_deploy.errors import EngineError, RecipeError
from id3pm_deploy.recipes import load_recipe, recipe_names

Found = dict[str, Any]


def look(
    tmp_path: Path,
    packages: Mapping[str, str],
    *,
    recipes: tuple[str, ...] = (),
    metadata: bool = True,
    checkpoint: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **outcomes: Outcome,
) -> Found:
    """The doctor's findings on a made-up machine."""
    site(tmp_path / "site", packages, requires=REQUIRES if metadata else None)
    here = host(tmp_path, **(changes or {}))
    return examine(
        here,
        packages=Packages(here, tmp_path / "nowhere"),
        recipes=recipes,
        prober=prober(**outcomes),
        checkpoint=checkpoint,
    )


def engine(found: Found, name: str) -> Any:
    (one,) = [one for one in found["recipes"]["engines"] if one["name"] == name]
    return one


def text(found: Found) -> str:
    return "\n".join(lines(found))


def test_a_cpu_device_can_sample(tmp_path: Path) -> None:
    found = look(tmp_path, CPU, core=WORKING, onnxruntime=runtime())
    assert (found["ok"], exit_status(found)) == (True, 0)
    assert found["tiers"]["device"] == {
        "ok": True,
        "missing": [],
        "fix": "",
        "engines": ["cpu"],
    }
    cpu = engine(found, "cpu")
    assert (cpu["build"]["ok"], cpu["run"]["ok"]) == (True, True)
    assert cpu["build_from_checkpoint"]["ok"] is False
    assert cpu["build_from_checkpoint"]["missing"][0] == "torch>=2.7"
    assert cpu["build_from_checkpoint"]["fix"].startswith("pip install 'torch>=2.7'")
    assert found["tiers"]["build"]["ok"] is False
    assert "works, with cpu" in text(found)


def test_an_empty_device_is_told_the_one_command(tmp_path: Path) -> None:
    found = look(tmp_path, {"click": "8.3"})
    assert (found["ok"], exit_status(found)) == (False, 1)
    device = found["tiers"]["device"]
    assert device["engines"] == []
    wanted = "pip install 'numpy>=1.26' 'pillow>=10.3' 'onnxruntime>=1.20'"
    assert device["fix"] == wanted
    assert f"fix: {wanted}\n" in text(found)


def test_only_the_runtime_is_missing(tmp_path: Path) -> None:
    found = look(tmp_path, CORE, core=WORKING)
    assert found["tiers"]["device"]["missing"] == ["onnxruntime>=1.20"]
    assert found["tiers"]["device"]["fix"] == "pip install 'onnxruntime>=1.20'"
    assert exit_status(found) == 1


@pytest.mark.parametrize(
    ("outcome", "packages", "missing", "fix"),
    [
        (
            Outcome(problem="importing onnxruntime died of SIGSEGV"),
            CPU,
            "importing onnxruntime died of SIGSEGV",
            "pip install --force-reinstall --no-deps onnxruntime==1.23.2",
        ),
        (  # its metadata is there and its module is gone
            ABSENT,
            CPU,
            "there is none",
            "pip install --force-reinstall --no-deps onnxruntime==1.23.2",
        ),
        (
            runtime(version="1.19.2"),
            {**CORE, "onnxruntime": "1.19.2"},
            "onnxruntime>=1.20, not 1.19.2",
            "pip install 'onnxruntime>=1.20'",
        ),
        (  # both packages: putting one back means taking both away
            Outcome(problem="importing onnxruntime took over 60 s"),
            {**CPU, "onnxruntime-gpu": "1.23.2"},
            "importing onnxruntime took over 60 s",
            "pip uninstall -y onnxruntime onnxruntime-gpu && "
            "pip install onnxruntime==1.23.2",
        ),
    ],
)
def test_a_broken_runtime_is_named_with_what_repairs_it(
    tmp_path: Path,
    outcome: Outcome,
    packages: Mapping[str, str],
    missing: str,
    fix: str,
) -> None:
    found = look(tmp_path, packages, core=WORKING, onnxruntime=outcome)
    assert exit_status(found) == 1
    for verdict in (found["tiers"]["device"], engine(found, "cpu")["build"]):
        assert verdict["missing"] == [missing]
        assert verdict["fix"] == fix


def test_a_broken_numpy_is_named(tmp_path: Path) -> None:
    broken = Outcome(problem="importing numpy and PIL died of SIGILL")
    found = look(tmp_path, CPU, core=broken, onnxruntime=runtime())
    device = found["tiers"]["device"]
    assert device["missing"] == [broken.problem]
    assert device["fix"] == (
        "pip install --force-reinstall --no-deps click==8.3 numpy==2.2 pillow==12.0"
    )
    assert broken.problem in text(found)


def test_a_runtime_without_pip_counts(tmp_path: Path) -> None:
    """As TensorRT of a Jetson: the module is there, metadata is not."""
    found = look(tmp_path, CORE, core=WORKING, onnxruntime=runtime())
    assert found["ok"]


RTX = {**EXPORT, "tensorrt-rtx-cu13": "1.7.1.116", "cuda-bindings": "13.5.0"}
RTX_OUTCOME = Outcome(facts={"version": "1.7.1.116"})


def test_rtx_is_built_without_a_gpu_and_not_run(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        RTX,
        core=WORKING,
        onnxruntime=runtime(),
        tensorrt_rtx=RTX_OUTCOME,
        recipes=("rtx", "float16"),
    )
    rtx = engine(found, "rtx")
    assert (rtx["build"]["ok"], rtx["build_from_checkpoint"]["ok"]) == (True, True)
    assert rtx["run"]["missing"] == [
        "an NVIDIA GPU of compute capability 8.0, 8.6, 8.9 or 12.0",
    ]
    assert [one["ok"] for one in found["asked"]] == [True, True]
    assert exit_status(found) == 0
    assert "engine rtx can be built here" in text(found)


@pytest.mark.parametrize(
    ("capabilities", "gpu"),
    [
        (("8.9",), None),
        (("9.0", "12.0"), None),
        (("9.0",), "an NVIDIA GPU of compute capability 8.0, 8.6, 8.9 or 12.0"),
        (("7.5",), "an NVIDIA GPU of compute capability 8.0, 8.6, 8.9 or 12.0"),
    ],
)
def test_rtx_needs_a_gpu_that_its_plan_is_for(
    tmp_path: Path, capabilities: tuple[str, ...], gpu: str | None
) -> None:
    found = look(
        tmp_path,
        RTX,
        core=WORKING,
        onnxruntime=runtime(),
        tensorrt_rtx=RTX_OUTCOME,
        cuda=cuda(*capabilities),
    )
    missing = engine(found, "rtx")["run"]["missing"]
    wanted = [] if gpu is None else [f"{gpu}; here: {capabilities[0]}"]
    assert missing == wanted


def test_rtx_is_not_built_on_arm(tmp_path: Path) -> None:
    changes = {"machine": "aarch64"}
    found = look(tmp_path, CPU, changes=changes, core=WORKING, onnxruntime=runtime())
    build = engine(found, "rtx")["build"]
    assert build["missing"][0].startswith("an x86-64 machine")
    assert build["fix"] == "build it on an x86-64 machine"
    assert found["ok"]


def _recipe(tmp_path: Path, extra: str = "", **changes: str) -> str:
    values = {
        "summary": "mine",
        "backend": "tensorrt",
        "flavour": "tensorrt",
        "export": "float16",
        "precision": "float16",
        **changes,
    }
    rows = [f'{name} = "{value}"' for name, value in values.items()]
    if values["backend"] == "tensorrt":
        rows.append("dynamic_samples = [1, 2, 4]")
    path = tmp_path / "mine.toml"
    path.write_text("\n".join([*rows, extra]))
    return str(path)


def test_a_recipe_of_ones_own_for_plain_tensorrt(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        CPU,
        recipes=(_recipe(tmp_path), "cpu"),
        core=WORKING,
        onnxruntime=runtime(),
    )
    mine, cpu = found["asked"]
    assert (mine["name"], mine["kind"], mine["ok"]) == ("mine", "engine", False)
    assert mine["missing"] == [
        "an NVIDIA GPU: it builds for the one that is there",
        "tensorrt>=10.3",
    ]
    assert cpu["ok"]
    assert (found["ok"], exit_status(found)) == (True, 1)
    assert "engine mine cannot be built here: it needs an NVIDIA GPU" in text(found)


def test_tensorrt_is_there_with_its_gpu(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        CPU,
        recipes=(_recipe(tmp_path),),
        core=WORKING,
        onnxruntime=runtime(),
        tensorrt=Outcome(facts={"version": "10.13.3"}),
        cuda=cuda("9.0"),
    )
    assert found["asked"][0]["ok"]
    assert exit_status(found) == 0


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("h100", "9.0"),
        ("a100", "8.0"),
        ("l4", "8.9"),
        ("orin-agx", "8.7"),
        ("orin-nano", "8.7"),
        ("thor", "11.0"),
    ],
)
def test_recipes_of_plain_tensorrt_name_the_gpu_they_need(
    tmp_path: Path, name: str, capability: str
) -> None:
    outcomes: dict[str, Any] = {
        "core": WORKING,
        "tensorrt": Outcome(facts={"version": "10.13.3"}),
    }
    gpu = f"an NVIDIA GPU of compute capability {capability}"
    found = engine(look(tmp_path, CPU, **outcomes), name)
    assert found["build"]["missing"] == [f"{gpu}: it builds for the one that is there"]
    assert found["build"]["fix"] == "build it on the machine that will run it"
    assert gpu in found["run"]["missing"]
    found = engine(look(tmp_path / "b", CPU, **outcomes, cuda=cuda("12.0")), name)
    (missing,) = found["build"]["missing"]
    assert missing.startswith(f"{gpu}; here: 12.0: ")
    assert found["build"]["fix"].endswith("use the recipe of this GPU")
    assert f"{gpu}; here: 12.0" in found["run"]["missing"]
    right = cuda("12.0", capability)
    found = engine(look(tmp_path / "c", CPU, **outcomes, cuda=right), name)
    assert found["build"]["ok"]
    assert found["run"]["missing"] == ["cuda-bindings>=12.6.1"]
    whole = {**CPU, "cuda-bindings": "12.9.1"}
    found = engine(look(tmp_path / "d", whole, **outcomes, cuda=right), name)
    assert found["run"]["missing"] == []


@pytest.mark.parametrize(
    ("release", "name", "bindings", "missing", "fix"),
    [
        ("R36 (release), REVISION: 4.3", "orin-nano", "12.9.1", [], ""),
        (
            "R36 (release), REVISION: 4.3",
            "orin-nano",
            "13.1.0",
            ["cuda-bindings<13,>=12.6.1, not 13.1.0"],
            "pip install 'cuda-bindings<13,>=12.6.1'",
        ),
        ("R38 (release), REVISION: 2.0", "thor", "13.1.0", [], ""),
        (
            "R38 (release), REVISION: 2.0",
            "thor",
            "",
            ["cuda-bindings>=12.6.1"],
            "pip install 'cuda-bindings>=13,<14'",
        ),
    ],
)
def test_a_jetson_needs_the_bindings_of_its_cuda(
    tmp_path: Path, release: str, name: str, bindings: str, missing: list[str], fix: str
) -> None:
    put(tmp_path / "root", {"etc/nv_tegra_release": f"# {release}"})
    packages = {**CPU, **({"cuda-bindings": bindings} if bindings else {})}
    found = look(
        tmp_path,
        packages,
        changes={"machine": "aarch64"},
        core=WORKING,
        onnxruntime=runtime(),
        tensorrt=Outcome(facts={"version": "10.13.3"}),
        cuda=cuda("11.0" if name == "thor" else "8.7"),
    )
    verdict = engine(found, name)["run"]
    assert verdict["missing"] == missing
    assert fix in verdict["fix"]


def test_turing_has_a_recipe_of_its_own(tmp_path: Path) -> None:
    outcomes: dict[str, Any] = {"core": WORKING, "tensorrt_rtx": RTX_OUTCOME}
    found = look(tmp_path, RTX, cuda=cuda("7.5"), **outcomes)
    turing = engine(found, "rtx-turing")
    assert turing["build"]["ok"]
    assert turing["run"]["missing"] == []


@pytest.mark.parametrize(
    ("capability", "runs"), [("8.0", True), ("12.0", True), ("7.5", False)]
)
def test_a_compatible_plan_runs_on_later_gpus(
    tmp_path: Path, capability: str, runs: bool
) -> None:
    """Here the recipe's own GPU is another one."""
    wider = 'hardware_compatibility = "ampere_plus"\ncompute_capabilities = ["8.6"]'
    here = host(tmp_path)
    gpus = ({"compute_capability": capability},)
    outcomes = {"tensorrt": Outcome(facts={"version": "10.13"}), "core": WORKING}
    facts = verdicts.Facts(here, Packages(here, tmp_path), outcomes, gpus)
    recipe = load_recipe("engines", _recipe(tmp_path, wider), EngineRecipe)
    missing = [lack.what for lack in verdicts.run_verdict(recipe, facts).lacks]
    assert any("GPU" in what for what in missing) != runs


@pytest.mark.parametrize(("capability", "runs"), [("8.6", True), ("7.5", False)])
def test_a_plan_of_rtx_that_names_no_gpu_is_for_ampere_and_later(
    tmp_path: Path, capability: str, runs: bool
) -> None:
    recipe = load_recipe(
        "engines", _recipe(tmp_path, "", flavour="tensorrt_rtx"), EngineRecipe
    )
    here = host(tmp_path)
    gpus = ({"compute_capability": capability},)
    outcomes = {"tensorrt_rtx": RTX_OUTCOME, "core": WORKING}
    facts = verdicts.Facts(here, Packages(here, tmp_path), outcomes, gpus)
    missing = [lack.what for lack in verdicts.run_verdict(recipe, facts).lacks]
    assert any("GPU" in what for what in missing) != runs


def test_a_plan_for_the_gpu_that_is_there_needs_one(tmp_path: Path) -> None:
    recipe = _recipe(
        tmp_path, 'compute_capabilities = ["current"]', flavour="tensorrt_rtx"
    )
    outcomes: dict[str, Any] = {"core": WORKING, "tensorrt_rtx": RTX_OUTCOME}
    found = look(tmp_path, RTX, recipes=(recipe,), **outcomes)
    assert found["asked"][0]["missing"][0].startswith("an NVIDIA GPU")
    outcomes["cuda"] = cuda("8.9")
    found = look(tmp_path, RTX, recipes=(recipe,), **outcomes)
    assert found["asked"][0]["ok"]


def test_onnx_runtime_on_cuda_is_not_built(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, backend="onnxruntime", flavour="cuda")
    found = look(tmp_path, CPU, recipes=(recipe,), onnxruntime=runtime())
    assert "--backend onnxruntime-cuda" in found["asked"][0]["fix"]
    assert "onnxruntime-cuda" in BACKENDS


@pytest.mark.parametrize(
    ("files", "outcome", "fix"),
    [
        ({}, ABSENT, "sudo apt install python3-libnvinfer"),
        (
            {"usr/lib/python3.10/dist-packages/tensorrt/__init__.py": ""},
            ABSENT,
            "python3.10 -m venv --system-site-packages .venv",
        ),
        (
            {"usr/lib/python3.10/dist-packages/tensorrt/__init__.py": ""},
            Outcome(problem="importing tensorrt failed: libnvinfer.so.10"),
            "sudo apt install --reinstall python3-libnvinfer",
        ),
    ],
)
def test_tensorrt_of_a_jetson_comes_from_apt(
    tmp_path: Path, files: Mapping[str, str], outcome: Outcome, fix: str
) -> None:
    model = {"proc/device-tree/model": "NVIDIA Jetson Orin NX\0"}
    put(tmp_path / "root", {**model, **files})
    found = look(
        tmp_path,
        CPU,
        recipes=(_recipe(tmp_path),),
        changes={"machine": "aarch64"},
        core=WORKING,
        onnxruntime=runtime(),
        tensorrt=outcome,
        cuda=cuda("8.7"),
    )
    assert found["asked"][0]["fix"] == fix
    assert "NVIDIA Jetson Orin NX" in text(found)


def test_export_needs_its_packages(tmp_path: Path) -> None:
    outcomes: dict[str, Any] = {"core": WORKING, "onnxruntime": runtime()}
    found = look(tmp_path, EXPORT, recipes=("float32",), **outcomes)
    assert found["asked"] == [
        {"name": "float32", "kind": "export", "ok": True, "missing": [], "fix": ""}
    ]
    lesser = {k: v for k, v in EXPORT.items() if k not in ("diffusers", "onnx")}
    found = look(tmp_path / "b", lesser, recipes=("float32",), **outcomes)
    assert found["asked"][0]["missing"] == ["diffusers>=0.34", "onnx>=1.17"]
    assert found["asked"][0]["fix"] == "pip install 'diffusers>=0.34' 'onnx>=1.17'"
    assert exit_status(found) == 1


def test_imports_finds_a_broken_torch(tmp_path: Path) -> None:
    site(tmp_path / "site", EXPORT)
    here = host(tmp_path)
    torch = Outcome(problem="importing torch died of SIGILL")
    rest = {name: WORKING for name in verdicts.EXPORT_PACKAGES if name != "torch"}
    found = examine(
        here,
        packages=Packages(here, tmp_path / "nowhere"),
        imports=True,
        prober=prober(core=WORKING, onnxruntime=runtime(), torch=torch, **rest),
    )
    assert found["modules"]["torch"]["problem"] == torch.problem
    assert found["tiers"]["build"]["missing"] == [torch.problem]
    assert "--force-reinstall" in found["tiers"]["build"]["fix"]
    assert found["ok"]


def test_an_unknown_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe 'tpu'"):
        look(tmp_path, CPU, recipes=("tpu",))


def test_the_recipes_are_the_products_own(tmp_path: Path) -> None:
    found = look(tmp_path, CPU)
    names = [one["name"] for one in found["recipes"]["engines"]]
    assert names == recipe_names("engines")
    names = [one["name"] for one in found["recipes"]["export"]]
    assert names == recipe_names("export")
    assert found["recipes"]["problem"] == ""


def test_what_this_release_runs_is_what_the_product_runs() -> None:
    from id3pm_deploy.models import Model, open_engine

    model = Model(Path("none"), cast(Any, None), None)
    assert set(verdicts.RUNTIMES) == {
        ("onnxruntime", "cpu"),
        ("tensorrt", "tensorrt"),
        ("tensorrt", "tensorrt_rtx"),
    }
    with pytest.raises(EngineError, match="holds no TensorRT plan"):
        open_engine(model, "tensorrt")


def test_the_capabilities_are_those_of_the_installed_library() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert {c.replace(".", "") for c in flavours.RTX_CAPABILITIES} == known


def test_every_flavour_has_an_extra_and_a_package() -> None:
    from id3pm_deploy.builders.recipe import FLAVOURS
    from id3pm_deploy.doctor.flavours import EXTRAS, PACKAGES

    flavours = {name for names in FLAVOURS.values() for name in names}
    assert set(EXTRAS) == set(PACKAGES) == flavours


def test_the_export_packages_are_in_the_extra(root: Path) -> None:
    from id3pm_deploy.doctor.host import Host

    declared = Packages(Host(search=()), root).declared
    assert set(verdicts.EXPORT_PACKAGES) <= {one.name for one in declared["export"]}
    assert set(verdicts.IMPORTED) <= {one.name for one in declared["core"]}


@pytest.mark.parametrize(
    ("files", "outcome", "problem", "fix"),
    [
        ({}, ABSENT, "there is no NVIDIA driver (libcuda.so.1)", ""),
        (
            {
                "sys/bus/pci/devices/1/vendor": "0x10de",
                "sys/bus/pci/devices/1/class": "0x030200",
            },
            ABSENT,
            "there is an NVIDIA GPU, and its driver is not to be found",
            "install the driver, or start the container with its GPUs",
        ),
        (
            {},
            Outcome(problem="asking the NVIDIA driver took over 60 s"),
            "asking the NVIDIA driver took over 60 s",
            "look at what nvidia-smi says; after an update of the driver, reboot",
        ),
        ({}, cuda(), "the driver shows no GPU", "look at CUDA_VISIBLE_DEVICES"),
        ({}, cuda("8.6"), "", ""),
    ],
)
def test_the_gpus_problem(
    tmp_path: Path, files: Mapping[str, str], outcome: Outcome, problem: str, fix: str
) -> None:
    put(tmp_path / "root", files)
    found = look(tmp_path, CPU, cuda=outcome)
    assert (found["gpu"]["problem"], found["gpu"]["fix"]) == (problem, fix)
    warned = [one["what"] for one in found["notes"] if one["level"] == "warning"]
    assert (problem in warned) == bool(fix)


def _notes(found: Found) -> list[str]:
    return [f"{one['level']}: {one['what']}" for one in found["notes"]]


def test_two_packages_of_one_module_are_a_warning(tmp_path: Path) -> None:
    both = {**CPU, "onnxruntime-gpu": "1.22"}
    found = look(tmp_path, both, core=WORKING, onnxruntime=runtime())
    (note,) = found["notes"]
    assert note["what"].startswith("onnxruntime and onnxruntime-gpu are the same")
    assert note["fix"] == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && "
        "pip install onnxruntime==1.23.2"
    )
    assert found["ok"]
    on_gpu = look(tmp_path, both, core=WORKING, cuda=cuda("8.9"))
    assert on_gpu["notes"][0]["fix"].endswith("pip install onnxruntime-gpu==1.22")


def test_torch_for_cuda_without_a_gpu_is_only_a_note(tmp_path: Path) -> None:
    version = {"torch/version.py": "cuda: Optional[str] = '12.8'\n"}
    put(tmp_path / "site", version)
    outcomes: dict[str, Any] = {"core": WORKING, "onnxruntime": runtime()}
    found = look(tmp_path, EXPORT, **outcomes)
    assert _notes(found)[0].startswith("note: torch is built for CUDA 12.8")
    assert exit_status(found) == 0
    assert _notes(look(tmp_path, EXPORT, cuda=cuda("8.9"), **outcomes)) == []


def test_more_threads_than_cores_are_a_warning(tmp_path: Path) -> None:
    put(
        tmp_path / "root",
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
    )
    found = look(tmp_path, CPU, core=WORKING, onnxruntime=runtime(threads=4))
    assert _notes(found) == [
        "warning: ONNX Runtime takes 4 threads, and 2 cores are for this process"
    ]
    assert found["cpu"]["onnxruntime_threads"] == 4
    found = look(tmp_path, CPU, core=WORKING, onnxruntime=runtime(threads=2))
    assert _notes(found) == []


def test_metadata_of_another_version_is_a_warning(tmp_path: Path) -> None:
    info = "id3pm_deploy-0.0.9.dist-info/METADATA"
    head = "Metadata-Version: 2.1\nName: id3pm-deploy\nVersion: 0.0.9\n"
    put(tmp_path / "site", {info: head})
    found = look(tmp_path, CPU, metadata=False)
    assert "its metadata 0.0.9" in _notes(found)[0]


def test_without_any_metadata_nothing_is_called_complete(tmp_path: Path) -> None:
    found = look(tmp_path, CORE, metadata=False)
    assert found["package"]["origin"] == "unknown"
    assert found["extras"] == []
    assert found["tiers"]["train"]["ok"] is False
    assert found["tiers"]["device"]["ok"] is False
    assert found["tiers"]["device"]["fix"] == (
        "pip install --force-reinstall --no-deps numpy==2.2 pillow==12.0"
    )
    assert any("the package is not installed" in note for note in _notes(found))
    assert "None" not in text(found)


def test_the_shipped_checkpoint_is_held_against_its_card(tmp_path: Path) -> None:
    found = look(tmp_path, CPU)["checkpoint"]
    assert (found["ok"], found["problem"]) == (True, "")
    assert re.fullmatch("[0-9a-f]{64}", found["sha256"])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("weights", "its weights are not those that its card describes"),
        ("no weights", "cannot read …/model.safetensors"),
        ("config", "…/config.json is not JSON"),
        ("card", "its card cannot be read"),
        ("folder", "is not a checkpoint folder"),
    ],
)
def test_a_damaged_checkpoint_is_reported(
    tmp_path: Path, damage: str, problem: str
) -> None:
    from id3pm_deploy.shipped import shipped_checkpoint

    folder = tmp_path / "checkpoint"
    if damage != "folder":
        folder.mkdir()
        for name in ("config.json", "README.md", "model.safetensors"):
            data = (shipped_checkpoint() / name).read_bytes()
            (folder / name).write_bytes(data)
    if damage == "weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "card":
        (folder / "README.md").unlink()
    found = look(tmp_path, CPU, checkpoint=folder)["checkpoint"]
    assert found["ok"] is False
    assert problem in found["problem"]
    assert str(tmp_path) not in found["problem"]


def test_folders_are_named_without_saying_whose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "alices-state"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = look(tmp_path, CPU)["folders"]
    assert {one["name"]: one["place"] for one in folders} == {
        "cache": "~/.cache/id3pm-deploy",
        "state": "$XDG_STATE_HOME",
        "settings": "~/.config/id3pm-deploy",
        "temporary": "$TMPDIR",
    }
    assert all(one["writable"] and one["free"] > 0 for one in folders)
    assert list(home.iterdir()) == []  # looking makes nothing


def test_a_folder_in_the_way_of_the_cache_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    state = tmp_path / "state" / "id3pm-deploy"
    state.mkdir(parents=True)
    state.chmod(0o777)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    found = {one["name"]: one for one in look(tmp_path, CPU)["folders"]}
    assert found["cache"]["problem"] == "it may not be written to"
    assert found["state"]["problem"] == "others may write to it"


# What every result has, whatever the machine: the keys that programs may rely on.
VERDICT = {"ok": bool, "missing": list, "fix": str}
MAYBE_INT, MAYBE_TEXT = (int, type(None)), (str, type(None))
SCHEMA: dict[str, Any] = {
    "format": str,
    "format_version": int,
    "ok": bool,
    "package": {"version": str, "origin": str},
    "system": {"python": str, "name": str, "kernel": str, "machine": str},
    "cpu": {
        "model": str,
        "features": dict,
        "logical": int,
        "physical": MAYBE_INT,
        "affinity": int,
        "quota": (float, type(None)),
        "usable": int,
        "omp_num_threads": MAYBE_TEXT,
        "onnxruntime_threads": MAYBE_INT,
    },
    "memory": {"total": MAYBE_INT, "available": MAYBE_INT, "limit": MAYBE_INT},
    "gpu": {
        "driver": MAYBE_TEXT,
        "cuda": MAYBE_TEXT,
        "cards": int,
        "devices": [
            {
                "name": str,
                "compute_capability": str,
                "multiprocessors": int,
                "memory": int,
                "integrated": bool,
            }
        ],
        "jetson": (dict, type(None)),
        "problem": str,
        "fix": str,
    },
    "modules": dict,
    "extras": [
        {
            "name": str,
            "ok": bool,
            "requirements": [
                {"requirement": str, "found": MAYBE_TEXT, "by": str, "ok": bool}
            ],
            "fix": str,
        }
    ],
    "tiers": {
        "device": {**VERDICT, "engines": list},
        "build": VERDICT,
        "train": VERDICT,
    },
    "recipes": {
        "problem": str,
        "engines": [
            {
                "name": str,
                "summary": str,
                "backend": str,
                "flavour": str,
                "precision": str,
                "export": str,
                "build": VERDICT,
                "build_from_checkpoint": VERDICT,
                "run": VERDICT,
            }
        ],
        "export": [{"name": str, "build": VERDICT}],
    },
    "asked": [{"name": str, "kind": str, **VERDICT}],
    "checkpoint": {"ok": bool, "problem": str, "sha256": MAYBE_TEXT},
    "folders": [
        {
            "name": str,
            "place": str,
            "writable": bool,
            "free": MAYBE_INT,
            "problem": str,
        }
    ],
    "notes": [{"level": str, "what": str, "fix": str}],
}
MODULE = {
    "ok": bool,
    "absent": bool,
    "version": MAYBE_TEXT,
    "problem": str,
    "seconds": float,
}


def check(value: Any, schema: Any, where: str = "") -> None:
    """``value`` has exactly the keys and the types of ``schema``."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            check(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            check(item, schema[0], f"{where}[]")
    else:
        assert isinstance(value, schema), f"{where}: {value!r}"
        assert isinstance(value, bool) == (schema is bool), where


@pytest.mark.parametrize("full", [False, True])
def test_the_json_has_the_same_keys_everywhere(tmp_path: Path, full: bool) -> None:
    outcomes: dict[str, Any] = {}
    if full:
        outcomes = {
            "core": WORKING,
            "onnxruntime": runtime(),
            "cuda": cuda("8.6"),
        }
        outcomes |= {"nvml": Outcome(facts={"driver": "580.65"})}
        put(
            tmp_path / "root",
            {
                "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3",
                "proc/self/cgroup": "0::/",
                "sys/fs/cgroup/cpu.max": "150000 100000",
            },
        )
    packages = {**EXPORT, "onnxruntime-gpu": "1.22"} if full else {}
    found = look(tmp_path, packages, recipes=("cpu", "float16"), **outcomes)
    found = json.loads(json.dumps(found, allow_nan=False))
    check(found, SCHEMA)
    assert (found["format"], found["format_version"]) == ("id3pm-doctor", 1)
    assert (found["gpu"]["jetson"] is not None) == full
    names = ["core", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy"]
    assert list(found["modules"]) == names
    for name, module in found["modules"].items():
        known = dict(module)
        known.pop("providers", None)
        check(known, MODULE, name)
    # A key of the result is documented where the result is made.
    document = sys.modules["id3pm_deploy.doctor.examine"].__doc__ or ""
    for key in SCHEMA:
        assert f"``{key}``" in document, key


@pytest.mark.parametrize("full", [False, True])
def test_the_text_fits_a_terminal(tmp_path: Path, full: bool) -> None:
    packages = {**EXPORT, "onnxruntime-gpu": "1.22"} if full else {}
    outcomes: dict[str, Any] = (
        {"onnxruntime": runtime(), "cuda": cuda("8.6")} if full else {}
    )
    found = look(tmp_path, packages, recipes=("rtx",), **outcomes)
    for line in text(found).splitlines()[1:]:
        assert len(line) <= 88 or "fix: " in line, line
        assert line == line.rstrip()


@pytest.fixture(scope="module")
def result() -> tuple[int, Found]:
    """What the command says of this machine, as a person calls it."""
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, json.loads(done.stdout)


def test_the_result_here_is_whole(result: tuple[int, Found]) -> None:
    status, found = result
    check(found, SCHEMA)
    assert status == (0 if found["ok"] else 1)
    assert found["package"]["version"] == id3pm_deploy.__version__
    assert found["system"]["python"] == platform.python_version()
    assert found["cpu"]["affinity"] == len(os.sched_getaffinity(0))
    assert found["checkpoint"]["ok"]
    assert found["modules"]["core"]["ok"]


def test_sampling_works_where_onnx_runtime_does(result: tuple[int, Found]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    status, found = result
    assert status == 0
    assert found["modules"]["onnxruntime"]["version"] == runtime.__version__
    assert found["tiers"]["device"]["engines"][0] == "cpu"


def test_nothing_says_whose_machine_it_is(result: tuple[int, Found]) -> None:
    found = json.dumps(result[1], ensure_ascii=False) + text(result[1])
    name = platform.node()
    if name and name.lower() not in result[1]["system"]["name"].lower():
        assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", found)
    folders = {str(Path.home()), sys.prefix, str(Path.cwd()), sys.executable}
    assert [f for f in folders if len(f) > 1 and f in found] == []
    paths = set(re.findall(r"(?<![\w~…./])/[\w.-]+/?[\w./-]*", found))
    assert paths <= {"/tmp", "/var/tmp"}  # noqa: S108 - named, not used


def test_the_command_prints_a_table() -> None:
    done = CliRunner().invoke(main, ["doctor", "--recipe", "cpu"])
    assert done.exit_code in (0, 1)
    assert "engines/cpu" in done.stdout
    assert "Traceback" not in done.output


def test_the_command_refuses_an_unknown_recipe() -> None:
    done = CliRunner().invoke(main, ["doctor", "--recipe", "toaster"])
    assert done.exit_code == 2
    assert "there is no recipe 'toaster'" in done.stderr


def test_broken_libraries_and_private_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real children, a home with a telling name, libraries that fall over in it."""
    home = tmp_path / "home-zq81" / "user-zq82"
    mods = home / "venv-zq83" / "mods"
    put(
        mods,
        {
            "tensorrt.py": "import ctypes; ctypes.string_at(0)",
            "tensorrt_rtx.py": f"raise ImportError('no {home}/lib/a.so: {mods}')",
            "onnxruntime.py": "raise OSError(2, 'No such file', __file__)",
            "polygraphy/__init__.py": "import time; time.sleep(600)",
        },
    )
    for name, value in (
        ("HOME", str(home)),
        ("USER", "user-zq82"),
        ("LOGNAME", "user-zq82"),
        ("HOSTNAME", "host-zq84"),
        ("XDG_CACHE_HOME", str(home / "cache-zq85")),
        ("TMPDIR", str(home)),
    ):
        monkeypatch.setenv(name, value)
    here = host(
        tmp_path, search=(str(mods), *filter(None, sys.path)), home=home, root=Path("/")
    )
    found = examine(here, limit=6.0)
    modules = found["modules"]
    assert modules["tensorrt"]["problem"] == "importing tensorrt died of SIGSEGV"
    assert modules["polygraphy"]["problem"].startswith("importing polygraphy took over")
    assert modules["tensorrt_rtx"]["problem"].endswith("ImportError: no ~/lib/a.so: …")
    assert "No such file" in modules["onnxruntime"]["problem"]
    assert (found["ok"], exit_status(found)) == (False, 1)
    everything = json.dumps(found) + text(found)
    assert re.findall(r"\w*[-/]?zq8\d", everything) == []


@pytest.mark.parametrize("name", ["this", "python3.10"])
def test_an_environment_with_click_and_packaging_alone(
    name: str, tmp_path: Path
) -> None:
    """Python 3.10 lacks even a TOML reader there; the doctor says so and no more."""
    from test_light_import import _interpreter, _run

    folder = tmp_path / "venv"
    make = [_interpreter(name), "-m", "venv", "--without-pip", folder]
    assert _run(make).returncode == 0
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(_run([python, "-I", "-c", where]).stdout.strip())
    for package in (click, packaging, id3pm_deploy):
        assert package.__file__
        source = Path(package.__file__).parent
        (purelib / source.name).symlink_to(source, target_is_directory=True)
    command = [str(python), "-I", "-m", "id3pm_deploy", "doctor"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    check(found, SCHEMA)
    assert found["ok"] is False
    assert found["tiers"]["device"]["fix"].startswith("pip install ")
    assert found["modules"]["onnxruntime"]["absent"]
    if sys.version_info >= (3, 11) and name == "python3.10":
        assert "tomli" in found["recipes"]["problem"]
        assert found["recipes"]["engines"] == []
    elif sys.version_info >= (3, 11):
        assert found["tiers"]["device"]["fix"] == (
            "pip install -e '.[cpu]' -c constraints.txt"
        )
    asked = [*command, "--recipe", "cpu"]
    done = subprocess.run(
        asked, capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode in (1, 2)


def test_doctor_imports_nothing_heavy() -> None:
    from test_light_import import HEAVY

    code = (
        "import sys; from click.testing import CliRunner; "
        "from id3pm_deploy.commands.doctor import command; "
        "CliRunner().invoke(command, ['--json', '--limit', '0.1']); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "click" in done.stdout.split()
    assert set(done.stdout.split()) & HEAVY == set()


def test_verdicts_do_not_depend_on_recipe_fields_that_do_not_exist() -> None:
    """The recipe's fields that verdicts read are still there under these names."""
    names = {field.name for field in dataclasses.fields(EngineRecipe)}
    assert {"backend", "flavour", "compute_capabilities", "export"} <= names
