"""Broken installations are reported by the doctor and cannot break it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from doctor_fakes import host, put

from id3pm_deploy.doctor.host import Host
from id3pm_deploy.doctor.probe import Outcome, Probe, importing, run_probe, run_probes
from id3pm_deploy.doctor.probes import tiny_graph

LIMIT = 60.0


def _broken(tmp_path: Path, source: str) -> Host:
    """A machine on which the module ``tensorrt`` is ``source``."""
    put(tmp_path / "mods", {"tensorrt.py": source})
    return host(tmp_path, search=(str(tmp_path / "mods"), *filter(None, sys.path)))


def _import(tmp_path: Path, source: str, limit: float = LIMIT) -> Outcome:
    return run_probe(importing("tensorrt"), _broken(tmp_path, source), limit)


def test_a_module_that_works(tmp_path: Path) -> None:
    outcome = _import(tmp_path, "__version__ = '10.3.0'\n")
    assert (outcome.ok, outcome.facts) == (True, {"version": "10.3.0"})


def test_what_a_module_prints_is_not_taken_for_the_answer(tmp_path: Path) -> None:
    source = "import os\nprint('{}')\nos.write(1, b'{\"facts\": {}}')\n"
    outcome = _import(tmp_path, source + "__version__ = 3\n")
    assert outcome.facts == {"version": "3"}


def test_a_module_without_a_version(tmp_path: Path) -> None:
    assert _import(tmp_path, "").facts == {"version": None}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import ctypes; ctypes.string_at(0)", "importing tensorrt died of SIGSEGV"),
        ("import os; os.abort()", "importing tensorrt died of SIGABRT"),
        (
            "import os; os._exit(3)",
            "importing tensorrt failed: the process ended with status 3",
        ),
        (
            "raise SystemExit('no GPU')",
            "importing tensorrt failed: SystemExit: no GPU",
        ),
        (
            "raise ImportError('libnvinfer.so.10: cannot open')",
            "importing tensorrt failed: ImportError: libnvinfer.so.10: cannot open",
        ),
        ("raise OSError", "importing tensorrt failed: OSError"),
        ("1 +", "importing tensorrt failed: SyntaxError: invalid syntax"),
        (
            "import absent_thing",
            "importing tensorrt failed: ModuleNotFoundError: "
            "No module named 'absent_thing'",
        ),
    ],
)
def test_a_module_that_fails(tmp_path: Path, source: str, problem: str) -> None:
    outcome = _import(tmp_path, source)
    assert outcome.problem.startswith(problem)
    assert outcome.broken


def test_a_module_that_hangs_is_ended(tmp_path: Path) -> None:
    ticks = tmp_path / "ticks"
    source = (
        "import time\n"
        "while True:\n"
        f"    open({str(ticks)!r}, 'a').write('.')\n"
        "    time.sleep(0.05)\n"
    )
    begun = time.monotonic()
    outcome = _import(tmp_path, source, limit=3.0)
    assert time.monotonic() - begun < 30
    assert outcome.problem == "importing tensorrt took over 3 s"
    assert outcome.broken
    size = ticks.stat().st_size
    time.sleep(0.5)
    assert ticks.stat().st_size == size  # it runs no more


def test_a_module_that_ignores_signals_is_ended(tmp_path: Path) -> None:
    source = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "time.sleep(600)\n"
    )
    assert _import(tmp_path, source, limit=2.0).problem.endswith("took over 2 s")


def test_a_module_that_is_not_there_is_absent_not_broken(tmp_path: Path) -> None:
    outcome = run_probe(importing("no_such_module"), _broken(tmp_path, ""), LIMIT)
    assert (outcome.absent, outcome.broken, outcome.ok) == (True, False, False)


def test_paths_in_messages_are_shortened(tmp_path: Path) -> None:
    secret = Path("/srv/data/alice")
    source = f"raise ImportError('cannot load {secret}/lib/x.so for {secret}')"
    outcome = _import(tmp_path, source)
    assert outcome.problem.endswith("cannot load …/x.so for …/alice")
    here = host(tmp_path, home=secret)
    assert here.redacted(f"{secret}/lib/x.so of {secret}") == "~/lib/x.so of ~"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("no path: 1/2 and/or N/A", "no path: 1/2 and/or N/A"),
        ("(/opt/secret/numpy/core.so)", "(…/core.so)"),
        ("file:///srv/bob/x.onnx", "file:…/x.onnx"),
        (f"in /{'home'}/bob", "in ~"),
        (f"in /{'home'}/bob, and /{'Users'}/carol!", "in ~, and ~"),
        ("/root: denied", "~: denied"),
        ("/", "/"),
        ("'/data/bob smith/x'", "'…/bob smith/x'"),
    ],
)
def test_redaction(tmp_path: Path, text: str, short: str) -> None:
    assert host(tmp_path, home=Path("/nobody/here")).redacted(text) == short


def test_longer_names_that_begin_like_the_home_are_not_cut(tmp_path: Path) -> None:
    here = host(tmp_path, home=Path("/srv/al"), search=("/srv/lib",))
    assert here.redacted("/srv/al/x") == "~/x"
    assert here.redacted("/srv/alice/x") == "…/x"
    assert here.redacted("/srv/lib/y/z.py") == "…/y/z.py"


def test_an_interpreter_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    outcome = run_probe(importing("tensorrt"), host(tmp_path), LIMIT)
    assert "could not be tried: No such file" in outcome.problem


def test_several_probes_keep_their_names(tmp_path: Path) -> None:
    def prober(probe: Probe, host: Host, limit: float) -> Outcome:
        return Outcome(facts={"doing": probe.doing, "limit": limit})

    probes = {name: importing(name) for name in "abcdefgh"}
    found = run_probes(probes, host(tmp_path), 5.0, prober)
    assert {k: v.facts["doing"] for k, v in found.items()} == {
        name: f"importing {name}" for name in probes
    }


def test_the_tiny_graph_is_a_valid_model() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(tiny_graph())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


def test_onnx_runtime_is_really_run_and_its_threads_counted() -> None:
    pytest.importorskip("onnxruntime")
    outcome = run_probe(Probe("onnxruntime", (), "trying it"), Host(), LIMIT)
    assert outcome.ok, outcome.problem
    assert "CPUExecutionProvider" in outcome.facts["providers"]
    assert 1 <= outcome.facts["threads"] <= 1024


def test_trying_onnx_runtime_leaves_nothing_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wheels report their use, and keep a device id, unless told otherwise."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    assert run_probe(Probe("onnxruntime", (), "trying it"), Host(), LIMIT).ok
    assert list(tmp_path.rglob("*")) == []


def test_an_onnx_runtime_that_computes_nonsense_is_broken(tmp_path: Path) -> None:
    source = """
import numpy
__version__ = "1.99"
class SessionOptions: pass
class InferenceSession:
    def __init__(self, graph, options, providers): pass
    def run(self, names, feeds): return [numpy.array([5.0], numpy.float32)]
def get_available_providers(): return []
"""
    put(tmp_path / "mods", {"onnxruntime.py": source})
    here = host(tmp_path, search=(str(tmp_path / "mods"), *filter(None, sys.path)))
    outcome = run_probe(Probe("onnxruntime", (), "trying it"), here, LIMIT)
    assert outcome.problem == (
        "trying it failed: ArithmeticError: Relu(-1) came out as [5.0]"
    )
