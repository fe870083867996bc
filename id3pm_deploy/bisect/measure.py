"""How far a network with a given set of islands is from float32, measured by PyTorch.

Single table rows are measured at early, middle and late timesteps, each from the
float32 reference's state, and whole trajectories as ``parity`` measures them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..backends.base import Engine, Float32, RowEngine, step_shapes
from ..backends.torch import TorchEngine
from ..body_form import FLOAT32, BodyForm
from ..compare import compare
from ..errors import NonFiniteError
from ..guidance import GuidanceTable
from ..parity.trajectory import compare_trajectory
from ..reference.half_products import ProductsInFloat32
from ..reference.unet import IdentityUNet
from ..sampler import SampleJob, walk
from ..solvers import CLIP_COLUMN, NO_CLIP
from ..spec import DiffusionSpec
from ..tolerances import CEILINGS, ORACLE, Tolerances
from .result import Errors
from .search import Islands


@dataclass(frozen=True)
class RecordedRow:
    """One table row of the reference, to be run again alone.

    ``state`` [K, B, C, H, W] is where it starts; ``next_state`` [B, C, H, W] is slot 0
    of where it leads, and ``x0`` [B, C, H, W] its preview, neither of them clamped.
    """

    guidance: GuidanceTable
    low_res: Float32 | None
    state: Float32
    step: Float32
    noise: Float32 | None
    next_state: Float32
    x0: Float32


class _Recorder(RowEngine):
    """An engine that keeps what some table rows of another one were given.

    It says that it is of a backend of its own: diffusers' scheduler is not run beside
    it, which would say nothing of half precision.
    """

    def __init__(self, engine: Engine, wanted: Sequence[int] = ()) -> None:
        info = dataclasses.replace(engine.info, backend="recorded")
        super().__init__(info, engine.shapes)
        self.engine = engine
        self.wanted = frozenset(wanted)
        self.rows: list[RecordedRow] = []
        self._count = 0

    def close(self) -> None:
        """Leave the engine to whoever entered it."""

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        self._guidance, self._low_res = guidance, low_res
        self.engine.begin(x_t, guidance, low_res)

    def _guide(self, guidance: GuidanceTable) -> None:
        self._guidance = guidance
        self.engine.guide(guidance)

    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        self.engine.replace(samples, x_t, low_res)

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        if self._count in self.wanted:
            self.rows.append(self._alone(step, noise))
        self._count += 1
        self.engine.run_row(step, noise)
        assert self._row is not None
        return np.ones(len(self._row), np.float32)

    def _alone(self, step: Float32, noise: Float32 | None) -> RecordedRow:
        """Run a row without its clamp, and leave the state as it was.

        An ε model's x0 is a number of up to 20,000 at the last timestep of the cosine
        schedule; its rounding would be counted in full against the 1 that it is
        clamped to.
        """
        state = self.engine.state()
        free = step.copy()
        free[:, CLIP_COLUMN] = NO_CLIP
        self.engine.run_row(free, noise)
        made = self.engine.state()[0], self.engine.preview()
        self.engine.load_state(state)
        return RecordedRow(self._guidance, self._low_res, state, free, noise, *made)

    def state(self) -> Float32:
        """The engine's state, [K, B, C, H, W]."""
        return self.engine.state()

    def load_state(self, state: Float32) -> None:
        """Put a state in place."""
        self.engine.load_state(state)

    def preview(self) -> Float32:
        """The engine's last predicted x0, [B, C, H, W]."""
        return self.engine.preview()

    def failed_samples(self) -> npt.NDArray[np.bool_]:
        """[B], the engine's own."""
        return self.engine.failed_samples()


