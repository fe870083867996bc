"""Two engines in step: every table, every starting point and every draw of noise is
made once and handed to both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..backends.base import Engine, Float32, RowEngine
from ..compare import Comparison, compare
from ..errors import EngineError
from ..guidance import GuidanceTable
from ..solvers import SolverTable
from .rounding import amplifying_rows, clamped


class Tandem(RowEngine):
    """An engine that runs each table row in two others, on the very same arrays.

    The sampler walks it like any engine. Every row is run three times: in the
    reference, in the engine from the reference's state (``single``), and in the engine
    from its own.

    Args:
        engine: What is judged; entered.
        reference: What it is held against; entered, of the same shapes.
        table: What is walked; rows of it that enlarge rounding are compared where their
            x0 is clamped, and both sides go on from the reference's state. None: none
            does.

    Raises:
        EngineError: The two run pictures or identities of different shapes.
    """

    def __init__(
        self, engine: Engine, reference: Engine, table: SolverTable | None = None
    ) -> None:
        if engine.shapes != reference.shapes:
            raise EngineError(
                "two engines of different shapes cannot be compared",
                why=f"{engine.shapes} and {reference.shapes}",
            )
        super().__init__(engine.info, engine.shapes)
        self.engine = engine
        self.reference = reference
        self.single: Comparison | None = None
        self._table = table
        self._amplifying = () if table is None else amplifying_rows(table)
        self._at = 0
        self.noise: Float32 | None = None
        """The noise of the row that ran last; None where it used none."""
        self.x_t: Float32 | None = None

    def close(self) -> None:
        """Leave both engines to whoever entered them."""

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        self.x_t = x_t
        self._at = 0
        self.engine.begin(x_t, guidance, low_res)
        self.reference.begin(x_t, guidance, low_res)

    def _guide(self, guidance: GuidanceTable) -> None:
        self.engine.guide(guidance)
        self.reference.guide(guidance)

    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        self.engine.replace(samples, x_t, low_res)
        self.reference.replace(samples, x_t, low_res)

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        own, common = self.engine.state(), self.reference.state()
        self.reference.run_row(step, noise)
        self.engine.load_state(common)
        self.engine.run_row(step, noise)
        self.single = self._compared()
        self._at += 1
        if not np.array_equal(own, common):
            self.engine.load_state(own)
            self.engine.run_row(step, noise)
        self.noise = noise
        # Failed samples are asked of each side.
        assert self._row is not None
        return np.ones(len(self._row), np.float32)

    @property
    def amplified(self) -> bool:
        """Whether the row that ran last enlarges rounding."""
        return bool(len(self._amplifying) and self._amplifying[self._at - 1])

    def _compared(self) -> Comparison | None:
        states = self.engine.state(), self.reference.state()
        if self._table is None or not self._amplifying[self._at]:
            return compare(*states)
        previews = self.engine.preview(), self.reference.preview()
        mask = clamped(self._table, self._at, *previews)
        return compare(states[0][0], states[1][0], mask) if mask.any() else None

    def rejoin(self) -> None:
        """Have the engine go on from the reference's state."""
        self.engine.load_state(self.reference.state())

    def state(self) -> Float32:
        """The engine's state, [K, B, C, H, W]."""
        return self.engine.state()

    def load_state(self, state: Float32) -> None:
        """Put a state in place, on both sides."""
        self.engine.load_state(state)
        self.reference.load_state(state)

    def preview(self) -> Float32:
        """The engine's last predicted x0, [B, C, H, W]."""
        return self.engine.preview()

    def failed_samples(self) -> npt.NDArray[np.bool_]:
        """[B], True where a sample failed on either side."""
        failed: npt.NDArray[np.bool_] = (
            self.engine.failed_samples() | self.reference.failed_samples()
        )
        return failed
