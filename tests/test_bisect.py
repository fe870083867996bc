"""``bisect``: networks with a culprit of which we know where it is."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from models import contents, tiny_network, tiny_spec

import id3pm_deploy.bisect.measure as measure_module
from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.bisect.measure import TorchMeasure, chosen_rows
from id3pm_deploy.bisect.modules import (
    candidates,
    holders,
    largest_numbers,
    multiply_accumulates,
)
from id3pm_deploy.bisect.result import BisectRequest, BisectResult, Errors
from id3pm_deploy.bisect.run import bisect_to_recipe, find_islands, sample_jobs
from id3pm_deploy.bisect.search import every_candidate
from id3pm_deploy.bisect.write import check_recipe_path, save_recipe
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.cli import main
from id3pm_deploy.errors import (
    CheckpointError,
    InputError,
    NonFiniteError,
    OutputError,
    ParityError,
)
from id3pm_deploy.generate import SampleSettings
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.recipes import load_recipe, recipe_text
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.solvers import SolverSettings
from id3pm_deploy.spec import NO_IDENTITY
from id3pm_deploy.tolerances import CEILINGS, Tolerances

SPEC = tiny_spec(learned_variance=True, prediction_type="v", title="tiny")
SHAPES = step_shapes(SPEC)
HALF = load_recipe("export", "float16", ExportRecipe)
RESNET = "unet.mid_block.resnets.0"
ATTENTION = "unet.mid_block.attentions.0"
STEPS = ("--steps", "3", "--count", "1")


def request(**changes: Any) -> BisectRequest:
    """Three steps of one sample."""
    settings = SampleSettings(solver=SolverSettings(steps=3), count=1)
    whole = BisectRequest(Path("unused"), "float16", settings)
    return dataclasses.replace(whole, **changes)


def large_convolution(network: IdentityUNet) -> None:
    """The first convolution of a residual block gives about 2e6, which the GroupNorm
    behind it takes back."""
    block = cast(Any, network.unet.mid_block).resnets[0]
    for weight in block.conv1.parameters():
        weight.mul_(1e6)


def large_values(network: IdentityUNet) -> None:
    """An attention's values are about 3e5, which its last layer takes back."""
    attention = cast(Any, network.unet.mid_block).attentions[0]
    for weight in attention.to_v.parameters():
        weight.mul_(1e5)
    attention.to_out[0].weight.mul_(1e-5)


def small_values(network: IdentityUNet, down: float = 5e-7, up: float = 4e5) -> None:
    """An attention's values are subnormal in half precision: rounding, no overflow."""
    attention = cast(Any, network.unet.mid_block).attentions[0]
    for weight in attention.to_v.parameters():
        weight.mul_(down)
    attention.to_out[0].weight.mul_(up)


def smallish_values(network: IdentityUNet) -> None:
    """The same, less so."""
    small_values(network, 1.5e-6, 2e5)


def network_with(*culprits: Callable[[IdentityUNet], None]) -> IdentityUNet:
    network = tiny_network(SPEC)
    with torch.no_grad():
        for spoil in culprits:
            spoil(network)
    return network


def measure_of(network: IdentityUNet, form: BodyForm | None = None) -> TorchMeasure:
    jobs = sample_jobs(SPEC, request().settings)
    return TorchMeasure(network, SPEC, form or HALF.form, jobs)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CHECKPOINT with :func:`large_convolution`."""
    folder = tmp_path_factory.mktemp("overflowing") / "checkpoint"
    save_checkpoint(folder, SPEC, network_with(large_convolution).state_dict())
    return folder


# --- what is measured ---------------------------------------------------------------


@pytest.mark.parametrize("spoil", [None, large_convolution, small_values])
def test_products_are_those_of_pytorch_in_half(
    spoil: Callable[[IdentityUNet], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions summed in float32 and rounded are what PyTorch's kernels give, too:
    the same errors, and the same overflow."""
    network = network_with(*([spoil] if spoil else []))
    sets = [frozenset[str](), frozenset([RESNET])]
    ours = [measure_of(network).on_rows(one).step for one in sets]
    monkeypatch.setattr(measure_module, "ProductsInFloat32", contextlib.nullcontext)
    theirs = [measure_of(network).on_rows(one).step for one in sets]
    for a, b in zip(ours, theirs, strict=True):
        assert math.isinf(a) == math.isinf(b)
        if math.isfinite(a):
            assert 0.5 < a / b < 2


