"""UniPC: predictor and corrector of the same order in one table row."""

from __future__ import annotations

import numpy as np

from ..schedule import Float64
from ..spec import DiffusionSpec
from .layout import X0_COLUMN, matrices, prediction_rows
from .path import NoisePath
from .settings import SolverSettings


def unipc_2_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """UniPC-2, see :func:`unipc_3_rows`; slots 0 to 2."""
    return _unipc_rows(spec, path, settings, 2)


def unipc_3_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """UniPC-3 for data prediction, B(h) = e^h - 1 ("bh2"): Zhao et al. 2023, sec. 3.

    The UNet sees the predicted state only. Its x0 is then used twice in one row: to
    correct that state, and to predict the next one from the corrected state. What the
    coming correction takes from earlier rows is gathered beforehand, so that the row
    has no need of the state it started from:

        slot 0    predicted state x̃_j
        slot 1    u_j, all of the corrected state x_j but its share of the new x0:
                  x_j = u_j + κ_j·x0_j
        slot 2    x0_{j-1}
        slot 3    x0_{j-2}
    """
    return _unipc_rows(spec, path, settings, 3)


def _unipc_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings, order: int
) -> Float64:
    rows = prediction_rows(spec, path, settings)
    matrix = matrices(rows)
    share = 0.0
    for j, own in enumerate(_orders(path, order, settings.final_order != "full")):
        corrected = np.zeros(matrix.shape[2])
        corrected[1 if j else 0] = 1.0
        corrected[X0_COLUMN] = share
        matrix[j, 0] = _advanced(corrected, *_weights(path, j, own, ahead=False))
        if j + 1 < len(path):
            kept, weights = _weights(path, j, own, ahead=True)
            share, weights[0] = weights[0], 0.0
            matrix[j, 1] = _advanced(corrected, kept, weights)
        matrix[j, 2, X0_COLUMN] = 1.0
        if order == 3:
            matrix[j, 3, 2] = 1.0
    return rows


def _orders(path: NoisePath, order: int, lower_final: bool) -> list[int]:
    """The order of each step: rising from 1, and falling towards clean data."""
    count = len(path)
    orders = [min(order, j + 1) for j in range(count)]
    if path.ends_clean:
        left = range(count, 0, -1) if lower_final else [order] * (count - 1) + [1]
        orders = [min(pair) for pair in zip(orders, left, strict=True)]
    return orders


def _advanced(corrected: Float64, kept: float, weights: Float64) -> Float64:
    """[K + 2] row of A that carries the corrected state one step on."""
    row: Float64 = kept * corrected
    row[X0_COLUMN] += weights[1]
    row[2] += weights[2]
    row[3] += weights[3]
    return row


def _weights(
    path: NoisePath, j: int, order: int, *, ahead: bool
) -> tuple[float, Float64]:
    """Shares of the state and of each x0 in a step from level j to j + 1.

    x' = σ'/σ·x - α'·(e^{-h} - 1)·(m_j + Σ_k ρ_k·(m_k - m_j)/r_k), UniP and UniC of
    Zhao et al. 2023, sec. 3, with r_k = (λ_k - λ_j)/h.

    Args:
        path: Noise levels.
        j: Where the step begins.
        order: p, with nodes m_{j-1} to m_{j-p+1}.
        ahead: Whether m_{j+1} is a node too: the corrector.

    Returns:
        The state's share, and those of m_{j+1}, m_j, m_{j-1} and m_{j-2}.
    """
    lambdas = path.lambdas
    h = lambdas[j + 1] - lambdas[j]
    step = path.signal[j + 1] * np.expm1(-h)
    offsets = [-k for k in range(1, order)] + [1] * ahead
    weights = np.zeros(4)
    weights[1] = -step
    if offsets:
        nodes = np.array([(lambdas[j + k] - lambdas[j]) / h for k in offsets])
        shares = -step * _node_weights(h, nodes) / nodes
        weights[1 - np.array(offsets)] = shares
        weights[1] -= shares.sum()
    return float(path.sigma[j + 1] / path.sigma[j]), weights


def _node_weights(h: float, nodes: Float64) -> Float64:
    """ρ of the nodes r, which make the step exact for x0 a polynomial in λ.

    Σ_k ρ_k·r_k^{i-1} = i!·φ_{i+1}(-h)·(-h)/(e^{-h} - 1) with φ_1(z) = (e^z - 1)/z and
    φ_{i+1}(z) = (φ_i(z) - 1/i!)/z (Zhao et al. 2023, sec. 3). A single node takes ½,
    which is of the same order in h.
    """
    count = len(nodes)
    if count == 1:
        return np.array([0.5])
    base = np.expm1(-h)
    phi, factorial = base / -h - 1, 1.0
    wanted = np.empty(count)
    for i in range(count):
        wanted[i] = phi * factorial / base
        factorial *= i + 2
        phi = phi / -h - 1 / factorial
    powers = np.vander(nodes, increasing=True).T
    return np.asarray(np.linalg.solve(powers, wanted), dtype=np.float64)
