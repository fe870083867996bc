"""Guidance as tables: which UNet rows there are, how they mix, and when.

A :class:`GuidanceTable` is what one table row of a solver needs; a
:class:`GuidancePlan` says which of a few such tables each table row takes, so that the
guidance scale can move along a trajectory and rows at scale 1 run half the UNet rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import defaults
from .errors import InputError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class GuidanceTable:
    """What R UNet rows see and what B samples make of them.

    Attributes:
        row: [R] int32, the sample that a UNet row denoises.
        identity: [R, D] float32, its normalised identity vector; zeros are null.
        mix: [2, B, R] float32, weights for the prediction and for learned variance.
    """

    row: npt.NDArray[np.int32]
    identity: Float32
    mix: Float32

    @property
    def samples(self) -> int:
        """B."""
        return int(self.mix.shape[1])

    @property
    def unet_rows(self) -> int:
        """R."""
        return len(self.row)


@dataclass(frozen=True)
class Others:
    """Further identity vectors of B samples, V of each beside its own.

    The conditional prediction is that of the blend, and guidance leads away from the
    unguided one, which need not be the null identity's:

        cond     = (1 - Σ_v blend_v)·own + Σ_v blend_v·other_v
        unguided = (1 - Σ_v negative_v)·null + Σ_v negative_v·other_v
        guided   = unguided + s·(cond - unguided)

    With one negative of share 1 that is the negative prompt of text models; blends are
    the conjunction of Liu et al. 2022 (eq. 11), with weights that add up to s.

    Attributes:
        identity: [B, V, D] float32, normalised.
        blend: [B, V] float64, shares of the blend; a sample's own vector has the rest.
        negative: [B, V] float64, shares of the unguided prediction; null has the rest.
    """

    identity: Float32
    blend: Float64
    negative: Float64

    def part(self, samples: slice | list[int]) -> Others:
        """Those of some samples."""
        return Others(
            self.identity[samples], self.blend[samples], self.negative[samples]
        )


SCHEDULES: dict[str, Callable[[Float64], Float64]] = {
    "constant": np.ones_like,
    "linear": lambda u: u,
    "cosine": lambda u: (1 - np.cos(np.pi * u)) / 2,
}
"""Share of the way from scale 1 to the full scale, by progress u in [0, 1]; see
:func:`guidance_scales`."""


@dataclass(frozen=True)
class GuidanceSettings:
    """How strongly samples are guided, and when; kept in run records.

    Attributes:
        scale: Guidance scale s from 0 to 100; 1 is none. Where the scale moves, the
            one it ends at.
        schedule: How the scale moves: ``constant``, ``linear`` or ``cosine``; see
            :func:`guidance_scales`.
        scales: One scale for each table row, in place of ``scale`` and ``schedule``.
        interval: Lowest and highest timestep that is guided, both included; outside,
            the scale is 1 (Kynkäänniemi et al. 2024, who bound noise levels σ; these
            are training timesteps). None: all are.
        rescale: φ of guidance rescale, from 0 (off) to 1 (Lin et al. 2024, eq. 15 and
            16): the share by which a guided prediction gets the standard deviation of
            the conditional one.
        guide_variance: Guide learned variance channels too.
        rows: ``parallel`` runs both UNet rows of a guided sample in one batch,
            ``sequential`` one after the other, in less memory.

    Raises:
        InputError: A value is out of range or contradicts another.
    """

    scale: float = defaults.GUIDANCE
    schedule: str = "constant"
    scales: tuple[float, ...] | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    guide_variance: bool = False
    rows: str = "parallel"

    def __post_init__(self) -> None:
        for scale in (self.scale, *(self.scales or ())):
            _check_scale(scale)
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"there is no guidance schedule {self.schedule!r}",
                fix=f"use one of {', '.join(SCHEDULES)}",
            )
        if self.scales is not None and (not self.scales or self.schedule != "constant"):
            raise InputError(
                "a list of guidance scales must not be empty, nor have a schedule",
                why=f"it has {len(self.scales)}, and the schedule {self.schedule!r}",
                fix="give either a list of scales, or one scale and a schedule",
            )
        if self.interval is not None:
            _check_interval(self.interval)
        if not 0.0 <= self.rescale <= 1.0:
            raise InputError(
                "guidance rescale must be from 0 to 1", why=f"it is {self.rescale}"
            )
        if self.rescale and self.guide_variance:
            raise InputError(
                "guidance rescale cannot be used while learned variance is guided",
                why="it refers to the conditional prediction, which is then not kept",
                fix="leave out one of the two",
            )
        if self.rows not in defaults.GUIDANCE_ROWS:
            raise InputError(
                f"guidance rows cannot be {self.rows!r}",
                fix=f"use one of {', '.join(defaults.GUIDANCE_ROWS)}",
            )
        if self.rows == "sequential" and self.guide_variance:
            raise InputError(
                "learned variance cannot be guided with sequential rows",
                why="one slot of the state holds the prediction without identity, and "
                "none is left for its variance",
                fix="leave variance unguided, or use parallel guidance rows",
            )


def _check_scale(scale: float) -> None:
    if not 0.0 <= scale <= 100.0:
        raise InputError(
            "the guidance scale must be from 0 to 100", why=f"it is {scale}"
        )


def _check_interval(interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0.0 <= low <= high or not math.isfinite(high):
        raise InputError(
            "the guidance interval must be two timesteps, the lower one first",
            why=f"it is {low:g} to {high:g}",
        )


@dataclass(frozen=True)
class GuidancePlan:
    """Guidance of a whole trajectory.

    Attributes:
        tables: The different ones that occur, all with the same B; R is B where the
            scale is 1.
        index: [N] int, the table of each table row.
        rescale: [N] float32, φ of each table row; 0 where the scale is 1.
    """

    tables: tuple[GuidanceTable, ...]
    index: npt.NDArray[np.intp]
    rescale: Float32


def guidance_scales(
    settings: GuidanceSettings, timesteps: npt.NDArray[np.float64]
) -> Float64:
    """The guidance scale of every table row, [N] float64.

    ``linear`` and ``cosine`` are the increasing schedules of Wang et al. 2024
    ("Analysis of classifier-free guidance weight schedulers"), 1 - t/T and
    cos(πt/T) + 1, moved and scaled so that a trajectory starts at scale 1 and ends at
    the given scale s: with progress u = (t_first - t)/(t_first - t_last),

        linear   1 + (s - 1)·u
        cosine   1 + (s - 1)·(1 - cos πu)/2

    Their weights are the s - 1 here, and doubled to keep the mean of a constant w; for
    that, give s = 1 + 2w. u follows the timestep and not the row's number, so that two
    rows at one timestep (Heun) share a scale. A single row has u = 1.

    Args:
        settings: What to do.
        timesteps: [N], training timesteps of the table rows, first executed first.

    Raises:
        InputError: There are more or fewer scales than table rows, or no table row
            lies in the interval.
    """
    times = np.asarray(timesteps, dtype=np.float64)
    if settings.scales is None:
        share = SCHEDULES[settings.schedule](_progress(times))
        moved = 1 + (settings.scale - 1) * share
        scales = np.where(share == 1, settings.scale, moved)
    else:
        scales = np.array(settings.scales, dtype=np.float64)
    if len(scales) != len(times):
        raise InputError(
            f"there must be {len(times)} guidance scales, one for each table row",
            why=f"there are {len(scales)}",
        )
    if settings.interval is None:
        return scales
    low, high = settings.interval
    inside = (low <= times) & (times <= high)
    if not inside.any():
        raise InputError(
            f"no table row lies in the guidance interval {low:g} to {high:g}",
            why=f"their timesteps run from {times.max():g} to {times.min():g}",
            fix="widen the interval, or switch guidance off with a scale of 1",
        )
    return np.where(inside, scales, 1.0)


def _progress(times: Float64) -> Float64:
    """0 at the first timestep, 1 at the last."""
    span = times[0] - times[-1]
    done: Float64 = (times[0] - times) / span if span else np.ones_like(times)
    return done


def guidance_plan(
    identity: Float32,
    settings: GuidanceSettings,
    timesteps: npt.NDArray[np.float64],
    *,
    others: Others | None = None,
    moved: Float32 | None = None,
) -> GuidancePlan:
    """Guidance of a batch over a trajectory.

    What a sample is given depends on its own identity and the settings alone, so that
    the batch cannot change its picture.

    Args:
        identity: [B, D] float32, normalised; a zero row makes an unconditional sample.
        settings: What to do.
        timesteps: [N], training timesteps of the table rows, first executed first.
        others: Further identities of the samples.
        moved: [N, B, D] float32, what each table row sees in place of ``identity``,
            where that moves; unconditional samples stay so.

    Raises:
        InputError: See :func:`guidance_scales`; or the model has no identity (D = 0)
            and a scale is not 1.
    """
    scales = guidance_scales(settings, timesteps)
    if not identity.shape[1] and (scales != 1).any():
        raise InputError(
            "a model without identity cannot be guided",
            why=f"the guidance scale is {scales.max():g}",
            fix="use the scale 1",
        )
    rescale = np.where(scales == 1, 0, settings.rescale).astype(np.float32)
    if not identity.any() and others is None:
        scales = np.ones_like(scales)
    made: dict[tuple[float, bytes], int] = {}
    tables: list[GuidanceTable] = []
    index = np.zeros(len(scales), np.intp)
    for j, scale in enumerate(scales.tolist()):
        own = identity if moved is None else np.ascontiguousarray(moved[j])
        key = scale, b"" if moved is None else own.tobytes()
        if key not in made:
            made[key] = len(tables)
            tables.append(
                guidance_table(
                    own, scale, guide_variance=settings.guide_variance, others=others
                )
            )
        index[j] = made[key]
    return GuidancePlan(_sharing(tables), index, rescale)


def _sharing(tables: Sequence[GuidanceTable]) -> tuple[GuidanceTable, ...]:
    """The same tables, which hold what several of them have in common only once: those
    of different scales differ in their mix only."""
    first: dict[tuple[bytes, bytes], GuidanceTable] = {}
    shared = []
    for table in tables:
        key = table.row.tobytes(), table.identity.tobytes()
        same = first.setdefault(key, table)
        shared.append(dataclasses.replace(table, row=same.row, identity=same.identity))
    return tuple(shared)


def guidance_table(
    identity: Float32,
    scale: float,
    *,
    guide_variance: bool = False,
    others: Others | None = None,
) -> GuidanceTable:
    """Classifier-free guidance: null + s·(id - null) (Ho & Salimans 2022, eq. 6).

    An unconditional sample, and every sample at scale 1, needs one UNet row only. It
    gets one whatever shares its batch, so that the batch cannot change its picture.
    Others cost a row each where they weigh anything.

    Args:
        identity: [B, D] float32, normalised; a zero row makes an unconditional sample.
        scale: s.
        guide_variance: Guide learned variance channels too, as the ID3PM
            re-implementation does; otherwise the conditional branch's are taken, as
            GLIDE does.
        others: Further identities of the samples.

    Raises:
        InputError: The scale is not a finite number from 0 to 100.
    """
    _check_scale(scale)
    count = len(identity)
    own = np.arange(count, dtype=np.int32)
    cond, null = np.ones(count), np.ones(count)
    if others is not None:
        cond = cond - others.blend.sum(axis=1)
        null = null - others.negative.sum(axis=1)
    away = np.float64(1 - scale) * null
    # What has no identity of its own is predicted by its own row.
    nobody = ~identity.any(axis=1)
    guided = np.flatnonzero(~nobody & (away != 0))
    rows, vectors = [own, own[guided]], [identity, np.zeros_like(identity[guided])]
    weights = [scale * cond + np.where(nobody, away, 0), away[guided]]
    plain = [cond, np.zeros(len(guided))]
    if others is not None:
        mixed = scale * others.blend + (1 - scale) * others.negative
        who, which = np.nonzero((mixed != 0) | (others.blend != 0))
        rows.append(who.astype(np.int32))
        vectors.append(others.identity[who, which])
        weights.append(mixed[who, which])
        plain.append(others.blend[who, which])
    row = np.concatenate(rows)
    mix = np.zeros((2, count, len(row)), np.float32)
    at = np.arange(len(row))
    mix[0, row, at] = np.concatenate(weights)
    mix[1, row, at] = np.concatenate(weights if guide_variance else plain)
    return GuidanceTable(row, np.concatenate(vectors), mix)