def test_products_in_half_round_as_pytorch_does() -> None:
    """Bit for bit, but where another order of a sum falls on the other side."""
    from id3pm_deploy.reference.half_products import ProductsInFloat32

    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(32, 32, 3, padding=1).half()
    linear = torch.nn.Linear(16, 64).half()
    x = torch.randn(2, 32, 16, 16).half()

    wide = torch.randn(2, 32, 16, 64).half()
    square = torch.randn(2, 16, 16).half()

    def all_products() -> list[torch.Tensor]:
        return [
            convolution(x),
            linear(x),
            wide @ wide.transpose(-1, -2),
            torch.mm(square[0], square[1]),
        ]

    with torch.inference_mode():
        theirs = all_products()
    with torch.inference_mode(), ProductsInFloat32():  # type: ignore[no-untyped-call]
        ours = all_products()
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float16
        assert (a == b).float().mean() > 0.98


def test_early_middle_and_late_rows() -> None:
    assert chosen_rows(1) == (0,)
    assert chosen_rows(2) == (0, 1)
    assert chosen_rows(50) == (0, 25, 49)


def test_rows_are_measured_without_their_clamp() -> None:
    """Each from where the reference was in its trajectory, which does clamp."""
    spec = tiny_spec(prediction_type="epsilon")
    jobs = sample_jobs(spec, request().settings)
    rows = TorchMeasure(tiny_network(spec), spec, HALF.form, jobs).rows
    assert [float(row.step[0, 0]) for row in rows] == [999, 500, 0]
    assert np.abs(rows[0].x0).max() > 1000
    assert np.abs(rows[-1].state[0]).max() < 10


def test_everything_in_float32_is_the_reference() -> None:
    network = network_with()
    tree = candidates(network, HALF.form, multiply_accumulates(network))
    measure = measure_of(network)
    everything = frozenset(one.name for one in tree)
    assert measure.on_rows(everything).step < 1e-5
    assert 1e-4 < measure.on_rows(frozenset()).step < 1e-2


def test_overflow_is_an_infinite_error() -> None:
    measure = measure_of(network_with(large_convolution))
    assert math.isinf(measure.on_rows(frozenset()).step)
    limits = Tolerances(1e-2, 2e-2)
    found = measure.on_trajectories(frozenset(), limits)
    assert found.trajectory is not None
    assert math.isinf(found.trajectory)


def test_a_reference_that_is_not_finite_is_refused() -> None:
    network = network_with()
    with torch.no_grad():
        cast(Any, network.unet.conv_out).weight.mul_(1e38)
        cast(Any, network.unet.conv_out).weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match="float32"):
        measure_of(network)


def test_the_worse_of_two_errors_counts() -> None:
    limits = Tolerances(1e-2, 2e-2)
    assert Errors(1e-2).excess(limits) == 1
    assert Errors(5e-3, 4e-2).excess(limits) == 2
    assert Errors(2e-2, 1e-2).excess(limits) == 2


def test_candidates_are_modules_and_their_costs_add_up() -> None:
    network = network_with()
    costs = multiply_accumulates(network)
    assert costs["unet.conv_in"] == 3 * 32 * 9 * 16 * 16
    tree = candidates(network, HALF.form, costs)
    known = dict(network.named_modules())
    for one in every_candidate(tree):
        assert one.name in known
        assert not isinstance(known[one.name], torch.nn.GroupNorm), "an island already"
        assert sum(part.cost for part in one.parts) <= one.cost
    fixed = ("unet.time_embedding", "identity_projection", "unet.conv_out")
    total = sum(one.cost for one in tree) + sum(costs[name] for name in fixed)
    assert total == costs[""]


