"""Timesteps and noise of a batch: what each sample sees follows from its number.

So a batch is the same however many processes or pieces it is shared out to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_TIMES, _NOISE, _LOW_RES = 1, 2, 3
"""Third word of the seeds; the batches' own have two words."""


def draw_timesteps(
    seed: int, step: int, samples: Sequence[int], batch: int, timesteps: int
) -> Tensor:
    """Timesteps [n] int64, each uniform, spread evenly over the batch.

    One random offset shifts a comb of ``batch`` teeth (Kingma et al. 2021, app. I.1):
    the loss varies less than with timesteps drawn one by one.

    Args:
        seed: Of the run.
        step: Of the run.
        samples: Numbers of the samples within the batch.
        batch: Size of the batch.
        timesteps: T.
    """
    offset = np.random.default_rng([seed, step, _TIMES]).random()
    places = (np.asarray(samples) / batch + offset) % 1.0
    times = np.minimum((places * timesteps).astype(np.int64), timesteps - 1)
    return torch.from_numpy(times)


def draw_noise(
    seed: int, step: int, samples: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Normals [n, *shape] float32 for the samples of those numbers."""
    noise = np.empty((len(samples), *shape), dtype=np.float32)
    for place, sample in enumerate(samples):
        rng = np.random.default_rng([seed, step, _NOISE, sample])
        rng.standard_normal(dtype=np.float32, out=noise[place])
    return torch.from_numpy(noise)


def draw_low_res_noise(
    seed: int, step: int, samples: Sequence[int], shape: Sequence[int], most: float
) -> Tensor:
    """Noise [n, *shape] float32 for small pictures, its standard deviation uniform
    from 0 to ``most`` for each sample (Ho et al. 2022, cascaded diffusion, sec. 4.2).
    """
    noise = np.empty((len(samples), *shape), dtype=np.float32)
    for place, sample in enumerate(samples):
        rng = np.random.default_rng([seed, step, _LOW_RES, sample])
        level = np.float32(most * rng.random())
        noise[place] = level * rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(noise)
