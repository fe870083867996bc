"""Names taken from TensorRT, held against the bindings of what we build with."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorrt_names
from tensorrt_names import RESULT, ROOT, names_of_module, names_used

AGAIN = "run `python tests/tensorrt_names.py`, and tensorrt_stubs.py beside it"

# Names that some release lacks, and what the code does there.
PROBED = {
    "ComputeCapability": "asked for; without it a plan is for the building GPU",
    "CURRENT": "a member of it",
    "set_compute_capability": "asked for, as above",
    "SAME_COMPUTE_CAPABILITY": "asked for; a recipe that wants it is refused",
    **{f"SM{n}": "a member of ComputeCapability" for n in (75, 80, 86, 89, 120)},
    "REQUIRE_USER_ALLOCATION": "asked for; a recipe that wants it is refused",
    "DynamicShapesKernelSpecializationStrategy": "asked for; it tells TensorRT-RTX",
    "is_stream_capturable": "asked for; where it is absent, a capture is tried",
}

# Names that come with one that was asked for.
BESIDE = {
    "num_compute_capabilities": "set_compute_capability",
    **dict.fromkeys(
        (
            "CudaGraphStrategy",
            "create_runtime_cache",
            "create_runtime_config",
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "set_execution_context_allocation_strategy",
            "set_runtime_cache",
        ),
        "DynamicShapesKernelSpecializationStrategy",
    ),
    "DISABLED": "CudaGraphStrategy",
    "EAGER": "DynamicShapesKernelSpecializationStrategy",
}


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(RESULT.read_text())


def test_every_name_that_the_code_uses_was_looked_up(recorded: Any) -> None:
    used, _ = names_used()
    assert sorted(recorded["names"]) == sorted(used), AGAIN
    assert recorded["wheels"] == list(tensorrt_names.WHEELS)
    assert recorded["libraries"][:3] == ["10.3.0", "10.16.1.11", "11.4.0.106"]
    assert len(used) > 50


def test_every_name_is_some_librarys(recorded: Any) -> None:
    assert [name for name, found in recorded["names"].items() if not found] == []


def test_what_a_release_lacks_is_asked_for_first(recorded: Any) -> None:
    everywhere = set(recorded["libraries"])
    lacking = {n for n, found in recorded["names"].items() if set(found) != everywhere}
    assert lacking == PROBED.keys() | BESIDE.keys()
    _, probed = names_used()
    assert lacking - probed == set(BESIDE)
    names = recorded["names"]
    for name, other in BESIDE.items():
        assert set(names[name]) >= set(names[other]), name


def test_the_bindings_of_tensorrt_rtx_have_what_was_recorded(recorded: Any) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")
    found = names_of_module(trt)
    version = recorded["libraries"][3]
    theirs = {name for name, in_ in recorded["names"].items() if version in in_}
    assert theirs == set(recorded["names"]) & found, AGAIN
    assert version == f"tensorrt_rtx {trt.__version__}", AGAIN


def test_names_are_read_from_a_shared_object() -> None:
    """As in the wheels that cannot be imported; here both ways can be compared."""
    bindings = pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX")
    trt = pytest.importorskip("tensorrt_rtx")
    (path,) = Path(bindings.__file__).parent.glob("*.so")
    read = tensorrt_names.bound_names(path.read_bytes())
    shown = {
        name
        for kind in vars(trt).values()
        if isinstance(kind, type) and kind.__module__.startswith("tensorrt_rtx")
        for name in (kind.__name__, *dir(kind))
        if not name.startswith("_")
    }
    assert len(shown) > 900
    assert shown - read <= {
        "PluginFieldCollection",
        "PluginFieldCollection_",
        "itemsize",
    }
    assert not {"FP16", "EXPLICIT_BATCH"} & read
    assert {"BF16", "REFIT", "name", "type"} <= read  # some as the end of another


def taken(source: str) -> tuple[set[str], set[str]]:
    found = tensorrt_names._Names(ast.parse(source))
    return found.used, found.probed


def test_how_names_are_found_in_source() -> None:
    used, probed = taken(
        "import os\n"
        "FLAGS = {'key': 'WEIGHT_STREAMING'}\n"
        "OPTIONS = {'key': 'max_aux_streams'}\n"
        "def f(trt, config: tensorrt.IBuilderConfig, path: Path, out: list[str]):\n"
        "    builder = make_builder(trt)\n"
        "    builder.create_network(1 << int(trt.Flags.STRONGLY_TYPED))\n"
        "    text = path.read_text()\n"
        "    out.append(text.strip())\n"
        "    os.getcwd()\n"
        "    if hasattr(config, 'progress_monitor'):\n"
        "        config.progress_monitor = None\n"
        "    level = getattr(trt, 'Level', None)\n"
        "    level.name.lower()\n"
        "    for layer in network_of(builder): layer.type\n"
        "    class Logger(trt.ILogger):\n"
        "        def log(self, severity): severity.value; self.mine.other\n"
    )
    assert used == {
        "WEIGHT_STREAMING",
        "max_aux_streams",
        "create_network",
        "Flags",
        "STRONGLY_TYPED",
        "IBuilderConfig",
        "progress_monitor",
        "Level",
        "name",
        "type",
        "ILogger",
        "log",
        "value",
    }
    assert probed == {
        "WEIGHT_STREAMING",
        "max_aux_streams",
        "progress_monitor",
        "Level",
    }


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("builder.create_builder_config(", "builder.create_builder_confg(", "attr-def"),
        ("parse_from_file(str(graph))", "parse_from_file(graph)", "arg-type"),
        ("if data is None:\n        raise", "if not 1:\n        raise", "IHostMemory"),
    ],
)
def test_a_wrong_call_fails_the_type_check(
    tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    """A misspelt method, a path for a string, and a plan that may be None."""
    pytest.importorskip("mypy", reason="needs mypy")
    module = ROOT / "id3pm_deploy" / "builders" / "tensorrt_child.py"
    text = module.read_text()
    assert right in text
    shadow = tmp_path / "shadow.py"
    shadow.write_text(text.replace(right, wrong))
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += [f"--cache-dir={tmp_path / 'cache'}", "--shadow-file", str(module)]
    done = subprocess.run(
        [*command, str(shadow), str(module)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout
