"""Plans that are bound to a GPU, through the real child process.

Plain TensorRT and the driver are fakes: this says which plan is taken and which is
built, and nothing of what TensorRT builds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import GOLDEN
from fakes import EARLY, LATE, library_path, put_driver, put_tensorrt

from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.bundle.migrate import migrate_bundle

BOUND = ("flavour=tensorrt", "compute_capabilities=[]")
BASE = ("export=float32", "precision=float32")


class Bench:
    """A bundle, and machines that differ in their GPU or library."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.bundle = Path(shutil.copytree(GOLDEN / "bundle-v1", folder / "b"))
        migrate_bundle(self.bundle)
        self.machines = 0

    def machine(self, version: str = EARLY, **gpu: Any) -> tuple[Path, Path]:
        """Folders of a TensorRT and a driver; see ``fakes``."""
        self.machines += 1
        place = self.folder / f"machine-{self.machines}"
        library = put_tensorrt(place / "library", version)
        facts: dict[str, Any] = {"name": "a GPU", "capability": "8.6"}
        driver = put_driver(place / "driver", **facts | gpu, integrated=False)
        return library, driver

    def build(self, machine: tuple[Path, Path], *settings: str) -> dict[str, Any]:
        """Run ``build-engine``; returns what it prints."""
        library, driver = machine
        kinds = ("CACHE", "STATE")
        own = {f"XDG_{kind}_HOME": str(self.folder / kind.lower()) for kind in kinds}
        words = [word for text in (*BASE, *settings) for word in ("--set", text)]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "id3pm_deploy", "build-engine"),
                *(str(self.bundle), "--target", "rtx", "--json", *words),
            ],
            cwd=self.root,
            env={
                **os.environ,
                **own,
                "PYTHONPATH": str(library),
                "LD_LIBRARY_PATH": library_path(driver),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        open_bundle(self.bundle).verify()
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts


@pytest.fixture
def bench(tmp_path: Path, root: Path) -> Bench:
    return Bench(tmp_path, root)


def test_a_plan_is_for_the_gpu_the_driver_and_the_library_that_built_it(
    bench: Bench,
) -> None:
    machines = {
        "one": bench.machine(),
        "another name": bench.machine(name="another GPU"),
        "another capability": bench.machine(capability="8.9"),
        "another size": bench.machine(multiprocessors=9),
        "another CUDA": bench.machine(cuda=13000),
        "another library": bench.machine(LATE),
    }
    keys = []
    for name, machine in machines.items():
        found = bench.build(machine, *BOUND)
        assert not found["from_cache"], name
        keys.append(found["plan_key"])
    assert len({*keys}) == len(machines)
    first = bench.build(machines["one"], *BOUND)
    assert (first["from_cache"], first["plan_key"]) == (True, keys[0])
    assert (first["gpu_name"], first["compute_capability"]) == ("a GPU", "8.6")
    assert (first["multiprocessors"], first["cuda"]) == (8, "12.6")
    assert first["version"] == EARLY


def test_how_far_a_plan_travels_is_how_far_it_is_taken(bench: Bench) -> None:
    one, same, other = (
        bench.machine(LATE, **gpu)
        for gpu in ({}, {"name": "another GPU"}, {"capability": "8.9"})
    )
    for level, taken in (
        ("ampere_plus", (True, True)),
        ("same_compute_capability", (True, False)),
    ):
        settings = (*BOUND, f"hardware_compatibility={level}")
        assert not bench.build(one, *settings)["from_cache"]
        found = [bench.build(there, *settings)["from_cache"] for there in (same, other)]
        assert tuple(found) == taken, level
