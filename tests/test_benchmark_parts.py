"""What a step costs, the file of a benchmark, its comparison, table and plot."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import tiny_network, tiny_spec
from torch import nn

from id3pm_deploy.benchmark import rates
from id3pm_deploy.benchmark.case import loosest
from id3pm_deploy.benchmark.columns import BY_NAME, COLUMNS, chosen_columns
from id3pm_deploy.benchmark.compare import FASTER, SAME, SLOWER, compare_results
from id3pm_deploy.benchmark.operations import products, step_cost
from id3pm_deploy.benchmark.plot import plot
from id3pm_deploy.benchmark.result import check_out, load_result, measured, save_result
from id3pm_deploy.benchmark.table import markdown, number
from id3pm_deploy.errors import InputError, OutputError

GOLDEN = Path(__file__).parent / "golden" / "benchmark-1.json"

# What a step takes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learned_variance": True, "scale_shift_norm": False},
        {"resblock_updown": False, "residual_blocks": 2},
        {"channel_multipliers": (1, 1, 2), "attention_resolutions": (16, 4)},
        {"low_res_size": 8, "num_heads": 2},
    ],
)
def test_the_products_are_those_of_the_network(changes: dict[str, Any]) -> None:
    spec = tiny_spec(**changes)
    network = tiny_network(spec)
    macs = weights = 0

    def count(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        nonlocal macs, weights
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        kernel = weight[0].numel()
        macs += out.numel() * kernel
        weights += weight.numel()

    attention = 0
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)

    def product(*arrays: torch.Tensor, **_: Any) -> torch.Tensor:
        nonlocal attention
        query, key, value = arrays[:3]
        attention += 2 * query.numel() * key.shape[-2]
        return torch.zeros_like(query) + 0 * value

    pictures = 1 if spec.model.low_res_size is None else 2
    x = torch.zeros((1, 3 * pictures, 16, 16))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", product)
        network(x, torch.zeros(1), torch.zeros((1, 16)))
    found = list(products(spec))
    assert attention > 0
    assert sum(one.macs for one in found) == macs + attention
    assert sum(one.weights for one in found) == weights


def test_more_rows_cost_more_operations_and_the_same_weights() -> None:
    spec = tiny_spec()
    one, four = (step_cost(spec, rows, "float16") for rows in (1, 4))
    assert four.operations == 4 * one.operations
    weights = 2 * sum(product.weights for product in products(spec))
    assert four.bytes - weights == 4 * (one.bytes - weights)
    assert step_cost(spec, 1, "float32").bytes == 2 * one.bytes


@pytest.mark.parametrize("kind", ["MatMul", "Conv"])
def test_the_graph_written_by_hand_is_one(kind: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"MatMul": ((3, 4), (4, 5)), "Conv": ((1, 2, 6, 6), (3, 2, 3, 3))}[kind]
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    data = rates.one_node(kind, {"a": a, "b": b})
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    made = session.run(None, {"a": a})[0]
    given = torch.from_numpy(a), torch.from_numpy(b)
    if kind == "Conv":
        wanted = torch.nn.functional.conv2d(*given, padding=1)
    else:
        wanted = torch.matmul(*given)
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)


def test_rates_are_operations_and_bytes_over_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("SIDE", 64), ("CHANNELS", 8), ("COPIED", 1 << 16)):
        monkeypatch.setattr(rates, name, value)
    found = rates.cpu_rates(1)
    fastest = max(
        2 * 64**3 / found.seconds["matrix product"],
        18 * 8**2 * rates.PICTURE**2 / found.seconds["convolution"],
    )
    assert found.operations == fastest
    assert found.bytes == 2 * (1 << 16) / found.seconds["copy"]


# Columns


def test_names_of_columns_are_checked() -> None:
    assert len(BY_NAME) == len(COLUMNS)
    assert chosen_columns(None) == COLUMNS
    found = chosen_columns(["torch", "onnxruntime"])
    assert [column.name for column in found] == ["onnxruntime", "torch"]
    for wrong in (["onnx"], []):
        with pytest.raises(InputError, match="no column"):
            chosen_columns(wrong)


def test_the_looser_precision_judges() -> None:
    assert loosest("float32", "float16 weights") == "float16"
    assert loosest("float32", "something else") == "float32"


# The file


def test_figures_follow_from_the_values() -> None:
    rows = [[0.010, 0.012]] * 60
    trajectories = [[0.5]] * 60
    found = measured(rows, trajectories, [[0.49]] * 60, 4, 0.006)
    assert found["row_ms"]["n"] == 120
    assert found["row_ms"]["p50"]["value"] == pytest.approx(11)
    assert found["row_ms"]["p99"] == {"value": 12.0, "low": 12.0, "high": 12.0}
    assert found["trajectory_ms"]["p90"]["value"] == 500
    assert found["trajectory_ms"]["p99"] is None
    assert found["pictures_per_second"]["value"] == 8
    assert found["outside_engine"]["value"] == pytest.approx(0.02)
    assert found["limit_share"]["value"] == pytest.approx(0.55)
    assert found["row_seconds"] == rows
    without = measured(rows, trajectories, None, 4, None)
    assert without["outside_engine"] is without["limit_share"] is None


def _golden() -> Any:
    return json.loads(GOLDEN.read_text("utf-8"))


def test_the_golden_file_is_read_and_shown(tmp_path: Path) -> None:
    found = load_result(GOLDEN)
    assert found == _golden()
    page = markdown(found)
    assert "# Benchmark of golden" in page
    assert "no NVIDIA driver" in page
    drawn = plot(found)
    ElementTree.fromstring(drawn)  # noqa: S314 - our own
    out = tmp_path / "out"
    save_result(out, found, page, drawn)
    assert load_result(out) == found
    names = sorted(path.name for path in out.iterdir())
    assert names == ["benchmark.json", "benchmark.md", "benchmark.svg"]


def test_the_golden_figures_follow_from_its_values() -> None:
    for column in _golden()["columns"].values():
        for batch in column["batches"].values():
            if "reason" in batch:
                continue
            limit = batch["limit_ms"] and batch["limit_ms"] / 1e3
            again = measured(
                batch["row_seconds"],
                batch["trajectory_seconds"],
                batch["engine_seconds"],
                batch["samples"],
                limit,
            )
            assert {key: batch[key] for key in again} == again


def _drop(key: str) -> Callable[[Any], Any]:
    return lambda found: found.pop(key)


def _negative(found: Any) -> None:
    found["columns"]["onnxruntime"]["batches"]["1"]["row_seconds"][0][0] = -1


def _no_lists(found: Any) -> None:
    found["columns"]["onnxruntime"]["batches"]["1"]["trajectory_seconds"] = "x"


def _newer(found: Any) -> None:
    found["format_version"] = 2


def _other(found: Any) -> None:
    found["format"] = "id3pm-run"


def _flat(found: Any) -> None:
    found["columns"] = {"a": 1}


@pytest.mark.parametrize(
    "change", [_drop("columns"), _negative, _no_lists, _newer, _other, _flat]
)
def test_a_damaged_file_is_refused(
    change: Callable[[Any], Any], tmp_path: Path
) -> None:
    found = _golden()
    change(found)
    path = tmp_path / "b.json"
    path.write_text(json.dumps(found))
    with pytest.raises(InputError):
        load_result(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_result(tmp_path / "none.json")


def test_only_an_earlier_benchmark_is_replaced(tmp_path: Path) -> None:
    found, out = _golden(), tmp_path / "out"
    check_out(out, force=False)
    save_result(out, found, "", "")
    with pytest.raises(InputError, match="not empty"):
        check_out(out, force=False)
    save_result(out, found, "again", "", force=True)
    assert (out / "benchmark.md").read_text() == "again"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="no earlier benchmark"):
        check_out(other, force=True)
    with pytest.raises(OutputError, match="is a file"):
        check_out(other / "thesis.txt", force=True)


# Comparing


def _with_values(scale: float, seed: int) -> Any:
    """The golden benchmark with other values: noise, and a factor on one column."""
    found, rng = _golden(), np.random.default_rng(seed)
    for name, column in found["columns"].items():
        for batch in column["batches"].values():
            if "reason" in batch:
                continue
            factor = scale if name == "onnxruntime" else 1.0
            for key in ("row_seconds", "trajectory_seconds"):
                repeats = len(batch[key][0])
                drawn = factor * rng.lognormal(-4, 0.05, (25, repeats))
                batch[key] = drawn.tolist()
    return found


def test_a_planted_regression_is_flagged_and_noise_is_not() -> None:
    before = _with_values(1.0, 1)
    same = compare_results(_with_values(1.0, 2), before)
    assert {change.verdict for change in same.changes} == {SAME}
    assert (same.differences, same.versions, same.lost) == ((), (), ())
    worse = compare_results(_with_values(1.15, 3), before)
    assert {change.column for change in worse.regressions} == {"onnxruntime"}
    assert {change.measure for change in worse.regressions} == {
        "table row",
        "trajectory",
    }
    better = compare_results(before, _with_values(1.15, 3))
    flagged = {c.column for c in better.changes if c.verdict == FASTER}
    assert flagged == {"onnxruntime"}
    assert better.regressions == ()
    assert f"**{SLOWER}**" in markdown(before, worse)


def test_noise_alone_is_hardly_ever_flagged() -> None:
    flagged = total = 0
    for seed in range(40):
        pair = _with_values(1.0, 100 + seed), _with_values(1.0, 200 + seed)
        found = compare_results(*pair)
        flagged += len(found.regressions)
        total += len(found.changes)
    assert flagged / total < 0.02


def test_another_machine_or_setting_is_said() -> None:
    before, now = _golden(), _golden()
    now["machine"]["processor"] = "another"
    now["settings"]["solver"]["steps"] = 7
    now["versions"]["numpy"] = "0"
    found = compare_results(now, before)
    assert len(found.differences) == 2
    assert "another" in found.differences[0]
    assert "numpy" in found.versions[0]
    assert "no verdict holds" in markdown(now, found)


def test_rounds_and_columns_are_no_difference_and_a_lost_one_is_told() -> None:
    before, now = _golden(), copy.deepcopy(_golden())
    now["settings"] |= {"rounds": 99, "columns": ["onnxruntime"]}
    now["columns"]["onnxruntime"]["batches"]["1"] = {"reason": "out of memory"}
    found = compare_results(now, before)
    assert found.differences == ()
    assert found.lost == ("onnxruntime, batch size 1",)


# Pictures and numbers


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.01234, "0.0123"), (1.236, "1.24"), (12.36, "12.4"), (1234.5, "1234")],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_one_batch_size_has_no_second_panel() -> None:
    found = _golden()
    drawn = plot(found)
    assert "<polyline" in drawn
    found["settings"]["batch_sizes"] = found["settings"]["batch_sizes"][:1]
    assert "<polyline" not in plot(found)
    assert 'class="ours"' in drawn


def test_a_name_cannot_leave_its_place_in_the_drawing() -> None:
    found = _golden()
    found["columns"]["onnxruntime"]["title"] = "<script>"
    assert "<script>" not in plot(found)
