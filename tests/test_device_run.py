"""A bundle on a device: our wheel with the extra `cpu` in a fresh environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from device_install import DeviceInstall, build_wheel, device_install
from PIL import Image

from id3pm_deploy.cli import main

pytestmark = pytest.mark.slow

HEAVY = ("torch", "onnx", "onnxscript", "diffusers", "safetensors", "polygraphy", "cv2")
SAMPLE = ("--unconditional", "--count", "3", "--batch-size", "2", "--seed", "7")
SOLVER = ("--solver", "dpmpp-2m", "--steps", "4", "--backend", "onnxruntime")

# Refuses to import what a device has not, even where it is installed; then says what
# was imported.
WATCHED = """
import importlib.abc, json, sys
heavy = set(sys.argv[1].split(","))
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from id3pm_deploy.cli import main
try:
    main(sys.argv[2:])
except SystemExit as ended:
    if ended.code:
        raise
assert not heavy & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["3.11", "3.10"])
def device(
    request: pytest.FixtureRequest,
    wheel: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> DeviceInstall:
    folder = tmp_path_factory.mktemp("device") / "venv"
    return device_install(folder, request.param, wheel, "cpu")


def pixels(folder: Path) -> npt.NDArray[np.uint8]:
    files = sorted(folder.glob("sample-*.png"))
    assert len(files) == 3
    return np.stack([np.asarray(Image.open(one)) for one in files])


def watched(device: DeviceInstall, *arguments: object) -> str:
    return device.run(",".join(HEAVY), *arguments, code=WATCHED)


def test_heavy_packages_are_absent(device: DeviceInstall) -> None:
    code = (
        "import importlib.util as u, sys;"
        "print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    )
    found = device.run(*HEAVY, "onnxruntime", "numpy", code=code)
    assert found.split() == ["onnxruntime", "numpy"]


def test_the_watch_can_fail(device: DeviceInstall) -> None:
    with pytest.raises(AssertionError, match="colorsys was imported"):
        device.run("colorsys", code=WATCHED.replace("from id3pm", "import colorsys #"))


def test_its_pictures_are_those_of_the_full_environment(
    device: DeviceInstall, tiny_bundle: Path, tmp_path: Path
) -> None:
    arguments = ["sample", str(tiny_bundle), *SAMPLE, *SOLVER]
    watched(device, *arguments, "--out", tmp_path / "device")
    here = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "here")])
    assert here.exit_code == 0, here.output
    theirs, ours = pixels(tmp_path / "device"), pixels(tmp_path / "here")
    assert ours.std() > 1
    np.testing.assert_array_equal(theirs, ours)


def test_inspect_parity_and_doctor(
    device: DeviceInstall, tiny_bundle: Path, tmp_path: Path
) -> None:
    facts = json.loads(watched(device, "inspect", tiny_bundle, "--self-test", "--json"))
    assert facts["files_verified"] is True
    assert 0 <= facts["self_test"]["cpu"] < 1e-4
    report = watched(
        device,
        *("parity", tiny_bundle, "--against", tiny_bundle, "--solver", "ddim"),
        *("--steps", "2", "--out", tmp_path / "report"),
    )
    assert report
    assert (tmp_path / "report").is_dir()
    told: dict[str, Any] = json.loads(watched(device, "doctor", "--json"))
    assert told


def test_memory_is_told(device: DeviceInstall, tiny_bundle: Path) -> None:
    told = json.loads(watched(device, "inspect", tiny_bundle, "--memory", "--json"))
    (found,) = told["memory"]
    assert found["total"] > 1 << 26


def test_benchmark(device: DeviceInstall, tiny_bundle: Path, tmp_path: Path) -> None:
    few = ("--rounds", "2", "--batch-sizes", "1", "--row-repeats", "1")
    told = watched(
        device,
        *("benchmark", tiny_bundle, *few, "--solver", "ddim", "--steps", "3"),
        *("--out", tmp_path / "out", "--json"),
    )
    columns = json.loads(told)["columns"]
    assert columns["onnxruntime"]["status"] == "timed"
    for name in (name for name in columns if name.startswith("torch")):
        assert columns[name]["status"] != "timed"
        assert columns[name]["reason"]
    assert any((tmp_path / "out").glob("*.json"))
