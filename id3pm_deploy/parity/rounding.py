"""What rounding alone does to a trajectory, so that it is not held against an engine.

Two computations of one network differ by the rounding of float32, some 1e-6 of the
largest number. Two things can make more of it than the tolerances, whoever computes:

- a table row that turns the prediction into x0 by a difference of two large numbers. An
  ε model on the cosine schedule has x0 = 20,000·(x - ε) at t = 999; where that is not
  clamped, the rounding of ε is seen 20,000 times enlarged;
- a network that answers to a change of x with a larger one, row after row.

Such numbers are left out of a comparison, never judged by a larger tolerance, and the
report says how many there were.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..backends.base import Engine, Float32
from ..compare import Mask
from ..sampler import SampleJob, walk
from ..solvers import CLIP_COLUMN, SOLVERS, STATE_SLOTS, SolverTable, matrices

ROUNDING = 1e-6
"""Of the largest number of x: what float32 makes of a table row, measured between 3e-7
and 4e-6."""
MOST_GAIN = 10.0
"""A row of more gain turns that into more than the tolerance of a step, 1e-5."""
MOST_LEFT_OUT = 0.05
"""Share of a row's numbers; where it would be more, the row is judged whole."""
_RUNS = 8
_SEED = 20


def amplifying_rows(table: SolverTable) -> npt.NDArray[np.bool_]:
    """[N], the table rows in which x' moves by over MOST_GAIN times the error of the
    prediction, unless a clamp hides it.

    The gain is |c_p·A[0, x0]|. Rows of solvers that remember more than x are not among
    them: they start where there is signal.
    """
    rows = table.rows.astype(np.float64)
    gain = np.abs(rows[:, 3] * matrices(rows)[:, 0, STATE_SLOTS])
    plain = SOLVERS[table.settings.solver].state_slots == 1
    found: npt.NDArray[np.bool_] = (gain > MOST_GAIN) & plain
    return found


def clamped(table: SolverTable, row: int, *previews: Float32) -> Mask:
    """Where x0 is at the clip on all sides, so that no rounding is enlarged: a mask of
    [B, C, H, W]."""
    clip = table.rows[row, CLIP_COLUMN]
    found = np.ones(previews[0].shape, np.bool_)
    for x0 in previews:
        found &= np.abs(x0) >= clip
    return found


def steady_numbers(engine: Engine, job: SampleJob, tolerance: float) -> list[Mask]:
    """For every table row, the numbers of x that rounding alone leaves in place.

    The trajectory is walked again with x moved by ROUNDING before each row, at random;
    a number is steady if no such walk moves it by more than half of ``tolerance``,
    relative to the row's largest: both sides round, and each may use its half.

    Args:
        engine: Entered; of the two sides, the one that is believed.
        job: What both sides made; all samples are one batch.
        tolerance: Of the trajectory.

    Returns:
        A mask [B, C, H, W] a row; all true where more than MOST_LEFT_OUT would be left
        out.
    """
    samples = range(len(job.identity))
    plain = [engine.state()[0] for _ in walk(engine, job, samples, most=1)]
    moved = [np.zeros(x.shape, np.float32) for x in plain]
    for run in range(_RUNS):
        draw = np.random.Generator(np.random.Philox(key=[_SEED, run]))
        for j in walk(engine, job, samples, most=1):
            state = engine.state()
            moved[j] = np.maximum(moved[j], np.abs(state[0] - plain[j]))
            reach = ROUNDING * np.abs(state[0]).max()
            state[0] += (reach * draw.uniform(-1, 1, state[0].shape)).astype(np.float32)
            engine.load_state(state)
    return [_mask(a, x, tolerance) for a, x in zip(moved, plain, strict=True)]


def _mask(moved: Float32, x: Float32, tolerance: float) -> Mask:
    steady: Mask = moved <= tolerance / 2 * np.abs(x).max()
    if np.isfinite(x).all() and np.mean(~steady) <= MOST_LEFT_OUT:
        return steady
    return np.ones(x.shape, np.bool_)


def left_out(masks: list[Mask]) -> str:
    """How many numbers are left out, for people; empty for none."""
    most = max(int((~mask).sum()) for mask in masks)
    if not most:
        return ""
    share = most / masks[0].size
    return (
        f"up to {most} of {masks[0].size} numbers ({share:.1%}) after a table row: "
        "rounding alone moves them as far as the tolerance"
    )
