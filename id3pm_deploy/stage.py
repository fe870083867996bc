"""A loaded model: its engine, the thread that it belongs to, its front."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from .backends.base import Engine
from .errors import EngineError
from .models import Model, open_engine
from .sampler import Limits, SampleBatch, SampleJob, run_trajectory
from .serving import Front
from .solvers import SolverSettings, SolverTable, solver_table
from .worker import Worker


class Stage:
    """One model of a chain, opened when it is first needed.

    Args:
        model: What to run.
        backend, options: For :func:`~id3pm_deploy.models.open_engine`.
        places, waiting: For :class:`~id3pm_deploy.serving.Front`.

    Attributes:
        model: What is run.
        front: Its continuous batching.
        table: The solver table of settings, kept for those who ask again.
    """

    def __init__(
        self,
        model: Model,
        backend: str,
        options: Mapping[str, Any],
        places: int,
        waiting: int,
    ) -> None:
        self.model = model
        self._backend, self._options = backend, dict(options)
        make = functools.partial(solver_table, model.spec)
        self.table: Callable[[SolverSettings], SolverTable]
        self.table = functools.lru_cache(maxsize=64)(make)
        self._engine: Engine | None = None
        self._worker = Worker()
        self.front = Front(self._entered, self._worker, places, waiting)

    def _entered(self) -> Engine:
        """The engine, in the worker's thread."""
        if self._engine is None:
            engine = open_engine(self.model, self._backend, **self._options)
            engine.__enter__()
            self._engine = engine
        return self._engine

    def open(self) -> None:
        """Load the engine now."""
        self._worker.call(lambda _: self._entered())

    @property
    def engine(self) -> Engine:
        """The engine that has run, to ask what it is."""
        if self._engine is None:
            raise EngineError("the engine was not opened")
        return self._engine

    def run(self, job: SampleJob, limits: Limits) -> SampleBatch:
        """A whole job as one batch; other threads have their turn before or after."""

        def work(check: Callable[[], None]) -> SampleBatch:
            engine, samples = self._entered(), range(len(job.identity))
            made = run_trajectory(engine, job, samples, lambda _: check(), limits)
            return dataclasses.replace(made, on_device=engine.pictures_on_device())

        return self._worker.call(work)

    def close(self) -> None:
        """Cancel what is in flight, release the engine and end the thread."""
        self.front.close()
        self._worker.close(self._release)

    def _release(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.__exit__(None, None, None)
