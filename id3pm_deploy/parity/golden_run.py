"""An engine against recorded golden data: forward passes, trajectories, every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..backends.base import Engine, Float32, empty_state
from ..compare import Comparison, Mask, compare
from ..guidance import guidance_table
from ..report import StepComparison, Trajectory
from ..sampler import walk
from ..solvers import NO_CLIP, NOISE_COLUMN, SOLVERS, STEP_WIDTH, matrices
from ..spec import DiffusionSpec
from ..tolerances import Tolerances
from .golden import GoldenData, GoldenTrajectory
from .oracle import has_oracle, oracle_steps
from .rounding import amplifying_rows, clamped, left_out, steady_numbers
from .trajectory import (
    Compared,
    compare_trajectory,
    compare_unsaturated,
    grey_difference,
    grey_error,
    keeps,
    visible,
)

_LOG_RANGE = 2.0
"""min_log and max_log of a forward pass: at ±2 the noise column is exp(v)."""


def forward_pass(
    engine: Engine,
    spec: DiffusionSpec,
    x: Float32,
    t: Float32,
    identity: Float32,
    low_res: Float32 | None = None,
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
        low_res: [B, C, h, w], what a super-resolution model enlarges.

    Returns:
        [B, C or 2C, H, W] float32; NaN in samples where the network made NaN or
        infinity.
    """
    rows = np.zeros((len(x), STEP_WIDTH))
    rows[:, 0], rows[:, 1], rows[:, 3], rows[:, 4] = t, 1.0, 1.0, NO_CLIP
    rows[:, 5], rows[:, 6] = -_LOG_RANGE, _LOG_RANGE
    matrices(rows)[:, 0, NOISE_COLUMN] = 1.0
    engine.begin(x, guidance_table(identity, 1.0), low_res)
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
    made = forward_pass(engine, spec, data.x, data.t, data.identity, data.low_res)
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
    limits: Tolerances | None = None,
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
        limits: What is going to be asked of the comparison. Where it does not keep
            them, it is made again without the numbers that rounding alone moves past
            them; see :mod:`.rounding`.
    """
    found = _compared(engine, spec, one, reference, on_row, limits, None)
    if limits is None or keeps(found.trajectory, limits):
        return found
    masks = steady_numbers(reference or engine, one.job, limits.trajectory)
    if not (said := left_out(masks)):
        return found
    found = _compared(engine, spec, one, reference, lambda: None, limits, masks)
    missed = (*found.not_checked, f"{one.name}, {said}")
    return dataclasses.replace(found, not_checked=missed)


def _compared(
    engine: Engine,
    spec: DiffusionSpec,
    one: GoldenTrajectory,
    reference: Engine | None,
    on_row: Callable[[], None],
    limits: Tolerances | None,
    masks: list[Mask] | None,
) -> Compared:
    missed: tuple[str, ...] = ()
    if reference is not None:
        compared = compare_trajectory(engine, reference, spec, one.job, on_row, limits)
        known = dataclasses.replace(
            compared.trajectory, steps_against="the reference on the recorded noise"
        )
        missed = compared.not_checked
    else:
        known = _rows_alone(engine, spec, one, on_row, masks)
        if not any(step.state or step.oracle for step in known.per_step):
            missed = (
                f"{one.name}, table rows: the file records none, and there is no "
                "PyTorch engine to run diffusers' scheduler on; give --against "
                "CHECKPOINT",
            )
            known = dataclasses.replace(known, per_step=())
    images = engine.state()[0]
    steady = None if masks is None else masks[-1]
    ours, theirs = visible(images), visible(one.sample)
    found = dataclasses.replace(
        known,
        name=one.name,
        final=compare(images, one.sample, steady),
        final_unsaturated=compare_unsaturated(images, one.sample, steady),
        uint8_max=grey_difference(ours, theirs),
    )
    return Compared(found, theirs, ours, grey_error(images, one.sample), missed)


def _rows_alone(
    engine: Engine,
    spec: DiffusionSpec,
    one: GoldenTrajectory,
    on_row: Callable[[], None],
    masks: list[Mask] | None,
) -> Trajectory:
    """Table rows against the recorded states and diffusers' scheduler, as there are.

    Behind a row that enlarges rounding, the engine goes on from the recorded state, or
    the oracle from the engine's; that row is not compared along the trajectory.
    """
    job, samples = one.job, range(len(one.sample))
    amplifying = amplifying_rows(job.table)
    given = None
    singles = _single_rows(engine, one)
    oracle = None
    if has_oracle(engine):
        x_t = job.noise.start(samples, engine.shapes.picture)
        x_t = x_t * np.float32(job.table.x_scale)
        oracle = oracle_steps(engine, spec, job, x_t, lambda j: _used_noise(one, j))
    steps = []
    for j in walk(engine, job, samples, most=1):
        x, mask = engine.state()[0], None if masks is None else masks[j]
        beside = None if oracle is None else oracle.send(given)
        given, state = None, None
        if amplifying[j]:
            x = given = x if one.states is None else one.states[j]
            engine.load_state(_alone(engine, x))
            beside = None
        elif one.states is not None:
            state = compare(x, one.states[j], mask)
        steps.append(
            StepComparison(
                table_row=j,
                timestep=float(job.table.timesteps[j]),
                state=state,
                single=singles[j] if singles else None,
                oracle=None if beside is None else compare(x, beside, mask),
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


def _alone(engine: Engine, x: Float32) -> Float32:
    """A state that is x and remembers nothing."""
    state = empty_state(len(x), engine.shapes)
    state[0] = x
    return state


def _single_rows(engine: Engine, one: GoldenTrajectory) -> list[Comparison | None]:
    """Every row alone, from the recorded x before it; a solver that remembers more than
    x cannot be started from that."""
    slots = SOLVERS[one.job.table.settings.solver].state_slots
    if one.states is None or slots > 1:
        return []
    table = one.job.table
    amplifying = amplifying_rows(table)
    found: list[Comparison | None] = []
    for j in walk(engine, one.job, range(len(one.sample)), most=1):
        x, recorded = engine.state()[0], one.states[j]
        mask = clamped(table, j, engine.preview()) if amplifying[j] else None
        nowhere = mask is not None and not mask.any()
        found.append(None if nowhere else compare(x, recorded, mask))
        engine.load_state(_alone(engine, recorded))
    return found
