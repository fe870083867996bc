"""What a training run is told: one flat, frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..spec import Normalisation, PredictionType


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run; the defaults are those of the shipped checkpoint's network.

    ``identity_noise`` is the standard deviation of Gaussian noise added to the
    identity vector (whose entries have variance 1) before it is scaled back to its
    norm; it keeps a small data set from being learned by heart. ``identity_jitter``
    is how many slightly shifted crops of each face are embedded for the same reason.
    ``processes`` share each batch between them on a CPU: one a core is faster and
    steadier there than one process with as many threads.
    """

    image_size: int = 32
    base_channels: int = 32
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    residual_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    num_head_channels: int = 32
    resblock_updown: bool = False
    model_dropout: float = 0.0
    prediction_type: PredictionType = "v"
    schedule: str = "cosine"
    normalisation: Normalisation = "unit_sqrt_dim"
    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 5e-4
    final_learning_rate: float = 5e-5
    warmup_steps: int = 200
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.9995
    condition_dropout: float = 0.1
    identity_noise: float = 0.0
    identity_jitter: int = 1
    crop_margin: float = 1.15
    shares: tuple[float, ...] = ()
    seed: int = 0
    save_every: int = 250
    sheet_every: int = 1000
    compile: bool = False
    device: str = "cpu"
    processes: int = 1

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "save_every", "sheet_every")
        for name in (*positive, "identity_jitter", "image_size", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{name.replace('_', ' ')} must be above 0",
                    why=f"it is {getattr(self, name)}",
                )
        if self.processes < 1 or self.batch_size % self.processes:
            raise InputError(
                "the batch size must be a multiple of the processes",
                why=f"they are {self.batch_size} and {self.processes}",
            )
        if self.processes > 1 and self.device != "cpu":
            raise InputError("several processes are for training on a CPU")
        for name in ("condition_dropout", "ema_decay", "model_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(
                    f"{name.replace('_', ' ')} must be in [0, 1)",
                    why=f"it is {getattr(self, name)}",
                )
        if not 0 <= self.identity_noise <= 4 or not 1 <= self.crop_margin <= 4:
            raise InputError("identity noise must be in [0, 4], crop margin in [1, 4]")
        if self.seed < 0 or self.warmup_steps < 0:
            raise InputError("seed and warm-up steps cannot be negative")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, a plateau for half of the run, then a straight line down."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        half = self.steps / 2
        fall = min(max((step - half) / max(half, 1.0), 0.0), 1.0)
        return self.learning_rate + fall * (
            self.final_learning_rate - self.learning_rate
        )

    def ema_decay_at(self, step: int) -> float:
        """EMA decay with warm-up, so that early weights do not linger."""
        return min(self.ema_decay, (1 + step) / (10 + step))
