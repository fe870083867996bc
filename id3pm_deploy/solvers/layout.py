"""How the numbers of a table row lie, and the columns that all solvers share."""

from __future__ import annotations

import numpy as np

from ..schedule import Float64
from ..spec import DiffusionSpec
from .path import NoisePath
from .settings import SolverSettings

STATE_SLOTS = 4
"""K: state slots of an exported step graph."""

_HEAD = ("t", "c_in", "c_x", "c_p", "clip", "min_log", "max_log")
STEP_HEAD = len(_HEAD)
CLIP_COLUMN = _HEAD.index("clip")
RESCALE_COLUMN = STEP_HEAD + STATE_SLOTS * (STATE_SLOTS + 2)
CARRY_COLUMN = RESCALE_COLUMN + 1
STEP_WIDTH = CARRY_COLUMN + 1
"""S: numbers in a table row. New columns come last and are neutral at 0, so that a
graph that was exported before they came runs every table that does not use them."""

LATER_COLUMNS = {
    RESCALE_COLUMN: "guidance rescale",
    CARRY_COLUMN: "sequential guidance rows",
}
"""The columns that came after the first release of the graph, and what each is for."""
STEP_WIDTHS = (*LATER_COLUMNS, STEP_WIDTH)
"""Numbers in a table row of all graphs that this release can run."""

X0_COLUMN = STATE_SLOTS
NOISE_COLUMN = STATE_SLOTS + 1

NO_CLIP = 1e6
"""Clip value that clamps nothing a sane model predicts, and stays finite in FP32."""


def matrices(rows: Float64) -> Float64:
    """View of A in rows [N, S]: [N, K, K + 2]."""
    flat = rows[:, STEP_HEAD:RESCALE_COLUMN]
    return flat.reshape(len(rows), STATE_SLOTS, STATE_SLOTS + 2)


def prediction_rows(
    spec: DiffusionSpec, path: NoisePath, settings: SolverSettings
) -> Float64:
    """[N, S] rows, one for each level of ``path``, with A still zero.

    ε: x0 = (x - √(1-ᾱ)·ε)/√ᾱ (Ho et al. 2020, eq. 15); v: x0 = √ᾱ·x - √(1-ᾱ)·v
    (Salimans & Ho 2022, app. D).
    """
    rows = np.zeros((len(path), STEP_WIDTH))
    signal, sigma = path.signal[:-1], path.sigma[:-1]
    c_x, c_p = {
        "epsilon": (1 / signal, -sigma / signal),
        "v": (signal, -sigma),
        "x0": (np.zeros_like(signal), np.ones_like(signal)),
    }[spec.prediction_type]
    rows[:, 0], rows[:, 1] = path.timesteps, 1.0
    rows[:, 2], rows[:, 3] = c_x, c_p
    rows[:, 4] = settings.clip or NO_CLIP
    return rows
