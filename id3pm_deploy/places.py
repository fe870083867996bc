"""A batch whose samples are at different points of their trajectories.

It has a fixed number of places, so that an engine's buffers for samples never change
size. An empty place has no UNet row, and so costs the network nothing; a sample that
is done leaves its place to another one between two table rows. Noise is addressed by
sample, and no sample sees another, so neighbours cannot change a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .backends.base import Engine
from .guidance import GuidancePlan, GuidanceTable
from .sampler import NoiseSource, step_rows
from .solvers import STEP_WIDTH, SolverTable

Float32 = npt.NDArray[np.float32]


@dataclass(eq=False)
class Trajectory:
    """One sample on its way.

    Attributes:
        table: Its solver's table.
        plan: Its guidance, made for it alone (B = 1).
        noise: Its noise.
        sample: Its number, to ask the noise for.
        low_res: [C, h, w] float32 for a super-resolution model, else None.
        row: Table rows that are done.
    """

    table: SolverTable
    plan: GuidancePlan
    noise: NoiseSource
    sample: int = 0
    low_res: Float32 | None = None
    row: int = 0
    rows: Float32 = field(init=False)

    def __post_init__(self) -> None:
        self.rows = step_rows(self.table, self.plan)

    @property
    def remaining(self) -> int:
        """Table rows that are left."""
        return len(self.rows) - self.row

    def start(self, shape: tuple[int, ...]) -> Float32:
        """x_T, [C, H, W] float32."""
        (drawn,) = self.noise.start([self.sample], shape)
        x_t: Float32 = drawn * np.float32(self.table.x_scale)
        return x_t


@dataclass(frozen=True)
class Finished:
    """A trajectory that came to its end: its picture [C, H, W] float32, and whether
    that is not finite and must not be shown."""

    trajectory: Trajectory
    image: Float32
    failed: bool


_Guided = tuple[int, Trajectory, int]
"""A place, who is in it (compared by identity), and the table of its guidance."""


class Places:
    """The places of one batch on an engine that nobody else uses meanwhile.

    Args:
        engine: Entered.
        count: Places, B.

    Attributes:
        rows_run: Table rows that were run so far.
    """

    def __init__(self, engine: Engine, count: int) -> None:
        self._engine = engine
        self._held: list[Trajectory | None] = [None] * count
        self.rows_run = 0
        self._begun = False
        self._guided: tuple[_Guided, ...] = ()

    @property
    def free(self) -> int:
        """Empty places."""
        return self._held.count(None)

    @property
    def held(self) -> list[Trajectory]:
        """Who is there."""
        return [one for one in self._held if one is not None]

    def admit(self, new: Sequence[Trajectory]) -> None:
        """Put trajectories into empty places; there must be enough.

        Raises:
            EngineError: The engine refuses them.
        """
        if not new:
            return
        empty = [i for i, one in enumerate(self._held) if one is None]
        places = empty[: len(new)]
        for place, one in zip(places, new, strict=True):
            self._held[place] = one
        shape = self._engine.shapes.picture
        starts = np.stack([one.start(shape) for one in new])
        small = self._engine.shapes.low_res
        low_res = None if small is None else _stacked([one.low_res for one in new])
        if self._begun:
            self._engine.replace(places, starts, low_res)
            return
        count = len(self._held)
        x_t = np.zeros((count, *shape), np.float32)
        x_t[places] = starts
        if small is not None:
            all_low = np.zeros((count, *small), np.float32)
            all_low[places] = low_res
            low_res = all_low
        self._guided = self._guidance_key(0)
        self._engine.begin(x_t, self._guidance(), low_res)
        self._begun = True

    def drop(self, trajectory: Trajectory) -> None:
        """Empty its place."""
        self._held[self._held.index(trajectory)] = None

    def run(self) -> list[Finished]:
        """Run table rows of all that are there, at least one, and at most to the first
        end of a trajectory; returns those that are done and empties their places.

        Raises:
            EngineError: The engine fails.
        """
        if not self.held:
            return []
        key = self._guidance_key(0)
        if key != self._guided:
            self._engine.guide(self._guidance())
            self._guided = key
        count = self._rows_together(key)
        steps = np.zeros((count, len(self._held), STEP_WIDTH), np.float32)
        for place, one in self._occupied():
            steps[:, place] = one.rows[one.row : one.row + count]
        self._engine.run_rows(steps, self._noise(count))
        self.rows_run += count
        for one in self.held:
            one.row += count
        return self._take_finished()

    def _occupied(self) -> list[tuple[int, Trajectory]]:
        return [(i, one) for i, one in enumerate(self._held) if one is not None]

    def _guidance_key(self, ahead: int) -> tuple[_Guided, ...]:
        """What the batch's guidance table follows from, ``ahead`` table rows on."""
        return tuple(
            (place, one, int(one.plan.index[one.row + ahead]))
            for place, one in self._occupied()
        )

    def _rows_together(self, key: tuple[_Guided, ...]) -> int:
        """Table rows that the engine can take in one call."""
        most = min(self._engine.rows_at_once, *(one.remaining for one in self.held))
        count = 1
        while count < most and self._guidance_key(count) == key:
            count += 1
        return count

    def _guidance(self) -> GuidanceTable:
        """One table of all samples' own, each in its place."""
        rows, identity, weights = [], [], []
        for place, one in self._occupied():
            own = one.plan.tables[one.plan.index[one.row]]
            rows += [place] * own.unet_rows
            identity.append(own.identity)
            weights.append(own.mix[:, 0])
        spare = self._spare(len(rows))
        identity.append(np.repeat(identity[0][:1], spare, axis=0))
        mix = np.zeros((2, len(self._held), len(rows) + spare), np.float32)
        mix[:, rows, np.arange(len(rows))] = np.concatenate(weights, axis=1)
        row = np.array(rows + rows[:1] * spare, np.int32)
        return GuidanceTable(row, np.concatenate(identity), mix)

    def _spare(self, rows: int) -> int:
        """UNet rows to add where each number of them is captured for itself: copies of
        the first one, which weigh nothing."""
        if self._engine.rig is None:
            return 0
        return row_bucket(rows) - rows

    def _noise(self, count: int) -> list[Float32 | None]:
        """Noise of the next ``count`` table rows; None for all where none is used."""
        shape = (len(self._held), *self._engine.shapes.picture)
        drawn: list[Float32 | None] = [None] * count
        for place, one in self._occupied():
            for k in np.flatnonzero(one.table.stochastic[one.row : one.row + count]):
                if drawn[k] is None:
                    drawn[k] = np.zeros(shape, np.float32)
                (own,) = one.noise.row(one.row + int(k), [one.sample], shape[1:])
                drawn[k][place] = own  # type: ignore[index]
        if all(noise is None for noise in drawn):
            return drawn
        return [np.zeros(shape, np.float32) if n is None else n for n in drawn]

    def _take_finished(self) -> list[Finished]:
        done = [(i, one) for i, one in self._occupied() if not one.remaining]
        if not done:
            return []
        images, failed = self._engine.state()[0], self._engine.failed_samples()
        finished = []
        for place, one in done:
            image = images[place].copy()
            # A finite but enormous learned variance overflows after the UNet's check.
            bad = bool(failed[place]) or not np.isfinite(image).all()
            finished.append(Finished(one, image, bad))
            self._held[place] = None
        return finished


def _stacked(arrays: Sequence[Float32 | None]) -> Float32:
    given = [one for one in arrays if one is not None]
    assert len(given) == len(arrays), "a super-resolution model is given pictures"
    return np.stack(given)


def row_bucket(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most a third is spare."""
    size = 1
    while True:
        for bucket in (size, size * 3 // 2):
            if bucket >= rows:
                return bucket
        size *= 2
