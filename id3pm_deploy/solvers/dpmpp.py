"""DPM-Solver++, second-order multistep, as an ODE and as an SDE solver."""

from __future__ import annotations

import numpy as np

from ..schedule import Float64
from ..spec import DiffusionSpec
from .layout import NOISE_COLUMN, X0_COLUMN, matrices, prediction_rows
from .path import NoisePath
from .settings import SolverSettings


def dpmpp_2m_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), algorithm 2.

    Slot 1 keeps the previous x0. The first row and the one that goes to σ = 0 are of
    first order.
    """
    return _multistep_rows(spec, path, settings, stochastic=False)


def dpmpp_2m_sde_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """SDE-DPM-Solver++(2M): Lu et al. 2022 (DPM-Solver++), the midpoint form.

    x' = σ'/σ·e^{-h}·x + α'·(1 - e^{-2h})·(D_0 + ½·D_1) + σ'·√(1 - e^{-2h})·noise, with
    D_0 and D_1 as in :func:`dpmpp_2m_rows`. Its first order is ``ddpm_rows`` with the
    variance fixed_small.
    """
    return _multistep_rows(spec, path, settings, stochastic=True)


def _multistep_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings, *, stochastic: bool
) -> Float64:
    rows = prediction_rows(spec, path, settings)
    matrix = matrices(rows)
    signal, sigma, lambdas = path.signal, path.sigma, path.lambdas
    for j in range(len(path)):
        matrix[j, 1, X0_COLUMN] = 1.0
        h = lambdas[j + 1] - lambdas[j]
        forgotten = -np.expm1(-2 * h)
        kept = sigma[j + 1] / sigma[j]
        gain = signal[j + 1] * -np.expm1(-h)
        if stochastic:
            kept, gain = kept * np.exp(-h), signal[j + 1] * forgotten
            matrix[j, 0, NOISE_COLUMN] = sigma[j + 1] * np.sqrt(forgotten)
        matrix[j, 0, 0] = kept
        matrix[j, 0, X0_COLUMN] = gain
        if j > 0 and np.isfinite(h):
            ratio = (lambdas[j] - lambdas[j - 1]) / h
            matrix[j, 0, X0_COLUMN] = gain * (1 + 0.5 / ratio)
            matrix[j, 0, 1] = -gain * 0.5 / ratio
    return rows
