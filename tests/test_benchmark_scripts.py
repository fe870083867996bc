"""The benchmark scripts on toys: nothing is measured here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from models import tiny_network, tiny_spec
from onnx import TensorProto, helper

from id3pm_deploy.errors import EngineError, ParityError, RecipeError
from id3pm_deploy.solvers import STATE_SLOTS, STEP_WIDTH
from id3pm_deploy.spec import DiffusionSpec

_FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(_FOLDER))
cold_start: Any = importlib.import_module("cold_start")
child: Any = importlib.import_module("cold_start_child")
harness: Any = importlib.import_module("harness")
page_cache: Any = importlib.import_module("page_cache")
random_model: Any = importlib.import_module("random_model")
step_latency: Any = importlib.import_module("step_latency")
trajectory_overhead: Any = importlib.import_module("trajectory_overhead")

Arrays = dict[str, npt.NDArray[Any]]

NAMED_SIZES = {
    "state": (STATE_SLOTS, "B", 3, 16, 16),
    "noise": ("B", 3, 16, 16),
    "identity": ("R", 16),
    "row": ("R",),
    "mix": (2, "B", "R"),
    "step": ("B", STEP_WIDTH),
}


# The model


def test_the_recipe_is_the_model_that_the_tables_name() -> None:
    spec = random_model.load_model("identity64")
    assert isinstance(spec, DiffusionSpec)
    model = spec.model
    assert (model.image_size, model.base_channels) == (64, 64)
    assert model.channel_multipliers == (1, 2, 3, 4)
    assert model.residual_blocks == 2
    assert model.attention_resolutions == (32, 16, 8)
    assert (model.num_heads, model.num_head_channels) == (None, 64)
    assert model.learned_variance
    assert spec.identity.dim == 512
    assert random_model.parameter_count(spec) == 25_582_278


def test_a_recipe_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"identity65\.toml"):
        random_model.load_model("identity65")


def test_no_random_weight_can_be_optimised_away() -> None:
    network = random_model.random_network(tiny_spec(), seed=4)
    for name, weight in network.named_parameters():
        assert weight.std() > 0, name
    again = random_model.random_network(tiny_spec(), seed=4)
    other = random_model.random_network(tiny_spec(), seed=5)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t, identity = torch.tensor([500.0]), torch.ones(1, 16)
    out = network(x, t, identity)
    assert torch.equal(out, again(x, t, identity))
    assert not torch.allclose(out, other(x, t, identity))
    assert out.std() > 0.05
    assert (out - network(x, t, 0 * identity)).abs().max() > 0.01


def test_outputs_that_prove_nothing_are_refused() -> None:
    random_model.refuse_trivial({"x0": np.linspace(-1, 1, 9)})
    with pytest.raises(ParityError, match="x0 hardly varies"):
        random_model.refuse_trivial({"x0": np.full(9, 0.3)})
    with pytest.raises(ParityError):
        random_model.refuse_trivial({"x0": np.full(9, np.nan)})


# Contenders, on a step graph that needs no export


@pytest.fixture(scope="module")
def toy_graph() -> bytes:
    """A step graph: state' = state / 2 + noise, x0 = noise · step[0, 0], finite = 1."""
    kinds = dict.fromkeys(NAMED_SIZES, TensorProto.FLOAT) | {"row": TensorProto.INT32}
    inputs = [
        helper.make_tensor_value_info(name, kinds[name], size)
        for name, size in NAMED_SIZES.items()
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, NAMED_SIZES[like])
        for name, like in (("state_next", "state"), ("x0", "noise"), ("finite", "row"))
    ]
    constants = {
        "half": helper.make_tensor("half", TensorProto.FLOAT, [], [0.5]),
        "zero": helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        "none": helper.make_tensor("none", TensorProto.FLOAT, [], [0.0]),
        "one": helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    }
    nodes = [
        helper.make_node("Mul", ["state", "half"], ["halved"]),
        helper.make_node("Add", ["halved", "noise"], ["state_next"]),
        helper.make_node("Gather", ["step", "zero"], ["first"], axis=0),
        helper.make_node("Gather", ["first", "zero"], ["factor"], axis=0),
        helper.make_node("Mul", ["noise", "factor"], ["x0"]),
        helper.make_node("Cast", ["row"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "none"], ["zeros"]),
        helper.make_node("Add", ["zeros", "one"], ["finite"]),
    ]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, [*constants.values()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


class ToyStep(torch.nn.Module):
    """What the toy graph computes."""

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, noise, _, row, _, step = values
        return state / 2 + noise, noise * step[0, 0], torch.ones(len(row))


@pytest.fixture
def toy_subject(toy_graph: bytes) -> Any:
    given = random_model.inputs(tiny_spec(), 2, 4, seed=1)
    return step_latency.Subject(tiny_spec(), ToyStep(), toy_graph, given, 1)


def _expected(subject: Any) -> Arrays:
    state, noise = subject.inputs["state"], subject.inputs["noise"]
    return {"state_next": state / 2 + noise, "x0": noise * subject.inputs["step"][0, 0]}


def test_inputs_have_no_clamp_that_could_hide_an_error() -> None:
    made = random_model.inputs(tiny_spec(), 2, 4)
    assert (made["step"][:, 4] >= 1e6).all()
    assert made["identity"].shape == (4, 16)


CHEAP = ("engine", "runtime", "eager", "openvino")


@pytest.mark.parametrize("name", CHEAP)
def test_contenders_compute_the_function_again_and_again(
    toy_subject: Any, name: str
) -> None:
    if name == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    contender = getattr(step_latency, f"{name}_contender")(toy_subject)
    for _ in range(2):
        contender.variant.prepare()
        contender.variant.run()
        found = contender.outputs()
        error = harness.checked(name, found, _expected(toy_subject), 1e-6)
        assert error < 1e-6


def _only(monkeypatch: pytest.MonkeyPatch, **others: Any) -> None:
    """Leave the engine and ``others`` among the contenders."""
    made = {step_latency.ENGINE: step_latency.engine_contender, **others}
    monkeypatch.setattr(step_latency, "CONTENDERS", made)


def test_a_contender_with_a_planted_error_stops_everything(
    toy_subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(ToyStep):
        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            state_next, x0, finite = super().forward(*values)
            return state_next, x0 * 1.001, finite

    def planted(subject: Any) -> Any:
        return step_latency._torch_contender(subject, "planted", Wrong())

    _only(monkeypatch, planted=planted)
    with pytest.raises(ParityError, match="planted computes another x0"):
        step_latency.checked_contenders(toy_subject, _expected(toy_subject), 1e-5)


def test_what_is_missing_or_fails_keeps_its_row(
    toy_subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(subject: Any) -> Any:
        raise EngineError("torch.compile failed", why="no compiler")

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "openvino" else real(n)
    )
    _only(
        monkeypatch,
        **{
            "plain ONNX Runtime, session.run": step_latency.runtime_contender,
            "OpenVINO": step_latency.openvino_contender,
            "compiled": failing,
        },
    )
    ready, states = step_latency.checked_contenders(
        toy_subject, _expected(toy_subject), 1e-5
    )
    plan = harness.Plan(rounds=3, repeats=1, pause=0.0)
    found = step_latency.measure(ready, states, plan)
    assert found["OpenVINO"] == {"status": "not installed"}
    assert found["compiled"] == {"status": "failed: no compiler"}
    engine = found[step_latency.ENGINE]
    assert engine["times_the_engine"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert len(engine["seconds"]) == 3
    rows = {row[0]: row[1:] for row in step_latency.table_rows(found)}
    assert rows["OpenVINO"] == ["not installed", "", ""]
    assert rows["compiled"][0] == "failed: no compiler"
    json.dumps(found, allow_nan=False)


def test_an_engine_that_fails_is_no_row_but_an_error(
    toy_subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(subject: Any) -> Any:
        raise EngineError("no engine")

    monkeypatch.setattr(step_latency, "CONTENDERS", {step_latency.ENGINE: broken})
    with pytest.raises(EngineError, match="no engine"):
        step_latency.checked_contenders(toy_subject, _expected(toy_subject), 1e-5)


# The trajectory


def _bench(toy_graph: bytes) -> Any:
    return trajectory_overhead.make_bench(tiny_spec(), toy_graph, 2, 4, 1, seed=0)


def test_a_trajectory_times_each_row_with_its_neighbours(toy_graph: bytes) -> None:
    bench = _bench(toy_graph)
    found = bench.trajectory(0)
    assert {name: len(row) for name, row in found.rows.items()} == {
        "product": 4,
        "bare": 4,
        "control": 4,
    }
    assert len(found.inside) == 4
    whole, inside = found.rows["product"], found.inside
    assert all(a > b > 0 for a, b in zip(whole, inside, strict=True))
    assert found.finish > 0
    assert found.noise > 0
    # The session is as it was.
    assert "run_with_iobinding" not in vars(bench.engine._session)


def test_the_overhead_is_what_was_put_in() -> None:
    found = trajectory_overhead.Trajectory()
    found.rows["bare"] = [0.1] * 10
    found.rows["product"] = [0.1 + 0.004, *[0.1 + 0.001] * 9]
    found.rows["control"] = [0.1 * 1.002] * 10
    found.inside = [0.1] * 10
    found.finish = 0.007
    assert found.overhead() == pytest.approx(0.02)
    assert found.control() == pytest.approx(0.002)
    assert found.own_row() == pytest.approx(0.001)
    assert found.own_ends() == pytest.approx(0.011)
    found.rows["product"][5] += 3.0  # a hiccup
    assert found.overhead() == pytest.approx(0.02)


def test_the_table_says_whether_the_goal_is_met(toy_graph: bytes) -> None:
    bench = _bench(toy_graph)
    made = trajectory_overhead.measure(bench, rounds=3, seed=0)
    found = trajectory_overhead.figures(made)
    assert found["verdict"] in ("met", "missed", "undecided")
    assert set(found["overhead"]) == {"value", "low", "high"}
    rows = trajectory_overhead.table_rows(found)
    assert rows[0][2] == f"goal 1%: {found['verdict']}"
    json.dumps(found, allow_nan=False)


def test_a_session_that_computes_something_else_is_refused(toy_graph: bytes) -> None:
    # The bare runs are the product's to the bit, but the graph is no UNet's.
    bench = _bench(toy_graph)
    with pytest.raises(ParityError, match="the trajectory computes another images"):
        trajectory_overhead.check(bench, tiny_network(tiny_spec()), 1e-4)
    bench.bare.states[0][0] += 1e-3
    with pytest.raises(ParityError, match="a bare run computes another images"):
        trajectory_overhead.check(bench, tiny_network(tiny_spec()), 1e-4)


# Cold start


def test_spans_leave_out_what_is_inside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(child.time, "perf_counter", lambda: now[0])
    spans = child.Spans()

    def spend(seconds: float) -> None:
        now[0] += seconds

    inner = spans.around(spend, lambda *_: "inner")

    def outer_body() -> None:
        spend(1.0)
        inner(2.0)
        inner(3.0)

    spans.around(outer_body, lambda: "outer")()
    assert spans.seconds == {"inner": 5.0, "outer": 1.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("numpy.linalg", {}, {}, (), 0), "import numpy"),
        (("json", {}, {}, (), 0), "import Python"),
        (("", {"__package__": "PIL"}, {}, ("Image",), 1), "import PIL"),
        ((".commands.sample", "id3pm_deploy"), "import id3pm_deploy"),
        (("onnxruntime",), "import onnxruntime"),
    ],
)
def test_an_import_is_filed_under_its_package(
    arguments: tuple[Any, ...], expected: str
) -> None:
    assert child.imported_package(*arguments) == expected


def test_the_child_writes_where_the_time_went(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, str(_FOLDER / "cold_start_child.py"), str(trace)]
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(trace.read_text("utf-8"))
    assert found["finished"] > found["begun"]
    assert {"import numpy", "import PIL", "import id3pm_deploy"} <= set(
        found["seconds"]
    )
    assert any(name.endswith("generate.py") for name in found["files"])
    found |= {"spawned": found["begun"] - 0.5, "ended": found["finished"] + 0.25}
    parts = cold_start.split(found)
    assert parts["starting Python"] == pytest.approx(0.5)
    assert sum(parts.values()) == pytest.approx(found["ended"] - found["spawned"])
    assert parts["imports"] == pytest.approx(sum(cold_start.imports_of(found).values()))
    assert min(parts.values()) > 0


def test_a_command_that_makes_no_picture_is_an_error(tmp_path: Path) -> None:
    runs = cold_start.Runs(["inspect", str(tmp_path / "nothing")], tmp_path)
    with pytest.raises(EngineError, match="did not make its one picture"):
        runs.run(cold_start.WARM)


def test_files_can_be_put_out_of_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 100_000)
    assert page_cache.resident_share([path, tmp_path / "missing"]) == 1.0
    page_cache.evict([path, tmp_path / "missing"])
    share = page_cache.resident_share([path])
    if share == 1.0:
        pytest.skip("this file system keeps its pages")
    assert share == 0.0
    path.read_bytes()
    assert page_cache.resident_share([path]) == 1.0


def test_cold_start_figures_leave_warm_up_runs_out(tmp_path: Path) -> None:
    runs = cold_start.Runs([], tmp_path)
    trace = {"spawned": 0.0, "begun": 0.1, "finished": 0.8, "ended": 0.9}
    seconds = {"import numpy": 0.2, "session": 0.1, "sampling": 0.3}
    first = trace | {"finished": 99.0, "ended": 99.0, "seconds": seconds}
    runs.traces = [first, *[trace | {"seconds": seconds}] * 3]
    runs.written = {kind: [50.0, 0.7, 0.7, 0.7] for kind in ("warm", "evicted")}
    runs.processor = {"warm": [9.0, 1.5, 1.5, 1.5]}
    runs.resident = [1.0, 0.25, 0.25, 0.25]
    times = {kind: [0.9] * 3 for kind in ("warm", "evicted", "split")}
    found = cold_start.figures(runs, times, warmup=1)
    assert found["verdict"] == "met"
    assert found["resident_after_eviction"] == 0.25
    assert found["to_picture_milliseconds"]["warm"]["high"] == pytest.approx(700)
    medians = {k: v["value"] for k, v in found["split_milliseconds"].items()}
    assert medians == pytest.approx(
        {
            "starting Python": 100,
            "imports": 200,
            "session": 100,
            "sampling": 300,
            "the rest of the command": 100,
            "ending the process": 100,
        }
    )
    rows = cold_start.table_rows(found)
    assert rows[0] == ["warm, to the picture", "700 (700 to 700)", "goal 1 s: met"]
    assert rows[2][1] == "1500 (1500 to 1500)"


def test_the_harness_imports_nothing_that_is_measured() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1]); import cold_start;"
        "print([m for m in ('numpy', 'onnxruntime', 'PIL', 'torch')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(_FOLDER)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
