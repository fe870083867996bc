"""A baseline: the loop that a user of diffusers writes, with diffusers' own UNet2DModel
and scheduler, and classifier-free guidance in one doubled batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm

from ..backends.base import Float32, step_shapes
from ..compare import Comparison
from ..errors import EngineError
from ..reference.checkpoint import load_checkpoint
from ..reference.sampling import make_scheduler
from ..selftest import Arrays
from .case import Case
from .column import Runner
from .torch_loop import HALF_ON_CPU, no_tf32

_SOLVERS = ("ddpm", "ddim")


class DiffusersRunner(Runner):
    """diffusers' loop.

    Args:
        case: What is measured; it has a checkpoint.
        device: A torch device.
        precision: ``float32``, or ``float16``: ``unet.half()``, as its users do. The
            scheduler gets float32, without which a cosine schedule overflows.

    Raises:
        EngineError: A user of diffusers could not do this with a few lines.
    """

    def __init__(self, case: Case, device: str, precision: str) -> None:
        _check_plain(case)
        if precision != "float32" and not device.startswith("cuda"):
            raise EngineError(HALF_ON_CPU)
        assert case.checkpoint is not None
        if case.settings.threads:
            torch.set_num_threads(case.settings.threads)
        self._case, self._device = case, torch.device(device)
        network: Any = load_checkpoint(case.checkpoint).network.eval()
        self._dtype = torch.float32 if precision == "float32" else torch.float16
        network = network.to(self._device, self._dtype)
        self._unet: Any = network.unet.to(memory_format=torch.channels_last)
        self._projection: Any = getattr(network, "identity_projection", None)
        self._channels = network.spec.image_channels
        self.precision, self.device = precision, self._device.type
        self.label = f"diffusers {diffusers.__version__}, PyTorch {torch.__version__}, "
        self.label += f"{precision}, {device}"
        self._scheduler = _scheduler(case)

    def close(self) -> None:
        """Drop the network."""
        self._unet = self._projection = None

    def golden(self, golden: Arrays) -> Comparison | None:
        """None: it has no step graph; its trajectory is judged."""
        return None

    def begin(self, samples: int) -> None:
        """Take this batch size."""
        job = self._case.job(samples)
        self._samples, self._noise = samples, job.noise
        self._shape = (samples, *step_shapes(self._case.model.spec).picture)
        self._scale = float(job.guidance.scale)
        identity = torch.from_numpy(job.identity).to(self._device, self._dtype)
        if self._scale != 1:
            identity = torch.cat([identity, torch.zeros_like(identity)])
        self._labels: Any = None
        self._rows = len(identity)
        with torch.no_grad():
            wide = self._case.model.spec.model.embedding_dim
            self._labels = (
                torch.zeros((self._rows, wide), device=self._device, dtype=self._dtype)
                if self._projection is None
                else self._projection(identity)
            )
        self._times = [int(t) for t in self._case.table.timesteps]
        self._timed = self._case.timed_row(samples)

    def _predict(self, x: Any, t: int) -> Any:
        doubled = torch.cat([x] * (self._rows // self._samples)).to(self._dtype)
        out = self._unet(doubled, t, class_labels=self._labels).sample.float()
        if self._scale == 1:
            return self._trimmed(out)
        own, null = out.chunk(2)
        mixed = null + self._scale * (own - null)
        if not self._case.settings.guidance.guide_variance:
            kept = (mixed[:, : self._channels], own[:, self._channels :])
            mixed = torch.cat(kept, dim=1)
        return self._trimmed(mixed)

    def _trimmed(self, out: Any) -> Any:
        learned = self._case.table.settings.variance == "learned"
        return out if learned else out[:, : self._channels]

    def _trajectory(self, x: Any, at: Callable[[int], object]) -> Any:
        own = {"use_clipped_model_output": True, "eta": self._case.table.settings.eta}
        own = own if self._case.table.settings.solver == "ddim" else {}
        with torch.no_grad(), no_tf32():
            for j, t in enumerate(self._times):
                at(j)
                out = self._predict(x, t)
                x = self._scheduler.step(out, t, x, **own).prev_sample
        return x.cpu()

    def check(self) -> Float32:
        """A trajectory on the product's noise, given to the scheduler as its own."""
        numbers, shape, now = range(self._samples), self._shape[1:], [0]

        def drawn(*_: Any, **__: Any) -> Any:
            row = self._noise.row(now[0], numbers, shape)
            return torch.from_numpy(row).to(self._device)

        def at(j: int) -> None:
            now[0] = j

        x_t = self._noise.start(numbers, shape) * np.float32(self._case.table.x_scale)
        with mock.patch.object(scheduling_ddpm, "randn_tensor", drawn):
            made = self._trajectory(torch.from_numpy(x_t).to(self._device), at)
        images: Float32 = made.numpy()
        return images

    def prepare_row(self) -> None:
        """Put the timed row's start in place."""
        self._x = torch.from_numpy(self._timed.x_t).to(self._device)

    def run_row(self) -> None:
        """One prediction and one step of the scheduler, and a wait."""
        t = self._times[self._timed.number]
        with torch.no_grad(), no_tf32():
            self._scheduler.step(self._predict(self._x, t), t, self._x)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def run_trajectory(self) -> None:
        """The loop, on noise of the scheduler's own drawing."""
        x_t = torch.randn(self._shape, device=self._device)
        self._trajectory(x_t, lambda j: None)


def _check_plain(case: Case) -> None:
    """Raise :class:`EngineError` for what takes more than the loop of the examples."""
    spec, settings, guidance = case.model.spec, case.table.settings, case.settings
    told = guidance.guidance
    if settings.solver not in _SOLVERS:
        raise EngineError(f"written for {' and '.join(_SOLVERS)} only")
    if told.rows != "parallel":
        raise EngineError("written for guided rows side by side only")
    if told.scales or told.interval or told.rescale or told.schedule != "constant":
        raise EngineError("written for a constant guidance scale only")
    if spec.model.low_res_size is not None:
        raise EngineError("not written for super-resolution")
    if spec.model.base_channels != spec.model.level_channels[0]:
        raise EngineError("UNet2DModel ties the timestep embedding to the first level")
    if settings.eta and settings.solver == "ddim":
        raise EngineError("written for a deterministic ddim only")


def _scheduler(case: Case) -> Any:
    settings = case.table.settings
    scheduler = make_scheduler(
        case.model.spec,
        settings.solver,
        clip=settings.clip,
        variance=settings.variance,
    )
    times = [int(t) for t in case.table.timesteps]
    if settings.solver == "ddpm":
        scheduler.set_timesteps(timesteps=times)
        return scheduler
    gaps = {a - b for a, b in itertools.pairwise(times)} or {times[0] + 1}
    gap = gaps.pop()
    if gaps or times[-1] >= gap:
        raise EngineError("diffusers' ddim takes even spacings only")
    # It goes from t to t - T // N; T and N are told so that this is the gap.
    scheduler.register_to_config(num_train_timesteps=gap)
    scheduler.num_inference_steps = 1
    return scheduler
