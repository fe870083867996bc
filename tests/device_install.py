"""A device: a fresh virtual environment with our wheel and what its extra asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 900
UNREACHABLE = ("No matching distribution", "Temporary failure", "NewConnection")
"""What pip says where it cannot get a package."""


def find_python(version: str) -> str:
    """An interpreter of that version; the test is skipped where there is none."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = [shutil.which(f"python{version}")]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found += [str(one) for one in versions.glob(f"{version}.*/bin/python{version}")]
    for one in filter(None, found):
        # pyenv's stand-in for a version that is not chosen only prints a message.
        tried = subprocess.run([one, "-c", ""], capture_output=True, check=False)
        if tried.returncode == 0:
            return str(one)
    pytest.skip(f"needs python{version}")


def build_wheel(folder: Path) -> Path:
    """Our wheel, built in ``folder``."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    command += ["--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip_install(python: Path, *arguments: str) -> None:
    """Install with pip as this machine has it set up; the test is skipped where the
    packages cannot be had."""
    command = [str(python), "-m", "pip", "install", "--quiet", *arguments]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--retries", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        pytest.skip(f"needs packages that pip cannot get: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class DeviceInstall:
    """The environment in ``folder``."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(self, *arguments: object, code: str = "") -> str:
        """Run the command line there, or ``code`` with it; what it prints."""
        start = ["-c", code] if code else ["-m", "id3pm_deploy"]
        home = self.folder / "home"
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [self.python, *start, *map(str, arguments)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout


def device_install(
    folder: Path, version: str, wheel: Path, extra: str
) -> DeviceInstall:
    """A fresh environment with the wheel and one extra of it."""
    interpreter = find_python(version)
    subprocess.run(
        [interpreter, "-m", "venv", str(folder)], check=True, timeout=SECONDS
    )
    made = DeviceInstall(folder)
    pip_install(made.python, f"{wheel}[{extra}]")
    return made
