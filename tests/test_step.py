"""The step module against DESIGN's formula, written out slowly in NumPy."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from models import random_identity, tiny_model, tiny_network, tiny_spec
from torch import Tensor, nn
from torch.nn import functional

from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.guidance import guidance_table
from id3pm_deploy.noise import batch_normals
from id3pm_deploy.reference.attention import Projection
from id3pm_deploy.reference.normalisation import Normalise
from id3pm_deploy.reference.precision import body_in
from id3pm_deploy.reference.step import StepModule, StepOutputs, step_module
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.solvers import (
    CARRY_COLUMN,
    NO_CLIP,
    RESCALE_COLUMN,
    STATE_SLOTS,
    STEP_HEAD,
    STEP_WIDTH,
    SolverSettings,
    solver_table,
)

Float64 = npt.NDArray[np.float64]
Inputs = dict[str, npt.NDArray[Any]]

B, R, C, SIZE, D = 3, 5, 3, 4, 8
ORDER = ("state", "noise", "identity", "row", "mix", "step")


class StubNetwork(nn.Module):
    """Answers with given outputs and remembers what it was asked."""

    def __init__(self, outputs: npt.NDArray[np.float32]) -> None:
        super().__init__()
        learned = outputs.shape[1] == 2 * C
        self.spec = tiny_model(image_channels=C, learned_variance=learned)
        self.outputs = torch.from_numpy(outputs)
        self.asked: tuple[Tensor, ...] = ()

    def forward(self, *asked: Tensor) -> Tensor:
        self.asked = asked
        return self.outputs


def random_inputs(seed: int = 0) -> Inputs:
    """Inputs in which every number differs from every other, rows mixed freely."""
    rng = np.random.default_rng(seed)
    step = rng.normal(size=(B, STEP_WIDTH))
    step[:, 0] = rng.integers(0, 1000, B)
    step[:, 4] = [0.7, 1.5, NO_CLIP]
    step[:, 5:7] = np.sort(rng.uniform(-6, -1, size=(B, 2)))
    step[:, RESCALE_COLUMN] = [0.3, 0.0, 1.0]
    step[:, CARRY_COLUMN] = [1.0, 0.0, -0.4]
    inputs: Inputs = {
        "state": rng.normal(size=(STATE_SLOTS, B, C, SIZE, SIZE)),
        "noise": rng.normal(size=(B, C, SIZE, SIZE)),
        "identity": rng.normal(size=(R, D)),
        "mix": rng.normal(size=(2, B, R)),
        "step": step,
    }
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    inputs["row"] = np.array([2, 0, 1, 2, 0], dtype=np.int32)
    return inputs


def random_outputs(planes: int, seed: int = 1) -> npt.NDArray[np.float32]:
    shape = (R, planes * C, SIZE, SIZE)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_step(network: nn.Module, inputs: Inputs) -> StepOutputs:
    module = StepModule(network)  # type: ignore[arg-type]
    with torch.inference_mode():
        found = module(*(torch.from_numpy(inputs[name]) for name in ORDER))
    assert isinstance(found, StepOutputs)
    return found


def step_by_hand(inputs: Inputs, outputs: Float64) -> tuple[Float64, Float64]:
    """state' and x0 in float64, one sample and one UNet row at a time."""
    wide = {name: value.astype(np.float64) for name, value in inputs.items()}
    state_next = np.zeros_like(wide["state"])
    x0 = np.zeros_like(wide["noise"])
    for b in range(len(x0)):
        _, _, c_x, c_p, clip, min_log, max_log = wide["step"][b, :STEP_HEAD]
        matrix = wide["step"][b, STEP_HEAD:RESCALE_COLUMN]
        matrix = matrix.reshape(STATE_SLOTS, STATE_SLOTS + 2)
        prediction = np.zeros_like(x0[b])
        conditional = np.zeros_like(x0[b])
        v = np.zeros_like(x0[b])
        for r in range(len(outputs)):
            prediction += wide["mix"][0, b, r] * outputs[r, :C]
            conditional += wide["mix"][1, b, r] * outputs[r, :C]
            if outputs.shape[1] == 2 * C:
                v += wide["mix"][1, b, r] * outputs[r, C:]
        prediction += wide["step"][b, CARRY_COLUMN] * wide["state"][-1, b]
        phi = wide["step"][b, RESCALE_COLUMN]
        rescaled = prediction * conditional.std() / prediction.std()
        prediction = phi * rescaled + (1 - phi) * prediction
        x0[b] = np.clip(c_x * wide["state"][0, b] + c_p * prediction, -clip, clip)
        log_variance = (v + 1) / 2 * max_log + (1 - (v + 1) / 2) * min_log
        n = wide["noise"][b] * np.exp(0.5 * log_variance)
        for i in range(STATE_SLOTS):
            for k in range(STATE_SLOTS):
                state_next[i, b] += matrix[i, k] * wide["state"][k, b]
            state_next[i, b] += matrix[i, STATE_SLOTS] * x0[b]
            state_next[i, b] += matrix[i, STATE_SLOTS + 1] * n
    return state_next, x0


