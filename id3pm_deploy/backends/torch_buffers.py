"""Buffers of a TorchRig: what a step reads and writes, and two staging slots."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..solvers import STATE_SLOTS, STEP_WIDTH
from .base import StepShapes
from .rig import SLOTS


class Memory(Protocol):
    """Where buffers come from: the rig."""

    shapes: StepShapes

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A zeroed tensor on the device."""

    def host_zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A zeroed tensor of the host that the device can copy by itself."""

    def uploads_wait(self) -> None:
        """What is uploaded from now on waits for what is queued by now."""


class Slot:
    """One staging place: table rows and their noise, on the host and on the device."""

    def __init__(self, rig: Memory, samples: int, rows: int) -> None:
        self.steps = rig.zeros(rows, samples, STEP_WIDTH)
        self.host_steps = rig.host_zeros(rows, samples, STEP_WIDTH)
        self.picture = (rows, samples, *rig.shapes.picture)
        self.done: Any = None
        self.noise: Any = None
        self.host_noise: Any = None

    def make_noise(self, rig: Memory) -> None:
        """Memory for noise, which deterministic solvers never need."""
        if self.noise is None:
            self.noise = rig.zeros(*self.picture)
            rig.uploads_wait()  # for the zeros
            self.host_noise = rig.host_zeros(*self.picture)


class SampleBuffers:
    """Buffers of B samples, whatever guides them."""

    def __init__(
        self, rig: Memory, samples: int, rows: int, kept: SampleBuffers | None
    ) -> None:
        shapes, self.samples, self.rows = rig.shapes, samples, rows
        picture = (samples, *shapes.picture)
        small = shapes.low_res
        if kept is None:
            self.state = rig.zeros(STATE_SLOTS, *picture)
            self.x0 = rig.zeros(*picture)
            self.low_res = None if small is None else rig.zeros(samples, *small)
        else:
            self.state, self.x0, self.low_res = kept.state, kept.x0, kept.low_res
        self.noise = rig.zeros(*picture)
        self.step = rig.zeros(samples, STEP_WIDTH)
        self.slots = [Slot(rig, samples, rows) for _ in range(SLOTS)]

    def inputs(self, rows: RowBuffers) -> tuple[Tensor, ...]:
        """The step module's, in its order."""
        constant = (rows.identity, rows.row, rows.mix)
        given = (self.state, self.noise, *constant, self.step)
        return given if self.low_res is None else (*given, self.low_res)


class RowBuffers:
    """Buffers of R UNet rows of B samples."""

    def __init__(self, rig: Memory, samples: int, unet_rows: int, rows: int) -> None:
        self.identity = rig.zeros(unet_rows, rig.shapes.identity_dim)
        self.row = rig.zeros(unet_rows, dtype=torch.int32)
        self.mix = rig.zeros(2, samples, unet_rows)
        self.finite = rig.zeros(unet_rows)
        self.logs = [rig.zeros(rows, unet_rows) for _ in range(SLOTS)]
