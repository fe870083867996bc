"""What keeps large models small in memory: loading, writing graphs, and the sizes at
which a fresh graph is checked. Peaks are measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from models import tiny_network, tiny_spec
from torch import nn

from id3pm_deploy import __version__
from id3pm_deploy.backends.graph_check import check_graph_file
from id3pm_deploy.backends.onnxruntime import make_session
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.builders import onnx as onnx_module
from id3pm_deploy.builders import onnx_graph
from id3pm_deploy.builders.check_sizes import TRACED, checked_sizes, row_flops
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.bundle.writer import bundle_writer
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import BuildError, EngineError, OutputError
from id3pm_deploy.files import ScratchFile
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.reference.precision import body_in
from id3pm_deploy.spec import NO_IDENTITY

_PEAK = """
import json, os, sys, torch
torch.set_num_threads(1)

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith(name))

def measured(function):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the high-water mark
    before = status("VmRSS:")
    kept = function()
    print(json.dumps(status("VmHWM:") - before))
"""


def _peak(code: str, *arguments: object) -> int:
    """Bytes that ``measured`` in the code of a new process took beyond what it held."""
    command = [sys.executable, "-c", _PEAK + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1]))


linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc"
)

_LOAD = """
from pathlib import Path
from id3pm_deploy.reference.checkpoint import load_checkpoint
measured(lambda: load_checkpoint(Path(sys.argv[1])))
"""


@linux
@pytest.mark.slow
def test_loading_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    spec = tiny_spec(base_channels=128, num_head_channels=64)
    save_checkpoint(tmp_path / "c", spec, tiny_network(spec).state_dict())
    size = (tmp_path / "c" / "model.safetensors").stat().st_size
    assert size > 40e6
    assert _peak(_LOAD, tmp_path / "c") < 1.3 * size


_WRITE = """
from pathlib import Path
from torch import nn
from id3pm_deploy.builders.onnx_graph import traced, write_checked
from id3pm_deploy.files import ScratchFile
module = nn.Sequential(*[nn.Linear(1500, 1500) for _ in range(12)]).eval()
model = traced(module, (torch.zeros(2, 1500),), ("x",), ("y",), ({},), 20)
file = ScratchFile(Path(sys.argv[1]))
measured(lambda: write_checked(model, file))
"""


@linux
@pytest.mark.slow
def test_a_graph_is_checked_and_written_without_copies_of_it(tmp_path: Path) -> None:
    size = 12 * 1500 * 1500 * 4
    assert _peak(_WRITE, tmp_path) < 0.6 * size


def _traced(module: nn.Module) -> Any:
    dynamic = ({0: torch.export.Dim("R", min=1, max=8)},)
    return onnx_graph.traced(
        module.eval(), (torch.zeros(2, 40),), ("x",), ("y",), dynamic, 20
    )


def _toy() -> nn.Module:
    """Weights on both sides of the size that is written by itself, one in half."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 300), nn.SiLU(), nn.Linear(300, 3))


def test_a_written_graph_is_whole(tmp_path: Path) -> None:
    module, file = _toy(), ScratchFile(tmp_path)
    nodes = onnx_graph.write_checked(_traced(module), file)
    model = onnx.load_from_string(file.read())
    onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.node) == nodes
    assert len(model.graph.input) == 1
    kept = {item.name: list(item.dims) for item in model.graph.initializer}
    assert {(300, 40), (3, 300)} <= {tuple(dims) for dims in kept.values()}
    x = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    made = make_session(file.path, 1).run(None, {"x": x})[0]
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    assert compare(made, wanted).passes(1e-6)
    assert os.listdir(tmp_path) == []