@pytest.mark.parametrize("planes", [1, 2], ids=["fixed", "learned"])
def test_a_step_is_designs_formula(planes: int) -> None:
    for seed in range(4):
        inputs, outputs = random_inputs(seed), random_outputs(planes, seed)
        found = run_step(StubNetwork(outputs), inputs)
        state, x0 = step_by_hand(inputs, outputs.astype(np.float64))
        for ours, expected in ((found.state, state), (found.x0, x0)):
            assert ours.dtype == torch.float32
            assert ours.shape == expected.shape
            error = np.abs(ours.numpy() - expected).max() / np.abs(expected).max()
            assert error < 2e-6
        assert found.finite.tolist() == [1.0] * R


def test_rescale_is_diffusers_own() -> None:
    """Its unbiased standard deviations give the same ratio as ours."""
    utils = pytest.importorskip("diffusers.guiders.guider_utils")
    inputs, outputs = random_inputs(), random_outputs(1)
    inputs["step"][:, 4] = NO_CLIP
    inputs["step"][:, 2:4] = [0.0, 1.0]  # x0 is the prediction
    inputs["step"][:, RESCALE_COLUMN] = 0.7
    inputs["step"][:, CARRY_COLUMN] = 0.0
    found = run_step(StubNetwork(outputs), inputs).x0
    mixed, conditional = (
        torch.from_numpy(np.tensordot(plane, outputs, axes=1))
        for plane in inputs["mix"]
    )
    expected = utils.rescale_noise_cfg(mixed, conditional, guidance_rescale=0.7)
    assert (found - expected).abs().max() / expected.abs().max() < 2e-6
    assert (found - mixed).abs().max() > 0.1


def test_no_rescale_is_no_arithmetic() -> None:
    """At φ = 0 and c_s = 0 the prediction keeps every bit, whatever its size."""
    inputs = random_inputs()
    inputs["step"][:, RESCALE_COLUMN:] = 0.0
    inputs["step"][:, 4] = 1e37
    inputs["step"][:, 2:4] = [0.0, 1.0]
    inputs["mix"][...] = np.eye(B, R)
    for scale in (1e-30, 1.0, 1e30):
        outputs = random_outputs(1) * np.float32(scale)
        found = run_step(StubNetwork(outputs), inputs).x0
        assert (found.numpy() == outputs[:B]).all()


@pytest.mark.parametrize("value", [0.0, -0.3, 12.0])
def test_a_constant_prediction_is_not_rescaled(value: float) -> None:
    """Its standard deviation is 0; the conditional one's is not."""
    outputs = random_outputs(2)
    outputs[1, :C] = value
    inputs = random_inputs()
    inputs["step"][:, RESCALE_COLUMN] = 1.0
    inputs["step"][:, CARRY_COLUMN] = 0.0
    inputs["mix"][0] = np.eye(R)[1]
    inputs["mix"][1] = np.eye(R)[0]
    found = run_step(StubNetwork(outputs), inputs)
    without = {**inputs, "step": inputs["step"].copy()}
    without["step"][:, RESCALE_COLUMN] = 0.0
    for ours, plain in zip(found, run_step(StubNetwork(outputs), without), strict=True):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, plain)
    # A constant conditional prediction does flatten a guided one.
    inputs["mix"] = inputs["mix"][::-1].copy()
    inputs["step"][:, 2:4] = [0.0, 1.0]
    flat = run_step(StubNetwork(outputs), inputs).x0
    assert (flat == 0).all()


def test_what_the_network_is_asked() -> None:
    """c_in·x_t, t and the identity of every UNet row, the rows in their own order."""
    inputs = random_inputs()
    network = StubNetwork(random_outputs(1))
    run_step(network, inputs)
    x, times, identity = (part.numpy() for part in network.asked)
    row, step = inputs["row"], inputs["step"]
    for r in range(R):
        scaled = inputs["state"][0, row[r]] * step[row[r], 1]
        assert (x[r] == scaled).all()
        assert times[r] == step[row[r], 0]
    assert (identity == inputs["identity"]).all()