def test_what_is_an_island_already_is_no_candidate() -> None:
    network = network_with()
    costs = multiply_accumulates(network)
    form = BodyForm("float16", ("embedding", "attention", RESNET))
    names = [one.name for one in every_candidate(candidates(network, form, costs))]
    assert not [n for n in names if "attentions" in n or n.startswith(RESNET)]
    assert "unet.conv_norm_out" in names
    assert "unet.mid_block.resnets.1.norm1" in names


def test_where_numbers_get_too_large() -> None:
    network = network_with(large_convolution)
    rows = measure_of(network).rows
    found = largest_numbers(network, SHAPES, HALF.form, rows)
    assert [n for n, value in found.items() if value > 65504] == [f"{RESNET}.conv1"]
    tree = candidates(network, HALF.form, multiply_accumulates(network))
    assert holders([f"{RESNET}.conv1"], tree) == (f"{RESNET}.conv1",)
    assert holders([f"{RESNET}.norm2", "no such"], tree) == (RESNET,)


def test_numbers_inside_an_attention_are_seen() -> None:
    """Scores are no module's output."""
    network = network_with()
    attention = cast(Any, network.unet.mid_block).attentions[0]
    with torch.no_grad():
        for weight in (*attention.to_q.parameters(), *attention.to_k.parameters()):
            weight.mul_(3e3)
    rows = measure_of(network).rows
    found = largest_numbers(network, SHAPES, HALF.form, rows)
    assert [n for n, value in found.items() if value > 65504] == [ATTENTION]


# --- what is found ------------------------------------------------------------------


def checked(network: IdentityUNet, **changes: Any) -> BisectResult:
    """Search; without any one of the islands it must fail, measured anew."""
    recipe = dataclasses.replace(HALF, **changes)
    result = find_islands(network, SPEC, recipe, request())
    limits = result.tolerances
    assert result.errors.trajectory is not None
    assert result.errors.excess(limits) <= 1
    assert result.minimal
    measure = measure_of(network, recipe.form)
    islands = frozenset(result.shares)
    for name in islands:
        assert measure.on_rows(islands - {name}).excess(limits) > 1, name
    assert result.recipe.islands == recipe.islands + tuple(sorted(islands))
    assert result.recipe.form == measure.form_with(islands)
    return result


def test_the_layer_that_overflows_is_found() -> None:
    """Its output cannot leave it in half precision: the block that takes it back is
    the island, and no more."""
    result = checked(network_with(large_convolution))
    assert list(result.shares) == [RESNET]
    assert list(result.overflowing) == [f"{RESNET}.conv1"]
    assert result.without.step == math.inf
    assert len(result.tried) <= 12


def test_the_attention_that_overflows_is_found() -> None:
    result = checked(network_with(large_values))
    assert list(result.shares) == [ATTENTION]
    assert result.overflowing
    assert all(name.startswith(ATTENTION) for name in result.overflowing)


def test_two_culprits_are_found() -> None:
    result = checked(network_with(large_convolution, large_values))
    assert list(result.shares) == [ATTENTION, RESNET]


def test_rounding_in_one_attention_is_found() -> None:
    """Nothing is too large, so that only the search can tell."""
    result = checked(network_with(small_values), tolerance_step=6e-3)
    assert list(result.shares) == [ATTENTION]
    assert result.overflowing == {}
    assert 1e-2 < result.without.step < math.inf
    share = result.shares[ATTENTION]
    assert 0 < share < 0.05


def test_where_all_passes_nothing_is_added() -> None:
    result = checked(network_with())
    assert result.shares == {}
    assert result.recipe == HALF
    assert len(result.tried) == 1


def test_a_trajectory_can_need_what_its_rows_do_not() -> None:
    network = network_with(smallish_values)
    assert measure_of(network).on_rows(frozenset()).step < 1e-2
    recipe = dataclasses.replace(HALF, tolerance_trajectory=8e-3)
    result = find_islands(network, SPEC, recipe, request())
    # Rounding differs from machine to machine: another island may be needed as well.
    assert ATTENTION in result.shares
    assert result.without.step < 1e-2
    assert result.without.trajectory is not None
    assert result.without.trajectory > 8e-3
    assert result.errors.trajectory is not None
    assert result.errors.trajectory <= 8e-3


