"""Which plans run on which machine, and what is said and done where they do not."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import edit_manifest, new_engine, new_writer, with_plan
from click.testing import CliRunner, Result
from doctor_fakes import CORE, cuda, host, prober, put, site
from fakes import EARLY, library_path, pretend_here, put_driver, put_tensorrt

from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.bundle import EngineEntry, open_bundle
from id3pm_deploy.bundle.ledger import record_plan
from id3pm_deploy.bundle.writer import BundleWriter
from id3pm_deploy.cli import main
from id3pm_deploy.doctor.flavours import require_flavour
from id3pm_deploy.doctor.probe import Outcome
from id3pm_deploy.doctor.verdicts import Lack
from id3pm_deploy.errors import (
    BundleError,
    EngineError,
    Id3pmError,
    MissingPackageError,
    TrustError,
)
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.preflight import (
    Gpu,
    Here,
    PlanProblem,
    here,
    library_version,
    plan_problem,
    runnable_plans,
)
from id3pm_deploy.preflight.commands import entry_recipe, fitting_targets
from id3pm_deploy.preflight.machine import release, same_version
from id3pm_deploy.recipes import load_recipe

RTX_VERSION = "1.7.1.116"
ADA = Gpu("NVIDIA RTX 4090", "8.9", 128)
HOPPER = Gpu("NVIDIA H100", "9.0", 132)
ORIN = Gpu("Orin", "8.7", 8, integrated=True)
JETSON = {"model": "Jetson Orin Nano", "l4t": "36.4", "jetpack": "6"}
RTX = EngineEntry(
    "rtx",
    "tensorrt",
    "tensorrt_rtx",
    RTX_VERSION,
    "float16",
    graph="g",
    file="f",
    compute_capabilities=("8.6", "8.9"),
)
PLAIN = EngineEntry(
    "h100",
    "tensorrt",
    "tensorrt",
    "10.3.0",
    "float16",
    graph="g",
    file="f",
    compute_capabilities=("9.0",),
    gpu_name=HOPPER.name,
    compute_capability="9.0",
    multiprocessors=132,
    cuda="12.6",
)


def with_rtx(*gpus: Gpu, version: str = RTX_VERSION) -> Here:
    return Here(gpus, "13.0", versions={"tensorrt_rtx": version})


def with_plain(*gpus: Gpu, version: str = "10.3.0", cuda: str = "12.6") -> Here:
    return Here(gpus, cuda, versions={"tensorrt": version})


def problem(entry: EngineEntry, machine: Here) -> PlanProblem:
    found = plan_problem(entry, machine, Path("my bundle"))
    assert found is not None
    return found


# The machine.


def machine(tmp_path: Path, *outcomes: Any, **found: Outcome) -> Here:
    return here(host=host(tmp_path), prober=prober(**found))


def put_module(folder: Path, name: str) -> None:
    put(folder, {f"{name}/__init__.py": "raise SystemExit('imported')\n"})


def test_what_is_here_comes_from_the_driver_and_from_metadata(tmp_path: Path) -> None:
    site(tmp_path / "site", {**CORE, "tensorrt-rtx-cu13-bindings": RTX_VERSION})
    put_module(tmp_path / "site", "tensorrt_rtx")
    found = machine(tmp_path, cuda=cuda("8.6", "12.0"))
    assert [gpu.compute_capability for gpu in found.gpus] == ["8.6", "12.0"]
    assert (found.cuda, found.gpu_problem) == ("13.0", "")
    assert found.versions == {"tensorrt_rtx": RTX_VERSION}
    assert set(found.lacks) == {"tensorrt"}
    assert "is not installed" in found.lacks["tensorrt"].what
    assert "pip install" in found.lacks["tensorrt"].fix
    assert "home" not in repr(found), "a machine's folders are nobody's business"


def test_only_what_matters_is_looked_at(tmp_path: Path) -> None:
    site(tmp_path / "site", CORE)
    found = here(("tensorrt_rtx", "evil"), host=host(tmp_path), prober=prober())
    assert set(found.lacks) == {"tensorrt_rtx"}
    assert found.gpu_problem == "there is no NVIDIA driver (libcuda.so.1)"


@pytest.mark.parametrize(
    ("packages", "version"),
    [
        ({"tensorrt": "10.9.0.34", "tensorrt-cu12": "10.9.0.34.post1"}, "10.9.0.34"),
        ({"tensorrt-cu13-bindings": "11.4.0.106"}, "11.4.0.106"),
        # What disagrees, or is not there, is asked for.
        ({"tensorrt": "10.3.0", "tensorrt-cu13-bindings": "11.4.0.106"}, "10.16.1"),
        ({}, "10.16.1"),
    ],
)
def test_the_version_of_a_library(
    tmp_path: Path, packages: dict[str, str], version: str
) -> None:
    site(tmp_path / "site", packages)
    put_module(tmp_path / "site", "tensorrt")
    answer = prober(tensorrt=Outcome(facts={"version": "10.16.1"}))
    found = library_version("tensorrt", host=host(tmp_path), prober=answer)
    assert found == version


def test_a_mere_folder_is_no_library(tmp_path: Path) -> None:
    site(tmp_path / "site", {"tensorrt": "10.3.0"})
    put(tmp_path / "site", {"tensorrt/notes.txt": ""})
    with pytest.raises(MissingPackageError, match="tensorrt cannot be used here"):
        library_version("tensorrt", host=host(tmp_path), prober=prober())


def test_a_library_that_cannot_be_imported_or_has_no_version(tmp_path: Path) -> None:
    site(tmp_path / "site", {})
    put_module(tmp_path / "site", "tensorrt")
    broken = Outcome(problem="importing tensorrt failed: no libnvinfer.so.10")
    for outcome, said in (
        (broken, "no libnvinfer.so.10"),
        (Outcome(facts={"version": None}), "does not say which version"),
    ):
        answer = prober(tensorrt=outcome)
        with pytest.raises(MissingPackageError) as caught:
            library_version("tensorrt", host=host(tmp_path), prober=answer)
        assert said in caught.value.why


def jetson(tmp_path: Path) -> None:
    release = "# R36 (release), REVISION: 4.3, GCID: 1"
    put(
        tmp_path / "root",
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc/nv_tegra_release": release,
        },
    )


def test_on_a_jetson_tensorrt_comes_from_apt(tmp_path: Path) -> None:
    jetson(tmp_path)
    site(tmp_path / "site", CORE)
    one = host(tmp_path, machine="aarch64")
    assert here(("tensorrt",), host=one, prober=prober()).lacks["tensorrt"].fix == (
        "sudo apt install python3-libnvinfer"
    )
    put(tmp_path / "root", {"usr/lib/python3.10/dist-packages/tensorrt/a.py": ""})
    fix = here(("tensorrt",), host=one, prober=prober()).lacks["tensorrt"].fix
    assert fix == "python3.10 -m venv --system-site-packages .venv"


def test_a_builder_says_how_its_library_is_installed(tmp_path: Path) -> None:
    site(tmp_path / "site", CORE)
    with pytest.raises(MissingPackageError, match="'tensorrt', which is not") as caught:
        require_flavour("tensorrt", host(tmp_path))
    assert caught.value.fix == "pip install 'tensorrt>=10.3'"
    jetson(tmp_path)
    with pytest.raises(MissingPackageError, match="'tensorrt', which is not") as caught:
        require_flavour("tensorrt", host(tmp_path))
    assert caught.value.fix == "sudo apt install python3-libnvinfer"


@pytest.mark.parametrize(
    "line", ["import libnvinfer_is_not_here", "raise OSError('libnvinfer.so.10: no')"]
)
def test_a_library_that_is_there_and_broken_is_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    put(tmp_path / "site", {"tensorrt/__init__.py": line + "\n"})
    monkeypatch.syspath_prepend(tmp_path / "site")
    jetson(tmp_path)
    with pytest.raises(MissingPackageError, match="cannot be imported") as caught:
        require_flavour("tensorrt", host(tmp_path))
    assert "libnvinfer" in caught.value.why
    assert caught.value.fix == "sudo apt install --reinstall python3-libnvinfer"


def test_the_real_driver_and_libraries_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tensorrt(tmp_path / "site", tell=tmp_path / "imported")
    library = put_driver(tmp_path / "lib", "Orin", "8.7", 8)
    monkeypatch.setenv("LD_LIBRARY_PATH", library_path(library))
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = here(("tensorrt",))
    assert found.gpus == (Gpu("Orin", "8.7", 8, 8 << 30, True),)
    assert (found.cuda, found.versions) == ("12.6", {"tensorrt": EARLY})
    assert not (tmp_path / "imported").exists()


def test_a_tensorrt_without_metadata_is_asked_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "imported"
    put_tensorrt(tmp_path / "site", metadata=False, tell=told)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert library_version("tensorrt") == EARLY
    assert told.exists()
    assert "tensorrt" not in sys.modules


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.9.0.34.post1", "10.9.0.34", True),
        ("10.3.0+cuda12", "10.3.0", True),
        ("10.3.0", "10.3.0.30", False),
        ("10.3.0", "10.3.1", False),
        ("odd", "odd", True),
        ("odd", "", False),
    ],
)
def test_versions(one: str, other: str, same: bool) -> None:
    assert same_version(one, other) is same
    assert release("10.9.0.34.post1") == (10, 9, 0, 34)


# The rules.


@pytest.mark.parametrize(
    ("entry", "machine"),
    [
        (RTX, with_rtx(ADA)),
        (RTX, with_rtx(HOPPER, ADA)),
        (dataclasses.replace(RTX, compute_capabilities=()), with_rtx(ADA)),
        (PLAIN, with_plain(HOPPER)),
        (PLAIN, with_plain(ADA, HOPPER)),
        (PLAIN, with_plain(HOPPER, cuda="13.1")),
        (PLAIN, with_plain(HOPPER, version="10.3.0.post1")),
    ],
)
def test_a_plan_that_fits(entry: EngineEntry, machine: Here) -> None:
    assert plan_problem(entry, machine) is None


def plain(**changes: Any) -> EngineEntry:
    return dataclasses.replace(PLAIN, **changes)


def rtx(**changes: Any) -> EngineEntry:
    return dataclasses.replace(RTX, **changes)


BIGGER = dataclasses.replace(HOPPER, multiprocessors=114)
NAMED = dataclasses.replace(HOPPER, name="NVIDIA H200")


@pytest.mark.parametrize(
    ("entry", "machine", "kind", "stale", "said"),
    [
        (RTX, with_rtx(ADA, version="1.8.0.1"), "version", True, "version that built"),
        (RTX, with_rtx(), "gpu", False, "no NVIDIA GPU"),
        (RTX, with_rtx(HOPPER), "gpu", False, "none of the GPUs"),
        (rtx(compute_capabilities=()), with_rtx(HOPPER), "gpu", False, "none of the"),
        (
            rtx(compute_capabilities=()),
            with_rtx(Gpu("T4", "7.5", 40)),
            "gpu",
            False,
            "none of the GPUs",
        ),
        (rtx(compute_capabilities=("current",)), with_rtx(ADA), "gpu", True, "not say"),
        (RTX, Here((ADA,)), "library", False, "was not looked for"),
        (rtx(flavour="evil"), with_rtx(ADA), "flavour", False, "not know its kind"),
        (rtx(backend="mlir"), with_rtx(ADA), "flavour", False, "not know its kind"),
        (PLAIN, with_plain(HOPPER, version="10.16.1.11"), "version", True, "version"),
        (PLAIN, with_plain(HOPPER, version="10.3.1"), "version", True, "version"),
        (PLAIN, with_plain(BIGGER), "gpu", True, "tuned for another GPU"),
        (PLAIN, with_plain(NAMED), "gpu", True, "tuned for another GPU"),
        (PLAIN, with_plain(ADA), "gpu", False, "another compute capability"),
        (
            plain(compute_capabilities=()),
            with_plain(ADA),
            "gpu",
            True,
            "tuned for another GPU",
        ),
        (plain(gpu_name=None), with_plain(HOPPER), "gpu", True, "does not say"),
        (PLAIN, with_plain(HOPPER, cuda="11.8"), "cuda", True, "runs no CUDA 12"),
    ],
)
def test_a_plan_that_does_not_fit(
    entry: EngineEntry, machine: Here, kind: str, stale: bool, said: str
) -> None:
    found = problem(entry, machine)
    assert (found.kind, found.stale) == (kind, stale)
    assert said in found.reason
    assert found.fix
    error = found.error()
    assert found.built_for in error.why
    assert found.found in error.why
    assert ("--rebuild-if-stale" in error.fix) is stale


@pytest.mark.parametrize(
    ("built", "here", "fits"),
    [
        ("10.3.0", "10.3.0", True),
        ("10.3.0", "10.16.1.11", True),
        ("10.3.0", "11.4.0.106", True),
        ("8.6.1", "10.3.0", True),
        ("10.16.1.11", "10.3.0", False),
        ("8.6.1", "11.4.0.106", False),
        ("11.4.0.106", "12.0", False),
        ("odd", "10.3.0", False),
    ],
)
def test_a_version_compatible_plan(built: str, here: str, fits: bool) -> None:
    entry = plain(version=built, version_compatible=True)
    found = plan_problem(entry, with_plain(HOPPER, version=here))
    assert (found is None) is fits
    if found is not None:
        assert "or later" in found.built_for


def test_hardware_compatible_plans() -> None:
    ampere = plain(hardware_compatibility="ampere_plus", compute_capabilities=())
    assert plan_problem(ampere, with_plain(ADA)) is None
    turing = Gpu("NVIDIA T4", "7.5", 40)
    assert problem(ampere, with_plain(turing)).kind == "gpu"
    same = plain(hardware_compatibility="same_compute_capability", gpu_name=None)
    assert plan_problem(same, with_plain(BIGGER)) is None
    found = problem(same, with_plain(ADA))
    assert found.stale
    assert found.built_for == "tensorrt 10.3.0, GPUs of compute capability 9.0"


def test_no_hardware_compatible_plan_is_for_a_jetson() -> None:
    entry = plain(hardware_compatibility="ampere_plus", compute_capabilities=())
    board = dataclasses.replace(with_plain(ORIN), jetson=JETSON)
    assert "does not extend to Jetson" in problem(entry, board).reason


def test_tensorrt_rtx_is_not_made_for_arm(tmp_path: Path) -> None:
    board = dataclasses.replace(
        with_plain(ORIN), host=host(tmp_path, machine="aarch64"), jetson=JETSON
    )
    found = problem(RTX, board)
    assert "not made for aarch64" in found.reason
    assert "--target orin-agx or orin-nano" in found.fix


def test_what_is_missing_is_passed_on() -> None:
    lack = Lack("the Python module tensorrt is not installed", "sudo apt install it")
    found = problem(PLAIN, Here((HOPPER,), "12.6", lacks={"tensorrt": lack}))
    assert (found.kind, found.reason, found.fix) == ("library", lack.what, lack.fix)
    assert found.found == f"no tensorrt, {HOPPER}, CUDA 12.6"


def test_both_sides_are_named() -> None:
    found = problem(PLAIN, with_plain(ADA, version="10.16.1.11", cuda="13.0"))
    assert found.built_for == (
        "tensorrt 10.3.0, NVIDIA H100 (compute capability 9.0, 132 multiprocessors), "
        "CUDA 12.6"
    )
    assert found.found == (
        "tensorrt 10.16.1.11, NVIDIA RTX 4090 (compute capability 8.9, 128 "
        "multiprocessors), CUDA 13.0"
    )


def test_what_a_manifest_says_cannot_fill_the_screen() -> None:
    long = "x" * 10_000
    entries = [
        plain(gpu_name=long, version=long, cuda=f"12.{long}", target=long),
        plain(version="9" * 10_000, version_compatible=True),
        plain(cuda="9" * 10_000, gpu_name="x"),
        plain(version="9", settings=settings("h100", export=long)),
        rtx(compute_capabilities=(long,) * 1_000),
    ]
    for entry in entries:
        for one in (with_plain(HOPPER), with_rtx(ADA), Here()):
            found = plan_problem(entry, one, Path("my bundle"))
            assert found is not None
            assert len(str(found.error())) < 2_000


# The commands that put it right.


def settings(name: str, **changes: Any) -> dict[str, Any]:
    recipe = load_recipe("engines", name, EngineRecipe)
    values = dataclasses.asdict(dataclasses.replace(recipe, **changes))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def test_the_command_builds_the_same_again() -> None:
    changed = settings("h100", workspace_share=0.25, static_samples=(1, 2))
    entry = plain(settings=changed)
    fix = problem(entry, with_plain(HOPPER, version="10.9")).fix
    assert fix == (
        "id3pm-deploy build-engine 'my bundle' --target h100 "
        "--set 'static_samples=[1, 2]' --set workspace_share=0.25"
    )
    # The command says what the manifest does.
    again = load_recipe(
        "engines",
        "h100",
        EngineRecipe,
        ("static_samples=[1, 2]", "workspace_share=0.25"),
    )
    assert again == entry_recipe(entry)


def test_a_recipe_of_the_users_own_is_asked_for() -> None:
    entry = plain(target="mine", settings=settings("h100"))
    assert entry_recipe(entry) == load_recipe("engines", "h100", EngineRecipe)
    fix = problem(entry, with_plain(HOPPER, version="10.9")).fix
    assert fix.endswith("--target FILE.toml")


def test_another_target_is_named_where_the_same_would_not_do() -> None:
    fix = problem(RTX, with_rtx(HOPPER)).fix
    assert fix.endswith("--target h100"), "no graph is exported anew for it"
    assert fitting_targets(with_rtx(ADA), "float16") == ["rtx"]
    assert fitting_targets(with_plain(ADA), "float16") == ["l4"]
    assert fitting_targets(Here((ADA,)), "float16") == ["l4", "rtx"]
    assert fitting_targets(with_rtx(ADA), "bfloat16") == []
    narrow = rtx(compute_capabilities=("8.6",), precision="bfloat16")
    assert "compute_capabilities" in problem(narrow, with_rtx(ADA)).fix


# A bundle's plans.


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / "home" / kind.lower()))


def planned(folder: Path, *targets: str) -> None:
    """A bundle with these plans, all built here by the user."""
    writer = new_writer(folder)
    graph = writer.commit().manifest.graphs[0].file
    for target in targets:
        file = writer.add_file(target, ".plan", f"plan of {target}".encode())
        entry = dataclasses.replace(new_engine(target, graph, file), version="1")
        writer.add_engine(entry)
        record_plan(writer.file_entry(file).sha256)
    writer.commit()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def sample(bundle: Path, out: Path, *options: str) -> Result:
    shared = ("--unconditional", "--backend", "tensorrt", "--out", out)
    return run("sample", bundle, *shared, *options)


FITS = with_rtx(ADA, version="1")


def edit_entry(folder: Path, index: int = 0, **changes: Any) -> None:
    edit_manifest(folder, lambda values: values["engines"][index].update(changes))


def test_a_plan_that_fits_is_checked_and_then_waits_for_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_here(monkeypatch, FITS)
    planned(tmp_path / "b", "rtx")
    engine = open_engine(open_model(tmp_path / "b"), "tensorrt")
    with pytest.raises(Id3pmError, match=r"no NVIDIA driver|Python module 'cuda"):
        engine.__enter__()


def damage(folder: Path, kind: str) -> None:
    """Flip a byte of the first plan, shorten it, or put the second one in its place."""
    first, second = (e.file for e in open_bundle(folder).manifest.plans)
    data = (folder / first).read_bytes()
    (folder / first).write_bytes(
        {
            "flipped": bytes([data[0] ^ 1]) + data[1:],
            "truncated": data[:-1],
            "empty": b"",
            "swapped": (folder / second).read_bytes(),
        }[kind]
    )


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "swapped"])
def test_a_damaged_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pretend_here(monkeypatch, FITS)
    planned(tmp_path / "b", "one", "two")
    damage(tmp_path / "b", kind)
    with pytest.raises(BundleError, match="not the file that the manifest") as caught:
        open_engine(open_model(tmp_path / "b"), "tensorrt")
    assert "do not use this file" in caught.value.fix
    refused = run("inspect", tmp_path / "b")
    assert refused.exit_code == 1
    assert "not the file that the manifest" in refused.stderr


def test_a_plan_of_another_version_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_here(monkeypatch, with_rtx(ADA))
    planned(tmp_path / "b", "one", "two")
    damage(tmp_path / "b", "flipped")
    with pytest.raises(EngineError, match="the version that built it") as caught:
        open_engine(open_model(tmp_path / "b"), "tensorrt")
    assert "tensorrt_rtx 1, " in caught.value.why
    assert f"tensorrt_rtx {RTX_VERSION}, " in caught.value.why
    refused = sample(tmp_path / "b", tmp_path / "out")
    assert refused.exit_code == 1
    assert "it was built for tensorrt_rtx 1" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_plan_that_runs_here_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path / "b", "one", "two", "three")
    edit_entry(tmp_path / "b", 0, version="2")
    bundle = open_bundle(tmp_path / "b")
    names = [entry.target for entry in runnable_plans(bundle, machine=FITS)]
    assert names == ["two", "three"]
    assert runnable_plans(bundle, precision="float16", machine=FITS) == []
    assert runnable_plans(bundle, "super_resolution", machine=FITS) == []
    # Of those, one that somebody answers for.
    damage_of = bundle.manifest.plans[1]
    sha256 = bundle.manifest.file_entry(damage_of.file).sha256
    (tmp_path / "home/state/id3pm-deploy/plans" / f"{sha256}.json").unlink()
    pretend_here(monkeypatch, FITS)
    engine = open_engine(open_model(tmp_path / "b"), "tensorrt")
    with pytest.raises(Id3pmError, match=r"no NVIDIA driver|Python module 'cuda"):
        engine.__enter__()


def test_of_several_that_do_not_run_the_nearest_is_told_of(tmp_path: Path) -> None:
    planned(tmp_path / "b", "one", "two")
    edit_entry(tmp_path / "b", 0, flavour="evil")
    with pytest.raises(EngineError, match="the engine 'two'"):
        runnable_plans(open_bundle(tmp_path / "b"), machine=with_rtx(ADA))


def test_trust_comes_after_what_the_machine_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_plan(tmp_path / "b")
    model = open_model(tmp_path / "b")
    pretend_here(monkeypatch, with_rtx(version="1"))
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        open_engine(model, "tensorrt")
    pretend_here(monkeypatch, FITS)
    with pytest.raises(TrustError):
        open_engine(model, "tensorrt")


def test_inspect_tells_of_every_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(tmp_path / "b", "one", "two")
    edit_entry(tmp_path / "b", 1, version="2")
    pretend_here(monkeypatch, FITS)
    plans = json.loads(run("inspect", tmp_path / "b", "--json").stdout)["plans"]
    assert [plans[name]["runs_here"] for name in ("one", "two")] == [True, False]
    assert plans["one"]["here"].startswith("runs here")
    assert (plans["one"]["fix"], plans["one"]["trusted"]) == ("", True)
    assert plans["two"]["here"].startswith("does not run here: a plan runs on the")
    assert plans["two"]["stale"] is True
    assert "tensorrt_rtx 2, GPUs of" in plans["two"]["built_for"]
    assert plans["two"]["found"] == f"tensorrt_rtx 1, {ADA}, CUDA 13.0"
    assert "build-engine" in plans["two"]["fix"]
    text = run("inspect", tmp_path / "b").stdout
    assert "does not run here: a plan runs on the version that built it" in text
    assert "  runs here" in text or " runs here" in text


def test_a_bundle_without_plans_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_writer(tmp_path / "b").commit()

    def never(*_: object) -> Outcome:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr("id3pm_deploy.preflight.machine.run_probe", never)
    facts = json.loads(run("inspect", tmp_path / "b", "--json").stdout)
    assert facts["plans"] == {}
    with pytest.raises(EngineError, match="holds no TensorRT plan"):
        open_engine(open_model(tmp_path / "b"), "tensorrt")


def test_auto_takes_no_plan(bundle_copy: Path) -> None:
    bundle = open_bundle(bundle_copy)
    writer = BundleWriter(bundle_copy, bundle.manifest)
    file = writer.add_file("rtx", ".plan", b"plan")
    graph = bundle.manifest.graphs[0].file
    writer.add_engine(new_engine("rtx", graph, file))
    writer.commit()
    engine = open_engine(open_model(bundle_copy))
    assert engine.info.backend == "onnxruntime"
