"""Both stages of a run on one device: the base's pictures never visit the host.

Each batch of the base is enlarged while it is still in the base's engine. The levels
that it hands over are those of the 8-bit pictures, so the large pictures are, bit for
bit, the ones that the way through the host makes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .backends.base import Engine
from .enlarging import Enlarging, low_res_from_pixels
from .errors import DeviceMemoryError, HandOverError
from .generate import (
    Conditions,
    Pictures,
    SampleSettings,
    finished_pictures,
    make_pictures,
    sample_job,
)
from .models import Model
from .sampler import Limits, SampleBatch, SampleJob, run_trajectory

Float32 = npt.NDArray[np.float32]

_LOG = logging.getLogger("id3pm_deploy")


class DeviceChain:
    """Enlarges the batches of a base engine as they come, on their device.

    Use it as a context manager. Where a batch cannot be enlarged so, for want of
    memory or because the engines are on two devices, that is logged, the second engine
    is closed, and :meth:`finish` gives None: everything is then to be enlarged by way
    of the host, as if there had been no chain.

    Args:
        base: The first stage's engine.
        large: The second stage's engine, not yet entered.
        second: How the second stage enlarges.
        on_row: Called after each of its table rows.
        limits: When to give up.

    Attributes:
        engine: The second stage's engine.
        seconds: Wall time that the second stage has taken.
    """

    def __init__(
        self,
        base: Engine,
        large: Engine,
        second: Enlarging,
        on_row: Callable[[int], None],
        limits: Limits,
    ) -> None:
        self._base, self.engine = base, large
        self.seconds = 0.0
        self._second, self._on_row, self._limits = second, on_row, limits
        self._job, self._table = sample_job(
            second.model, second.settings, second.wanted
        )
        self._batches: list[SampleBatch] | None = []

    def __enter__(self) -> DeviceChain:
        self.engine.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def take(self, batch: SampleBatch) -> None:
        """Enlarge the batch that the base has just finished, and still holds."""
        if self._batches is None:
            return
        begun = time.perf_counter()
        count, size = len(batch.samples), self._second.settings.batch_size
        try:
            for start in range(0, count, size):
                few = batch.samples[start : start + size]
                job = self._handed(start)
                made = run_trajectory(self.engine, job, few, self._on_row, self._limits)
                self._batches.append(made)
        except (DeviceMemoryError, HandOverError) as error:
            reason = " ".join(
                filter(None, (error.what, error.why and f"({error.why})"))
            )
            _LOG.warning("pictures are enlarged by way of the host: %s", reason)
            self._batches = None
            self.engine.close()
        self.seconds += time.perf_counter() - begun

    def _handed(self, start: int) -> SampleJob:
        def hand_over(target: Engine) -> bool:
            return self._base.hand_over(target, start)

        return dataclasses.replace(self._job, hand_over=hand_over)

    def finish(self) -> Pictures | None:
        """The large pictures; None if they could not be made so."""
        if self._batches is None:
            return None
        return finished_pictures(
            self.engine,
            self._second.model,
            self._second.settings,
            self._batches,
            self.seconds,
            self._table,
        )


def device_chain(
    base: Engine,
    second: Enlarging,
    on_row: Callable[[int], None],
    limits: Limits,
) -> DeviceChain | None:
    """A chain of ``base`` and the second stage; None where they are not both on a
    device, so that one may be closed before the other is opened."""
    if base.rig is None:
        return None
    large = second.open_engine()
    if large.rig is None:
        large.close()
        return None
    return DeviceChain(base, large, second, on_row, limits)


@dataclass(frozen=True)
class Large:
    """What the second stage made, and the engine that did."""

    pictures: Pictures
    engine: Engine


def both_stages(
    engine: Engine,
    model: Model,
    settings: SampleSettings,
    wanted: Conditions,
    second: Enlarging | None,
    low_res: Float32 | None,
    limits: Limits,
    on_row: Callable[[int], None],
) -> tuple[Pictures, Large | None]:
    """What the first stage makes, and what the second one makes of it, if there is one.

    On a device both engines are open together; elsewhere one after the other.

    Args:
        engine: The first stage's, not yet entered; it is closed in the end.
        model: What it runs.
        settings: How.
        wanted: One condition a picture.
        second: What enlarges the pictures.
        low_res: What ``model`` itself enlarges.
        limits: When to give up.
        on_row: Called after each table row of each batch of either stage.
    """
    with engine, ExitStack() as stack:
        chain = None if second is None else device_chain(engine, second, on_row, limits)
        take = None if chain is None else stack.enter_context(chain).take
        made = make_pictures(
            engine, model, settings, wanted, on_row, low_res, limits, take
        )
        if chain is not None:
            made = dataclasses.replace(made, seconds=made.seconds - chain.seconds)
            if (large := chain.finish()) is not None:
                return made, Large(large, chain.engine)
    if second is None:
        return made, None
    small = low_res_from_pixels(made.pixels)
    with second.open_engine() as last:
        large = make_pictures(
            last, second.model, second.settings, second.wanted, on_row, small, limits
        )
    return made, Large(large, last)
