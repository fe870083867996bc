"""Polygraphy, NVIDIA's own toolkit, beside our builder: what agrees and what it lacks.

It reads once, at its import, which library it is for, so each question has a process.
The product does not need it: on a device it is not installed, and its loaders write in
place what a killed build should not leave behind.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_tensorrt_builder import HALF, graph_bytes

from id3pm_deploy.builders.tensorrt import build_plan

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("polygraphy", "tensorrt_rtx", "onnx"))),
    reason="needs polygraphy, tensorrt_rtx and onnx",
)

PARSED = """
import collections, json, sys
from polygraphy.backend.trt import NetworkFromOnnxPath
builder, network, parser = NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)()
found = collections.defaultdict(collections.Counter)
for index in range(network.num_layers):
    layer = network.get_layer(index)
    found[layer.type.name][layer.get_output(0).dtype.name] += 1
print(json.dumps(found))
"""

REFUSED = """
import sys
from polygraphy.backend.trt import NetworkFromOnnxPath
NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)()
"""

HALF_FLAG = """
import sys
from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath
builder, network, parser = NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)()
CreateConfig(fp16=True)(builder, network)
"""


def polygraphy(code: str, graph: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(graph)],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "graph.onnx"
    path.write_bytes(graph_bytes())
    return path


def test_it_parses_the_network_that_we_count(graph: Path, tmp_path: Path) -> None:
    done = polygraphy(PARSED, graph)
    assert done.returncode == 0, done.stderr
    plan = build_plan(graph, HALF, None, tmp_path / "plan")
    assert json.loads(done.stdout.splitlines()[-1]) == plan.layer_types["layers"]


def test_it_says_less_of_what_a_parser_refuses(graph: Path) -> None:
    """The error that it raises names no node; ours names all of them."""
    graph.write_bytes(graph_bytes(operators=("Frobnicate", "Det")))
    done = polygraphy(REFUSED, graph)
    assert done.returncode == 1
    raised = done.stderr.strip().splitlines()[-1]
    assert "Could not parse ONNX correctly" in raised
    assert "node_Det" not in raised


def test_it_cannot_ask_for_float16_where_networks_are_typed(graph: Path) -> None:
    done = polygraphy(HALF_FLAG, graph)
    assert done.returncode == 1
    raised = done.stderr.strip().splitlines()[-1]
    assert "Precision flags" in raised
    assert "not supported" in raised
