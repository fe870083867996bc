"""One trajectory of two engines, compared after every table row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..backends.base import Engine, Float32
from ..compare import Comparison, Mask, compare, unsaturated
from ..defaults import MAX_BATCH_SIZE
from ..errors import InputError
from ..images import Pixels, to_uint8
from ..report import StepComparison, Trajectory
from ..sampler import SampleJob, walk
from ..spec import DiffusionSpec
from ..tolerances import ORACLE, Tolerances
from .oracle import has_oracle, oracle_gap, oracle_steps
from .rounding import left_out, steady_numbers
from .tandem import Tandem

Similarity = Callable[[Sequence[npt.NDArray[np.uint8]]], tuple[float, ...]]
"""Cosine of each uint8 picture [H, W, 3] to the wanted identity; NaN for no face."""


@dataclass(frozen=True)
class Compared:
    """One trajectory, its pictures and what could not be compared.

    Attributes:
        trajectory: The findings.
        reference: [B, H, W, 3] uint8; what is not finite is black.
        engine: The same shape.
        error: The same shape, float32: ``|a - b|`` in grey levels, before rounding.
        not_checked: A sentence each.
    """

    trajectory: Trajectory
    reference: Pixels
    engine: Pixels
    error: Float32
    not_checked: tuple[str, ...]


def check_count(count: int) -> None:
    """Refuse more pictures than one batch holds.

    Raises:
        InputError: There are too many, or none.
    """
    if not 1 <= count <= MAX_BATCH_SIZE:
        raise InputError(
            f"parity compares 1 to {MAX_BATCH_SIZE} pictures",
            why=f"{count} were asked for",
            fix="change --count, or give fewer identities",
        )


def compare_trajectory(
    engine: Engine,
    reference: Engine,
    spec: DiffusionSpec,
    job: SampleJob,
    on_row: Callable[[], None] = lambda: None,
    limits: Tolerances | None = None,
) -> Compared:
    """Walk both engines through ``job`` on the same noise; all samples are one batch.

    Where that does not keep ``limits``, they are walked again without the numbers that
    rounding alone moves past them; see :mod:`.rounding`.

    Args:
        engine: What is judged; entered.
        reference: What it is held against; entered.
        spec: Facts of the model that both run.
        job: What to sample.
        on_row: Called after each table row.
        limits: What is going to be asked of the comparison.

    Raises:
        InputError: There are too many samples for one batch.
        EngineError: One of them fails.
    """
    check_count(len(job.identity))
    found = _walked(engine, reference, spec, job, on_row, None)
    if limits is None or keeps(found.trajectory, limits):
        return found
    masks = steady_numbers(reference, job, limits.trajectory)
    if not (said := left_out(masks)):
        return found
    found = _walked(engine, reference, spec, job, lambda: None, masks)
    missed = (*found.not_checked, f"{job_name(job)}, {said}")
    return dataclasses.replace(found, not_checked=missed)


def keeps(found: Trajectory, limits: Tolerances) -> bool:
    """Whether every comparison passes."""
    return all(check.passed for check in found.checks(limits, ORACLE))


def _walked(
    engine: Engine,
    reference: Engine,
    spec: DiffusionSpec,
    job: SampleJob,
    on_row: Callable[[], None],
    masks: list[Mask] | None,
) -> Compared:
    """Both sides' trajectories; of x after row j only ``masks[j]`` is compared."""
    tandem = Tandem(engine, reference, job.table)
    oracle = _Oracle(engine, reference, spec, job)
    steps, rejoined = [], []
    for j in walk(tandem, job, range(len(job.identity)), most=1):
        mask = None if masks is None else masks[j]
        state = None
        if tandem.amplified:
            rejoined.append(j)
            tandem.rejoin()
        else:
            state = compare(engine.state(), reference.state(), mask)
        steps.append(
            StepComparison(
                table_row=j,
                timestep=float(job.table.timesteps[j]),
                state=state,
                x0=compare(engine.preview(), reference.preview()),
                single=tandem.single,
                oracle=oracle.compare_row(tandem, mask),
            )
        )
        on_row()
    missed = oracle.not_checked
    if rejoined:
        rows = ", ".join(map(str, rejoined))
        missed += (
            f"{job_name(job)}, table rows {rows} where x0 is not clamped: they enlarge "
            "the rounding of the prediction; both sides went on from the reference's "
            "state",
        )
    images = engine.state()[0], reference.state()[0]
    ours, theirs = visible(images[0]), visible(images[1])
    trajectory = Trajectory(
        name=job_name(job),
        per_step=tuple(steps),
        final=compare(*images, None if masks is None else masks[-1]),
        final_unsaturated=compare_unsaturated(
            *images, None if masks is None else masks[-1]
        ),
        uint8_max=grey_difference(ours, theirs),
        oracle_of=oracle.side,
        failed_engine=int(engine.failed_samples().sum()),
        failed_reference=int(reference.failed_samples().sum()),
    )
    return Compared(trajectory, theirs, ours, grey_error(*images), missed)