def test_the_clip_bounds_x0_and_is_each_samples_own() -> None:
    inputs, outputs = random_inputs(), random_outputs(1) * 100
    found = run_step(StubNetwork(outputs), inputs).x0.abs().amax(dim=(1, 2, 3))
    assert found[:2].tolist() == pytest.approx([0.7, 1.5])
    assert found[2] > 10


def test_samples_at_different_table_rows_share_a_batch() -> None:
    """Each one's result is what it is when all samples are at its row."""
    spec = tiny_spec(learned_variance=True)
    tables = [
        solver_table(spec, SolverSettings(name, 7)).rows
        for name in ("ddpm", "ddim", "dpmpp-2m")
    ]
    chosen = [tables[0][1], tables[1][6], tables[2][3]]
    inputs, outputs = random_inputs(), random_outputs(2)
    inputs["step"] = np.stack(chosen)
    together = run_step(StubNetwork(outputs), inputs)
    for b in range(B):
        same = {**inputs, "step": np.repeat(chosen[b][None], B, axis=0)}
        alone = run_step(StubNetwork(outputs), same)
        assert torch.equal(together.state[:, b], alone.state[:, b])
        assert torch.equal(together.x0[b], alone.x0[b])


@pytest.mark.parametrize("planes", [1, 2], ids=["fixed", "learned"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0, 0), (-1, 1, 3)], ids=str)
def test_a_bad_unet_row_harms_nobody_else(
    where: tuple[int, int, int], value: float, planes: int
) -> None:
    """One number of one row: in the prediction or at the end of the variance."""
    inputs = random_inputs()
    # Rows 0 and 3 belong to sample 2; no other sample takes anything from row 3.
    inputs["mix"] *= (inputs["row"][None] == np.arange(B)[:, None])[None]
    good = random_outputs(planes)
    bad = good.copy()
    place = (3, *where)
    bad[place] = value
    expected = run_step(StubNetwork(good), inputs)
    found = run_step(StubNetwork(bad), inputs)
    assert found.finite.tolist() == [1, 1, 1, 0, 1]
    for part in found:
        assert torch.isfinite(part).all()
    for b in (0, 1):
        assert torch.equal(found.state[:, b], expected.state[:, b])
        assert torch.equal(found.x0[b], expected.x0[b])
    # The bad row counts as zeros.
    zeroed = good.copy()
    zeroed[3] = 0
    assert torch.equal(found.state, run_step(StubNetwork(zeroed), inputs).state)


def test_all_rows_may_be_bad() -> None:
    outputs = np.full((R, C, SIZE, SIZE), np.nan, dtype=np.float32)
    found = run_step(StubNetwork(outputs), random_inputs())
    assert found.finite.tolist() == [0.0] * R
    assert torch.isfinite(found.state).all()


def test_large_finite_outputs_are_not_called_bad() -> None:
    outputs = np.full((R, C, SIZE, SIZE), 3.0e38, dtype=np.float32)
    outputs[1] *= -1
    found = run_step(StubNetwork(outputs), random_inputs())
    assert found.finite.tolist() == [1.0] * R


def network_inputs(samples: int = 3, scale: float = 2.0) -> Inputs:
    spec = tiny_spec(learned_variance=True)
    guided = guidance_table(random_identity(samples, spec), scale)
    shape = (C, 16, 16)
    state = np.zeros((STATE_SLOTS, samples, *shape), dtype=np.float32)
    state[0] = batch_normals(0, range(samples), 0, 0, shape)
    rows = solver_table(spec, SolverSettings("ddpm", 10)).rows
    return {
        "state": state,
        "noise": batch_normals(0, range(samples), 0, 1, shape),
        "identity": guided.identity,
        "row": guided.row,
        "mix": guided.mix,
        "step": np.repeat(rows[4:5], samples, axis=0),
    }


@pytest.fixture(scope="module")
def network() -> IdentityUNet:
    return tiny_network(tiny_spec(learned_variance=True))


def test_a_fault_in_a_real_network_stays_in_its_sample(network: IdentityUNet) -> None:
    inputs = network_inputs()
    expected = run_step(network, inputs)
    identity = inputs["identity"].copy()
    identity[1] = np.inf
    found = run_step(network, {**inputs, "identity": identity})
    assert found.finite.tolist() == [1, 0, 1, 1, 1, 1]
    assert torch.isfinite(found.state).all()
    for b in (0, 2):
        assert torch.equal(found.state[:, b], expected.state[:, b])
        assert torch.equal(found.x0[b], expected.x0[b])


