"""DDIM, and Euler's method on the probability-flow ODE, which has the same formula."""

from __future__ import annotations

import numpy as np

from ..schedule import Float64
from ..spec import DiffusionSpec
from .layout import NOISE_COLUMN, X0_COLUMN, matrices, prediction_rows
from .path import NoisePath
from .settings import SolverSettings


def ddim_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """DDIM(η): Song et al. 2021, eq. 12 and 16, with ε taken from the clipped x0.

    At η = 0 this is Euler's method on dx̂/dσ̂ = (x̂ - x0)/σ̂ with x̂ = x/√ᾱ and
    σ̂ = √((1-ᾱ)/ᾱ) (Karras et al. 2022, alg. 1 without churn; Song et al., sec. 4.3):
    x̂' = x̂ + (σ̂' - σ̂)(x̂ - x0)/σ̂ = x0 + σ̂'·(x̂ - x0)/σ̂, times √ᾱ'.
    """
    alphas, previous = path.alphas[:-1], path.alphas[1:]
    rows = prediction_rows(spec, path, settings)
    matrix = matrices(rows)
    spread = np.sqrt((1 - previous) / (1 - alphas)) * np.sqrt(1 - alphas / previous)
    sigma = settings.eta * spread
    towards = np.sqrt(np.maximum(1 - previous - sigma**2, 0.0))
    matrix[:, 0, 0] = towards / np.sqrt(1 - alphas)
    matrix[:, 0, X0_COLUMN] = np.sqrt(previous) - towards * np.sqrt(
        alphas / (1 - alphas)
    )
    matrix[:, 0, NOISE_COLUMN] = sigma
    return rows
