"""The CUDA seam's calls and the package's PTX, against what releases of CUDA have."""

from __future__ import annotations

import json
from typing import Any

import cuda_names
import cuda_ptx
import pytest
from cuda_names import names_used

AGAIN = "run `python tests/cuda_names.py`"


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(cuda_names.RESULT.read_text())


def test_every_call_was_looked_up_in_all_releases(recorded: Any) -> None:
    assert recorded["releases"] == list(cuda_names.RELEASES)
    assert sorted(recorded["names"]) == names_used(), AGAIN
    assert len(names_used()) > 40
    assert "CUresult.CUDA_ERROR_OUT_OF_MEMORY" in names_used()


def test_all_releases_take_the_same_arguments(recorded: Any) -> None:
    for name, found in recorded["names"].items():
        assert None not in found, name
        assert len({text.replace("'", "") for text in found}) == 1, name


def test_the_installed_release_says_what_was_recorded(recorded: Any) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
    for name, found in cuda_names.ask(names_used()).items():
        assert found == recorded["names"][name][-1], AGAIN


def test_ptx_was_made_from_the_source_that_lies_beside_it() -> None:
    assert cuda_ptx.SOURCES
    for path in cuda_ptx.SOURCES:
        first = path.with_suffix(".ptx").read_text().splitlines(keepends=True)[0]
        assert first == cuda_ptx.header(path.read_bytes()), "run tests/cuda_ptx.py"


def test_ptx_is_what_the_compiler_makes() -> None:
    library = cuda_ptx.nvrtc()
    if library is None:
        pytest.skip(f"needs {cuda_ptx.WHEEL}")
    for path in cuda_ptx.SOURCES:
        made = cuda_ptx.compile_ptx(library, path.read_bytes(), path.name)
        kept = path.with_suffix(".ptx").read_text()
        if _compiler(made) != _compiler(kept):
            pytest.skip(f"NVRTC is another one than {_compiler(kept)}")
        assert made == kept


def test_ptx_is_for_old_gpus_and_drivers() -> None:
    """Compute capability 7.5, and PTX 8.1 of CUDA 12.1; JetPack 6 has 12.6."""
    for path in cuda_ptx.SOURCES:
        lines = path.with_suffix(".ptx").read_text().splitlines()
        assert ".version 8.1" in lines
        assert ".target sm_75" in lines
        assert not any(".approx" in line or "fma" in line for line in lines)


def _compiler(ptx: str) -> str:
    return next(line for line in ptx.splitlines() if "compilation tools" in line)
