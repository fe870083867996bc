"""The Containerfiles: what they copy, install and run as. No image is built here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FILES = ("server", "jetson")
Instruction = tuple[str, str]


def instructions(name: str) -> list[Instruction]:
    text = (ROOT / "containers" / f"{name}.Containerfile").read_text("utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    kept = [line.split(None, 1) for line in lines if line.strip() and line[0] != "#"]
    return [(word, rest) for word, rest in kept]


def last_stage(name: str) -> list[Instruction]:
    found = instructions(name)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_let_through(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").split()
    sources = [
        source
        for word, rest in instructions(name)
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "id3pm_deploy", "export", "engines"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore, source


@pytest.mark.parametrize("name", FILES)
def test_extras_exist(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    known = project["optional-dependencies"]
    (value,) = [
        rest.partition("=")[2]
        for word, rest in instructions(name)
        if word == "ARG" and rest.startswith("EXTRA")
    ]
    assert set(value.split(",")) <= set(known)


@pytest.mark.parametrize("name", FILES)
def test_the_user_is_not_root(name: str) -> None:
    users = [rest for word, rest in last_stage(name) if word == "USER"]
    assert users
    assert users[-1].split(":")[0] not in ("root", "0")


@pytest.mark.parametrize("name", FILES)
def test_no_shell_starts_it_and_the_cache_is_a_volume(name: str) -> None:
    last = dict(last_stage(name))
    assert last["ENTRYPOINT"] == '["id3pm-deploy"]'
    assert last["VOLUME"] == "/cache"
    assert "XDG_CACHE_HOME=/cache" in last["ENV"]


@pytest.mark.parametrize("name", FILES)
def test_no_registry_is_named(name: str) -> None:
    text = (ROOT / "containers" / f"{name}.Containerfile").read_text("utf-8")
    assert not re.search(r"\w+\.\w+/\w+/\w+", text.replace("containers/", ""))


def test_the_jetson_image_must_be_given_and_sees_its_tensorrt() -> None:
    found = instructions("jetson")
    assert ("ARG", "BASE") in found
    runs = [rest for word, rest in found if word == "RUN"]
    assert any("venv --system-site-packages" in run for run in runs)
    assert not any("tensorrt" in run for run in runs)
