"""What a solver table is made of beside the noise schedule."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .. import defaults
from ..errors import InputError
from .timesteps import SPACINGS, Spacing

_OWNERS = {"eta": "ddim", "variance": "ddpm", "final_order": "unipc-3"}
"""Settings that mean something to one solver only."""


@dataclass(frozen=True)
class SolverSettings:
    """What a table is made of beside the noise schedule; kept in run records.

    Attributes:
        solver: One of ``defaults.SOLVERS``.
        steps: Number of solver steps, as diffusers counts them; a step of ``heun``
            takes two table rows, but for the last.
        spacing: How timesteps are spread: ``linspace`` takes N points from the first
            to 0; ``linspace_open`` N + 1 such points without the last; ``leading``
            and ``trailing`` as in Lin et al. 2024, table 2. None: the solver's own.
        lambda_min: Start no noisier than this half log-SNR; None: the solver's own.
        clip: Bound of the predicted x0; 0 switches clipping off.
        eta: DDIM's η (Song et al. 2021, eq. 16): 0 deterministic, 1 as noisy as DDPM.
        variance: ``learned`` where the model has it, else ``fixed_small`` (β̃) or
            ``fixed_large`` (β); None: learned if the model has it, else fixed_small.
        final_order: How ``unipc-3`` ends: ``lower`` takes the last steps in order 2
            and 1, ``full`` the last step alone in order 1, which has to be (it goes
            to σ = 0). Every other solver has no choice. None: ``lower``.

    Raises:
        InputError: A value is out of range, or belongs to another solver.
    """

    solver: str = defaults.SOLVER
    steps: int = defaults.STEPS
    spacing: Spacing | None = None
    lambda_min: float | None = None
    clip: float = 1.0
    eta: float = 0.0
    variance: Literal["learned", "fixed_small", "fixed_large"] | None = None
    final_order: Literal["lower", "full"] | None = None

    def __post_init__(self) -> None:
        _check_name("solver", self.solver, defaults.SOLVERS)
        if self.spacing is not None:
            _check_name("timestep spacing", self.spacing, SPACINGS)
        if self.variance is not None:
            _check_name("variance", self.variance, defaults.VARIANCES)
        if self.final_order is not None:
            _check_name("final order", self.final_order, defaults.FINAL_ORDERS)
        if self.lambda_min is not None and not math.isfinite(self.lambda_min):
            raise InputError(
                "lambda_min must be a finite number", why=f"it is {self.lambda_min}"
            )
        if not math.isfinite(self.clip) or self.clip < 0:
            raise InputError("clip must be 0 or above", why=f"it is {self.clip}")
        if not 0.0 <= self.eta <= 1.0:
            raise InputError("eta must be in [0, 1]", why=f"it is {self.eta}")
        for name, owner in _OWNERS.items():
            if getattr(self, name) and self.solver != owner:
                raise InputError(
                    f"{name} is a setting of {owner}, not of {self.solver}",
                    fix=f"leave it out, or use the solver {owner}",
                )


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise InputError(
            f"there is no {what} {name!r}", fix=f"use one of {', '.join(known)}"
        )
