"""Plans really built by TensorRT-RTX without a GPU, and builds that end badly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.builders import tensorrt as builder
from id3pm_deploy.builders import tensorrt_child as child
from id3pm_deploy.builders.precision import (
    NodeWork,
    node_work,
    share_of,
    type_shares,
)
from id3pm_deploy.builders.recipe import EngineRecipe
from id3pm_deploy.builders.tensorrt import BuiltPlan, build_plan
from id3pm_deploy.builders.tensorrt_events import Limits, Messages, Watch
from id3pm_deploy.errors import BuildError, MissingPackageError, RecipeError

HALF = EngineRecipe(
    summary="a test",
    backend="tensorrt",
    flavour="tensorrt_rtx",
    export="float16",
    precision="float16",
    static_guided_samples=(1,),
    dynamic_samples=(1, 2, 3),
    compute_capabilities=("8.6", "12.0"),
)
FULL = dataclasses.replace(HALF, export="float32", precision="float32")
BRAIN = dataclasses.replace(HALF, export="bfloat16", precision="bfloat16")
FAKE = dataclasses.replace(HALF, flavour="tensorrt", compute_capabilities=())
CHANNELS, SIZE, KERNEL = 8, 16, 3


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX")


def graph(
    body: str = "FLOAT16",
    names: tuple[str | int, str | int] = ("B", "R"),
    operators: tuple[str, ...] = ("Relu",),
    channels: int = CHANNELS,
) -> Any:
    """A step-like ONNX model: B pictures dealt to R rows, two convolutions, output.

    ``body`` is the data type of the first convolution.
    """
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    b, r = names
    picture = (channels, SIZE, SIZE)
    kind = getattr(kinds, body)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
    weights = np.random.default_rng(0).normal(size=(channels, channels, KERNEL, KERNEL))
    head = np.random.default_rng(1).normal(size=(1, channels, 1, 1))
    nodes = [
        make.make_node("Gather", ["state", "row"], ["rows"], name="deal"),
        make.make_node("Cast", ["rows"], ["x"], to=kind),
        make.make_node("Conv", ["x", "weights"], ["c"], name="body", pads=[1] * 4),
        *(
            make.make_node(kind, ["c"], [f"o{i}"], name=f"node_{kind}")
            for i, kind in enumerate(operators)
        ),
        make.make_node("Cast", ["o0"], ["y"], to=kinds.FLOAT),
        make.make_node("Conv", ["y", "head"], ["out"], name="head"),
    ]
    more = [f"o{i}" for i in range(1, len(operators))]
    return make.make_model(
        make.make_graph(
            nodes,
            "step",
            [
                make.make_tensor_value_info("state", kinds.FLOAT, [b, *picture]),
                make.make_tensor_value_info("row", kinds.INT32, [r]),
            ],
            [
                make.make_tensor_value_info("out", kinds.FLOAT, [r, 1, SIZE, SIZE]),
                *(make.make_tensor_value_info(n, kinds.FLOAT16, None) for n in more),
            ],
            [
                onnx.numpy_helper.from_array(weights.astype(dtype), "weights"),
                onnx.numpy_helper.from_array(head.astype(np.float32), "head"),
            ],
        ),
        # Convolutions in bfloat16 came with opset 22.
        opset_imports=[make.make_opsetid("", 22 if body == "BFLOAT16" else 20)],
    )


def graph_bytes(**options: Any) -> bytes:
    data: bytes = graph(**options).SerializeToString()
    return data


Build = Callable[..., BuiltPlan]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a graph's bytes, or what lies at a path, into ``tmp_path / "plan"``."""

    def plan(source: bytes | Path, recipe: EngineRecipe) -> BuiltPlan:
        path = tmp_path / "graph.onnx"
        if isinstance(source, bytes):
            path.write_bytes(source)
        graph = path if isinstance(source, bytes) else source
        return build_plan(graph, recipe, None, tmp_path / "plan")

    return plan


