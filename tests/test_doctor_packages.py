"""Requirements, versions and metadata as the doctor reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doctor_fakes import CORE, CPU, EXTRAS, REQUIRES, host, put, site

from id3pm_deploy.doctor.packages import Packages
from id3pm_deploy.doctor.requirements import (
    parse_requirement,
    satisfies,
)


@pytest.mark.parametrize(
    ("specifier", "version", "met"),
    [
        ("", "1.2", True),
        (">=1.2,<2", "1.2", True),
        (">=1.2,<2", "2.0", False),
        (">=1.2", "1.2rc1", False),
        (">=1.2", "1.3rc1", True),
        ("==2.13.0", "2.13.0+cpu", True),
        ("==2.13.*", "2.14", False),
    ],
)
def test_versions_meet_specifiers(specifier: str, version: str, met: bool) -> None:
    assert satisfies(specifier, version) is met


@pytest.mark.parametrize("text", ["", "abc", "1.2.x", "unknown", "1..2"])
def test_what_is_no_version_meets_nothing(text: str) -> None:
    assert not satisfies(">=0", text)


@pytest.mark.parametrize("clause", ["1.2", ">=abc", "=1", ">= 1 2", "~=1"])
def test_what_is_no_specifier_is_met_by_nothing(clause: str) -> None:
    assert not satisfies(clause, "1.2")


@pytest.mark.parametrize(
    ("python", "extra", "applies"),
    [("3.10", "cpu", True), ("3.12", "cpu", False), ("3.10", "rtx", False)],
)
def test_a_requirement_and_its_marker(python: str, extra: str, applies: bool) -> None:
    line = "Some_Thing[b,a] (>=1,<2); python_version < '3.11' and extra == 'cpu'"
    found = parse_requirement(line)
    assert found is not None
    assert (found.name, found.extras) == ("some-thing", ("a", "b"))
    assert {*found.specifier.split(",")} == {">=1", "<2"}
    assert found.applies({"python_version": python, "extra": extra}) is applies


@pytest.mark.parametrize("line", ["", "x; nobody == 'x'", "x; extra ==", "x y", "%"])
def test_a_line_that_cannot_be_read_is_no_requirement(line: str) -> None:
    assert parse_requirement(line) is None


def test_extras_come_from_the_installed_metadata(tmp_path: Path) -> None:
    site(tmp_path / "site", CPU)
    packages = Packages(host(tmp_path), tmp_path / "nowhere")
    assert tuple(packages.declared) == ("core", *EXTRAS)
    assert [str(r) for r in packages.declared["core"]] == list(REQUIRES[:3])
    assert [str(r) for r in packages.declared["cpu"]] == ["onnxruntime>=1.20"]
    # An extra that contains another one is unfolded.
    train = {one.name for one in packages.declared["train"]}
    assert train == {"accelerate", *(one.name for one in packages.declared["export"])}
    assert packages.origin == "wheel"


def test_markers_choose_the_requirements_of_this_python(tmp_path: Path) -> None:
    site(tmp_path / "site", CPU)
    packages = Packages(host(tmp_path, python="3.10.13"), tmp_path / "nowhere")
    assert [one.name for one in packages.declared["core"]][-1] == "tomli"


def test_extras_come_from_the_checkout_where_nothing_is_installed(
    tmp_path: Path, root: Path
) -> None:
    packages = Packages(host(tmp_path), root)
    assert packages.origin == "checkout"
    assert {"core", "cpu", "export", "rtx", "train"} <= set(packages.declared)
    assert "torch" in {one.name for one in packages.declared["all"]}


@pytest.mark.parametrize(
    "text", ["", "[project", "[project]\ndependencies = 1\n", "a=1"]
)
def test_a_damaged_checkout_tells_nothing(tmp_path: Path, text: str) -> None:
    put(tmp_path / "checkout", {"pyproject.toml": text})
    packages = Packages(host(tmp_path), tmp_path / "checkout")
    assert packages.declared.get("cpu", ()) == ()


def test_versions_are_found_and_held_against_the_requirement(tmp_path: Path) -> None:
    site(
        tmp_path / "site", {**CPU, "onnxruntime": "1.19.2", "tensorrt-rtx-cu13": "1.7"}
    )
    packages = Packages(host(tmp_path), tmp_path / "nowhere")
    (old,) = packages.found("cpu")
    assert (old.ok, old.version) == (False, "1.19.2")
    assert old.to_json() == {
        "requirement": "onnxruntime>=1.20",
        "found": "1.19.2",
        "by": "onnxruntime",
        "ok": False,
    }
    (new, _) = packages.found("rtx")
    assert (new.ok, new.version) == (True, "1.7")
    (none,) = packages.found("cuda")
    assert none.to_json()["found"] is None


def test_damaged_metadata_is_a_version_that_will_not_do(tmp_path: Path) -> None:
    site(tmp_path / "site", CORE)
    put(tmp_path / "site", {"onnxruntime-1.23.2.dist-info/RECORD": ""})
    packages = Packages(host(tmp_path), tmp_path / "nowhere")
    (found,) = packages.found("cpu")
    assert (found.version, found.ok) == ("unknown", False)


def test_the_gpu_package_stands_in_for_the_cpu_one_and_not_the_reverse(
    tmp_path: Path,
) -> None:
    site(tmp_path / "site", {**CORE, "onnxruntime-gpu": "1.23.2"})
    packages = Packages(host(tmp_path), tmp_path / "nowhere")
    (found,) = packages.found("cpu")
    assert (found.ok, found.by) == (True, "onnxruntime-gpu")
    site(tmp_path / "other", CPU)
    here = host(tmp_path, search=(str(tmp_path / "other"),))
    (gpu,) = Packages(here, tmp_path / "nowhere").found("cuda")
    assert not gpu.ok


@pytest.mark.parametrize(
    ("direct_url", "origin", "command"),
    [
        ("", "wheel", "pip install 'onnxruntime>=1.20'"),
        (
            {"url": "file:///x", "dir_info": {}},
            "folder",
            "pip install '.[cpu]' -c constraints.txt",
        ),
        (
            {"url": "file:///x", "dir_info": {"editable": True}},
            "editable",
            "pip install -e '.[cpu]' -c constraints.txt",
        ),
        ({"url": "https://x/y.whl"}, "wheel", "pip install 'onnxruntime>=1.20'"),
    ],
)
def test_the_command_depends_on_how_the_package_was_installed(
    tmp_path: Path, direct_url: object, origin: str, command: str
) -> None:
    text = json.dumps(direct_url) if direct_url else ""
    site(tmp_path / "site", CORE, direct_url=text)
    packages = Packages(host(tmp_path), tmp_path / "nowhere")
    (lacking,) = packages.declared["cpu"]
    assert packages.origin == origin
    assert packages.install_command("cpu", (lacking,)) == command


def test_installing_the_gpu_package_removes_the_other_first(tmp_path: Path) -> None:
    site(tmp_path / "site", CPU)
    packages = Packages(host(tmp_path), tmp_path / "nowhere")
    command = packages.install_command("cuda", packages.declared["cuda"])
    assert command == (
        "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu>=1.20'"
    )


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("__version__ = '2.9'\ncuda: Optional[str] = '12.8'\nhip = None\n", "12.8"),
        ("cuda = '12.8'\n", "12.8"),
        ("cuda: Optional[str] = None\n", None),
        ("", None),
    ],
)
def test_torchs_cuda_is_read_and_not_run(
    tmp_path: Path, text: str, cuda: str | None
) -> None:
    site(tmp_path / "site", {"torch": "2.9.0"})
    put(tmp_path / "site", {"torch/version.py": text})
    assert Packages(host(tmp_path), tmp_path).torch_cuda() == cuda


def test_without_torch_there_is_no_cuda_of_it(tmp_path: Path) -> None:
    assert Packages(host(tmp_path), tmp_path).torch_cuda() is None
    site(tmp_path / "site", {"torch": "2.9.0"})
    assert Packages(host(tmp_path), tmp_path).torch_cuda() is None
