"""A third computation of the same trajectory: diffusers' own scheduler, with guidance
worked out here. It shares neither tables nor guidance with the product."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..backends.base import Engine, Float32
from ..errors import InputError
from ..guidance import GuidanceSettings
from ..sampler import SampleJob
from ..spec import DiffusionSpec

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: u,
    "cosine": lambda u: math.sin(math.pi * u / 2) ** 2,
}
"""Share of the way from scale 1 to the full one, by progress u from 0 to 1."""


def oracle_scales(guidance: GuidanceSettings, times: Sequence[float]) -> list[float]:
    """The guidance scale of every table row, at its timestep."""
    span = times[0] - times[-1]
    scales = []
    for row, t in enumerate(times):
        if guidance.scales is not None:
            scale = guidance.scales[row]
        else:
            share = SCHEDULES[guidance.schedule]((times[0] - t) / span if span else 1.0)
            scale = (1 - share) + share * guidance.scale
        if guidance.interval is not None:
            low, high = guidance.interval
            scale = scale if low <= t <= high else 1.0
        scales.append(scale)
    return scales


def has_oracle(engine: Engine) -> bool:
    """Whether diffusers' scheduler can run on the network of ``engine``."""
    return engine.info.backend == "torch" and engine.info.precision == "float32"


def oracle_gap(spec: DiffusionSpec, job: SampleJob) -> str:
    """Why diffusers cannot compute this trajectory; empty where it can."""
    from ..reference.sampling import make_scheduler

    schedule = job.guidance.schedule
    if schedule not in SCHEDULES:
        return f"there is no second form of the guidance schedule {schedule!r}"
    try:
        make_scheduler(spec, job.table.settings.solver)
    except InputError as error:
        return error.what
    return ""


def reference_network(engine: Engine, low_res: Float32 | None) -> Any:
    """The network of a torch engine as a function of CPU tensors: x [B, C, H, W],
    timesteps [B] and identity [B, D] to its output.

    What a super-resolution model enlarges is fixed, and put together here on its own,
    as guided-diffusion's ``SuperResModel`` does.

    Args:
        engine: A torch engine.
        low_res: [B, C, h, w], or None for all other models.
    """
    import torch
    from torch.nn.functional import interpolate

    network: Any = engine.network  # type: ignore[attr-defined]
    device = next(network.parameters()).device
    small = None if low_res is None else torch.from_numpy(low_res).to(device)

    def run(x: Any, timesteps: Any, identity: Any) -> Any:
        x = x.to(device)
        if small is not None:
            large = interpolate(small, x.shape[2:], mode="bilinear")
            x = torch.cat([x, large], dim=1)
        return network(x, timesteps.to(device), identity.to(device)).cpu()

    run.spec = network.spec  # type: ignore[attr-defined]
    return run


def oracle_steps(
    engine: Engine,
    spec: DiffusionSpec,
    job: SampleJob,
    x_t: Float32,
    noise: Callable[[int], Float32 | None],
) -> Generator[Float32, Float32 | None, None]:
    """x [B, C, H, W] after every table row, by diffusers' scheduler.

    What is sent back in, it goes on from.

    Args:
        engine: A torch engine in float32; its network is what denoises.
        spec: Facts of the model.
        job: What to sample; all samples are one batch.
        x_t: [B, C, H, W], the starting point that the engines got.
        noise: The noise of table row j as the engines got it; None for none.
    """
    import torch

    from ..reference.sampling import guided_denoiser, reference_trajectory

    times = [float(t) for t in job.table.timesteps]
    scales = oracle_scales(job.guidance, times)
    denoise = guided_denoiser(
        reference_network(engine, job.low_res),
        torch.from_numpy(job.identity),
        scales,
        guide_variance=job.guidance.guide_variance,
        rescale=[job.guidance.rescale if s != 1 else 0.0 for s in scales],
    )

    def exact(x: Any, timesteps: Any, row: int) -> Any:
        # As the engine: cuDNN's convolutions take TF32 unless told.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return denoise(x, timesteps, row)

    start = torch.from_numpy(x_t)

    def replayed(row: int) -> Any:
        drawn = noise(row)
        return torch.zeros_like(start) if drawn is None else torch.from_numpy(drawn)

    chosen = job.table.settings
    steps = reference_trajectory(
        spec,
        exact,
        start,
        times,
        replayed,
        solver=chosen.solver,
        clip=chosen.clip,
        eta=chosen.eta,
        variance=chosen.variance,
        final_order=chosen.final_order,
    )
    given = None
    while True:
        try:
            x = steps.send(None if given is None else torch.from_numpy(given))
        except StopIteration:
            return
        made: Float32 = x.float().numpy()
        given = yield made
