"""What a run tells about itself: log.jsonl, and TensorBoard's files if wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import atomic_path
from ..optional import require

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"
_KEPT = 0.98
"""Share of the earlier steps in a smoothed figure."""


class Journal:
    """Figures of a run, smoothed over some fifty steps.

    Args:
        work: The run's work folder.
        step: Steps done already; what was logged of later ones is dropped.
        tensorboard: Write TensorBoard's files as well.

    Raises:
        MissingPackageError: TensorBoard is wanted and not installed.
    """

    def __init__(self, work: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = work / LOG_NAME
        self.smooth: dict[str, float] = {}
        self.lines = _lines_until(self.path, step)
        self.writer: Any = None
        if tensorboard:
            require("tensorboard", extra="train")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(work / TENSORBOARD_NAME, purge_step=step + 1)

    def add(self, figures: Mapping[str, float]) -> None:
        """Take in what one step gave; what is not finite is left out."""
        for name, value in figures.items():
            if math.isfinite(value):
                before = self.smooth.get(name, value)
                self.smooth[name] = _KEPT * before + (1 - _KEPT) * value

    def keep(self, step: int, **figures: float) -> None:
        """Log the smoothed figures and those given.

        Raises:
            OutputError: The log cannot be written.
        """
        entry = {"step": step, **self.smooth, **figures}
        self.lines.append(json.dumps(entry))
        with atomic_path(self.path) as temporary:
            temporary.write_text("\n".join(self.lines) + "\n")
        if self.writer is not None:
            for name, value in {**self.smooth, **figures}.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Entries of steps up to ``step``; a damaged line is dropped."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return kept