def chosen_rows(count: int) -> tuple[int, ...]:
    """Early, middle and late among ``count`` table rows."""
    return tuple(sorted({0, count // 2, count - 1}))


class TorchMeasure:
    """Errors of a network in half precision against itself in float32.

    Calling it with a set of islands gives its errors; what was measured is kept.

    Args:
        network: The reference network, in float32.
        spec: Facts of the model.
        form: The half-precision form that islands are added to.
        jobs: What to sample, one sample each.
        device: A torch device.

    Raises:
        NonFiniteError: The float32 reference itself is not finite.
        EngineError: PyTorch cannot run it.
    """

    def __init__(
        self,
        network: IdentityUNet,
        spec: DiffusionSpec,
        form: BodyForm,
        jobs: Sequence[SampleJob],
        device: str = "cpu",
    ) -> None:
        self._network, self._spec = network, spec
        self._shapes = step_shapes(spec)
        self._form, self._jobs, self._device = form, jobs, device
        self._seen: dict[Islands, Errors] = {}
        self._reference = TorchEngine(network, self._shapes, FLOAT32, device)
        self.rows = [row for job in jobs for row in self._recorded(job)]

    @property
    def table_rows(self) -> int:
        """Of all trajectories."""
        return sum(len(job.table) for job in self._jobs)

    def form_with(self, islands: Islands) -> BodyForm:
        """The form with these islands beside its own."""
        more = self._form.islands + tuple(sorted(islands))
        return dataclasses.replace(self._form, islands=more)

    def measured(self, islands: Islands) -> Errors | None:
        """What is known of a set."""
        return self._seen.get(islands)

    def on_rows(self, islands: Islands) -> Errors:
        """The worst single table row."""
        if islands not in self._seen:
            with self._engine(islands) as engine:
                worst = max(_row_error(engine, row) for row in self.rows)
            self._seen[islands] = Errors(worst)
        return self._seen[islands]

    def on_trajectories(self, islands: Islands, tolerances: Tolerances) -> Errors:
        """Single rows and whole trajectories; no further one where one fails."""
        known = self.on_rows(islands)
        if known.trajectory is None:
            with self._engine(islands) as engine:
                for job in self._jobs:
                    known = self._walked(engine, job, known)
                    if known.excess(tolerances) > 1:
                        break
            self._seen[islands] = known
        return known

    @contextlib.contextmanager
    def _engine(self, islands: Islands) -> Iterator[Engine]:
        form = self.form_with(islands)
        made = TorchEngine(self._network, self._shapes, form, self._device)
        products = ProductsInFloat32()  # type: ignore[no-untyped-call]
        with made as engine, products:
            yield engine

    def _recorded(self, job: SampleJob) -> list[RecordedRow]:
        recorder = _Recorder(self._reference, chosen_rows(len(job.table)))
        for _ in walk(recorder, job, [0], most=1):
            pass
        if recorder.failed_samples().any():
            raise NonFiniteError(
                "the checkpoint gives NaN or infinity in float32, too",
                fix="use an earlier checkpoint; this one has diverged",
            )
        return recorder.rows

    def _walked(self, engine: Engine, job: SampleJob, known: Errors) -> Errors:
        """One trajectory, judged as ``parity`` does."""
        reference = _Recorder(self._reference)
        found = compare_trajectory(engine, reference, self._spec, job).trajectory
        single, along = known.step, known.trajectory or 0.0
        if found.failed_engine:
            along = math.inf
        for check in found.checks(CEILINGS[self._form.precision], ORACLE):
            error = check.found.max_rel if check.found.finite else math.inf
            if check.part == "single":
                single = max(single, error)
            elif check.tolerance is not None or math.isinf(error):
                along = max(along, error)
        return Errors(single, along)


def run_recorded(engine: Engine, row: RecordedRow) -> None:
    """Run a recorded row from where the reference was."""
    engine.begin(np.ascontiguousarray(row.state[0]), row.guidance, row.low_res)
    engine.load_state(row.state)
    engine.run_row(row.step, row.noise)


def _row_error(engine: Engine, row: RecordedRow) -> float:
    run_recorded(engine, row)
    if engine.failed_samples().any():
        return math.inf
    return max(
        _error(engine.state()[0], row.next_state), _error(engine.preview(), row.x0)
    )


def _error(actual: Float32, expected: Float32) -> float:
    found = compare(actual, expected)
    return found.max_rel if found.finite else math.inf
