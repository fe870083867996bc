"""What the page and the Markdown say, so that both say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..compare import QUANTILES, Comparison, format_error
from ..tolerances import IDENTITY_DROP
from .findings import (
    Check,
    IdentityDrop,
    IdentitySimilarity,
    ParityReport,
    StepComparison,
    Trajectory,
    badness,
    summary,
)
from .plot import CURVES

METHOD = (
    "Both sides start from the same noise and get the same noise in every step. Error "
    "is max|a − b| / max|b| over every value of every sample, where a is the engine's "
    "and b the reference's. One table row is one call of the network."
)
DISTRIBUTION = (
    "Quantiles, max, mean and RMS are of |a − b|, in units of the model's range "
    "[−1, 1]: 99 % of the values are off by no more than the number under 99 %."
)
VERDICT_HEAD = ("", "error", "tolerance", "verdict")
DISTRIBUTION_HEAD = (
    "",
    *(f"{share * 100:g} %" for share in QUANTILES),
    "max",
    "mean",
    "RMS",
    "1 − cosine",
    "PSNR",
    "values",
)
IDENTITY_HEAD = ("picture", "reference", "engine", "change")


def word(report: ParityReport) -> str:
    """PASS or FAIL."""
    return "PASS" if report.passed else "FAIL"


def verdict_sentence(report: ParityReport) -> str:
    """The outcome in two sentences."""
    checks, failures = report.checks, report.failures
    sides = f"{report.engine_name} and {report.reference_name}"
    if failures:
        return (
            f"{sides} do not agree: {len(failures)} findings are past their "
            f"tolerance, of {len(checks)} comparisons."
        )
    held = [check for check in checks if check.tolerance is not None]
    worst = max(held, key=lambda check: badness(check.found))
    return (
        f"{sides} agree in all {len(checks)} comparisons. The largest error is "
        f"{format_error(worst.found.max_rel)} ({worst.what}), where "
        f"{format_error(worst.tolerance or 0)} is allowed."
    )


def verdict_rows(report: ParityReport) -> list[tuple[str, ...]]:
    """What was compared, its error, the tolerance and the verdict; of single table
    rows the worst ones."""
    rows: list[tuple[str, ...]] = [
        (
            check.what,
            error_text(check.found),
            "finite" if check.tolerance is None else format_error(check.tolerance),
            "pass" if check.passed else "FAIL",
        )
        for check in summary(report)
    ]
    if (drop := report.identity_drop) is not None:
        name = f"identity similarity: drop, upper bound, {drop.pairs} pairs"
        verdict = "FAIL" if drop.failure else "pass"
        rows.append((name, f"{drop.upper:.4f}", f"{IDENTITY_DROP:g}", verdict))
    return rows


def identity_drop_note(drop: IdentityDrop) -> str:
    """What was found over many pairs, in two sentences."""
    return (
        f"Over {drop.pairs} pairs of pictures, the engine's have a mean cosine of "
        f"{drop.engine:.4f} to their identity and the reference's "
        f"{drop.reference:.4f}, judged by {drop.name}: a drop of {drop.drop:.4f}, at "
        f"most {drop.upper:.4f} at 95 % confidence, where {IDENTITY_DROP:g} is "
        f"allowed. A face was found in {drop.faces_engine} of the engine's pictures "
        f"and in {drop.faces_reference} of the reference's; one without counts as 0."
    )


def distribution_rows(checks: Sequence[Check]) -> list[tuple[str, ...]]:
    """What was compared, and how its errors are distributed."""
    return [(check.what, *distribution(check.found)) for check in checks]


def distribution(found: Comparison) -> tuple[str, ...]:
    """The cells under :data:`DISTRIBUTION_HEAD`, but for the first."""
    psnr = f"{found.psnr:.1f} dB" if math.isfinite(found.psnr) else "equal"
    return (
        *(format_error(value) for value in found.quantiles),
        format_error(found.max_abs),
        format_error(found.mean_abs),
        format_error(found.rms),
        format_error(max(0.0, 1 - found.cosine)),
        psnr if found.finite else "not finite",
        f"{found.count:,}",
    )


def error_text(found: Comparison | None) -> str:
    """An error for a cell; empty where nothing was compared."""
    if found is None:
        return ""
    return format_error(found.max_rel) if found.finite else "not finite"


def step_table(trajectory: Trajectory) -> tuple[list[str], list[list[str]]]:
    """Head and rows of all table rows in numbers; columns without anything in them
    are left out."""
    steps = trajectory.per_step
    there = [n for n in CURVES if any(getattr(step, n) is not None for step in steps)]
    head = ["table row", "t", *(f"{CURVES[name][0]}: error" for name in there)]
    detailed = "state" in there
    head += ["state: max", "state: mean", "state: PSNR"] if detailed else []
    rows = []
    for step in steps:
        row = [str(step.table_row), f"{step.timestep:g}"]
        row += [error_text(getattr(step, name)) for name in there]
        rows.append(row + (_detail(step) if detailed else []))
    return head, rows


def _detail(step: StepComparison) -> list[str]:
    if step.state is None:
        return [""] * 3
    cells = dict(
        zip(DISTRIBUTION_HEAD[1:], distribution(step.state), strict=True),
    )
    return [cells["max"], cells["mean"], cells["PSNR"]]


def identity_rows(similarity: IdentitySimilarity) -> list[tuple[str, ...]]:
    """The mean over the pictures in which both sides show a face, then each one."""
    pairs = list(zip(similarity.reference, similarity.engine, strict=True))
    seen = [pair for pair in pairs if all(map(math.isfinite, pair))]
    rows = [(str(index), *pair) for index, pair in enumerate(pairs)]
    if seen:
        means = [sum(side) / len(seen) for side in zip(*seen, strict=True)]
        rows.insert(0, (f"mean of {len(seen)}", means[0], means[1]))
    return [
        (name, _cosine(a), _cosine(b), f"{b - a:+.4f}" if math.isfinite(b - a) else "")
        for name, a, b in rows
    ]


def identity_note(similarity: IdentitySimilarity) -> str:
    """What the identity's numbers are."""
    return (
        "Cosine between the identity asked for and that of each picture, judged by "
        f"{similarity.name}. These few are shown, not held to a tolerance."
    )


def grey_levels(trajectory: Trajectory) -> str:
    """The largest difference of a pixel, in a sentence."""
    if not trajectory.uint8_max:
        return "Rounded to grey levels, the final pictures are equal."
    return (
        "Rounded to grey levels, no pixel of the final pictures differs by more than "
        f"{trajectory.uint8_max} of 255."
    )


def _cosine(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "no face"
