"""Imports compute the same function: golden files, the project's own and recorded ones.

The project's own come from ``guided_unet``, a second implementation of
guided-diffusion's UNet; those in the folder `shared` from guided-diffusion itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from golden_imports import CASES, FOLDER, IDENTITY_DIM, flags_of, network_of
from safetensors.torch import save_file
from torch import Tensor

from id3pm_deploy.cli import main
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.reference.guided_diffusion import convert_guided_diffusion
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.spec import NO_IDENTITY, IdentitySpec

TOLERANCE = 1e-5
IDENTITY = IdentitySpec(IDENTITY_DIM, "a test", None, "raw")


def load_arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def output(network: IdentityUNet, arrays: dict[str, Tensor]) -> Tensor:
    """What a network makes of golden inputs; the small picture is enlarged as there."""
    x = arrays["x"]
    if "low_res" in arrays:
        large = F.interpolate(arrays["low_res"], x.shape[-2:], mode="bilinear")
        x = torch.cat([x, large], dim=1)
    y = arrays.get("y", torch.zeros(len(x), network.identity_dim))
    with torch.inference_mode():
        out: Tensor = network(x, arrays["t"].float(), y)
    return out


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error, max|a-b| / max|b|."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def imported(flags: dict[str, Any], tensors: dict[str, Tensor]) -> IdentityUNet:
    """The network that flags and tensors become."""
    identity = IDENTITY if "image_emb.0.weight" in tensors else NO_IDENTITY
    made = convert_guided_diffusion(flags, tensors, identity)
    network = IdentityUNet(made.spec.model, identity.dim).eval()
    network.load_state_dict(made.tensors)
    return network


@pytest.mark.parametrize("case", CASES)
def test_the_golden_files_are_what_the_second_implementation_makes(case: str) -> None:
    arrays = load_arrays(FOLDER / f"{case}.npz")
    assert json.loads((FOLDER / f"{case}.json").read_text()) == flags_of(case)
    _, inputs, out = network_of(case)
    for name, value in inputs.items():
        torch.testing.assert_close(value, arrays[name], rtol=0, atol=0)
    assert error(out, arrays["out"]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_an_import_computes_the_golden_output(case: str) -> None:
    weights = network_of(case)[0].weights
    arrays = load_arrays(FOLDER / f"{case}.npz")
    found = output(imported(flags_of(case), dict(weights)), arrays)
    assert found.shape == arrays["out"].shape
    assert error(found, arrays["out"]) <= TOLERANCE


@pytest.mark.parametrize("case", ["identity", "super-resolution"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_the_same_numbers(case: str, dtype: torch.dtype) -> None:
    network, inputs, _ = network_of(case)
    half = {name: tensor.to(dtype) for name, tensor in network.weights.items()}
    network.weights.update({name: tensor.float() for name, tensor in half.items()})
    found = output(imported(flags_of(case), half), inputs)
    with torch.inference_mode():
        assert error(found, network(**inputs)) <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("identity", {"num_head_channels": 16, "num_heads": 4}),
        ("identity", {"num_heads": 2}),
        ("identity", {"use_new_attention_order": False}),
        ("head-channels", {"num_head_channels": 32}),
        ("head-channels", {"use_new_attention_order": False}),
        ("legacy-order", {"use_new_attention_order": True}),
        ("legacy-order-head-channels", {"use_new_attention_order": True}),
        ("super-resolution", {"num_head_channels": 32}),
        ("super-resolution", {"use_new_attention_order": True}),
    ],
)
def test_what_shapes_do_not_tell_is_seen_in_the_output(
    case: str, wrong: dict[str, Any]
) -> None:
    """Other heads, or another order of rows, load without a word."""
    weights = dict(network_of(case)[0].weights)
    arrays = load_arrays(FOLDER / f"{case}.npz")
    found = output(imported({**flags_of(case), **wrong}, weights), arrays)
    differs = 100 * TOLERANCE
    if wrong == {"num_head_channels": 16, "num_heads": 4}:
        # The only attention is 64 channels wide: 4 heads of 16 are the same heads.
        assert error(found, arrays["out"]) <= TOLERANCE
    else:
        assert error(found, arrays["out"]) > differs


def run_import(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["import", *map(str, arguments)])


@pytest.mark.parametrize("case", ["identity", "super-resolution"])
def test_the_command_imports_them(case: str, tmp_path: Path) -> None:
    weights = dict(network_of(case)[0].weights)
    if case == "identity":
        source = tmp_path / "ema_0.9999_000100.pt"
        torch.save(weights, source)
        more = ["--identity-model", "a test", "--normalisation", "raw"]
    else:
        source, more = tmp_path / "ema.safetensors", []
        save_file(weights, source)
    out = tmp_path / "checkpoint"
    done = run_import(
        source, "--flags", FOLDER / f"{case}.json", "--out", out, "--title", case, *more
    )
    assert done.exit_code == 0, done.output
    loaded = load_checkpoint(out)
    assert loaded.spec.title == case
    assert loaded.spec.origin["converted_from"] == "guided-diffusion"
    assert len(loaded.spec.origin["source_sha256"]) == 64
    arrays = load_arrays(FOLDER / f"{case}.npz")
    assert error(output(loaded.network, arrays), arrays["out"]) <= TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint",
        source.name,
    ]


@pytest.fixture(params=["id32", "sr16to64"])
def recorded(request: pytest.FixtureRequest, shared: Path) -> Path:
    """A recorded set without its suffix."""
    path = shared / "golden" / str(request.param)
    if not path.with_suffix(".pt").is_file():
        pytest.skip(f"needs golden/{request.param} in the folder 'shared'")
    return path


def test_recorded_weights_through_the_command(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = recorded.with_suffix(".json")
    more = ["--identity-model", "golden", "--normalisation", "raw"]
    if not json.loads(flags.read_text())["class_cond"]:
        more = []
    weights = recorded.with_suffix(".pt")
    done = run_import(weights, "--flags", flags, "--out", out, *more)
    assert done.exit_code == 0, done.output
    arrays = load_arrays(recorded.with_suffix(".npz"))
    assert error(output(load_checkpoint(out).network, arrays), arrays["out"]) <= 1e-5


@pytest.mark.parametrize("change", ["heads", "order"])
def test_recorded_outputs_tell_other_heads_and_orders(
    recorded: Path, change: str
) -> None:
    flags = json.loads(recorded.with_suffix(".json").read_text())
    wrong: dict[str, Any] = {"use_new_attention_order": "large_size" in flags}
    if change == "heads":
        wrong = {"num_head_channels": 4}
    tensors = torch.load(recorded.with_suffix(".pt"), weights_only=True)
    identity = NO_IDENTITY
    if flags["class_cond"]:
        identity = IdentitySpec(512, "golden", None, "raw")
    made = convert_guided_diffusion({**flags, **wrong}, tensors, identity)
    network = IdentityUNet(made.spec.model, identity.dim).eval()
    network.load_state_dict(made.tensors)
    arrays = load_arrays(recorded.with_suffix(".npz"))
    assert error(output(network, arrays), arrays["out"]) > 100 * TOLERANCE
