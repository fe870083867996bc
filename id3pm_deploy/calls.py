"""What the engine is asked to do, call by call.

Most table rows of a solver are one call. With sequential guidance rows a guided one is
two, of B UNet rows each in place of one of 2B: the first leaves the null identity's
share of the prediction in the state's last slot, the second adds it to its own. Where
the unguided prediction is made of several identities, there is a first call for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .guidance import GuidancePlan, GuidanceTable
from .solvers import (
    CARRY_COLUMN,
    NO_CLIP,
    RESCALE_COLUMN,
    STATE_SLOTS,
    STEP_HEAD,
    X0_COLUMN,
)

Float32 = npt.NDArray[np.float32]

_LAST = STATE_SLOTS - 1


@dataclass(frozen=True)
class EngineCalls:
    """A trajectory as M calls of the engine, first executed first.

    Attributes:
        rows: [M, S] float32, what the step graph takes.
        tables: The guidance tables that occur, all with the same B.
        guidance: [M] int, the table of each call.
        solver_row: [M] int, the solver's table row j that a call belongs to; it has
            that row's timestep and its noise.
        stochastic: [M] bool, whether a call uses its noise.
        last: [M] bool, whether a call is the last of its table row: x0 is a preview
            and the state that of the solver only then.
    """

    rows: Float32
    tables: tuple[GuidanceTable, ...]
    guidance: npt.NDArray[np.intp]
    solver_row: npt.NDArray[np.intp]
    stochastic: npt.NDArray[np.bool_]
    last: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rows)


def engine_calls(
    rows: Float32,
    stochastic: npt.NDArray[np.bool_],
    plan: GuidancePlan,
    *,
    sequential: bool = False,
) -> EngineCalls:
    """The calls of a trajectory.

    Args:
        rows: [N, S] float32, the solver's table with guidance in it.
        stochastic: [N] bool, whether a table row uses its noise.
        plan: Guidance of the batch.
        sequential: Run the UNet rows of a guided table row one after the other.

    Raises:
        InputError: Sequential rows of a solver that uses the state's last slot, or of
            a blend.
    """
    split = {
        i: _split(table)
        for i, table in enumerate(plan.tables)
        if sequential and table.unet_rows > table.samples
    }
    if split and _uses_last_slot(rows):
        raise InputError(
            "this solver cannot be guided with sequential rows",
            why="it uses all slots of the state, and one has to hold the prediction "
            "without identity",
            fix="use another solver, or parallel guidance rows",
        )
    tables: list[GuidanceTable] = []
    places: list[range] = []
    for i, table in enumerate(plan.tables):
        parts = split.get(i, [table])
        places.append(range(len(tables), len(tables) + len(parts)))
        tables += parts
    calls = [(j, call) for j, i in enumerate(plan.index) for call in places[i]]
    solver_row = np.array([j for j, _ in calls], np.intp)
    last = np.append(np.diff(solver_row) != 0, True)
    first = np.append(True, last[:-1])
    made = rows[solver_row]
    for k in np.flatnonzero(~last):
        made[k] = _null_row(made[k])
    made[~first, CARRY_COLUMN] = 1.0
    guidance = np.array([call for _, call in calls], np.intp)
    noisy = stochastic[solver_row] & last
    return EngineCalls(made, tuple(tables), guidance, solver_row, noisy, last)


def _uses_last_slot(rows: Float32) -> bool:
    matrix = rows[:, STEP_HEAD:RESCALE_COLUMN].reshape(-1, STATE_SLOTS, STATE_SLOTS + 2)
    return bool(matrix[:, _LAST].any() or matrix[:, :, _LAST].any())


def _null_row(row: Float32) -> Float32:
    """The table row [S] of a first call: x0 is the prediction itself and goes to the
    last slot, everything else stays where it is."""
    matrix = np.zeros((STATE_SLOTS, STATE_SLOTS + 2), np.float32)
    np.fill_diagonal(matrix[:_LAST], 1.0)
    matrix[_LAST, X0_COLUMN] = 1.0
    made = np.zeros_like(row)
    made[:2] = row[:2]
    made[2:5] = 0.0, 1.0, NO_CLIP
    made[STEP_HEAD:RESCALE_COLUMN] = matrix.ravel()
    return made


def _split(table: GuidanceTable) -> list[GuidanceTable]:
    """A guided table as several of B UNet rows each, whose weights are 0 for samples
    that need none: of the null identity, of each further one, and of the own last.

    Raises:
        InputError: Another row than its own has a part in a sample's blend.
    """
    count = table.samples
    own, extra = table.row[:count], table.row[count:]
    if table.mix[1, :, count:].any():
        raise InputError(
            "blends cannot be made with sequential guidance rows",
            why="one slot of the state holds the unguided prediction, and none is left "
            "for the blend",
            fix="use parallel guidance rows",
        )
    tables = []
    nth = np.array([(extra[:r] == one).sum() for r, one in enumerate(extra)], np.intp)
    for n in range(int(nth.max()) + 1):
        chosen = count + np.flatnonzero(nth == n)
        samples = table.row[chosen]
        identity = np.zeros_like(table.identity[:count])
        identity[samples] = table.identity[chosen]
        mix = np.zeros((2, count, count), np.float32)
        mix[0, samples, samples] = table.mix[0, samples, chosen]
        tables.append(GuidanceTable(own, identity, mix))
    mix = np.ascontiguousarray(table.mix[:, :, :count])
    return [*tables, GuidanceTable(own, table.identity[:count], mix)]
