"""The Containerfiles: what they copy, install and run as. No image is built here; the
server's steps that need no image are run in a plain folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from device_install import UNREACHABLE

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


class PlainFolder:
    """Runs a Containerfile's steps with a folder for its root, and this Python for
    its base's. Users, volumes and the base itself are left to a container engine."""

    def __init__(self, name: str, root: Path) -> None:
        self.root, self.steps = root, instructions(name)
        self.folder, self.arguments = root, dict[str, str]()
        self.environment = {**os.environ, "HOME": str(root / "home")}
        self.entry: list[str] = []

    def within(self, path: str) -> str:
        """``path`` of the image, here; a relative one as it is."""
        return f"{self.root}{path}" if path.startswith("/") else path

    def build(self) -> None:
        """Go through all steps."""
        for word, rest in self.steps:
            getattr(self, word.lower(), lambda _: None)(rest)

    def arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.arguments[name] = value

    def env(self, rest: str) -> None:
        for part in rest.split():
            name, _, value = part.partition("=")
            value = value.replace("$PATH", self.environment["PATH"])
            here = ":".join(map(self._inside, value.split(":")))
            self.environment[name] = here

    def _inside(self, path: str) -> str:
        made = path.startswith(("/opt/", "/cache"))
        return self.within(path) if made else path

    def workdir(self, rest: str) -> None:
        self.folder = Path(self.within(rest))
        self.folder.mkdir(parents=True, exist_ok=True)

    def copy(self, rest: str) -> None:
        """From this tree, or from an earlier stage, which has the same root here."""
        words = rest.split()
        target = self.folder / self.within(words[-1])
        if words[0].startswith("--from="):
            shutil.copytree(self.within(words[1]), target)
            return
        for source in words[:-1]:
            here = ROOT / source
            if here.is_dir():
                shutil.copytree(
                    here, target, ignore=shutil.ignore_patterns("__pycache__")
                )
                continue
            into = target / here.name if len(words) > 2 else target
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(here, into)

    def run(self, rest: str) -> None:
        """A step in the shell; not what makes users and what belongs to them."""
        if rest.startswith(("useradd", "install --directory")):
            return
        for name, value in self.arguments.items():
            rest = rest.replace(f"${{{name}}}", value)
        inside = re.sub(r"(?<![\w./])/(opt|tmp|wheels)\b", rf"{self.root}/\1", rest)
        done = self.call(["sh", "-c", inside])
        if done.returncode and any(word in done.stderr for word in UNREACHABLE):
            pytest.skip(f"needs packages that pip cannot get: {done.stderr[-200:]}")
        assert done.returncode == 0, done.stderr

    def entrypoint(self, rest: str) -> None:
        self.entry = json.loads(rest)

    def call(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """What a command says in the image's environment."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )


@pytest.mark.slow
def test_the_servers_steps_install_a_tool_that_runs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", str(base)], check=True, timeout=300)
    image = PlainFolder("server", tmp_path / "root")
    image.environment["PATH"] = f"{base / 'bin'}:{os.environ['PATH']}"
    image.build()
    found = shutil.which(image.entry[0], path=image.environment["PATH"])
    assert found == image.within("/opt/id3pm/bin/id3pm-deploy")
    told = image.call([*image.entry, "--help"])
    assert told.returncode == 0, told.stderr
    assert "sample" in told.stdout
    told = image.call([*image.entry, "doctor", "--json"])
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)
    assert image.environment["XDG_CACHE_HOME"] == image.within("/cache")
