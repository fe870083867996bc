"""A column is checked before it is timed: it has to compute the same as the others."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..backends.base import Float32
from ..compare import compare
from ..selftest import load_golden
from ..tolerances import CEILINGS
from .case import Case, loosest
from .cold_start import reason_of
from .live import Live
from .result import WRONG


def checked(
    case: Case, live: Sequence[Live], samples: int, *, first: bool
) -> tuple[list[Live], str]:
    """Those that compute the right thing at a batch size, and who they were held
    against: the first float32 column that gives the golden step, or the first."""
    ready: list[Live] = []
    reference: tuple[Live, Float32] | None = None
    inside = [one for one in live if one.runner is not None]
    inside.sort(key=lambda one: one.inside.precision != "float32")
    for one in inside:
        with _failures(one, samples):
            error = _golden_error(case, one) if first else None
            if one.runner is None:
                continue
            one.runner.begin(samples)
            images = one.runner.check()
            if not np.isfinite(images).all():
                one.ends(WRONG, "its pictures are not finite")
                continue
            if reference is None:
                reference = (one, images)
            elif not _agrees(one, images, *reference, samples):
                continue
            if first:
                one.facts["step_error"] = error
            if one.runner.note:
                one.facts["note"] = one.runner.note
            ready.append(one)
    ready.sort(key=live.index)
    return ready, reference[0].column.name if reference else ""


@contextmanager
def _failures(one: Live, samples: int) -> Iterator[None]:
    """What goes wrong at a batch size is the column's reason there."""
    try:
        yield
    except Exception as error:  # out of memory, or a batch past a profile
        one.batches[str(samples)] = {"reason": reason_of(error)}
        gc.collect()


def _golden_error(case: Case, one: Live) -> float | None:
    """The error of the bundle's golden step; past the tolerance the column ends."""
    assert case.model.bundle is not None
    runner = one.inside
    found = runner.golden(load_golden(case.model.bundle, case.graph))
    if found is None:
        return None
    kind = loosest(runner.precision, case.graph.precision)
    allowed = CEILINGS[kind].step
    if kind == case.graph.precision:
        allowed = min(allowed, case.graph.tolerance_step)
    if not found.passes(allowed):
        one.ends(
            WRONG,
            "it computes another step than the bundle's golden data: relative error "
            f"{found.max_rel:.2e}, tolerance {allowed:.0e}",
        )
    return found.max_rel


def _agrees(
    one: Live, images: Float32, reference: Live, expected: Float32, samples: int
) -> bool:
    """Whether a trajectory ends where the reference's does; otherwise it ends."""
    found = compare(images, expected)
    kind = loosest(one.inside.precision, reference.inside.precision)
    allowed = CEILINGS[kind].trajectory
    if found.passes(allowed):
        one.facts.setdefault("trajectory_errors", {})[str(samples)] = found.max_rel
        return True
    one.ends(
        WRONG,
        f"its trajectory is not that of {reference.column.name}: relative error "
        f"{found.max_rel:.2e}, tolerance {allowed:.0e}, batch size {samples}",
    )
    return False
