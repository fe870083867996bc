"""Trajectories as a queue of replays: the host only queues, and never waits inside.

A graph holds the table rows of a chunk, m at most. Where that cannot be captured a
graph of one row is replayed, and where there are no graphs at all the rows are queued
one by one: each step down of this ladder is logged with its reason. What changes from
picture to picture (identities, guidance scale, seed, coefficients) lies in buffers that
are filled before a graph is launched, so it needs no new graph.

A chunk of m rows is captured at once. A shorter one is when its length comes again, and
until then the graph of one row carries it: to capture costs the host more than it saves
a trajectory that is run once, and a service may see any length.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, InputError
from ..guidance import GuidanceTable
from .base import Engine, Float32, check_array, empty_state
from .rig import SLOTS, Launchable, Rig

_LOG = logging.getLogger("id3pm_deploy")

STAGING_BUDGET = 64 << 20
"""Bytes of noise that all staging slots may hold, where the number of table rows in a
graph is left to the engine."""
MOST_ROWS = 16
"""Table rows in a graph, where that is left to the engine: more of them save little."""
MOST_GIVEN_ROWS = 1000
MOST_GRAPHS, MOST_GRAPH_BYTES = 32, 256 << 20
LEAST_GRAPHS = 10
"""As many may one trajectory need: for each of two numbers of UNet rows, two lengths of
chunks in each slot, and one row. They are kept whatever they take, which may be told
too high: the first of graphs that share a pool tells all of the pool."""

_PLAIN, _ONE_ROW, _ROWS = range(3)
_RUNGS = ("no graphs", "graphs of one table row", "graphs of {} table rows")

Key = tuple[object, ...]


class GraphStore:
    """Captured graphs; the least recently used go first.

    Args:
        most: How many are kept.
        most_bytes: Device memory that they may take, as far as they say.
        least: The newest that are kept even if they take more.
        before_drop: Called before graphs are released that may still be running.
    """

    def __init__(
        self, most: int, most_bytes: int, least: int, before_drop: Callable[[], None]
    ) -> None:
        self._most, self._most_bytes, self._least = most, most_bytes, least
        self._before_drop = before_drop
        self._graphs: OrderedDict[Key, Launchable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Key) -> Launchable | None:
        """The graph of ``key``, which is then the most recently used."""
        found = self._graphs.get(key)
        if found is not None:
            self._graphs.move_to_end(key)
        return found

    def add(self, key: Key, graph: Launchable) -> None:
        """Keep a graph, and release what there is no longer room for."""
        self._graphs[key] = graph
        if self._over():
            self._before_drop()
        while self._over():
            self._graphs.popitem(last=False)[1].close()

    def _over(self) -> bool:
        taken = sum(graph.bytes for graph in self._graphs.values())
        many = len(self._graphs)
        return many > self._most or (many > self._least and taken > self._most_bytes)

    def clear(self) -> None:
        """Release all of them, also where releasing one fails."""
        with contextlib.ExitStack() as stack:
            for graph in self._graphs.values():
                stack.callback(graph.close)
            self._graphs.clear()


class ReplayEngine(Engine):
    """Engine that replays captured table rows on a device.

    Args:
        rig: The device's side; it is opened on entry.
        replay_rows: Table rows in a graph. 0 leaves it to the engine, within
            MOST_ROWS and STAGING_BUDGET; -1 queues every row without a graph.

    Raises:
        InputError: ``replay_rows`` is out of range.
    """

    def __init__(self, rig: Rig, replay_rows: int = 0) -> None:
        if not -1 <= replay_rows <= MOST_GIVEN_ROWS:
            raise InputError(
                f"replayed table rows must be from 1 to {MOST_GIVEN_ROWS}, 0 for the "
                "engine's own choice or -1 for none",
                why=f"it is {replay_rows}",
            )
        super().__init__(rig.info, rig.shapes, rig.step_width)
        self.rig = self._rig = rig
        self._wanted = replay_rows
        self._rung = _PLAIN if replay_rows < 0 else _ROWS
        self._graphs = GraphStore(
            MOST_GRAPHS, MOST_GRAPH_BYTES, LEAST_GRAPHS, rig.drain
        )
        self._asked: deque[Key] = deque(maxlen=MOST_GRAPHS)
        self._open_now = self._closed = False
        self._sizes = (0, 0)
        self._slot = 0
        self._pending: list[npt.NDArray[np.int32]] = []
        self._ran: set[tuple[int, int]] = set()
        self._longest = 0
        self._why_not: list[str] = []

    def _open(self) -> None:
        if self._closed:
            raise EngineError("the engine was closed")
        if not self._open_now:
            self._rig.open()
            self._open_now = True
            # Which GPU it is, and what the plan takes, is known now.
            self.info, self.step_width = self._rig.info, self._rig.step_width

    def close(self) -> None:
        """Release the graphs and then the device."""
        self._closed, self._bad = True, None
        try:
            self._graphs.clear()
        finally:
            self._rig.close()

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        self._open()
        self._forget_logs()
        self.rows_at_once = self._rows_for(guidance.samples)
        self._size(guidance)
        state = empty_state(guidance.samples, self.shapes)
        state[0] = x_t
        self._rig.put("state", state)
        if low_res is not None:
            self._rig.put("low_res", low_res)
        self._put_guidance(guidance)

    def _forget_logs(self) -> None:
        """An earlier trajectory may have ended, or broken off, unread."""
        self._pending, self._slot = [], 0  # the same slots as the last time: its graphs
        self._rig.finite()

    def _rows_for(self, samples: int) -> int:
        if self._wanted:
            return max(self._wanted, 1)
        row = 4 * samples * math.prod(self.shapes.picture)
        return max(1, min(MOST_ROWS, STAGING_BUDGET // (SLOTS * row)))

    def _size(self, guidance: GuidanceTable) -> None:
        sizes = (guidance.samples, guidance.unet_rows)
        try:
            moved = self._rig.size(*sizes, self.rows_at_once)
        except BaseException:
            self._graphs.clear()
            raise
        self._sizes = sizes
        if moved:
            self._graphs.clear()

    def _put_guidance(self, guidance: GuidanceTable) -> None:
        if self.shapes.identity_dim:
            self._rig.put("identity", guidance.identity)
        self._rig.put("row", guidance.row)
        self._rig.put("mix", guidance.mix)

    def _guide(self, guidance: GuidanceTable) -> None:
        self._size(guidance)
        self._put_guidance(guidance)

    def _run_rows(self, steps: Float32, noise: Sequence[Float32 | None]) -> None:
        assert self._row is not None
        drawn = [one for one in noise if one is not None]
        slot, self._slot = self._slot, (self._slot + 1) % SLOTS
        self._rig.stage(slot, steps, drawn or None)
        self._queue(slot, len(steps), bool(drawn))
        self._rig.finish(slot, len(steps))
        self._pending.append(self._row)

    def _queue(self, slot: int, n: int, stochastic: bool) -> None:
        """Queue a staged chunk on the highest rung of the ladder that carries it."""
        if self._worth_a_graph(n, stochastic):
            key = (*self._sizes, n, stochastic, slot)
            rows = partial(self._queue_rows, slot, n, stochastic)
            self._longest = max(self._longest, n)
            whole = self._graph(_ROWS, key, rows)
            if whole is not None:
                whole.launch()
                self._note(_ROWS)
                return
        # Without the copies from and to the slot one graph fits every row of any slot.
        one = self._graph(_ONE_ROW, (*self._sizes, 1), self._rig.step)
        for k in range(n):
            self._rig.feed(slot, k, stochastic)
            if one is None:
                self._rig.step()
            else:
                one.launch()
            self._rig.log(slot, k)
        self._note(_PLAIN if one is None else _ONE_ROW)

    def _worth_a_graph(self, n: int, stochastic: bool) -> bool:
        """Whether a chunk is as long as can be, or of a kind that was here before."""
        kind = (*self._sizes, n, stochastic)
        if n == 1 or n == self.rows_at_once or kind in self._asked:
            return n > 1
        self._asked.append(kind)
        return False

    def _queue_rows(self, slot: int, n: int, stochastic: bool) -> None:
        for k in range(n):
            self._rig.queue_row(slot, k, stochastic)

    def _graph(
        self, rung: int, key: Key, queue: Callable[[], None]
    ) -> Launchable | None:
        """The graph of ``key``, captured if it is new; None below its rung."""
        if self._rung < rung:
            return None
        found = self._graphs.get(key)
        if found is not None:
            return found
        try:
            found = self._rig.capture(queue)
        except EngineError as error:
            self._step_down(rung, error)
            return None
        self._graphs.add(key, found)
        return found

    def _step_down(self, rung: int, error: EngineError) -> None:
        self._rung = rung - 1
        failed, instead = (self._named(one) for one in (rung, rung - 1))
        reason = " ".join(filter(None, (error.what, error.why and f"({error.why})")))
        _LOG.warning("%s instead of %s: %s", instead, failed, reason)
        self._why_not.append(f"no {failed}: {reason}")
        self._tell()

    def _named(self, rung: int) -> str:
        return _RUNGS[rung].format(self._longest)

    def _note(self, rung: int) -> None:
        longest = self._longest if rung == _ROWS else 0
        if (rung, longest) not in self._ran:
            self._ran.add((rung, longest))
            self._tell()

    def _tell(self) -> None:
        rungs = sorted({rung for rung, _ in self._ran}, reverse=True)
        ran = " and ".join(map(self._named, rungs))
        self.replay_note = "; ".join(filter(None, [ran, *self._why_not]))

    def _failed(self) -> npt.NDArray[np.bool_]:
        assert self._bad is not None
        rows, self._pending = self._pending, []
        for row, finite in zip(rows, self._rig.finite(), strict=True):
            bad = ~(finite >= 0.5).all(axis=0)
            self._bad[row[bad]] = True
        return self._bad

    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        places = list(samples)
        state = self._rig.fetch("state")
        state[:, places] = 0.0
        state[0, places] = x_t
        self._rig.put("state", state)
        if low_res is not None:
            small = self._rig.fetch("low_res")
            small[places] = low_res
            self._rig.put("low_res", small)

    def _drain(self) -> None:
        self._rig.drain()

    def _check_begun(self) -> None:
        if self._bad is None:
            raise EngineError("no trajectory was begun")

    def state(self) -> Float32:
        """A copy of the state, [K, B, C, H, W]."""
        self._check_begun()
        return self._rig.fetch("state")

    def load_state(self, state: Float32) -> None:
        """Put a state [K, B, C, H, W] of a begun trajectory in place."""
        self._check_begun()
        wanted = empty_state(self._sizes[0], self.shapes).shape
        check_array(state, wanted, "state")
        self._rig.put("state", state)

    def preview(self) -> Float32:
        """A copy of the last row's predicted x0, [B, C, H, W]."""
        self._check_begun()
        return self._rig.fetch("x0")