@pytest.mark.parametrize("low_res_size", [None, 8])
def test_models_without_identity_and_those_that_enlarge(
    low_res_size: int | None,
) -> None:
    spec = tiny_spec(
        low_res_size=low_res_size, identity=NO_IDENTITY, prediction_type="v"
    )
    network = tiny_network(spec)
    with torch.no_grad():
        large_convolution(network)
    settings = dataclasses.replace(request().settings, guidance=GuidanceSettings(1.0))
    result = find_islands(network, spec, HALF, request(settings=settings))
    assert list(result.shares) == [RESNET]
    assert list(result.overflowing) == [f"{RESNET}.conv1"]


def test_no_set_of_islands_is_enough() -> None:
    recipe = dataclasses.replace(HALF, tolerance_step=1e-9)
    with pytest.raises(ParityError, match="no set of islands") as caught:
        find_islands(network_with(), SPEC, recipe, request())
    assert "of 1e-09" in caught.value.why


def test_bfloat16_has_no_overflow_here() -> None:
    most = CEILINGS["bfloat16"]
    recipe = dataclasses.replace(
        HALF,
        precision="bfloat16",
        opset=22,
        tolerance_step=most.step,
        tolerance_trajectory=most.trajectory,
    )
    result = find_islands(network_with(large_convolution), SPEC, recipe, request())
    assert result.overflowing == {}
    assert result.recipe.precision == "bfloat16"


# --- the recipe ---------------------------------------------------------------------


def text_of_any_kind() -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(text_of_any_kind(), st.lists(text_of_any_kind(), max_size=6))
def test_any_recipe_is_read_back_as_it_was(summary: str, names: list[str]) -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    from id3pm_deploy.recipes import dataclass_from_mapping

    islands = tuple(dict.fromkeys(name for name in names if name))
    recipe = dataclasses.replace(HALF, summary=summary, islands=islands)
    values = tomllib.loads(recipe_text(recipe, ["a comment"]))
    assert dataclass_from_mapping(ExportRecipe, values, "test") == recipe


def test_a_recipe_file_is_never_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    save_recipe(path, HALF, force=False)
    assert load_recipe("export", str(path), ExportRecipe) == HALF
    before = contents(tmp_path)
    other = dataclasses.replace(HALF, summary="another")
    with pytest.raises(InputError, match="exists"):
        save_recipe(path, other, force=False)
    assert contents(tmp_path) == before
    save_recipe(path, other, force=True)
    assert load_recipe("export", str(path), ExportRecipe) == other
    assert list(contents(tmp_path)) == ["mine.toml"]


def test_places_where_no_recipe_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "link.toml").symlink_to(tmp_path / "nowhere")
    for name, kind in (
        ("mine", InputError),
        ("mine.json", InputError),
        ("link.toml", InputError),
        ("folder.toml", InputError),
        ("none/mine.toml", OutputError),
        ("file/mine.toml", OutputError),
    ):
        with pytest.raises(kind):
            check_recipe_path(tmp_path / name, force=False)
    with pytest.raises(OutputError, match="folder"):
        check_recipe_path(tmp_path / "folder.toml", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "file",
        "folder.toml",
        "link.toml",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError):
        check_recipe_path(tmp_path / "mine.toml", force=False)


# --- the command --------------------------------------------------------------------


