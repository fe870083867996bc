"""A plan added to a bundle on a device: no torch, no onnx, and TensorRT alone.

The device is a virtual environment with what the device tier asks for. Plain TensorRT
and the driver are fakes, so this says that our code goes through; TensorRT-RTX is real.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import EARLY, LATE, library_path, put_driver, put_tensorrt

import id3pm_deploy
from id3pm_deploy.builders.build import export_bundle
from id3pm_deploy.bundle import EngineEntry, open_bundle

pytestmark = pytest.mark.slow

DEVICE = ("click", "numpy", "PIL", "packaging", "tomli")
NATIVE = ("numpy.libs", "pillow.libs")
RTX = ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt_rtx_libs")
ABSENT = ("torch", "onnx", "onnxscript", "diffusers", "polygraphy", "onnxruntime")
MAGIC = b"ftrt"
SECONDS = 300


class Device:
    """An environment of the device tier."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
        subprocess.run(make, check=True, timeout=60)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = folder.glob("venv/lib/python*/site-packages")
        for name in DEVICE:
            self.link(name)
        for name in NATIVE:
            beside = _site_of("numpy") / name
            if beside.is_dir():
                (self.site / name).symlink_to(beside)
        package = Path(str(id3pm_deploy.__file__)).parent
        (self.site / package.name).symlink_to(package)
        self.libraries: Path | None = None

    def link(self, name: str) -> None:
        """Install a package of this environment there, with its metadata."""
        if importlib.util.find_spec(name) is None:
            return
        (self.site / name).symlink_to(_site_of(name) / name)
        for info in _site_of(name).glob(f"{name}*.dist-info"):
            if not (self.site / info.name).exists():
                (self.site / info.name).symlink_to(info)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the command line there."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder / "home")}
        if self.libraries is not None:
            environment["LD_LIBRARY_PATH"] = library_path(self.libraries)
        return subprocess.run(
            [self.python, "-m", "id3pm_deploy", *map(str, arguments)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def built(self, *arguments: object) -> dict[str, Any]:
        """Run ``build-engine`` there; what it prints as JSON."""
        done = self.run("build-engine", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts


def _site_of(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin)
    return path.parent.parent if path.name == "__init__.py" else path.parent


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path / "device")


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a float16 step graph and no engine."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(tiny_checkpoint, "float16", folder)
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy of it, as it was carried to the device."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def orin(folder: Path, multiprocessors: int) -> Path:
    """A driver with the GPU of an Orin, whose memory is the host's."""
    return put_driver(folder, "Orin", "8.7", multiprocessors, integrated=True)


def plan_of(folder: Path) -> EngineEntry:
    found = open_bundle(folder)
    found.verify()
    (entry,) = found.manifest.plans
    return entry


def told(folder: Path) -> dict[str, Any]:
    """What the fake TensorRT was told, which is its plan."""
    data = open_bundle(folder).read(plan_of(folder).file)
    assert data.startswith(MAGIC)
    found: dict[str, Any] = json.loads(data[len(MAGIC) :])
    return found


def test_the_device_lacks_what_it_should(device: Device) -> None:
    code = (
        "import importlib.util as u, sys;"
        "print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    )
    names = [*ABSENT, *RTX, "tensorrt", "click", "numpy"]
    done = subprocess.run(
        [device.python, "-I", "-c", code, *names],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["click", "numpy"]


@pytest.mark.parametrize("version", [EARLY, LATE])
def test_a_jetson_adds_its_plan_to_a_bundle(
    device: Device, bundle: Path, version: str
) -> None:
    put_tensorrt(device.site, version)
    device.libraries = orin(device.folder / "lib", 8)
    before = open_bundle(bundle).manifest
    facts = device.built(bundle, "--target", "orin-nano")
    assert facts["version"] == version
    entry = plan_of(bundle)
    after = open_bundle(bundle).manifest
    assert after.graphs == before.graphs
    assert (entry.target, entry.flavour) == ("orin-nano", "tensorrt")
    assert (entry.gpu_name, entry.compute_capability) == ("Orin", "8.7")
    assert (entry.multiprocessors, entry.cuda) == (8, "12.6")
    assert entry.settings["workspace_share"] == 0.25
    assert entry.self_test_error is None
    convolutions = entry.layer_types["multiply_accumulates"]["CONVOLUTION"]
    assert convolutions["HALF"] > 0.9 * sum(convolutions.values())
    # The finished plan is inspected where its GPU is, and says the same.
    assert entry.plan_types["source"] == "plan"
    assert entry.plan_types["multiply_accumulates"]["CONVOLUTION"] == convolutions

    plan = told(bundle)
    assert not set(ABSENT) & set(plan["modules"])
    assert "TF32" not in plan["flags"]
    # Strong typing is asked for where it is a choice, and nothing else ever is.
    assert plan["network_flags"] == (2 if version == EARLY else 0)
    assert plan["flags"] == []
    assert plan["optimization_level"] == 2
    assert plan["auxiliary_streams"] == 0
    assert plan["hardware_compatibility"] == "NONE"
    # Memory-safe: a quarter of what is free, up to the ceiling.
    assert 0 < plan["pools"]["WORKSPACE"] <= 512 << 20
    sizes = [profile["state"][1][1] for profile in plan["profiles"]]
    assert sizes == [1, 1]
    assert [profile["row"][1] for profile in plan["profiles"]] == [[1], [2]]


def test_the_plan_is_reused_and_runs_there(device: Device, bundle: Path) -> None:
    put_tensorrt(device.site)
    device.libraries = orin(device.folder / "lib", 8)
    first = device.built(bundle, "--target", "orin-nano")
    second = device.built(bundle, "--target", "orin-nano")
    assert second["plan_key"] == first["plan_key"] != ""
    plans = json.loads(device.run("inspect", bundle, "--json").stdout)["plans"]
    assert plans["orin-nano"]["runs_here"] is True
    assert plans["orin-nano"]["trusted"] is True
    # A larger Orin is another GPU: the plan is stale there, and is built again.
    device.libraries = orin(device.folder / "lib2", 16)
    arguments = ["sample", bundle, "--unconditional", "--out", device.folder / "out"]
    arguments += ["--backend", "tensorrt"]
    refused = device.run(*arguments)
    assert refused.returncode == 1
    assert "it was tuned for another GPU" in refused.stderr
    assert "8 multiprocessors" in refused.stderr
    assert "16 multiprocessors" in refused.stderr
    assert "build-engine" in refused.stderr
    again = device.run(*arguments, "--rebuild-if-stale")
    assert "building it again" in again.stderr
    assert "cuda.bindings" in again.stderr, "it is built, and lacks what runs it"
    assert plan_of(bundle).multiprocessors == 16


def test_a_plan_for_another_gpu_is_not_built(device: Device, bundle: Path) -> None:
    put_tensorrt(device.site)
    device.libraries = put_driver(device.folder / "lib", "NVIDIA L4", "8.9", 58)
    done = device.run("build-engine", bundle, "--target", "orin-nano")
    assert done.returncode == 1
    assert "NVIDIA L4" in done.stderr
    assert "8.7" in done.stderr
    assert open_bundle(bundle).manifest.plans == ()


def test_without_tensorrt_the_error_says_how_to_get_it(
    device: Device, bundle: Path
) -> None:
    done = device.run("build-engine", bundle, "--target", "orin-nano")
    assert done.returncode == 1
    assert "the Python module 'tensorrt', which is not installed" in done.stderr
    assert "fix: pip install -e '.[tensorrt]' -c constraints.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert open_bundle(bundle).manifest.plans == ()


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="needs tensorrt_rtx (x86-64 Linux)",
)
def test_tensorrt_rtx_builds_without_torch_and_onnx(
    device: Device, bundle: Path
) -> None:
    for name in RTX:
        device.link(name)
    for info in _site_of("tensorrt_rtx").glob("tensorrt_rtx*.dist-info"):
        if not (device.site / info.name).exists():
            (device.site / info.name).symlink_to(info)
    facts = device.built(bundle, "--target", "rtx")
    assert facts["flavour"] == "tensorrt_rtx"
    found = open_bundle(bundle)
    found.verify()
    assert found.read(plan_of(bundle).file)[:4] == b"vtrt"
