"""The project's own promises: versions agree, pins are complete, the wheel is whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import id3pm_deploy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = "id3pm_deploy"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Written with brackets so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(rb"(?<![\w.])/(?:[h]ome|[r]oot|[U]sers|[w]ork)/\w")
REGISTRY = re.compile(rb"index[-]url|https?://[^ \"'<>]*/[s]imple\b")


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict[str, Any]:
    text = (root / "pyproject.toml").read_text("utf-8")
    parsed: dict[str, Any] = tomllib.loads(text)
    return parsed


@pytest.fixture(scope="module")
def pins(root: Path) -> list[Requirement]:
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def project_files(root: Path) -> list[Path]:
    """Files that git tracks or would track, relative to the root."""
    if not shutil.which("git") or not (root / ".git").exists():
        pytest.skip("needs a git checkout and git")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, check=True)
    names = [Path(name) for name in listing.stdout.decode().split("\0") if name]
    files = [name for name in names if (root / name).is_file()]
    assert Path("pyproject.toml") in files
    return files


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    command = [*build, str(folder), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _environment(python: str, machine: str = "x86_64") -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
    }


def _requirements(
    extras: Mapping[str, list[str]], extra: str, environment: dict[str, str]
) -> Iterator[Requirement]:
    """What ``extra`` asks for in ``environment``, its own extras unfolded."""
    for requirement in map(Requirement, extras[extra]):
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        if requirement.name == "id3pm-deploy":
            for inner in requirement.extras:
                yield from _requirements(extras, inner, environment)
        else:
            yield requirement


def test_changelog_and_package_agree_on_the_version(
    root: Path, pyproject: dict[str, Any]
) -> None:
    changelog = (root / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == id3pm_deploy.__version__
    assert pyproject["project"]["dynamic"] == ["version"]
    assert pyproject["tool"]["hatch"]["version"]["path"] == "id3pm_deploy/__init__.py"


def test_every_pin_is_exact_and_works_with_any_build(pins: list[Requirement]) -> None:
    for pin in pins:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), str(pin)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_pin_that_satisfies_it(
    pyproject: dict[str, Any], pins: list[Requirement], python: str
) -> None:
    project = pyproject["project"]
    extras = {**project["optional-dependencies"], "": project["dependencies"]}
    for extra in extras:
        # The Jetson extra is for JetPack 6, which has Python 3.10 on 64-bit Arm.
        if extra == "jetson" and python != "3.10":
            continue
        machine = "aarch64" if extra == "jetson" else "x86_64"
        environment = _environment(python, machine)
        for wanted in _requirements(extras, extra, environment):
            applicable = [
                pin
                for pin in pins
                if canonicalize_name(pin.name) == canonicalize_name(wanted.name)
                and (pin.marker is None or pin.marker.evaluate(environment))
            ]
            assert len(applicable) == 1, f"{extra}, {python}: {wanted}"
            (version,) = [spec.version for spec in applicable[0].specifier]
            assert wanted.specifier.contains(version), f"{extra}, {python}: {wanted}"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_no_extra_brings_both_onnxruntime_packages(
    pyproject: dict[str, Any], machine: str
) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    for extra in extras:
        environment = _environment("3.11", machine)
        names = {item.name for item in _requirements(extras, extra, environment)}
        assert not {"onnxruntime", "onnxruntime-gpu"} <= names, extra
        assert extra == "cuda" or "onnxruntime-gpu" not in names, extra


def test_package_is_typed(root: Path, wheel: zipfile.ZipFile) -> None:
    assert (root / "id3pm_deploy" / "py.typed").is_file()
    assert "id3pm_deploy/py.typed" in wheel.namelist()


@pytest.mark.parametrize("kind", ["export", "engines"])
def test_recipes_are_in_the_wheel(
    root: Path, wheel: zipfile.ZipFile, kind: str
) -> None:
    recipes = sorted((root / kind).glob("*.toml"))
    assert recipes
    for recipe in recipes:
        inside = wheel.read(f"id3pm_deploy/_recipes/{kind}/{recipe.name}")
        assert inside == recipe.read_bytes()


def test_wheel_holds_the_package_and_nothing_else(
    project_files: list[Path], wheel: zipfile.ZipFile
) -> None:
    inside = set(wheel.namelist())
    package = {file.as_posix() for file in project_files if file.parts[0] == PACKAGE}
    assert package <= inside
    info = f"{PACKAGE}-{id3pm_deploy.__version__}.dist-info"
    assert {name.partition("/")[0] for name in inside} == {PACKAGE, info}
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "id3pm-deploy = id3pm_deploy.cli:main" in scripts
    assert f"{info}/licenses/LICENSE" in inside


def test_no_file_names_a_machine_path_or_a_registry(
    root: Path, project_files: list[Path]
) -> None:
    here = re.compile(re.escape(f"{root}/").encode())
    found = [
        str(file)
        for file in project_files
        for pattern in (here, MACHINE_PATHS, REGISTRY)
        if pattern.search((root / file).read_bytes())
    ]
    assert found == []


def test_readme_names_the_two_commands_and_the_torch_pin(
    root: Path, pins: list[Requirement]
) -> None:
    readme = (root / "README.md").read_text("utf-8")
    assert "make demo" in readme
    assert "make test" in readme
    (torch,) = [pin for pin in pins if pin.name == "torch"]
    assert f"torch{torch.specifier}" in readme
