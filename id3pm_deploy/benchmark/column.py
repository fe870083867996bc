"""A column of the table: one way of computing trajectories, opened and ready to run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from ..backends.base import Engine, Float32
from ..backends.rig import SLOTS
from ..compare import Comparison
from ..errors import EngineError
from ..sampler import run_trajectory
from ..selftest import Arrays, run_golden
from .case import Case, TimedRow


class Runner(ABC):
    """What runs a column. Make it, ``begin`` a batch size, then run rows and
    trajectories of that size in any order.

    Attributes:
        label: What ran, for people: backend, version, precision, device.
        precision: Of the UNet's body.
        device: ``cpu`` or ``cuda``.
        note: What else is to be known of it; may be empty.
        rows_in_one: Table rows in one :meth:`run_row`.
        inside: Seconds of the last trajectory that were spent in the engine; None
            where that is not told apart.
    """

    label = ""
    precision = "float32"
    device = "cpu"
    note = ""
    rows_in_one = 1
    inside: float | None = None

    @abstractmethod
    def close(self) -> None:
        """Release everything."""

    @abstractmethod
    def golden(self, golden: Arrays) -> Comparison | None:
        """The bundle's golden step, compared; None where there is no such step to run,
        which leaves the trajectory to judge by."""

    @abstractmethod
    def begin(self, samples: int) -> None:
        """Take this batch size from now on."""

    @abstractmethod
    def check(self) -> Float32:
        """Run a trajectory on the product's noise: [B, C, H, W] float32."""

    @abstractmethod
    def prepare_row(self) -> None:
        """Put what :meth:`run_row` starts from in place."""

    @abstractmethod
    def run_row(self) -> None:
        """Run ``rows_in_one`` table rows and wait for them."""

    @abstractmethod
    def run_trajectory(self) -> None:
        """Run a whole trajectory, noise included, up to the pictures on the host."""


class _Clocked:
    """An engine whose calls are timed, and nothing else about it changed.

    It stands in for the engine where the sampler calls one.
    """

    CALLS = ("begin", "guide", "run_rows", "run_row", "drain", "state")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.seconds = 0.0
        for name in (*self.CALLS, "failed_samples"):
            setattr(self, name, self._clocked(getattr(engine, name)))

    def _clocked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **rest: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*arguments, **rest)
            finally:
                self.seconds += time.perf_counter() - begun

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class EngineRunner(Runner):
    """One of the product's engines under the product's sampler.

    Args:
        case: What is measured.
        engine: Not yet entered; it is closed with this.
    """

    def __init__(self, case: Case, engine: Engine) -> None:
        self._case = case
        self._engine = engine.__enter__()
        info = engine.info
        self.label = f"{info.backend} {info.version}, {info.precision}, {info.device}"
        self.precision = info.precision.split()[0]
        self.device = "cpu" if info.device.lower().startswith("cpu") else "cuda"
        self._clocked = _Clocked(engine)
        self._row: TimedRow | None = None
        self._samples = 0

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def golden(self, golden: Arrays) -> Comparison | None:
        """The bundle's golden step in the engine."""
        return run_golden(self._engine, golden)

    def begin(self, samples: int) -> None:
        """Take this batch size; buffers are made by the first run."""
        self._samples, self._row = samples, self._case.timed_row(samples)
        self._job, self._calls = self._case.job(samples), len(self._case.calls(samples))
        self._steps = np.zeros((0, 0), np.float32)

    def check(self) -> Float32:
        """A trajectory, refused where a sample is not finite."""
        if self._engine.rig is not None:
            self._capture_all()
        made = run_trajectory(self._engine, self._job, range(self._samples))
        self.note = str(getattr(self._engine, "replay_note", ""))
        if made.failed.any():
            raise EngineError("it computed numbers that are not finite")
        return made.images

    def _capture_all(self) -> None:
        """What is timed later shall not find a graph missing: chunks are captured when
        they come a second time, and in each staging slot."""
        run_trajectory(self._engine, self._job, range(self._samples))
        self.prepare_row()
        for _ in range(2 * SLOTS):
            self.run_row()

    def prepare_row(self) -> None:
        """Begin a trajectory."""
        assert self._row is not None
        small = self._job.low_res
        self._engine.begin(self._row.x_t, self._row.guidance, small)
        count = min(self._engine.rows_at_once, self._calls)
        if count != len(self._steps):
            self._steps = np.repeat(self._row.step[None], count, axis=0)
        self._noise = [self._row.noise] * count
        self.rows_in_one = count

    def run_row(self) -> None:
        """What the sampler asks of the engine at once, and a wait."""
        self._engine.run_rows(self._steps, self._noise)
        self._engine.drain()

    def run_trajectory(self) -> None:
        """The product's own loop."""
        self._clocked.seconds = 0.0
        engine = cast(Engine, self._clocked)
        run_trajectory(engine, self._job, range(self._samples))
        self.inside = self._clocked.seconds
