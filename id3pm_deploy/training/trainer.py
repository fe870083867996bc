"""One process of a run: network, averages, optimizer, and one step of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reference.checkpoint import save_checkpoint
from ..reference.unet import IdentityUNet
from ..spec import DiffusionSpec
from .config import TrainingConfig
from .draws import draw_low_res_noise, draw_noise, draw_timesteps
from .ema import Ema
from .losses import DiffusionLoss
from .low_res import reduce_pictures
from .state import load_state, save_state
from .work import work_folder

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Plan:
    """What every process of a run is told; ``threads`` 0 leaves torch's choice."""

    config: TrainingConfig
    spec: DiffusionSpec
    out: Path
    resume: bool = False
    initial: dict[str, Tensor] | None = None
    threads: int = 0


class Trainer:
    """One process of a run.

    Every process holds the same weights and takes its share of each batch.

    Args:
        plan: What to train.
        accelerator: The device, the precision and the other processes.

    Raises:
        TrainingError: The state cannot be resumed.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator) -> None:
        config = plan.config
        self.config, self.spec, self.out = config, plan.spec, plan.out
        self.accelerator, self.work = accelerator, work_folder(plan.out)
        self.rank = accelerator.process_index
        torch.manual_seed(config.seed)
        network = IdentityUNet(plan.spec.model, plan.spec.condition_dim)
        self.network = network.to(accelerator.device).train()
        if plan.initial is not None:
            self.network.load_state_dict(plan.initial)
        decays = (config.ema_decay, *config.ema_decays)
        self.averages = [Ema(self.network, decay) for decay in decays]
        self.optimizer: Any = accelerator.prepare_optimizer(
            torch.optim.AdamW(
                self.network.parameters(),
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
            )
        )
        self.loss = DiffusionLoss(
            plan.spec,
            min_snr_gamma=config.min_snr_gamma,
            vlb_weight=config.vlb_weight,
            device=accelerator.device,
        )
        self.forward: Any = (
            torch.compile(self.network) if config.compile else self.network
        )
        self.step = 0
        if plan.resume:
            self.step = load_state(self.work, *self._state())

    def _state(self) -> Any:
        scaler = self.accelerator.scaler
        return self.network, self.averages, self.optimizer, scaler

    def train_step(self, x0: Tensor, condition: Tensor) -> dict[str, float]:
        """One optimizer step on this process's share of a batch.

        Args:
            x0: [N, C, H, W] in [-1, 1], the whole batch.
            condition: [N, D].

        Returns:
            ``loss``, its parts, and the norm of the gradient before it is clipped; the
            means over all processes.
        """
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(hash((config.seed, self.step, self.rank)) & (1 << 62) - 1)
        rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        figures = torch.zeros(3, device=accelerator.device)
        for piece in range(config.accumulation):
            figures += self._backward(x0, condition, piece)
        figures = self._average(figures)
        norm = accelerator.clip_grad_norm_(
            self.network.parameters(), config.gradient_clip
        )
        self.optimizer.step()
        for ema in self.averages:
            ema.update(self.network, self.step)
        self.step += 1
        total, simple, variational = figures.tolist()
        found = {"loss": total, "simple": simple, "gradient_norm": float(norm)}
        if self.spec.model.learned_variance:
            found["variational"] = variational
        return found

    def _backward(self, x0: Tensor, condition: Tensor, piece: int) -> Tensor:
        """Add the gradients of a piece of this process's share; its losses [3]."""
        config, device = self.config, self.accelerator.device
        shares = self.accelerator.num_processes * config.accumulation
        mine = slice(self.rank * config.accumulation + piece, None, shares)
        place = config.seed, self.step, range(config.batch_size)[mine]
        times = draw_timesteps(*place, config.batch_size, self.loss.timesteps)
        noise = draw_noise(*place, x0.shape[1:])
        given = [x0[mine], condition[mine], times, noise]
        if config.low_res_size:
            small = reduce_pictures(x0[mine], config.low_res_size)
            most = config.low_res_noise
            given.append(small + draw_low_res_noise(*place, small.shape[1:], most))
        batch = [tensor.to(device) for tensor in given]
        with self.accelerator.autocast():
            losses = self.loss(self.forward, *batch)
        self.accelerator.backward(losses.total / config.accumulation)
        return torch.stack(losses).detach() / config.accumulation

    def _average(self, figures: Tensor) -> Tensor:
        """Put the mean over all processes into every gradient; that of ``figures``.

        One flat sum in the same order every time, which a resumed run repeats bit for
        bit: torch's DistributedDataParallel orders its own anew after its first step.
        """
        if self.accelerator.num_processes == 1:
            return figures
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        flat = torch.cat([figures, *(gradient.reshape(-1) for gradient in gradients)])
        mean: Tensor = self.accelerator.reduce(flat, "mean")
        sizes = [len(figures), *(gradient.numel() for gradient in gradients)]
        averaged, *parts = torch.split(mean, sizes)
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return averaged

    def save(self, origin: dict[str, Any]) -> None:
        """Write the resumable state, and the averaged weights as CHECKPOINTs.

        Raises:
            TrainingError: The weights are not finite; nothing was written.
            CheckpointError: An average does not fit float16; the state was written.
            OutputError: A file cannot be written.
        """
        save_state(self.work, self.step, *self._state())
        for place, ema in enumerate(self.averages):
            spec = replace(self.spec, origin={**origin, "ema_decay": ema.decay})
            folder = self.work / f"ema-{ema.decay}" if place else self.out
            save_checkpoint(folder, spec, ema.tensors, self.config.storage)