class _Oracle:
    """diffusers' scheduler beside the two, where one of them has a network for it."""

    def __init__(
        self, engine: Engine, reference: Engine, spec: DiffusionSpec, job: SampleJob
    ) -> None:
        sides = {"reference": reference, "engine": engine}
        able = [name for name, side in sides.items() if has_oracle(side)]
        self.side = able[0] if able else "reference"
        self._engine = sides[self.side]
        self._spec, self._job = spec, job
        self._steps: Generator[Float32, Float32 | None, None] | None = None
        gap = "neither side is PyTorch in float32, on whose network it would run"
        if able:
            gap = oracle_gap(spec, job)
        self._able = not gap
        self._given: Float32 | None = None
        self.not_checked: tuple[str, ...] = ()
        if gap:
            self.not_checked = (f"{job_name(job)}, diffusers' scheduler: {gap}",)

    def compare_row(self, tandem: Tandem, mask: Mask | None) -> Comparison | None:
        """The row that ran last, against the oracle's; one that enlarges rounding is
        not compared, and the oracle goes on from the same state as both sides."""
        if not self._able:
            return None
        if self._steps is None:
            assert tandem.x_t is not None
            self._steps = oracle_steps(
                self._engine, self._spec, self._job, tandem.x_t, lambda _: tandem.noise
            )
        ours, theirs = self._engine.state()[0], self._steps.send(self._given)
        self._given = ours if tandem.amplified else None
        return None if tandem.amplified else compare(ours, theirs, mask)


def job_name(job: SampleJob) -> str:
    """Solver, steps and guidance, for people."""
    solver = job.table.settings
    parts = [solver.solver]
    parts += [f"η = {solver.eta:g}"] if solver.eta else []
    parts += [f"{solver.steps} steps", guidance_name(job)]
    return ", ".join(parts)


def guidance_name(job: SampleJob) -> str:
    """How strongly samples are guided, for people."""
    chosen = job.guidance
    if chosen.scales is not None:
        said = f"guidance {min(chosen.scales):g} to {max(chosen.scales):g} by row"
    else:
        said = f"guidance {chosen.scale:g}"
        said += "" if chosen.schedule == "constant" else f" ({chosen.schedule})"
    if chosen.interval is not None:
        said += f" for t from {chosen.interval[0]:g} to {chosen.interval[1]:g}"
    said += f", rescale {chosen.rescale:g}" if chosen.rescale else ""
    return said + (", variance guided" if chosen.guide_variance else "")


def visible(images: Float32) -> Pixels:
    """Grey levels of [B, 3, H, W]; what is not finite is black, for it is compared
    elsewhere."""
    return to_uint8(np.where(np.isfinite(images), images, np.float32(-1)))


def grey_difference(ours: Pixels, theirs: Pixels) -> int:
    """The largest difference of a pixel."""
    return int(np.abs(ours.astype(np.int16) - theirs.astype(np.int16)).max())


def grey_error(actual: Float32, expected: Float32) -> Float32:
    """How far two sets of pictures [B, 3, H, W] are apart where they are seen, in grey
    levels: [B, H, W, 3] float32. What is not finite is off by all 255."""
    with np.errstate(invalid="ignore"):
        error = np.abs(np.clip(actual, -1, 1) - np.clip(expected, -1, 1)) * 127.5
    good = np.isfinite(actual) & np.isfinite(expected)
    found = np.where(good, error, 255).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(found, dtype=np.float32)


def compare_unsaturated(
    actual: Float32, expected: Float32, steady: Mask | None = None
) -> Comparison | None:
    """Where no clamp can have hidden an error, among the ``steady`` numbers if they are
    given; None where that is nowhere."""
    mask = unsaturated(expected)
    if steady is not None:
        mask &= steady
    return compare(actual, expected, mask) if mask.any() else None
