"""A parity report: what was compared, by how much it differs, and whether that passes.

Three files hold the same findings: ``parity.json`` for scripts, ``parity.png`` to look
at, ``index.html`` to read; the page stands alone and loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .compare import Comparison, format_error
from .errors import InputError
from .files import make_folder, write_bytes, write_json, write_text
from .images import (
    PictureMark,
    Pixels,
    check_pixels,
    contact_sheet,
    encode_png,
)
from .report_page import ShownPictures, parity_page

FORMAT_VERSION = 1
SHOWN = 12
"""Pictures on the sheet and the page, at most; the figures are over all of them."""
_AMPLIFICATIONS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class StepComparison:
    """One table row. ``timestep`` is the model's, 0 to T-1.

    ``state`` and ``x0`` compare both sides' own trajectories after this row, errors of
    earlier rows included. ``single`` compares the state after this row alone, the
    engine having started it from the reference's state.
    """

    table_row: int
    timestep: float
    state: Comparison
    x0: Comparison
    single: Comparison | None = None


@dataclass(frozen=True)
class IdentitySimilarity:
    """Cosines between the identity asked for and that of each picture.

    ``name`` is the FR model that judged; there is one number a picture and side, NaN
    where no face was found. The vectors themselves have no place here.
    """

    name: str
    reference: tuple[float, ...]
    engine: tuple[float, ...]


@dataclass(frozen=True)
class Tolerances:
    """Largest errors that pass, as ``max|a - b| / max|b|``.

    Raises:
        InputError: One of them is no number of at least 0.
    """

    step: float
    trajectory: float

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("trajectory", self.trajectory)):
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"the {name} tolerance has to be at least 0: {value}")


@dataclass(frozen=True)
class ParityReport:
    """Everything the three files say; make it with :meth:`build`.

    ``subject`` says what ran where, in the order it is to be read: reference, engine,
    precision, checkpoint, solver, steps, guidance, seed, machine, versions. It is
    written as it stands, so it must hold no path of a photo. ``final`` compares the
    last pictures in [-1, 1] before rounding, ``final_unsaturated`` the same where no
    clamp can hide an error; ``uint8_max`` is the largest difference in grey levels.
    ``oracle`` compares the reference with a third computation of the same trajectory,
    diffusers' own scheduler, held to ``oracle_tolerance``.
    """

    title: str
    subject: Mapping[str, str]
    per_step: tuple[StepComparison, ...]
    final: Comparison
    final_unsaturated: Comparison | None
    uint8_max: int
    tolerances: Tolerances
    identity: IdentitySimilarity | None = None
    oracle: Comparison | None = None
    oracle_tolerance: float = 1e-4
    failures: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @classmethod
    def build(
        cls,
        *,
        title: str,
        subject: Mapping[str, str],
        per_step: Sequence[StepComparison],
        final: Comparison,
        final_unsaturated: Comparison | None,
        uint8_max: int,
        tolerances: Tolerances,
        identity: IdentitySimilarity | None = None,
        oracle: Comparison | None = None,
        oracle_tolerance: float = 1e-4,
    ) -> ParityReport:
        """A judged report; the arguments are the fields.

        Raises:
            InputError: The two sides of ``identity`` have different lengths.
        """
        if identity and len(identity.reference) != len(identity.engine):
            raise InputError("identity similarities need one number a side and picture")
        failures = [*judge(per_step, final, final_unsaturated, tolerances)]
        if oracle is not None:
            failures += _judge_one(
                "reference against diffusers' scheduler", oracle, oracle_tolerance
            )
        return cls(
            title=title,
            subject=dict(subject),
            per_step=tuple(per_step),
            final=final,
            final_unsaturated=final_unsaturated,
            uint8_max=uint8_max,
            tolerances=tolerances,
            identity=identity,
            oracle=oracle,
            oracle_tolerance=oracle_tolerance,
            failures=tuple(failures),
        )

    @property
    def worst_step(self) -> StepComparison | None:
        """The table row whose state is farthest off along the trajectory."""

        def badness(step: StepComparison) -> float:
            return step.state.max_rel if step.state.finite else math.inf

        return max(self.per_step, key=badness, default=None)

    def to_json(self) -> dict[str, Any]:
        """Flat, with stable keys; None where there is nothing or no finite number."""
        worst = self.worst_step
        found: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "passed": self.passed,
            "failures": list(self.failures),
            "tolerance_step": self.tolerances.step,
            "tolerance_trajectory": self.tolerances.trajectory,
            "subject": dict(self.subject),
            "uint8_max": self.uint8_max,
            "worst_table_row": worst.table_row if worst else None,
            "worst_max_rel": _finite(worst.state.max_rel) if worst else None,
        }
        found |= _prefixed("final", self.final)
        found |= _prefixed("final_unsaturated", self.final_unsaturated, like=self.final)
        found |= _prefixed("oracle", self.oracle, like=self.final)
        similarity = self.identity or IdentitySimilarity("", (), ())
        found["identity_name"] = similarity.name or None
        found["identity_reference"] = [_finite(v) for v in similarity.reference]
        found["identity_engine"] = [_finite(v) for v in similarity.engine]
        found["steps"] = [_step_json(step) for step in self.per_step]
        return found


@dataclass(frozen=True)
class ReportPaths:
    """Where :func:`save_report` put things."""

    json: Path
    sheet: Path
    page: Path


def judge(
    per_step: Sequence[StepComparison],
    final: Comparison,
    final_unsaturated: Comparison | None,
    tolerances: Tolerances,
) -> Iterator[str]:
    """What is past its tolerance, a sentence each, the final pictures first.

    A row's ``single`` is held to the step tolerance; its ``state``, the final pictures
    and their unsaturated part to the trajectory's. ``x0`` is a preview, which a small
    signal share amplifies: it has to be finite, and is shown but held to nothing.
    """
    yield from _judge_one("final pictures", final, tolerances.trajectory)
    if final_unsaturated is not None:
        where = "final pictures, unsaturated pixels"
        yield from _judge_one(where, final_unsaturated, tolerances.trajectory)
    for step in per_step:
        where = f"table row {step.table_row} (t = {step.timestep:g})"
        if step.single is not None:
            yield from _judge_one(f"{where}, one step", step.single, tolerances.step)
        yield from _judge_one(f"{where}, state", step.state, tolerances.trajectory)
        if not step.x0.finite:
            yield _not_finite(f"{where}, x0", step.x0)


def difference_pixels(reference: Pixels, engine: Pixels) -> tuple[Pixels, int]:
    """``|engine - reference|`` in grey levels, enlarged to be seen.

    Args:
        reference: uint8, any shape.
        engine: uint8, the same shape.

    Returns:
        uint8 of that shape, and the whole number it was multiplied by: the largest
        power of two, up to 64, at which nothing is cut off.
    """
    error = np.abs(engine.astype(np.int16) - reference.astype(np.int16))
    largest = int(error.max(initial=0))
    factor = max(f for f in _AMPLIFICATIONS if f * largest <= 255)
    return (error * factor).astype(np.uint8), factor


def save_report(
    folder: Path,
    report: ParityReport,
    reference_pixels: Pixels,
    engine_pixels: Pixels,
    marks: Sequence[PictureMark],
    *,
    reference_backend: str = "torch",
    reference_precision: str = "fp32",
) -> ReportPaths:
    """Write the report; each file replaces an older one whole, the JSON last.

    Args:
        folder: Made if it is not there.
        report: What to write.
        reference_pixels: [B,H,W,3] uint8.
        engine_pixels: The same shape.
        marks: How the engine's pictures were made, one each.
        reference_backend: What made the reference's, for the marks in those.
        reference_precision: And at what precision.

    Raises:
        InputError: The pictures and marks do not fit each other.
        OutputError: Something cannot be written.
    """
    _check_pictures(reference_pixels, engine_pixels, marks)
    total = len(marks)
    reference, engine = reference_pixels[:SHOWN], engine_pixels[:SHOWN]
    marks = marks[:SHOWN]
    difference, factor = difference_pixels(reference, engine)
    theirs = [
        replace(mark, backend=reference_backend, precision=reference_precision)
        for mark in marks
    ]
    names = [f"sample {mark.sample}" for mark in marks]
    more = f" (first {len(marks)} of {total})" if total > len(marks) else ""
    sheet = contact_sheet(
        [*reference, *engine, *difference],
        columns=len(marks),
        row_labels=["reference", "engine", f"|difference|\nx {factor}"],
        column_labels=names,
        title=f"{'PASS' if report.passed else 'FAIL'}: {report.title}{more}",
    )
    shown = ShownPictures(
        names=names,
        reference=[encode_png(p, m) for p, m in zip(reference, theirs, strict=True)],
        engine=[encode_png(p, m) for p, m in zip(engine, marks, strict=True)],
        difference=[encode_png(p, m) for p, m in zip(difference, marks, strict=True)],
        amplification=factor,
        differ=bool(difference.any()),
        total=total,
    )
    make_folder(folder)
    paths = ReportPaths(
        json=folder / "parity.json",
        sheet=folder / "parity.png",
        page=folder / "index.html",
    )
    write_bytes(paths.sheet, encode_png(sheet, replace(marks[0], sample=None)))
    write_text(paths.page, parity_page(report, shown))
    write_json(paths.json, report.to_json())
    return paths


def _check_pictures(
    reference: Pixels, engine: Pixels, marks: Sequence[PictureMark]
) -> None:
    if reference.shape != engine.shape or len(marks) != len(engine) or not marks:
        raise InputError(
            "a report needs as many marks as pictures on either side",
            why=f"reference {list(reference.shape)}, engine {list(engine.shape)}, "
            f"{len(marks)} marks",
        )
    check_pixels(reference[0])
    check_pixels(engine[0])


def _judge_one(where: str, found: Comparison, tolerance: float) -> Iterator[str]:
    if found.passes(tolerance):
        return
    if found.finite:
        error, limit = format_error(found.max_rel), format_error(tolerance)
        yield f"{where}: error {error} is past the tolerance of {limit}"
    else:
        yield _not_finite(where, found)


def _not_finite(where: str, found: Comparison) -> str:
    return (
        f"{where}: {found.nonfinite_actual} values of the engine and "
        f"{found.nonfinite_expected} of the reference are NaN or infinite"
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _prefixed(
    prefix: str, found: Comparison | None, like: Comparison | None = None
) -> dict[str, Any]:
    """A comparison's keys behind a prefix; all None where it is absent."""
    shape = found or like
    values = shape.to_json() if shape else {}
    return {f"{prefix}_{k}": v if found else None for k, v in values.items()}


def _step_json(step: StepComparison) -> dict[str, Any]:
    return {
        "table_row": step.table_row,
        "timestep": _finite(step.timestep),
        **_prefixed("state", step.state),
        **_prefixed("x0", step.x0),
        **_prefixed("single", step.single, like=step.state),
    }
