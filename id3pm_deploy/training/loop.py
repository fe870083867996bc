"""The training loop: batches, figures, and what is kept of them and when."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ..errors import TrainingError
from ..progress import progress
from .batches import Batches
from .faces import TrainingFaces
from .journal import Journal
from .sheet import save_training_sheet
from .trainer import Trainer


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


def run_steps(trainer: Trainer, faces: TrainingFaces) -> TrainingResult:
    """Train until ``config.steps``; process 0 logs, saves and shows progress.

    Raises:
        TrainingError: The loss is not finite.
        InputError: The shares leave no face to draw.
    """
    config, begun = trainer.config, time.monotonic()
    batches = Batches(faces, config)
    leads = trainer.rank == 0
    journal = None
    if leads and trainer.step < config.steps:
        wanted = config.tensorboard
        journal = Journal(trainer.work, trainer.step, tensorboard=wanted)
    smooth = None
    left = max(config.steps - trainer.step, 0)
    if leads and not left:  # what a run that was killed at its end did not write
        _save(trainer, faces)
        _draw(trainer, faces, batches)
    with progress(left, "training", enabled=None if leads else False) as tick:
        while trainer.step < config.steps:
            found = trainer.train_step(*batches.at(trainer.step))
            if not math.isfinite(found["loss"]):
                raise TrainingError(
                    f"the loss is {found['loss']} at step {trainer.step}",
                    fix="lower --learning-rate; the last saved state is intact",
                )
            if journal is not None:
                journal.add(found)
                smooth = journal.smooth["loss"]
                tick(note=f"loss {smooth:.4f}")
                seconds = time.monotonic() - begun
                _keep(trainer, faces, batches, journal, seconds)
    if journal is not None:
        journal.close()
    seconds = time.monotonic() - begun
    return TrainingResult(trainer.step, smooth, seconds, len(faces), faces.skipped)


def _keep(
    trainer: Trainer,
    faces: TrainingFaces,
    batches: Batches,
    journal: Journal,
    seconds: float,
) -> None:
    config, step = trainer.config, trainer.step
    last = step >= config.steps
    if last or step % config.save_every == 0:
        _save(trainer, faces)
        rate = config.learning_rate_at(step - 1)
        journal.keep(step, learning_rate=rate, seconds=round(seconds, 1))
    if last or step % config.sheet_every == 0:
        _draw(trainer, faces, batches)


def _save(trainer: Trainer, faces: TrainingFaces) -> None:
    origin = {
        "made_by": "id3pm-deploy train",
        "steps": trainer.step,
        "faces": len(faces),
        "batch_size": trainer.config.batch_size,
        "seed": trainer.config.seed,
        "torch": torch.__version__,
    }
    trainer.save(origin)


def _draw(trainer: Trainer, faces: TrainingFaces, batches: Batches) -> None:
    save_training_sheet(
        trainer.work / f"sheet-{trainer.step:07d}.png",
        trainer.network,
        trainer.averages[0].tensors,
        trainer.spec,
        faces.pictures[:, 0],
        batches.conditions,
        faces.folders,
        trainer.step,
    )
