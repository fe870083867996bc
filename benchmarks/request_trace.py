"""Requests of unlike steps, for what measures serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARES = {10: 0.5, 20: 0.3, 50: 0.2}
"""Steps of a request, and how many ask for them."""
SOLVERS = ("ddpm", "ddim", "dpmpp-2m")
"""All take one table row a step."""


@dataclass(frozen=True)
class Request:
    """One picture that somebody wants at a moment (seconds from the start)."""

    at: float
    person: int
    steps: int
    solver: str
    seed: int


def make_trace(count: int, per_second: float, people: int, seed: int) -> list[Request]:
    """Requests in an order drawn anew, with the exact shares of steps as far as whole
    numbers go.

    Args:
        count: Requests.
        per_second: Rate of a Poisson process; infinity: all are there at once.
        people: Identities to draw from.
        seed: Of the trace and of its pictures' noise.
    """
    draw = np.random.default_rng(seed)
    times = np.cumsum(draw.exponential(1 / per_second, count))
    ends = np.rint(np.cumsum(list(SHARES.values())) * count).astype(int)
    steps = np.repeat(list(SHARES), np.diff(ends, prepend=0))
    return [
        Request(
            float(at),
            int(draw.integers(people)),
            int(wanted),
            str(draw.choice(SOLVERS)),
            1000 * seed + number,
        )
        for number, (at, wanted) in enumerate(
            zip(times - times[0], draw.permutation(steps), strict=True)
        )
    ]


def mean_steps(trace: Sequence[Request]) -> float:
    """Table rows of a picture."""
    return float(np.mean([one.steps for one in trace]))
