"""Solver tables and engines against diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Float64, random_identity, run_table, tiny_network, tiny_spec
from torch import Tensor

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.errors import InputError
from id3pm_deploy.guidance import GuidanceSettings, guidance_table
from id3pm_deploy.reference.sampling import (
    guided_denoiser,
    make_scheduler,
    reference_trajectory,
)
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SOLVERS, SolverSettings, matrices, solver_table
from id3pm_deploy.spec import DiffusionSpec

SHAPE = (2, 3, 4, 4)
_RNG = np.random.default_rng(20)
_WEIGHTS = _RNG.normal(size=(6, 3)) / 3
_DRAWS = _RNG.normal(size=(81, *SHAPE)).astype(np.float32)

CASES: list[dict[str, Any]] = [
    {"solver": "ddpm", "variance": "fixed_small"},
    {"solver": "ddpm", "variance": "fixed_large"},
    {"solver": "ddpm", "variance": "learned"},
    {"solver": "ddim", "eta": 0.0},
    {"solver": "ddim", "eta": 0.5},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "dpmpp-2m"},
    {"solver": "euler"},
    {"solver": "heun"},
    {"solver": "dpmpp-2m-sde"},
    {"solver": "unipc-2"},
    {"solver": "unipc-3"},
    {"solver": "unipc-3", "final_order": "full"},
]
POINTS = [
    ("linspace", 1, None),
    ("linspace", 10, None),
    ("linspace", 40, -5.1),
    ("linspace_open", 2, -5.1),
    ("linspace_open", 3, -5.1),
    ("linspace_open", 12, -5.1),
    ("leading", 9, -100.0),
    ("trailing", 16, -100.0),
]
LEAST_LAMBDA = {"euler": -5.1, "heun": -5.1}
"""Their schedulers compute in float32 on x/√ᾱ, which is 20,000 at t = 999 of the cosine
schedule: what is left of that a step later is rounding."""


def model(x: Float64, t: float) -> Float64:
    """Stands for a network: mixes channels, is not linear, depends on t; the second
    three channels are a learned variance from -1 to 1."""
    mixed = np.einsum("oc,bchw->bohw", _WEIGHTS, x)
    out: Float64 = np.tanh(mixed + 0.3 * np.sin(t / 150))
    return out


def torch_model(x: Tensor, timesteps: Tensor, row: int) -> Tensor:
    return torch.from_numpy(model(x.double().numpy(), float(timesteps[0]))).to(x.dtype)


def case_name(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


def noise_of(steps: int) -> Callable[[int], Float64]:
    """None at the last row: like guided-diffusion, a table ends without noise, where
    diffusers adds some unless that row is timestep 0."""
    return lambda j: _DRAWS[j].astype(np.float64) * (j + 1 < steps)


def largest_error(spec: DiffusionSpec, settings: SolverSettings) -> float:
    """Over all rows: max |table - diffusers| / max |diffusers|.

    Heun's in units of the table's largest coefficient: with few steps, that is how
    much it makes of diffusers' β being float32. test_solvers_impulses.py compares it
    to 1e-12 on the same β.
    """
    table = solver_table(spec, settings)
    noise = noise_of(len(table))
    start = _DRAWS[-1].astype(np.float64)
    expected = reference_trajectory(
        spec,
        torch_model,
        torch.from_numpy(start),
        table.timesteps.tolist(),
        lambda j: torch.from_numpy(noise(j)),
        solver=settings.solver,
        clip=settings.clip,
        eta=settings.eta,
        variance=table.settings.variance,
        final_order=table.settings.final_order,
    )
    found = run_table(table, model, start, noise, learned=True)
    errors = [
        np.abs(ours - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        for ours, theirs in zip(found, expected, strict=True)
    ]
    unit = 1.0
    if settings.solver == "heun":
        unit = np.abs(matrices(table.rows.astype(np.float64))).max()
    return float(max(errors) / unit)


@pytest.mark.parametrize("case", CASES, ids=case_name)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_tables_are_diffusers(
    schedule: str, prediction: str, clip: float, case: dict[str, Any]
) -> None:
    spec = tiny_spec(
        schedule=schedule, prediction_type=prediction, learned_variance=True
    )
    for spacing, steps, lambda_min in POINTS:
        least = LEAST_LAMBDA.get(case["solver"], lambda_min)
        settings = SolverSettings(
            **case,
            steps=steps,
            spacing=spacing,  # type: ignore[arg-type]
            lambda_min=least,
            clip=clip,
        )
        error = largest_error(spec, settings)
        assert error <= 1e-5, (spacing, steps, least, error)


def test_a_wider_clip_is_diffusers_too() -> None:
    spec = tiny_spec(schedule="cosine", learned_variance=True)
    for case in CASES:
        assert largest_error(spec, SolverSettings(**case, steps=10, clip=2.5)) <= 1e-5


def test_the_comparison_sees_a_wrong_table() -> None:
    """Two solvers that agree on everything but their coefficients do differ."""
    spec = tiny_spec(schedule="cosine", learned_variance=True)
    times = [int(t) for t in solver_table(spec, SolverSettings("ddim", 10)).timesteps]
    start = torch.from_numpy(_DRAWS[-1])
    ends = {
        solver: list(
            reference_trajectory(
                spec,
                torch_model,
                start,
                times,
                lambda j: torch.zeros(SHAPE),
                solver=solver,
            )
        )[-1]
        for solver in ("ddim", "dpmpp-2m")
    }
    assert (ends["ddim"] - ends["dpmpp-2m"]).abs().max() > 1e-2


def test_injected_noise_is_what_diffusers_uses() -> None:
    """An oracle that ignored it would agree with a table that ignores it."""
    spec = tiny_spec(schedule="cosine", learned_variance=True)
    for case in [*CASES[:3], *CASES[4:6], {"solver": "dpmpp-2m-sde"}]:
        ends = []
        for scale in (np.float32(0.0), np.float32(1.0)):
            drawn = torch.from_numpy(scale * _DRAWS)
            steps = reference_trajectory(
                spec,
                torch_model,
                torch.from_numpy(_DRAWS[-1]),
                [900, 400, 0],
                drawn.__getitem__,
                **case,
            )
            ends.append(next(steps))
        assert (ends[0] - ends[1]).abs().max() > 1e-2, case


def test_the_oracles_schedule_is_float64() -> None:
    for solver in SOLVERS:
        scheduler = make_scheduler(tiny_spec(), solver)
        assert scheduler.alphas_cumprod.dtype == torch.float64


def test_no_oracle_for_an_unknown_solver() -> None:
    with pytest.raises(InputError, match="no oracle for the solver 'karras'"):
        make_scheduler(tiny_spec(), "karras")


class TestWholePath:
    """Network, guidance, tables and noise together, as `parity` compares them."""

    @pytest.mark.parametrize("guide_variance", [False, True])
    @pytest.mark.parametrize("scale", [1.0, 2.0])
    @pytest.mark.parametrize("case", [CASES[2], *CASES[5:]], ids=case_name)
    def test_the_torch_engine_follows_diffusers(
        self, case: dict[str, Any], scale: float, guide_variance: bool
    ) -> None:
        # v-prediction: at t = 995 an ε-model's own rounding is amplified 160 times.
        spec = tiny_spec(schedule="cosine", prediction_type="v", learned_variance=True)
        network = tiny_network(spec)
        identity = random_identity(2, spec)
        # Heun's first step multiplies the rounding of the network by 26 at 6 steps.
        steps = 12 if case["solver"] == "heun" else 6
        table = solver_table(spec, SolverSettings(**case, steps=steps))
        noise = SeededNoise(seed=3)
        guidance = GuidanceSettings(scale, guide_variance=guide_variance)
        job = SampleJob(identity, table, guidance, noise)
        found: list[np.ndarray[Any, Any]] = []
        with TorchEngine(network, step_shapes(spec)) as engine:
            run_trajectory(
                engine, job, [0, 1], lambda _: found.append(engine.state()[0])
            )
        shape = step_shapes(spec).picture
        expected = reference_trajectory(
            spec,
            guided_denoiser(
                network,
                torch.from_numpy(identity),
                scale,
                guide_variance=guide_variance,
            ),
            torch.from_numpy(noise.start([0, 1], shape)),
            table.timesteps.tolist(),
            lambda j: torch.from_numpy(noise.row(j, [0, 1], shape)),
            solver=table.settings.solver,
            eta=table.settings.eta,
            variance=table.settings.variance,
            final_order=table.settings.final_order,
        )
        for ours, theirs in zip(found, expected, strict=True):
            error = np.abs(ours - theirs.numpy()).max() / theirs.abs().max()
            assert error <= 2e-5, error

    def test_guidance_matters_to_this_network(self) -> None:
        """Without this, the test above could not tell one scale from another."""
        spec = tiny_spec(learned_variance=True)
        network, identity = tiny_network(spec), random_identity(2, spec)
        x = torch.from_numpy(SeededNoise(1).start([0, 1], (3, 16, 16)))
        time = torch.full((2,), 500.0)
        with torch.inference_mode():
            outs = [
                guided_denoiser(
                    network,
                    torch.from_numpy(identity),
                    scale,
                    guide_variance=guide_variance,
                )(x, time, 0)
                for scale, guide_variance in ((1.0, True), (2.0, True), (2.0, False))
            ]
        assert (outs[0] - outs[1])[:, :3].abs().max() > 1e-2
        assert (outs[1] - outs[2])[:, 3:].abs().max() > 1e-2
        assert (outs[0] - outs[2])[:, 3:].abs().max() == 0
        assert guidance_table(identity, 2.0).unet_rows == 4
