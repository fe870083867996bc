"""What a parity run found, and whether that passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..compare import Comparison, format_error
from ..errors import InputError
from ..tolerances import IDENTITY_DROP, IDENTITY_SAMPLES, ORACLE, Tolerances

FORMAT = "id3pm-parity"
FORMAT_VERSION = 3

PARTS = ("forward", "final", "unsaturated", "oracle", "single", "state", "x0")
"""Kinds of comparison, as the JSON names them:

``forward`` one pass of the network; ``final`` the last pictures in [-1, 1] before
rounding; ``unsaturated`` those of their pixels where no clamp can hide an error;
``oracle`` x after a table row against diffusers' own scheduler; ``single`` one table
row that both sides start from the reference's state; ``state`` and ``x0`` the state and
the preview after a row of each side's own trajectory.
"""


@dataclass(frozen=True)
class Check:
    """One comparison and the tolerance it is held to.

    ``tolerance`` is None where a value is shown but only has to be finite. ``what``
    says what was compared, for people; ``table_row`` and ``timestep`` are None for
    what does not belong to one table row.
    """

    part: str
    what: str
    found: Comparison
    tolerance: float | None
    trajectory: str = ""
    table_row: int | None = None
    timestep: float | None = None

    @property
    def passed(self) -> bool:
        """Whether everything is finite and the error within the tolerance."""
        if self.tolerance is None:
            return self.found.finite
        return self.found.passes(self.tolerance)

    @property
    def failure(self) -> str:
        """Why it failed, in a sentence."""
        found = self.found
        if not found.finite:
            return (
                f"{self.what}: {found.nonfinite_actual} values of the engine and "
                f"{found.nonfinite_expected} of the reference are NaN or infinite"
            )
        error, limit = format_error(found.max_rel), format_error(self.tolerance or 0)
        return f"{self.what}: error {error} is past the tolerance of {limit}"

    def to_json(self) -> dict[str, Any]:
        """One flat record, always of the same keys."""
        return {
            "trajectory": self.trajectory,
            "part": self.part,
            "table_row": self.table_row,
            "timestep": self.timestep,
            "tolerance": self.tolerance,
            "passed": self.passed,
            **self.found.to_json(),
        }


@dataclass(frozen=True)
class StepComparison:
    """One table row. ``timestep`` is the model's, 0 to T-1.

    ``state`` and ``x0`` compare both sides' own trajectories after this row, errors of
    earlier rows included. ``single`` compares the state after this row alone, the
    engine having started it from the reference's state. ``oracle`` compares x after
    this row with diffusers' scheduler. Each is None where there was nothing to compare
    with.
    """

    table_row: int
    timestep: float
    state: Comparison | None = None
    x0: Comparison | None = None
    single: Comparison | None = None
    oracle: Comparison | None = None


@dataclass(frozen=True)
class IdentitySimilarity:
    """Cosines between the identity asked for and that of each picture.

    ``name`` is the FR model that judged; there is one number a picture and side, NaN
    where no face was found. The vectors themselves have no place here.

    Raises:
        InputError: The two sides have different lengths.
    """

    name: str
    reference: tuple[float, ...]
    engine: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.reference) != len(self.engine):
            raise InputError("identity similarities need one number a side and picture")


@dataclass(frozen=True)
class IdentityDrop:
    """How much less alike to their people the engine's pictures are, over pairs of the
    same noise; held to :data:`~id3pm_deploy.tolerances.IDENTITY_DROP`.

    Attributes:
        name: The FR model that judged.
        pairs: How many samples both sides made.
        reference: Mean cosine of the reference's pictures to their identity; one
            without a face counts as 0.
        engine: The same of the engine's.
        upper: Upper 95 % bound of the mean drop from reference to engine.
        faces_reference: Of the reference's pictures, how many show a face.
        faces_engine: The same of the engine's.
    """

    name: str
    pairs: int
    reference: float
    engine: float
    upper: float
    faces_reference: int
    faces_engine: int

    @property
    def drop(self) -> float:
        """The mean drop; negative where the engine does better."""
        return self.reference - self.engine

    @property
    def failure(self) -> str:
        """Why it fails, in a sentence; empty where it passes."""
        if self.pairs < IDENTITY_SAMPLES:
            return (
                f"identity: {self.pairs} pairs are too few to hold the drop of the "
                f"similarity to; {IDENTITY_SAMPLES} are needed"
            )
        if 2 * self.faces_reference < self.pairs:
            return (
                f"identity: {self.faces_reference} of {self.pairs} pictures of the "
                "reference show a face, too few to judge whose they are"
            )
        if self.upper <= IDENTITY_DROP:
            return ""
        return (
            f"identity: the engine's pictures are less alike to their people by "
            f"{self.drop:.4f}, and by up to {self.upper:.4f} at 95 % confidence; "
            f"{IDENTITY_DROP:g} is allowed"
        )


@dataclass(frozen=True)
class Trajectory:
    """One trajectory of both sides on the same noise.

    Attributes:
        name: Solver, steps and guidance, for people.
        final: The last pictures, float, in [-1, 1] where the table clips.
        final_unsaturated: Those of their pixels that no clamp can have hidden; None
            where all are saturated.
        uint8_max: Largest difference of a pixel in grey levels.
        per_step: Its table rows; empty where only the end is known.
        steps_against: What ``state``, ``x0`` and ``single`` were compared with.
        oracle_of: Whose rows were compared with diffusers' scheduler.
        failed_engine: Samples of the engine in which the network made NaN or infinity,
            which the step graph replaces before it can spread.
        failed_reference: The same of the reference.
        identity: What an FR model says of the pictures.
    """

    name: str
    final: Comparison
    final_unsaturated: Comparison | None = None
    uint8_max: int = 0
    per_step: tuple[StepComparison, ...] = ()
    steps_against: str = "reference"
    oracle_of: str = "reference"
    failed_engine: int = 0
    failed_reference: int = 0
    identity: IdentitySimilarity | None = None

    def checks(self, limits: Tolerances, oracle: float) -> Iterator[Check]:
        """Every comparison with its tolerance, the ends first."""
        ends = (
            ("final", "final pictures", self.final, limits.trajectory),
            (
                "unsaturated",
                "final pictures, unsaturated pixels",
                self.final_unsaturated,
                limits.trajectory,
            ),
        )
        for part, what, found, tolerance in ends:
            if found is not None:
                yield Check(part, what, found, tolerance, self.name)
        for step in self.per_step:
            yield from self._row_checks(step, limits, oracle)

    def _row_checks(
        self, step: StepComparison, limits: Tolerances, oracle: float
    ) -> Iterator[Check]:
        rows = (
            ("single", "one step", step.single, limits.step),
            ("state", "state", step.state, limits.trajectory),
            ("x0", "x0", step.x0, None),
            (
                "oracle",
                f"{self.oracle_of} against diffusers' scheduler",
                step.oracle,
                oracle,
            ),
        )
        for part, what, found, tolerance in rows:
            if found is not None:
                yield Check(
                    part,
                    f"table row {step.table_row} (t = {step.timestep:g}), {what}",
                    found,
                    tolerance,
                    self.name,
                    step.table_row,
                    step.timestep,
                )

    @property
    def worst_step(self) -> StepComparison | None:
        """The table row whose state is farthest off along the trajectory."""
        rows = [step for step in self.per_step if step.state is not None]
        return max(rows, key=lambda step: badness(step.state), default=None)


@dataclass(frozen=True)
class ParityReport:
    """Everything a parity run found; all files of a report say this.

    Attributes:
        title: What was compared with what.
        subject: What ran where, in the order it is to be read: engine, reference,
            checkpoint, noise, machine, versions. It is written as it stands, so it
            must hold no path of a photo.
        tolerances: What errors are held to.
        trajectories: At least one, unless there are ``forward`` comparisons.
        forward: Passes of the network alone, with what each is called.
        not_checked: What could not be compared, and why; a sentence each.
        engine_name: The engine, in a few words.
        reference_name: The reference, in a few words.
        oracle_tolerance: What diffusers' scheduler is held to.
        identity_drop: What an FR model says of many pairs; None where none did.
    """

    title: str
    subject: Mapping[str, str]
    tolerances: Tolerances
    trajectories: tuple[Trajectory, ...] = ()
    forward: tuple[tuple[str, Comparison], ...] = ()
    not_checked: tuple[str, ...] = ()
    engine_name: str = "engine"
    reference_name: str = "reference"
    oracle_tolerance: float = ORACLE
    identity_drop: IdentityDrop | None = None

    def __post_init__(self) -> None:
        if not self.trajectories and not self.forward:
            raise InputError("a parity report has to compare something")

    @property
    def checks(self) -> tuple[Check, ...]:
        """Every comparison, with its tolerance and verdict."""
        found = [
            Check("forward", name, comparison, self.tolerances.step)
            for name, comparison in self.forward
        ]
        several = len(self.trajectories) > 1
        for one in self.trajectories:
            for check in one.checks(self.tolerances, self.oracle_tolerance):
                name = f"{one.name}: {check.what}" if several else check.what
                found.append(replace(check, what=name))
        return tuple(found)

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not pass, a sentence each."""
        said = [check.failure for check in self.checks if not check.passed]
        for one in self.trajectories:
            for side, count in (
                ("engine", one.failed_engine),
                ("reference", one.failed_reference),
            ):
                if count:
                    said.append(
                        f"{one.name}: the network of the {side} made NaN or infinity "
                        f"in {count} samples"
                    )
        if self.identity_drop is not None and self.identity_drop.failure:
            said.append(self.identity_drop.failure)
        return tuple(said)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def worst(self, part: str) -> Check | None:
        """The comparison of this kind with the largest error; None if there is none."""
        ours = [check for check in self.checks if check.part == part]
        return max(ours, key=lambda check: badness(check.found), default=None)

    def to_json(self) -> dict[str, Any]:
        """Verdict and largest errors first, then every comparison as one flat record.

        The keys are always the same; None where there is nothing, or no finite number.
        """
        found: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "passed": self.passed,
            "failures": list(self.failures),
            "not_checked": list(self.not_checked),
            "tolerance_step": self.tolerances.step,
            "tolerance_trajectory": self.tolerances.trajectory,
            "tolerance_oracle": self.oracle_tolerance,
        }
        for part in PARTS:
            worst = self.worst(part)
            found[f"{part}_max_rel"] = finite(worst.found.max_rel) if worst else None
        ones = self.trajectories
        found["uint8_max"] = max((one.uint8_max for one in ones), default=None)
        found["failed_engine"] = sum(one.failed_engine for one in ones)
        found["failed_reference"] = sum(one.failed_reference for one in ones)
        judged = next((one.identity for one in ones if one.identity), None)
        similarity = judged or IdentitySimilarity("", (), ())
        found["identity_name"] = similarity.name or None
        found["identity_reference"] = [finite(v) for v in similarity.reference]
        found["identity_engine"] = [finite(v) for v in similarity.engine]
        drop = self.identity_drop
        found["identity_pairs"] = drop.pairs if drop else None
        found["identity_drop"] = drop.drop if drop else None
        found["identity_drop_upper"] = drop.upper if drop else None
        found["identity_drop_limit"] = IDENTITY_DROP
        found["trajectories"] = [one.name for one in ones]
        found["subject"] = dict(self.subject)
        found["comparisons"] = [check.to_json() for check in self.checks]
        return found


def badness(found: Comparison | None) -> float:
    """What to sort comparisons by: the error, infinite where something is not finite,
    and -1 where there is none."""
    if found is None:
        return -1.0
    return found.max_rel if found.finite else math.inf


def finite(value: float) -> float | None:
    """``value``, or None where JSON has no number for it."""
    return float(value) if math.isfinite(value) else None


def summary(report: ParityReport) -> Sequence[Check]:
    """The checks to show people first: all but those of single table rows, of which
    there is the worst one of each part."""
    shown = [check for check in report.checks if check.table_row is None]
    for one in report.trajectories:
        for part in ("state", "single", "oracle"):
            rows = [
                check
                for check in report.checks
                if (check.part, check.trajectory) == (part, one.name)
                and check.table_row is not None
            ]
            if rows:
                shown.append(max(rows, key=lambda check: badness(check.found)))
    return shown