class Ticks:
    """Stands in for the progress bar and keeps what it was told."""

    def __init__(self) -> None:
        self.totals: list[int | None] = []
        self.done = 0
        self.notes: list[str] = []

    @contextlib.contextmanager
    def __call__(self, total: int | None, label: str) -> Iterator[Any]:
        self.totals.append(total)
        yield self.tick

    def tick(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.notes += [note] * bool(note)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which temporary folders are made, also by child processes."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@dataclass(frozen=True)
class Built:
    """A plan, its file, and what the progress bar was told."""

    plan: BuiltPlan
    file: Path
    ticks: Ticks


@pytest.fixture(scope="module")
def built(trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A plan with a static and a dynamic profile."""
    ticks, folder = Ticks(), tmp_path_factory.mktemp("built")
    graph, file = folder / "graph.onnx", folder / "plan"
    graph.write_bytes(graph_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "progress", ticks)
        return Built(build_plan(graph, HALF, None, file), file, ticks)


def test_a_plan_is_built_and_described(built: Built, trt: Any) -> None:
    plan = built.plan
    assert built.file.read_bytes()[:4] == b"vtrt"
    assert built.file.stat().st_size > 10_000
    assert (plan.flavour, plan.version) == ("tensorrt_rtx", trt.__version__)
    assert plan.precision == "float16"
    assert plan.compute_capabilities == ("8.6", "12.0")
    assert plan.profiles == (
        {"samples": [1, 1, 1], "rows": [2, 2, 2]},
        {"samples": [1, 2, 3], "rows": [1, 4, 6]},
    )
    assert plan.warnings == ()
    assert 0 < plan.build_seconds < 120
    assert 50e6 < plan.peak_memory_bytes < 4e9


def test_layers_and_work_are_counted_in_the_parsed_network(
    built: Built,
) -> None:
    found = built.plan.layer_types
    assert json.loads(json.dumps(found)) == found
    assert found["source"] == "parsed network"
    assert found["layers"]["CONVOLUTION"] == {"HALF": 1, "FLOAT": 1}
    assert found["layers"]["ACTIVATION"] == {"HALF": 1}
    pixels = 4 * SIZE * SIZE  # at the dynamic profile's usual 4 UNet rows
    body, head = pixels * CHANNELS * CHANNELS * KERNEL**2, pixels * CHANNELS
    assert found["multiply_accumulates"] == {
        "samples": 2,
        "rows": 4,
        "CONVOLUTION": {"HALF": body, "FLOAT": head},
    }
    assert share_of(found, "float16", "CONVOLUTION") == body / (body + head)
    assert share_of(found, "float16", "MATRIX_MULTIPLY") is None


def test_progress_counts_the_profiles_and_names_the_phases(built: Built) -> None:
    ticks = built.ticks
    assert ticks.totals == [2]
    assert ticks.done == 2
    assert len(set(ticks.notes)) > 3
    assert any(note.startswith("Building engine") for note in ticks.notes)


def test_a_graph_with_its_weights_in_another_file(
    trt: Any, tmp_path: Path, temporary: Path, build: Build
) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "step.onnx"
    onnx.save(
        graph(body="FLOAT"),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert (tmp_path / "weights.bin").is_file()
    plan = build(path, dataclasses.replace(FULL, static_guided_samples=()))
    assert plan.precision == "float32"
    assert plan.layer_types["layers"]["CONVOLUTION"] == {"FLOAT": 2}
    assert list(temporary.iterdir()) == []


def test_a_bfloat16_graph_is_built_as_that(trt: Any, build: Build) -> None:
    found = build(graph_bytes(body="BFLOAT16"), BRAIN).layer_types
    assert found["layers"]["CONVOLUTION"] == {"BF16": 1, "FLOAT": 1}
    body = CHANNELS * KERNEL**2  # multiply-accumulates for each of the head's
    assert share_of(found, "bfloat16", "CONVOLUTION") == body / (body + 1)
    assert share_of(found, "float16", "CONVOLUTION") == 0
    assert type_shares(found) == {"BF16": body / (body + 1), "FLOAT": 1 / (body + 1)}


@pytest.mark.parametrize(
    ("body", "recipe", "promised"),
    [
        ("FLOAT", HALF, "float16"),
        ("FLOAT", BRAIN, "bfloat16"),
        ("FLOAT16", FULL, "float32"),
        ("FLOAT16", BRAIN, "bfloat16"),
        ("BFLOAT16", HALF, "float16"),
    ],
)
def test_a_graph_of_another_precision_is_refused(
    trt: Any,
    body: str,
    recipe: EngineRecipe,
    promised: str,
    temporary: Path,
    build: Build,
) -> None:
    with pytest.raises(BuildError) as caught:
        build(graph_bytes(body=body), recipe)
    assert f"promises {promised}" in caught.value.what
    assert "parsed network" in caught.value.why
    assert promised in caught.value.fix
    assert list(temporary.iterdir()) == []


def test_every_node_the_parser_refuses_is_named(trt: Any, build: Build) -> None:
    with pytest.raises(BuildError) as caught:
        build(graph_bytes(operators=("Frobnicate", "Det")), HALF)
    assert "node_Frobnicate" in caught.value.what
    assert "node 'node_Frobnicate' (Frobnicate)" in caught.value.why
    assert "node 'node_Det' (Det)" in caught.value.why


def test_many_refusals_are_all_told(trt: Any, build: Build) -> None:
    kinds = tuple(f"Frobnicate{letter}" for letter in "ABCDEFGHIJ")
    with pytest.raises(BuildError) as caught:
        build(graph_bytes(operators=kinds), HALF)
    assert "node_FrobnicateA" in caught.value.what
    assert "and 6 more" in caught.value.what
    assert [kind for kind in kinds if f"({kind})" not in caught.value.why] == []


@pytest.mark.parametrize("data", [b"", b"no graph at all"])
def test_what_is_no_graph_is_refused(trt: Any, data: bytes, build: Build) -> None:
    with pytest.raises(BuildError, match="cannot parse"):
        build(data, HALF)


@pytest.mark.parametrize(
    ("names", "message"),
    [(("B", "N"), "neither B nor R"), ((1, 2), "sizes of the graph are fixed")],
)
def test_dimensions_must_be_the_step_graphs(
    trt: Any, names: tuple[str | int, str | int], message: str, build: Build
) -> None:
    with pytest.raises(BuildError, match=message):
        build(graph_bytes(names=names), HALF)


def test_an_unknown_capability_is_refused_with_those_there_are(
    trt: Any, build: Build
) -> None:
    recipe = dataclasses.replace(HALF, compute_capabilities=("8.6", "9.9"))
    with pytest.raises(BuildError, match=r"compute capability 9\.9") as caught:
        build(graph_bytes(), recipe)
    assert "8.9" in caught.value.fix


def test_a_build_for_this_gpu_needs_one(trt: Any, build: Build) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    recipe = dataclasses.replace(HALF, compute_capabilities=("current",))
    with pytest.raises(BuildError, match="could not build a plan") as caught:
        build(graph_bytes(), recipe)
    assert "driver" in caught.value.why
    assert "compute_capabilities" in caught.value.fix


@pytest.mark.parametrize("turned", [False, True])
def test_work_of_a_matrix_product(trt: Any, turned: bool) -> None:
    network = child.make_network(trt, trt.Builder(trt.Logger(trt.ILogger.ERROR)))
    made: Any = network
    first = made.add_input("first", trt.float16, (-1, 5, 3) if turned else (-1, 3, 5))
    second = made.add_input("second", trt.float16, (-1, 5, 7))
    kinds = trt.MatrixOperation
    first_kind = kinds.TRANSPOSE if turned else kinds.NONE
    made.add_matrix_multiply(first, first_kind, second, kinds.NONE).name = "product"
    shapes = {"first": (2, *first.shape[1:]), "second": (2, 5, 7)}
    (found,) = node_work(trt, network, shapes)
    assert found == NodeWork("product", "MATRIX_MULTIPLY", "HALF", 2 * 3 * 7 * 5)
    assert tuple(first.shape)[:1] == (-1,)


def test_networks_are_strongly_typed(trt: Any) -> None:
    network = child.make_network(trt, trt.Builder(trt.Logger(trt.ILogger.ERROR)))
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_a_library_that_has_only_strongly_typed_networks_is_asked_for_no_flag() -> None:
    asked: list[int] = []
    fake: Any = SimpleNamespace(create_network=asked.append)
    child.make_network(SimpleNamespace(), fake)
    kinds = SimpleNamespace(STRONGLY_TYPED=3)
    child.make_network(SimpleNamespace(NetworkDefinitionCreationFlag=kinds), fake)
    assert asked == [0, 1 << 3]


def test_a_builder_that_cannot_be_made_is_an_error() -> None:
    def refuse(_: object) -> None:
        raise TypeError("factory function returned nullptr")

    fake = SimpleNamespace(__name__="tensorrt", __version__="10.3", Builder=refuse)
    logger: Any = None
    messages = Messages(SimpleNamespace(send=lambda *_, **__: None))  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="cannot make a builder") as caught:
        child.make_builder(fake, logger, messages)
    assert "nullptr" in caught.value.why


def test_only_tensorrt_recipes_make_plans(build: Build) -> None:
    recipe = EngineRecipe("s", "onnxruntime", "cpu", "float32", "float32")
    with pytest.raises(RecipeError, match="makes no plan"):
        build(b"", recipe)


def test_a_graph_that_is_not_there(tmp_path: Path, build: Build) -> None:
    with pytest.raises(BuildError, match="there is no graph"):
        build(tmp_path / "no.onnx", HALF)


# Below, a module called `tensorrt` stands in for the library, to end in a given way.

Library = Callable[[str], None]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Make the source of the module `tensorrt` that child processes import."""
    folder = tmp_path / "library"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(source: str) -> None:
        (folder / "tensorrt.py").write_text(source)

    return write


def test_the_same_code_builds_with_a_library_of_fewer_names(
    trt: Any, library: Library, tmp_path: Path, build: Build
) -> None:
    """What only TensorRT-RTX has is hidden, as is the progress monitor."""
    library(
        "import tensorrt_rtx as other\n"
        "for name in dir(other):\n"
        "    if name not in ('ComputeCapability', 'IProgressMonitor', '__name__'):\n"
        "        globals()[name] = getattr(other, name)\n"
    )
    plan = build(graph_bytes(), dataclasses.replace(FAKE, dynamic_samples=()))
    assert (plan.flavour, plan.compute_capabilities) == ("tensorrt", ())
    assert len(plan.profiles) == 1
    assert (tmp_path / "plan").read_bytes()[:4] == b"vtrt"


ON_A_GPU = """
import id3pm_deploy.builders.tensorrt_child as child
import tensorrt_rtx as other
for name in dir(other):
    if name not in ("ComputeCapability", "__name__"):
        globals()[name] = getattr(other, name)

class Device:
    facts = {{
        "name": "NVIDIA Made Up",
        "compute_capability": "{capability}",
        "multiprocessors": 8,
        "cuda": "12.6",
    }}
    free = 8 << 30

    def free_bytes(self):
        return self.free

    def reader(self):
        return self.less

    def less(self):
        self.free -= 1 << 20
        return self.free

child.find_device = Device
"""


def test_a_build_on_a_gpu_says_on_which_and_what_it_took(
    trt: Any, library: Library, build: Build, own_cache: Path
) -> None:
    library(ON_A_GPU.format(capability="8.7"))
    plan = build(
        graph_bytes(), dataclasses.replace(FAKE, compute_capabilities=("8.7",))
    )
    assert (plan.gpu_name, plan.compute_capability) == ("NVIDIA Made Up", "8.7")
    assert (plan.multiprocessors, plan.cuda) == (8, "12.6")
    assert plan.peak_device_memory_bytes
    assert plan.peak_device_memory_bytes >= 1 << 20
    assert plan.plan_types["not_counted"], "there is no driver to load it"
    assert plan.warnings == ()
    name = f"tensorrt-{trt.__version__}-NVIDIA_Made_Up-8.7-8.cache"
    assert (own_cache / "id3pm-deploy" / "timings" / name).stat().st_size > 0


def test_a_crash_while_the_plan_is_looked_at_does_not_lose_it(
    trt: Any, library: Library, build: Build, tmp_path: Path, own_cache: Path
) -> None:
    library(
        ON_A_GPU.format(capability="8.7")
        + "import os\ndef Runtime(logger): os.kill(os.getpid(), 11)\n"
    )
    plan = build(graph_bytes(), FAKE)
    assert (tmp_path / "plan").read_bytes()[:4] == b"vtrt"
    assert plan.gpu_name == "NVIDIA Made Up"
    ended = "the process ended while it was loaded"
    assert plan.plan_types == {"source": "plan", "not_counted": ended}


def test_a_plan_for_another_gpu_is_refused_before_anything_is_parsed(
    trt: Any, library: Library, build: Build
) -> None:
    library(ON_A_GPU.format(capability="8.9"))
    recipe = dataclasses.replace(FAKE, compute_capabilities=("8.7",))
    with pytest.raises(
        BuildError, match=r"for GPUs of compute capability 8\.7"
    ) as caught:
        build(b"no graph at all", recipe)
    assert "NVIDIA Made Up with 8.9" in caught.value.why
    with pytest.raises(BuildError, match="cannot parse"):
        build(b"no graph", dataclasses.replace(FAKE, compute_capabilities=("current",)))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_signal_that_ends_the_build_is_named(
    library: Library, temporary: Path, name: str, build: Build
) -> None:
    library(
        "import os, signal, sys\n"
        "print('last words', file=sys.stderr, flush=True)\n"
        f"os.kill(os.getpid(), signal.{name})\n"
    )
    with pytest.raises(BuildError, match=f"ended by {name}") as caught:
        build(b"a graph", FAKE)
    assert "last words" in caught.value.why
    assert ("memory" in caught.value.fix) == (name == "SIGKILL")
    assert list(temporary.iterdir()) == []


def test_a_crash_in_python_is_an_error_with_its_last_words(
    library: Library, build: Build
) -> None:
    library("print('chatter on standard output')\nraise RuntimeError('no good')\n")
    with pytest.raises(BuildError, match="ended with status 1") as caught:
        build(b"a graph", FAKE)
    assert "no good" in caught.value.why
    assert "chatter on standard output" in caught.value.why


def test_a_missing_library_is_named_with_its_extra(
    library: Library, build: Build
) -> None:
    library("raise ImportError('not there')\n")
    with pytest.raises(MissingPackageError) as caught:
        build(b"a graph", FAKE)
    assert "tensorrt" in caught.value.fix


LIMITED = """
import re, resource
import tensorrt_rtx as other
for name in dir(other):
    if name not in ("ComputeCapability", "__name__"):
        globals()[name] = getattr(other, name)
held = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + {more},) * 2)
"""


@pytest.mark.parametrize("megabytes", [10, 40, 55])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_build_without_enough_memory_is_called_that(
    trt: Any, library: Library, build: Build, megabytes: int
) -> None:
    """Wherever the memory ends: TensorRT has a different word for each place."""
    library(LIMITED.format(more=megabytes << 20))
    with pytest.raises(BuildError, match="the build ran out of memory") as caught:
        build(graph_bytes(channels=1024), FAKE)
    assert caught.value.why
    assert "fewer samples at a time (now up to 3)" in caught.value.fix


NO_KERNEL = "Error Code 10: Could not find any implementation for node body"
TOO_SMALL = "no tactics to choose from within workspace limit"
GPU_MEMORY = (
    "[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"
)
HOST_MEMORY = "Error Code 2: OutOfMemory (Requested size was 84935039 bytes.)"


@pytest.mark.parametrize(
    ("said", "limits", "what", "fix"),
    [
        (NO_KERNEL, Limits(4, 1 << 23), "no kernel fits", "raise workspace_bytes .* 8"),
        (NO_KERNEL, Limits(4), "no kernel fits", "fewer samples .* 4"),
        (GPU_MEMORY, Limits(4, 1 << 30), "of GPU memory", r"lower .* \(now 1024 MiB\)"),
        (GPU_MEMORY, Limits(4), "of GPU memory", r"now not set.*fewer samples"),
        (TOO_SMALL, Limits(4, 1 << 20), "no kernel fits", "raise workspace_bytes .* 1"),
        (HOST_MEMORY, Limits(4, 1 << 24), "no kernel fits", "16 MiB, and 81 MiB were"),
        (HOST_MEMORY, Limits(4, 1 << 30), "ran out of memory", "fewer samples"),
        (HOST_MEMORY, Limits(4), "ran out of memory", r"fewer samples .* 4\)$"),
        (HOST_MEMORY, Limits(4, None, 5), "ran out of memory", "capabilities .now 5"),
        ("Unexpected exception std::bad_alloc", Limits(), "ran out of memory", ""),
    ],
)
def test_what_memory_was_short_and_which_limit_bounds_it(
    said: str, limits: Limits, what: str, fix: str
) -> None:
    channel: Any = SimpleNamespace(send=lambda *_, **__: None)
    messages = Messages(channel, limits)
    messages.add("ERROR", said)
    error = messages.error("no plan")
    assert what in error.what
    assert said in error.why
    assert re.search(fix, error.fix)


def test_another_refusal_is_no_lack_of_memory() -> None:
    channel: Any = SimpleNamespace(send=lambda *_, **__: None)
    messages = Messages(channel)
    messages.add("ERROR", "Network validation failed.")
    assert messages.error("no plan", "look at it").fix == "look at it"


def test_a_library_that_waits_for_ever_is_ended(monkeypatch: Any) -> None:
    """As TensorRT-RTX does when a thread of its own cannot be started."""
    said: list[Any] = []
    ended = threading.Event()

    def end(status: int) -> None:
        assert status == 0
        ended.set()

    monkeypatch.setattr("os._exit", end)
    channel: Any = SimpleNamespace(send=lambda *a, **v: said.append((a, v)))
    error = Limits(samples=3).host_error("it waits")
    with Watch(channel, error, seconds=1.0):
        for _ in range(20):  # it is at work
            sum(range(500_000))
        assert not said
        assert ended.wait(10)
    assert said[0][1]["what"] == "the build ran out of memory"


STOPPED = """
import pathlib, sys
from id3pm_deploy.builders.tensorrt import build_plan
from id3pm_deploy.builders.recipe import EngineRecipe
sys.path.insert(0, sys.argv[1])
recipe = EngineRecipe(
    "s", "tensorrt", "tensorrt", "e", "float16", dynamic_samples=(1, 2, 3)
)
build_plan(pathlib.Path(sys.argv[2]), recipe, None, pathlib.Path(sys.argv[3]))
"""


def _wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _runs(process: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_build_leaves_no_process_and_no_file(
    library: Library, tmp_path: Path, temporary: Path, root: Path, name: str
) -> None:
    """Ctrl-C, and a parent that is killed without a chance to tidy up."""
    pid = tmp_path / "pid"
    library(
        "import os, pathlib, time\n"
        "__version__ = '10.3'\n"
        "class ILogger: ...\n"
        "def Builder(logger):\n"
        f"    path = pathlib.Path({str(pid)!r})\n"
        "    path.with_suffix('.new').write_text(str(os.getpid()))\n"
        "    path.with_suffix('.new').rename(path)\n"
        "    time.sleep(60)\n"
    )
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(b"a graph")
    arguments = [str(tmp_path / "library"), str(graph), str(tmp_path / "plan")]
    command = [sys.executable, "-c", STOPPED, *arguments]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE) as parent:
        try:
            assert _wait_for(pid.exists)
            builds = int(pid.read_text())
            assert _runs(builds)
            assert len(list(temporary.iterdir())) == 1
            os.kill(parent.pid, getattr(signal, name))
            _, said = parent.communicate(timeout=20)
        finally:
            parent.kill()
    assert (b"KeyboardInterrupt" in said) == (name == "SIGINT")
    assert _wait_for(lambda: not _runs(builds))
    assert _wait_for(lambda: not list(temporary.iterdir()))