def dtypes_through(module: nn.Module, kind: type, run: Any) -> set[torch.dtype]:
    """Dtypes of weights, inputs and outputs of all modules of ``kind`` during a run."""
    seen: set[torch.dtype] = set()

    def note(part: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.update(p.dtype for p in part.parameters())
        seen.update(t.dtype for t in (*args, out))

    hooks = [
        m.register_forward_hook(note) for m in module.modules() if isinstance(m, kind)
    ]
    assert hooks
    run()
    for hook in hooks:
        hook.remove()
    return seen


@contextlib.contextmanager
def watched_norms() -> Iterator[set[torch.dtype]]:
    """Dtypes in which pictures are normalised meanwhile."""
    seen: set[torch.dtype] = set()
    original = functional.instance_norm

    def noting(x: Tensor, **settings: Any) -> Tensor:
        seen.add(x.dtype)
        return original(x, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "instance_norm", noting)
        yield seen


class TestHalf:
    """The float16 body: what stays in float32, and how near the result is."""

    def test_which_parts_are_half(self, network: IdentityUNet) -> None:
        half = body_in(network, BodyForm("float16"))
        unet: Any = half.unet
        x = torch.randn(2, C, 16, 16)
        arguments = (x, torch.tensor([3.0, 900.0]), torch.randn(2, 16))

        def run() -> None:
            with torch.inference_mode():
                assert half(*arguments).dtype == torch.float32

        only_float32 = {torch.float32}
        with watched_norms() as seen:
            run()
        assert seen == only_float32
        assert dtypes_through(unet.time_embedding, nn.Linear, run) == only_float32
        assert dtypes_through(half.identity_projection, nn.Linear, run) == only_float32
        assert dtypes_through(unet.conv_out, nn.Conv2d, run) == only_float32
        blocks = nn.ModuleList([*unet.down_blocks, unet.mid_block, *unet.up_blocks])
        for kind in (nn.Conv2d, Projection):
            assert dtypes_through(blocks, kind, run) == {torch.float16}
        joined = cast(Any, half.conditioning).projection
        assert joined.weight.dtype == torch.float16
        norms = sum(isinstance(m, Normalise) for m in half.modules())
        assert norms == sum(isinstance(m, nn.GroupNorm) for m in network.modules())

    def test_the_original_is_left_alone(self, network: IdentityUNet) -> None:
        before = {name: t.clone() for name, t in network.state_dict().items()}
        step_module(network, BodyForm("float16"))
        after = network.state_dict()
        assert list(after) == list(before)
        for name, tensor in before.items():
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name], tensor)

    def test_near_float32(self, network: IdentityUNet) -> None:
        inputs = network_inputs()
        tensors = [torch.from_numpy(inputs[name]) for name in ORDER]
        with torch.inference_mode():
            full = step_module(network, BodyForm("float32"))(*tensors)
            half = step_module(network, BodyForm("float16"))(*tensors)
        for ours, expected in zip(half[:2], full[:2], strict=True):
            error = (ours - expected).abs().max() / expected.abs().max()
            # Above 0: it really ran in half precision.
            assert 1e-6 < error < 1e-2
        assert half.finite.tolist() == [1.0] * 6

    def test_overflow_in_half_is_caught(self, network: IdentityUNet) -> None:
        """Finite in float32, beyond 65504 in the body."""
        inputs = network_inputs()
        inputs["state"][0, 1] *= 1e6
        tensors = [torch.from_numpy(inputs[name]) for name in ORDER]
        with torch.inference_mode():
            full = step_module(network, BodyForm("float32"))(*tensors)
            half = step_module(network, BodyForm("float16"))(*tensors)
        assert full.finite.tolist() == [1.0] * 6
        assert half.finite.tolist() == [1, 0, 1, 1, 0, 1]
        assert torch.isfinite(half.state).all()


def test_the_module_is_in_evaluation_mode() -> None:
    spec = tiny_spec(dropout=0.5)
    network = tiny_network(spec).train()
    assert not step_module(network, BodyForm("float16")).training
    model = dataclasses.replace(spec.model, dropout=0.0)
    assert not step_module(IdentityUNet(model, 16), BodyForm("float32")).training