def test_the_command_writes_a_recipe(overflowing: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    result = run("bisect", overflowing, "--out", out, *STEPS)
    assert result.exit_code == 0, result.output
    assert RESNET in result.stdout
    assert f"{RESNET}.conv1" in result.stderr
    assert "65504" in result.stderr
    assert "one evaluation takes" in result.stderr
    recipe = load_recipe("export", str(out), ExportRecipe)
    assert recipe.islands == (*HALF.islands, RESNET)
    assert recipe.precision == "float16"
    text = out.read_text()
    assert str(tmp_path) not in text
    assert str(overflowing) not in text
    again = run("bisect", overflowing, "--out", out, *STEPS)
    assert again.exit_code == 2
    assert "--force" in again.stderr
    assert out.read_text() == text


def test_the_command_says_all_as_json(overflowing: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    out.write_text("something else")
    result = run("bisect", overflowing, "--out", out, *STEPS, "--json", "--force")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["islands"]) == [RESNET]
    assert found["share"] == pytest.approx(sum(found["islands"].values()))
    assert found["errors_without"] == {"step": None, "trajectory": None}
    assert found["errors"]["trajectory"] <= found["tolerances"]["trajectory"]
    assert found["tried"][0]["islands"] == []
    assert found["minimal"] is True


def test_tighter_tolerances_are_asked_of_the_islands_not_of_the_export(
    overflowing: Path, tmp_path: Path
) -> None:
    """An export is held against PyTorch in half, not in float32."""
    out = tmp_path / "mine.toml"
    asked = ("--tolerance-step", "9e-3", "--tolerance-trajectory", "1.9e-2")
    assert run("bisect", overflowing, "--out", out, *STEPS, *asked).exit_code == 0
    recipe = load_recipe("export", str(out), ExportRecipe)
    assert (recipe.tolerance_step, recipe.tolerance_trajectory) == (1e-2, 2e-2)
    assert re.search(r"of 9e-03, trajectory .* of 1\.90e-02 that were", out.read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tolerance-step", "nan"],
        ["--tolerance-step", "inf"],
        ["--tolerance-step", "-1e-3"],
        ["--tolerance-step", "0"],
        ["--tolerance-step", "0.5"],
        ["--tolerance-trajectory", "nan"],
        ["--tolerance-trajectory", "-1"],
        ["--tolerance-trajectory", "0.5"],
        ["--recipe", "float32"],
        ["--recipe", "none such"],
        ["--recipe", "none such.toml"],
        ["--budget", "1"],
        ["--count", "0"],
        ["--count", "1000"],
        ["--steps", "0"],
        ["--threads", "-1"],
        ["--seed", "-1"],
    ],
    ids=" ".join,
)
def test_unusable_settings(
    arguments: list[str], overflowing: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine.toml"
    result = run("bisect", overflowing, "--out", out, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    result = run("bisect", tmp_path / "none", "--out", tmp_path / "mine.toml")
    assert result.exit_code == CheckpointError.exit_status
    assert "none" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_tolerance_that_cannot_be_reached_writes_nothing(
    overflowing: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine.toml"
    result = run("bisect", overflowing, "--out", out, *STEPS, "--tolerance-step", 1e-9)
    assert result.exit_code == ParityError.exit_status
    assert "no set of islands" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_killed_search_leaves_nothing(overflowing: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, "-m", "id3pm_deploy", "bisect"]
    command += [overflowing, "--out", tmp_path / "mine.toml", "--steps", "40"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "one evaluation takes" in line:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_recipe_mends_the_export(overflowing: Path, tmp_path: Path) -> None:
    """The half-precision export fails its own check; with the recipe it passes, and
    the engine is within the tolerance against float32."""
    from id3pm_deploy.builders.build import export_bundle
    from id3pm_deploy.parity.run import ParityRequest, parity_to_folder
    from id3pm_deploy.parity.sides import SideRequest

    with pytest.raises(ParityError):
        export_bundle(overflowing, "float16", tmp_path / "broken")
    out = tmp_path / "mine.toml"
    wanted = dataclasses.replace(request(), checkpoint=overflowing)
    bisect_to_recipe(out, wanted)
    bundle = tmp_path / "bundle"
    made = export_bundle(overflowing, str(out), bundle)
    assert made.manifest.graphs[-1].precision == "float16"
    report = parity_to_folder(
        tmp_path / "report",
        ParityRequest(
            engine=SideRequest(bundle),
            reference=SideRequest(overflowing, precision="float32"),
            settings=request().settings,
        ),
    )
    assert report.passed, report.failures
    assert not np.isnan(report.checks[0].found.max_rel)
