"""Recording golden data, so that a device without PyTorch can be checked against it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Engine
from ..enlarging import noise_stage
from ..errors import GoldenError
from ..files import write_bytes
from ..generate import SampleSettings
from ..guidance import GuidanceSettings
from ..noise import batch_normals
from ..sampler import SampleJob, SeededNoise
from ..solvers import SolverTable, solver_table
from ..spec import DiffusionSpec
from .conditions import random_conditions, random_low_res
from .oracle import has_oracle, oracle_gap, oracle_steps, reference_network
from .trajectory import check_count

_FORWARD_STAGE = 3
"""Noise stage of the forward passes' inputs, which no other noise has."""


def record_golden(
    path: Path,
    engine: Engine,
    spec: DiffusionSpec,
    weights_sha256: str,
    settings: SampleSettings,
    on_row: Callable[[], None] = lambda: None,
) -> None:
    """Write forward passes and one trajectory of the reference, in the form that
    :mod:`~id3pm_deploy.parity.golden` describes.

    The trajectory is that of diffusers' own scheduler around the network, so that what
    is compared with it later shares no solver table with it. Identities are random:
    nobody's vector gets into the file.

    Args:
        path: File to write.
        engine: A torch engine in float32, entered.
        spec: Facts of its model.
        weights_sha256: SHA-256 of its weights.
        settings: Solver, guidance, seed, and ``count`` pictures.
        on_row: Called after each table row.

    Raises:
        GoldenError: The engine is not PyTorch in float32, or diffusers cannot compute
            the trajectory.
        OutputError: The file cannot be written.
    """
    check_count(settings.count)
    if not has_oracle(engine):
        raise GoldenError(
            "golden data is recorded from PyTorch in float32",
            why=f"this is {engine.info.backend} in {engine.info.precision}",
            fix="give a CHECKPOINT, with the backend torch and the precision float32",
        )
    table = solver_table(spec, settings.solver)
    wanted = random_conditions(spec, settings.count, settings.seed)
    noise = SeededNoise(settings.seed, noise_stage(spec))
    small = random_low_res(spec, settings.count, settings.seed)
    job = SampleJob(wanted.identity, table, settings.guidance, noise, low_res=small)
    if gap := oracle_gap(spec, job):
        raise GoldenError("diffusers cannot compute this trajectory", why=gap)
    arrays = _forward(engine, spec, job, settings.seed)
    made = _trajectory(engine, spec, job, on_row)
    name = _name(spec, table, settings.guidance)
    arrays |= {f"{name}/{part}": value for part, value in made.items()}
    arrays["checkpoint_sha256"] = np.array(weights_sha256)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def _forward(
    engine: Engine, spec: DiffusionSpec, job: SampleJob, seed: int
) -> dict[str, Any]:
    import torch

    identity, small = job.identity, job.low_res
    count = len(identity)
    x = batch_normals(seed, range(count), _FORWARD_STAGE, 0, engine.shapes.picture)
    t = np.rint(np.linspace(spec.schedule.timesteps - 1, 0, count)).astype(np.int64)
    network: Any = reference_network(engine, small)
    inputs = (torch.from_numpy(a) for a in (x, t.astype(np.float32), identity))
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        out = network(*inputs).cpu().numpy()
    made = {"x": x, "t": t, "out": out}
    made |= {"y": identity} if spec.condition_dim else {}
    return made | ({} if small is None else {"low_res": small})


def _trajectory(
    engine: Engine,
    spec: DiffusionSpec,
    job: SampleJob,
    on_row: Callable[[], None],
) -> dict[str, Any]:
    samples, shape = range(len(job.identity)), engine.shapes.picture
    x_t = job.noise.start(samples, shape)
    noise = [
        job.noise.row(j, samples, shape) if used else np.zeros_like(x_t)
        for j, used in enumerate(job.table.stochastic)
    ]
    start = x_t * np.float32(job.table.x_scale)
    states = []
    for x in oracle_steps(engine, spec, job, start, lambda j: noise[j]):
        states.append(x.copy())
        on_row()
    stated = {
        "solver": dataclasses.asdict(job.table.settings),
        "guidance": dataclasses.asdict(job.guidance),
    }
    times = job.table.timesteps[::-1]
    whole = bool((times == np.rint(times)).all())
    return {
        "x_T": x_t,
        "noise": np.stack(noise),
        "timesteps": times.astype(np.int64) if whole else times,
        "sample": states[-1],
        "states": np.stack(states),
        "settings": np.array(json.dumps(stated, allow_nan=False)),
    }


def _name(spec: DiffusionSpec, table: SolverTable, guidance: GuidanceSettings) -> str:
    """As guided-diffusion's runs are called where this is one of them; else the
    solver's own name, and a dot in front of the number of steps."""
    chosen, learned = table.settings, spec.model.learned_variance
    plain = GuidanceSettings(
        scale=guidance.scale, guide_variance=learned and guidance.scale != 1
    )
    variance = "learned" if learned else "fixed_large"
    known = {"ddpm": chosen.variance == variance, "ddim": chosen.eta == 0}
    if not known.get(chosen.solver) or chosen.clip != 1 or guidance != plain:
        return f"{chosen.solver}.{chosen.steps}"
    name = {"ddpm": "ancestral"}.get(chosen.solver, chosen.solver) + str(chosen.steps)
    return name if guidance.scale == 1 else f"{name}_guided{guidance.scale:g}"
