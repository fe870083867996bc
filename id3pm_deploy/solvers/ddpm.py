"""Ancestral sampling."""

from __future__ import annotations

import numpy as np

from ..schedule import Float64
from ..spec import DiffusionSpec
from .layout import NOISE_COLUMN, X0_COLUMN, matrices, prediction_rows
from .path import NoisePath
from .settings import SolverSettings


def ddpm_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """Ho et al. 2020, eq. 6 and 7, on respaced β (Nichol & Dhariwal 2021, sec. 4);
    learned variance: their eq. 15.

    With ``fixed_small`` it is also the first-order SDE-DPM-Solver++ (Lu et al. 2022,
    DPM-Solver++), term by term.
    """
    alphas, previous = path.alphas[:-1], path.alphas[1:]
    betas = 1 - alphas / previous
    rows = prediction_rows(spec, path, settings)
    matrix = matrices(rows)
    matrix[:, 0, X0_COLUMN] = betas * np.sqrt(previous) / (1 - alphas)
    matrix[:, 0, 0] = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas)
    variance = betas * (1 - previous) / (1 - alphas)
    if settings.variance == "learned":
        clipped = variance.copy()
        if path.ends_clean:
            # The last step's β̃ is 0; the one before stands in for its logarithm.
            clipped[-1] = clipped[-2] if len(clipped) > 1 else betas[-1]
        rows[:, 5], rows[:, 6] = np.log(clipped), np.log(betas)
        scale = np.ones_like(betas)
    else:
        scale = np.sqrt(betas if settings.variance == "fixed_large" else variance)
    if path.ends_clean:
        scale[-1] = 0.0
    matrix[:, 0, NOISE_COLUMN] = scale
    return rows
