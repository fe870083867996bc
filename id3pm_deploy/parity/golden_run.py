"""An engine against recorded golden data: forward passes, trajectories, every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..backends.base import Engine, Float32, empty_state
from ..compare import Comparison, compare
from ..guidance import guidance_table
from ..report import StepComparison, Trajectory
from ..sampler import walk
from ..solvers import NO_CLIP, NOISE_COLUMN, SOLVERS, STEP_WIDTH, matrices
from ..spec import DiffusionSpec
from .golden import GoldenData, GoldenTrajectory
from .oracle import has_oracle, oracle_steps
from .trajectory import (
    Compared,
    compare_trajectory,
    compare_unsaturated,
    grey_difference,
    grey_error,
    visible,
)

_LOG_RANGE = 2.0
"""min_log and max_log of a forward pass: at ±2 the noise column is exp(v)."""


def forward_pass(
    engine: Engine, spec: DiffusionSpec, x: Float32, t: Float32, identity: Float32
) -> Float32:
    """The network's output, got from a step graph by a table row that hides nothing.

    With c_in = 1, c_x = 0, c_p = 1 and a clip that is out of reach, the predicted x0 is
    the prediction itself. With noise 1 and min_log, max_log = ∓2, the noise column is
    exp(v), whose logarithm is the learned variance v.

    Args:
        engine: Entered, of any backend.
        spec: Facts of its model.
        x: [B, C, H, W], noisy images.
        t: [B], timesteps.
        identity: [B, D], normalised; zeros for null.

    Returns:
        [B, C or 2C, H, W] float32; NaN in samples where the network made NaN or
        infinity.
    """
    rows = np.zeros((len(x), STEP_WIDTH))
    rows[:, 0], rows[:, 1], rows[:, 3], rows[:, 4] = t, 1.0, 1.0, NO_CLIP
    rows[:, 5], rows[:, 6] = -_LOG_RANGE, _LOG_RANGE
    matrices(rows)[:, 0, NOISE_COLUMN] = 1.0
    engine.begin(x, guidance_table(identity, 1.0))
    engine.run_row(rows.astype(np.float32), np.ones_like(x))
    out = engine.preview()
    if spec.model.learned_variance:
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = np.log(engine.state()[0].astype(np.float64))
        out = np.concatenate([out, variance.astype(np.float32)], axis=1)
    out[engine.failed_samples()] = np.nan
    return out


def compare_forward(
    engine: Engine, spec: DiffusionSpec, data: GoldenData
) -> list[tuple[str, Comparison]]:
    """Forward passes against the recorded ones, at all timesteps together."""
    made = forward_pass(engine, spec, data.x, data.t, data.identity)
    channels = spec.model.image_channels
    times = ", ".join(f"{t:g}" for t in data.t[:4]) + (
        " ..." if len(data.t) > 4 else ""
    )
    found = [
        (
            f"forward passes at t = {times}, prediction",
            compare(made[:, :channels], data.out[:, :channels]),
        )
    ]
    if spec.model.learned_variance:
        variance = compare(made[:, channels:], data.out[:, channels:])
        found.append((f"forward passes at t = {times}, learned variance", variance))
    return found


def compare_golden(
    engine: Engine,
    spec: DiffusionSpec,
    one: GoldenTrajectory,
    reference: Engine | None = None,
    on_row: Callable[[], None] = lambda: None,
) -> Compared:
    """Make a recorded trajectory again and compare it.

    Its end is held against the recorded one. Table rows are held against ``reference``
    where one is given, else against the recorded states; beside them, a PyTorch engine
    in float32 is held against diffusers' scheduler.

    Args:
        engine: What is judged; entered.
        spec: Facts of its model.
        one: What was recorded.
        reference: An engine of the same model, entered, that runs beside it.
        on_row: Called after each table row.
    """
    missed: tuple[str, ...] = ()
    if reference is not None:
        compared = compare_trajectory(engine, reference, spec, one.job, on_row)
        known = dataclasses.replace(
            compared.trajectory, steps_against="the reference on the recorded noise"
        )
        missed = compared.not_checked
    else:
        known = _rows_alone(engine, spec, one, on_row)
        if not any(step.state or step.oracle for step in known.per_step):
            missed = (
                f"{one.name}, table rows: the file records none, and there is no "
                "PyTorch engine to run diffusers' scheduler on; give --against "
                "CHECKPOINT",
            )
            known = dataclasses.replace(known, per_step=())
    images = engine.state()[0]
    ours, theirs = visible(images), visible(one.sample)
    found = dataclasses.replace(
        known,
        name=one.name,
        final=compare(images, one.sample),
        final_unsaturated=compare_unsaturated(images, one.sample),
        uint8_max=grey_difference(ours, theirs),
    )
    return Compared(found, theirs, ours, grey_error(images, one.sample), missed)


def _rows_alone(
    engine: Engine,
    spec: DiffusionSpec,
    one: GoldenTrajectory,
    on_row: Callable[[], None],
) -> Trajectory:
    """Table rows against the recorded states and diffusers' scheduler, as there are."""
    job, samples = one.job, range(len(one.sample))
    singles = _single_rows(engine, one)
    oracle = None
    if has_oracle(engine):
        x_t = job.noise.start(samples, engine.shapes.picture)
        x_t = x_t * np.float32(job.table.x_scale)
        oracle = oracle_steps(engine, spec, job, x_t, lambda j: _used_noise(one, j))
    steps = []
    for j in walk(engine, job, samples):
        x = engine.state()[0]
        steps.append(
            StepComparison(
                table_row=j,
                timestep=float(job.table.timesteps[j]),
                state=None if one.states is None else compare(x, one.states[j]),
                single=singles[j] if singles else None,
                oracle=None if oracle is None else compare(x, next(oracle)),
            )
        )
        on_row()
    return Trajectory(
        name=one.name,
        final=compare(engine.state()[0], one.sample),
        per_step=tuple(steps),
        steps_against="reference" if one.states is None else "the recorded states",
        oracle_of="engine",
        failed_engine=int(engine.failed_samples().sum()),
    )


def _used_noise(one: GoldenTrajectory, j: int) -> npt.NDArray[np.float32] | None:
    """The noise of a row, or None where the table does not use it."""
    samples = range(len(one.sample))
    if not one.job.table.stochastic[j]:
        return None
    return one.job.noise.row(j, samples, one.sample.shape[1:])


def _single_rows(engine: Engine, one: GoldenTrajectory) -> list[Comparison]:
    """Every row alone, from the recorded x before it; a solver that remembers more than
    x cannot be started from that."""
    slots = SOLVERS[one.job.table.settings.solver].state_slots
    if one.states is None or slots > 1:
        return []
    found = []
    for j in walk(engine, one.job, range(len(one.sample))):
        found.append(compare(engine.state()[0], one.states[j]))
        state = empty_state(len(one.sample), engine.shapes)
        state[0] = one.states[j]
        engine.load_state(state)
    return found
