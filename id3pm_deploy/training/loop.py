"""The training loop: conditional diffusion loss, condition dropout, EMA, resume."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from ..errors import TrainingError
from ..files import atomic_path, beside
from ..progress import progress
from ..reference.checkpoint import save_checkpoint
from ..reference.unet import IdentityUNet
from ..spec import DiffusionSpec
from .batches import Batches
from .config import TrainingConfig
from .draws import draw_noise, draw_timesteps
from .faces import TrainingFaces
from .losses import DiffusionLoss
from .sheet import save_training_sheet
from .state import Ema, load_state, save_state

LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class TrainingResult:
    """What a run did: steps in all, the last smoothed loss, seconds of this call.

    ``loss`` is None where a resumed run had no step left to do.
    """

    steps: int
    loss: float | None
    seconds: float
    faces: int
    skipped: int


def work_folder(checkpoint: Path) -> Path:
    """Where a run keeps its state, log, sheets and face cache: beside the output."""
    return beside(checkpoint, ".training")


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
    """One process of a run: network, average, optimizer and where they are kept.

    Every process holds the same weights and takes its share of each batch.
    """

    def __init__(self, plan: Plan, rank: int = 0) -> None:
        config = plan.config
        self.config, self.spec, self.out, self.rank = config, plan.spec, plan.out, rank
        self.work = work_folder(plan.out)
        if plan.threads:
            torch.set_num_threads(plan.threads)
        torch.manual_seed(config.seed)
        network = IdentityUNet(plan.spec.model, plan.spec.identity.dim)
        self.network = network.to(config.device).train()
        if plan.initial is not None:
            self.network.load_state_dict(plan.initial)
        self.ema = Ema(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.loss = DiffusionLoss(
            plan.spec,
            min_snr_gamma=config.min_snr_gamma,
            vlb_weight=config.vlb_weight,
            device=config.device,
        )
        self.forward: Any = (
            torch.compile(self.network) if config.compile else self.network
        )
        self.step = 0
        if plan.resume:
            self.step = load_state(self.work, self.network, self.ema, self.optimizer)

    def train_step(self, x0: Tensor, identity: Tensor) -> float:
        """One optimizer step on this process's share of a batch; returns its loss."""
        config = self.config
        torch.manual_seed(hash((config.seed, self.step, self.rank)) & (1 << 62) - 1)
        rate = config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mine = slice(self.rank, None, config.processes)
        place = config.seed, self.step, range(config.batch_size)[mine]
        times = draw_timesteps(*place, config.batch_size, self.loss.timesteps)
        noise = draw_noise(*place, x0.shape[1:])
        given = (x0[mine], identity[mine], times, noise)
        batch = [tensor.to(config.device) for tensor in given]
        loss = self.loss(self.forward, *batch).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if config.processes > 1:
            _average_gradients(self.network, config.processes)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.gradient_clip)
        self.optimizer.step()
        self.ema.update(self.network, config.ema_decay_at(self.step))
        self.step += 1
        return float(loss.detach())

    def save(self, origin: dict[str, Any]) -> None:
        """Write the resumable state, and the averaged weights as a CHECKPOINT.

        Raises:
            TrainingError: The weights are not finite; nothing was written.
            CheckpointError: An average does not fit float16; the state was written.
            OutputError: A file cannot be written.
        """
        save_state(self.work, self.step, self.network, self.ema, self.optimizer)
        spec = replace(self.spec, origin=origin)
        save_checkpoint(self.out, spec, self.ema.tensors, self.config.storage)


def _average_gradients(network: torch.nn.Module, processes: int) -> None:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat / processes, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, parts, strict=True):
        gradient.copy_(mean.view_as(gradient))


def run_steps(trainer: Trainer, faces: TrainingFaces) -> TrainingResult:
    """Do the steps that are left; the process of rank 0 keeps what comes out.

    Raises:
        TrainingError: The loss or the weights are not finite.
        InputError: The shares leave no face to draw.
    """
    config, begun = trainer.config, time.monotonic()
    batches = Batches(faces, config)
    smooth, leads = float("nan"), trainer.rank == 0
    left = max(config.steps - trainer.step, 0)
    with progress(left, "training", enabled=None if leads else False) as tick:
        while trainer.step < config.steps:
            loss = trainer.train_step(*batches.at(trainer.step))
            if not np.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {trainer.step}",
                    fix="lower --learning-rate; the last saved state is intact",
                )
            smooth = loss if np.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            tick(note=f"loss {smooth:.4f}")
            if leads:
                _keep(trainer, faces, batches, smooth, time.monotonic() - begun)
    seconds = time.monotonic() - begun
    loss_or_none = None if np.isnan(smooth) else smooth
    return TrainingResult(
        trainer.step, loss_or_none, seconds, len(faces), faces.skipped
    )


def _keep(
    trainer: Trainer,
    faces: TrainingFaces,
    batches: Batches,
    loss: float,
    seconds: float,
) -> None:
    config, step = trainer.config, trainer.step
    last = step >= config.steps
    if last or step % config.save_every == 0:
        _log(trainer.work, {"step": step, "loss": loss, "seconds": round(seconds, 1)})
        origin = {
            "made_by": "id3pm-deploy train",
            "steps": step,
            "faces": len(faces),
            "batch_size": config.batch_size,
            "seed": config.seed,
            "torch": torch.__version__,
        }
        trainer.save(origin)
    if last or step % config.sheet_every == 0:
        save_training_sheet(
            trainer.work / f"sheet-{step:07d}.png",
            trainer.network,
            trainer.ema.tensors,
            trainer.spec,
            faces.pictures[:, 0],
            batches.vectors[:, 0, 0],
            faces.folders,
            step,
        )


def _log(work: Path, entry: dict[str, Any]) -> None:
    path = work / LOG_NAME
    kept = path.read_text(errors="replace") if path.exists() else ""
    with atomic_path(path) as temporary:
        temporary.write_text(kept + json.dumps(entry) + "\n")
