"""What the CUDA seam calls of cuda-python, held against several of its releases.

Run as ``python tests/cuda_names.py`` after a change to what ``backends/cuda.py`` calls.
It installs each release of ``cuda-bindings`` into a folder of its own, 13 MB each, asks
it in a process of its own for the functions and constants that are used, which needs no
GPU, and rewrites ``cuda-names.json`` beside it: per name, what each release says its
arguments (or its value) are.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEAM = ROOT / "id3pm_deploy" / "backends" / "cuda.py"
RESULT = ROOT / "tests" / "cuda-names.json"
RELEASES = ("12.8.0", "12.9.10", "13.0.3", "13.5.0")
"""The package index has no 12.6 or 12.7; pyproject.toml asks for 12.6.1 or later."""

_ASK = """
import inspect, json, sys
from cuda.bindings import driver
found = {}
for name in json.loads(sys.argv[1]):
    first, _, member = name.partition(".")
    thing = getattr(driver, first, None)
    if member:
        value = getattr(thing, member, None)
        found[name] = None if value is None else str(int(value))
    else:
        found[name] = None if thing is None else str(inspect.signature(thing))
print(json.dumps(found))
"""


def names_used() -> list[str]:
    """Functions of the driver API and members of its enumerations in the seam."""
    text = SEAM.read_text()
    functions = set(re.findall(r'"(cu[A-Z]\w+)"', text))
    members = set(re.findall(r"\b(CU\w+\.CU_?\w+)", text))
    flags = {f"CUevent_flags.{name}" for name in re.findall(r"\bflags\.(CU_\w+)", text)}
    return sorted(functions | members | flags)


def ask(names: list[str], folder: str = "") -> dict[str, str | None]:
    """What one installation says of names; an empty folder is this environment's."""
    code = f"import sys; sys.path[:0] = [{folder!r}] * {bool(folder)}\n{_ASK}"
    command = [sys.executable, "-c", code, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    answer: dict[str, str | None] = json.loads(done.stdout)
    return answer


def _of_release(release: str, names: list[str]) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target"]
        command += [folder, "--only-binary=:all:", f"cuda-bindings=={release}"]
        subprocess.run(command, check=True)
        return ask(names, folder)


def main() -> None:
    """Rewrite the result."""
    names = names_used()
    found = {release: _of_release(release, names) for release in RELEASES}
    lines = [
        f"  {json.dumps(name)}: {json.dumps([found[r][name] for r in RELEASES])}"
        for name in names
    ]
    head = f'{{\n "releases": {json.dumps(RELEASES)},\n "names": {{\n'
    RESULT.write_text(head + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    main()
