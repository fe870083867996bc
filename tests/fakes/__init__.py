"""Stand-ins for what no test machine has: plain TensorRT, an NVIDIA driver, a Jetson.

They say something of our code alone. What plain TensorRT and a GPU do with it is not
tested by them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from id3pm_deploy.preflight import Here

_HERE = Path(__file__).resolve().parent
EARLY, LATE = "10.3.0", "11.4.0.106"
"""Versions that the fake TensorRT can be: with weakly typed networks, and without."""


def put_tensorrt(
    folder: Path,
    version: str = EARLY,
    *,
    metadata: bool = True,
    tell: Path | None = None,
) -> Path:
    """Write a fake ``tensorrt`` into a folder of a search path; returns the folder.

    Args:
        folder: Where.
        version: ``EARLY`` or ``LATE``.
        metadata: Write a package's metadata, too; not every Jetson has some.
        tell: A file that the module writes when it is imported.
    """
    package = folder / "tensorrt"
    shutil.copytree(_HERE / "tensorrt_fake", package)
    names = package / "names.py"
    code = names.read_text(encoding="utf-8")
    names.write_text(code.replace(f'"{EARLY}"', f'"{version}"'), encoding="utf-8")
    if tell is not None:
        with open(package / "__init__.py", "a", encoding="utf-8") as handle:
            handle.write(f"\nopen({str(tell)!r}, 'w').close()\n")
    if metadata:
        info = folder / f"tensorrt-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n"
        (info / "METADATA").write_text(head)
    return folder


def put_driver(
    folder: Path,
    name: str = "Orin",
    capability: str = "8.7",
    multiprocessors: int = 8,
    *,
    integrated: bool = True,
    cuda: int = 12060,
) -> Path:
    """Write a ``libcuda.so.1`` with one GPU; returns its folder.

    A process finds it with :func:`library_path` of that folder. The test is skipped
    where there is no C compiler.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    major, minor = capability.split(".")
    values = {
        "NAME": f'"{name}"',
        "MAJOR": major,
        "MINOR": minor,
        "MULTIPROCESSORS": multiprocessors,
        "INTEGRATED": int(integrated),
        "CUDA": cuda,
    }
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-shared", "-fPIC", str(_HERE / "libcuda.c")]
    command += [f"-D{key}={value}" for key, value in values.items()]
    command += ["-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True, timeout=60)
    return folder


def library_path(folder: Path) -> str:
    """``LD_LIBRARY_PATH`` with that folder first."""
    before = os.environ.get("LD_LIBRARY_PATH")
    return os.pathsep.join(filter(None, (str(folder), before)))


def pretend_here(monkeypatch: pytest.MonkeyPatch, machine: Here) -> None:
    """Have the preflight find ``machine`` instead of this one, in this process."""

    def found(*_: object, **__: object) -> Here:
        return machine

    for module in ("choose", "rebuild", "machine"):
        monkeypatch.setattr(f"id3pm_deploy.preflight.{module}.here", found)
    monkeypatch.setattr("id3pm_deploy.preflight.here", found)