def test_half_weights_are_written_as_they_are(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(40, 300).half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.linear(x.half())
            return out.float()

    module, file = Halves(), ScratchFile(tmp_path)
    onnx_graph.write_checked(_traced(module), file)
    model = onnx.load_from_string(file.read())
    large = max(model.graph.initializer, key=lambda item: len(item.raw_data))
    assert large.data_type == onnx.TensorProto.FLOAT16
    found = onnx.numpy_helper.to_array(large)
    wanted = module.linear.weight.detach().numpy()
    assert np.array_equal(found, wanted) or np.array_equal(found, wanted.T)


def test_what_does_not_fit_into_a_file_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr(onnx_module, "traced", never)
    monkeypatch.setattr(onnx_graph, "MAX_GRAPH_BYTES", 3_000_000)
    spec = tiny_spec()
    network = tiny_network(spec)
    with pytest.raises(BuildError, match="too large for an ONNX graph") as caught:
        onnx_module.export_graph(network, spec, ExportRecipe("test"), tmp_path)
    size = sum(weight.numel() for weight in network.parameters()) * 4
    assert f"{size / 1e9:.2f} GB" in str(caught.value)
    assert "float16" in str(caught.value)


def test_a_graph_that_grew_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_GRAPH_BYTES", 10_000)
    file = ScratchFile(tmp_path)
    with pytest.raises(BuildError, match="more than one file can hold"):
        onnx_graph.write_checked(_traced(_toy()), file)
    assert file.size == 0


# Checking


def test_a_row_costs_what_is_known_of_it() -> None:
    """109.7 and 631.6 billion multiply-adds of the published models."""
    full = {"image_size": 64, "base_channels": 192, "residual_blocks": 3}
    levels = {"channel_multipliers": (1, 2, 3, 4), "num_head_channels": 64}
    places = {"attention_resolutions": (32, 16, 8), "learned_variance": True}
    identity = tiny_spec(**full, **levels, **places)
    assert row_flops(identity) == pytest.approx(2 * 109.7e9, rel=0.02)
    full = {"image_size": 256, "base_channels": 192, "residual_blocks": 2}
    levels = {"channel_multipliers": (1, 1, 2, 2, 4, 4), "num_heads": 4}
    second = tiny_spec(
        **full, **levels, **places, low_res_size=64, identity=NO_IDENTITY
    )
    assert row_flops(second) == pytest.approx(2 * 631.6e9, rel=0.02)


@pytest.mark.parametrize(
    ("flops", "count"), [(1e8, 5), (2e10, 5), (2.2e11, 2), (8e11, 1)]
)
def test_large_models_are_checked_at_fewer_sizes(flops: float, count: int) -> None:
    sizes = checked_sizes(flops)
    assert len(sizes) == count
    assert any(size != TRACED and size[1] > size[0] for size in sizes), "guided"


def test_the_largest_models_are_checked_with_one_row() -> None:
    assert checked_sizes(1.3e12) == checked_sizes(1e15) == ((1, 1),)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spec, self.identity_dim, self.runs = tiny_spec().model, 16, 0

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return x + 1


def test_the_network_runs_once_for_equal_inputs() -> None:
    network: Any = _Counting()
    oracle = onnx_module._Remembering(network, in_float32=True)
    x, t = torch.zeros(1, 3, 4, 4), torch.ones(1)
    for _ in range(3):
        assert oracle(x.clone(), t, None).mean() == 1
    assert network.runs == 1
    assert oracle(x + 1, t, None).mean() == 2
    assert oracle(x + 1, t, torch.ones(1)).mean() == 2
    assert network.runs == 3


def test_half_summed_in_float32_is_what_pytorch_computes() -> None:
    spec = tiny_spec(learned_variance=True)
    network = tiny_network(spec)
    half = body_in(network, BodyForm("float16"))
    torch.manual_seed(3)
    inputs = (torch.randn(2, 3, 16, 16), torch.tensor([5.0, 700.0]), torch.randn(2, 16))
    with torch.inference_mode():
        wanted, exact = half(*inputs), network(*inputs)
        oracle = onnx_module._Remembering(half, in_float32=True)
        made = oracle(*inputs)
    own = compare(wanted.numpy(), exact.numpy()).max_rel
    assert own > 1e-4, "it is half"
    assert compare(made.numpy(), exact.numpy()).max_rel > own / 3
    assert compare(made.numpy(), wanted.numpy()).max_rel < 2 * own


# Files that are never in memory


def test_a_scratch_file_has_no_name_and_holds_what_it_was_given(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path / "not" / "there")
    file.write([b"abc", b"", b"def"])
    assert (file.size, file.read()) == (6, b"abcdef")
    assert file.sha256().startswith("bef57ec7f53a6d40beb640a780a639c8")
    assert os.listdir(tmp_path) == []
    before = file.path.stat()
    file.save_as(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert os.path.samestat(before, saved.stat()), "it was given a name, not copied"
    assert (saved.read_bytes(), saved.stat().st_mode & 0o777) == (b"abcdef", 0o644)
    assert os.listdir(tmp_path) == ["saved"]
    path = file.path
    del file
    assert not path.exists()


@pytest.mark.parametrize("missing", ["O_TMPFILE", "link"])
def test_a_scratch_file_is_copied_where_it_cannot_be_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file = os.open

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    def open_named(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            refuse()
        return open_file(path, flags, *rest)

    if missing == "link":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.setattr(os, "open", open_named)
    file = ScratchFile(tmp_path)
    file.write([b"abc"])
    (tmp_path / "saved").write_bytes(b"older")
    file.save_as(tmp_path / "saved")
    assert os.listdir(tmp_path) == ["saved"]
    assert (tmp_path / "saved").read_bytes() == b"abc"


def test_a_full_disk_is_said_in_our_words(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield b"some"
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="free some space"):
        ScratchFile(tmp_path).write(pieces())


def test_a_bundle_takes_a_scratch_file(tmp_path: Path) -> None:
    spec = tiny_spec()
    writer = bundle_writer(tmp_path / "b", spec, "0" * 64, __version__)
    file = ScratchFile(tmp_path)
    file.write([b"graph"])
    name = writer.add_file("step", ".onnx", file)
    assert name == writer.add_file("step", ".onnx", b"graph")
    writer.add_file("step", ".onnx", file)
    assert writer.file_entry(name).size == 5
    assert writer.read(name) == b"graph"


def test_files_are_checked_as_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"no graph at all")
    for check in (check_graph_file, lambda path: make_session(path, 1)):
        with pytest.raises(EngineError, match="not one that this tool runs"):
            check(path)
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        with pytest.raises(EngineError, match="cannot read"):
            check_graph_file(tmp_path / name)
