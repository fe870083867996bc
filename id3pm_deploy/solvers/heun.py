"""Heun's method on the probability-flow ODE."""

from __future__ import annotations

import numpy as np

from ..schedule import Float64
from ..spec import DiffusionSpec
from .layout import X0_COLUMN, matrices, prediction_rows
from .path import NoisePath
from .settings import SolverSettings


def heun_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """Karras et al. 2022, alg. 1 without churn: [2N - 1, S].

    With x̂ = x/√ᾱ, σ̂ = √((1-ᾱ)/ᾱ) and d = (x̂ - x0)/σ̂, a step to σ̂' is two table rows:

        x̂' = x̂ + (σ̂' - σ̂)·d             slot 1 = x̂ + ½(σ̂' - σ̂)·d
        x̂' = slot 1 + ½(σ̂' - σ̂)·d'      where d' is taken at the x̂' above

    all of it times √ᾱ'. The last step is Euler's, since at σ̂ = 0 there is no d'.
    """
    points = np.repeat(np.arange(len(path)), 2)[1:]
    rows = prediction_rows(spec, path, settings)[points]
    matrix = matrices(rows)
    signal, ratio = path.signal, path.sigma / path.signal
    for row, j in enumerate(points):
        if row % 2:
            half = (ratio[j] - ratio[j - 1]) / (2 * ratio[j])
            matrix[row, 0, 1] = 1.0
            matrix[row, 0, 0] = half
            matrix[row, 0, X0_COLUMN] = -half * signal[j]
            continue
        to, kept = signal[j + 1], ratio[j + 1] / ratio[j]
        matrix[row, 0, 0] = to * kept / signal[j]
        matrix[row, 0, X0_COLUMN] = to * (1 - kept)
        if j + 1 < len(path):
            matrix[row, 1, 0] = to * (1 + kept) / 2 / signal[j]
            matrix[row, 1, X0_COLUMN] = to * (1 - kept) / 2
    return rows
