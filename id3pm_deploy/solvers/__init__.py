"""Solvers as tables: one row of coefficients for each UNet call.

A table is a pure function of the noise schedule and the settings, computed in float64
and cast once. The step graph (see ``reference/step.py``) executes a row as

    pred   = what the UNet says of c_in·x_t at timestep t, after guidance
    pred   = pred + c_s·state_{K-1}
    pred   = pred·(1 + φ·(std(conditional)/std(pred) - 1))
    x0     = clamp(c_x·x_t + c_p·pred, -clip, clip)
    n      = noise·exp(½·((v+1)/2·max_log + (1-(v+1)/2)·min_log))
    state' = A · [state_0, ..., state_{K-1}, x0, n]

with state_0 = x_t. All formulas are in the variance-preserving form
x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε.
"""

from .layout import (
    CARRY_COLUMN,
    CLIP_COLUMN,
    LATER_COLUMNS,
    NO_CLIP,
    NOISE_COLUMN,
    RESCALE_COLUMN,
    STATE_SLOTS,
    STEP_HEAD,
    STEP_WIDTH,
    STEP_WIDTHS,
    X0_COLUMN,
    matrices,
)
from .path import NoisePath
from .settings import SolverSettings
from .table import SOLVERS, Solver, SolverTable, solver_table
from .timesteps import (
    SPACINGS,
    Spacing,
    first_timestep,
    spaced_points,
    spaced_timesteps,
)

__all__ = [
    "CARRY_COLUMN",
    "CLIP_COLUMN",
    "LATER_COLUMNS",
    "NOISE_COLUMN",
    "NO_CLIP",
    "RESCALE_COLUMN",
    "SOLVERS",
    "SPACINGS",
    "STATE_SLOTS",
    "STEP_HEAD",
    "STEP_WIDTH",
    "STEP_WIDTHS",
    "X0_COLUMN",
    "NoisePath",
    "Solver",
    "SolverSettings",
    "SolverTable",
    "Spacing",
    "first_timestep",
    "matrices",
    "solver_table",
    "spaced_points",
    "spaced_timesteps",
]
