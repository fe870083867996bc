"""What a training run is told: one flat, frozen dataclass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError
from ..spec import AttributeSpec, Normalisation, PredictionType
from .labels import declared_attribute

_MOST = 1_000_000_000
_BOUNDS: dict[str, tuple[float, float]] = {
    "image_size": (8, 4096),
    "low_res_size": (0, 4096),
    "low_res_noise": (0.0, 1.0),
    "base_channels": (2, 4096),
    "residual_blocks": (1, 64),
    "num_head_channels": (1, 4096),
    "norm_groups": (1, 4096),
    "steps": (1, _MOST),
    "batch_size": (1, 65536),
    "learning_rate": (1e-12, 10.0),
    "final_learning_rate": (0.0, 10.0),
    "warmup_steps": (0, _MOST),
    "weight_decay": (0.0, 10.0),
    "gradient_clip": (1e-9, 1e9),
    "min_snr_gamma": (0.0, 1e6),
    "vlb_weight": (0.0, 1e3),
    "identity_noise": (0.0, 4.0),
    "identity_jitter": (1, 64),
    "crop_margin": (1.0, 4.0),
    "seed": (0, 2**63 - 1),
    "save_every": (1, _MOST),
    "sheet_every": (1, _MOST),
    "processes": (1, 256),
    "accumulation": (1, 65536),
}
_CHOICES = {
    "prediction_type": ("epsilon", "x0", "v"),
    "schedule": ("cosine", "linear"),
    "normalisation": ("raw", "unit", "unit_sqrt_dim"),
    "precision": ("float32", "bfloat16", "float16"),
    "storage": ("float32", "float16"),
}
_DROPOUTS = (
    "condition_dropout",
    "attribute_dropout",
    "joint_dropout",
    "model_dropout",
)
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")


def _refused(name: str, wanted: str, value: Any) -> InputError:
    return InputError(
        f"{name.replace('_', ' ')} must be {wanted}", why=f"it is {value!r}"
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run; the defaults are those of the shipped checkpoint's network.

    ``identity_noise`` is the standard deviation of Gaussian noise added to the
    identity vector (whose entries have variance 1) before it is scaled back to its
    norm; it keeps a small data set from being learned by heart. ``identity_jitter``
    is how many slightly shifted crops of each face are embedded for the same reason.
    ``processes`` share each batch between them: on a CPU one a core is faster and
    steadier than one process with as many threads, with ``cuda`` each has a GPU. Each
    takes its share in ``accumulation`` pieces, which need less memory and give the same
    gradient. ``precision`` is of the network's arithmetic in training; weights and
    averages are float32. ``ema_decays`` are those of further averages, kept beside the
    CHECKPOINT's in the work folder. A ``low_res_size`` above 0 trains a second stage,
    which sees the picture reduced to that size; Gaussian noise of a random standard
    deviation up to ``low_res_noise`` makes it forgive a first stage's faults.
    ``storage`` is of the CHECKPOINT's weights, which carries ``title``; the state is
    always float32.
    ``vlb_weight`` (of the hybrid loss, with learned variance only) and
    ``min_snr_gamma`` (0: no weighting) are those of :class:`.losses.DiffusionLoss`.

    ``attributes`` are declared as ``age=0..100`` or ``glasses=yes|no`` and condition
    the network beside identity. ``condition_dropout`` is the share of samples that see
    no identity, ``attribute_dropout`` that of those that do not see an attribute, each
    drawn on its own; where there are attributes, ``joint_dropout`` of the samples see
    nothing at all, which would be rare otherwise and is what guidance leads away from.

    Raises:
        InputError: A value is out of its range, or two contradict each other.
    """

    image_size: int = 32
    low_res_size: int = 0
    low_res_noise: float = 0.0
    base_channels: int = 32
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    residual_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (8,)
    num_head_channels: int = 32
    norm_groups: int = 32
    resblock_updown: bool = False
    model_dropout: float = 0.0
    prediction_type: PredictionType = "v"
    learned_variance: bool = False
    vlb_weight: float = 0.001
    min_snr_gamma: float = 0.0
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
    ema_decays: tuple[float, ...] = ()
    condition_dropout: float = 0.1
    attributes: tuple[str, ...] = ()
    attribute_dropout: float = 0.1
    joint_dropout: float = 0.05
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
    accumulation: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    tensorboard: bool = False
    storage: Literal["float32", "float16"] = "float32"
    title: str = ""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN fails as well
                raise _refused(name, f"from {low} to {high}", value)
        shares = {name: getattr(self, name) for name in (*_DROPOUTS, "ema_decay")}
        shares |= {f"ema_decays {place}": d for place, d in enumerate(self.ema_decays)}
        for name, value in shares.items():
            if not 0.0 <= value < 1.0:
                raise _refused(name, "in [0, 1)", value)
        if len({self.ema_decay, *self.ema_decays}) != 1 + len(self.ema_decays):
            raise _refused("ema_decays", "different from each other", self.ema_decays)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _refused(
                    name, f"one of {', '.join(choices)}", getattr(self, name)
                )
        self._check_lists()
        if len(self.title) > 200 or not (self.title + " ").isprintable():
            raise _refused("title", "at most 200 printable characters", self.title)
        if not _DEVICE.fullmatch(self.device):
            raise _refused("device", "such as cpu, cuda or cuda:1", self.device)
        if self.low_res_noise and not self.low_res_size:
            raise InputError(
                "low res noise is for a second stage", fix="give low_res_size, too"
            )
        self._check_devices()

    def _check_devices(self) -> None:
        if self.batch_size % (self.processes * self.accumulation):
            raise InputError(
                "the batch size must be a multiple of the processes, and of the pieces "
                "that each accumulates",
                why=f"they are {self.batch_size}, {self.processes} and "
                f"{self.accumulation}",
            )
        if self.processes > 1 and self.device not in ("cpu", "cuda"):
            raise InputError(
                "several processes train on the CPU, or on one GPU each",
                why=f"the device is {self.device}",
                fix="use --device cpu or --device cuda",
            )
        if self.precision == "float16" and self.device == "cpu":
            raise InputError(
                "float16 is not for training on a CPU",
                fix="use --precision float32 or bfloat16",
            )

    def _check_lists(self) -> None:
        for name in ("channel_multipliers", "attention_resolutions"):
            values = getattr(self, name)
            if len(values) > 16 or not all(1 <= value <= 4096 for value in values):
                raise _refused(name, "at most 16 numbers from 1 to 4096", list(values))
        if not self.channel_multipliers:
            raise _refused("channel_multipliers", "at least one number", "none")
        specs = self.attribute_specs  # or an error about one of them
        if len({spec.name for spec in specs}) != len(specs):
            raise _refused("attributes", "of different names", list(self.attributes))
        usable = all(0 <= share <= 1e9 for share in self.shares)
        if not usable or (self.shares and not sum(self.shares) > 0):
            raise _refused(
                "shares", "numbers from 0 on, one of them above", list(self.shares)
            )

    @property
    def attribute_specs(self) -> tuple[AttributeSpec, ...]:
        """The attributes that are declared."""
        return tuple(map(declared_attribute, self.attributes))

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, a plateau for half of the run, then a straight line down."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        half = self.steps / 2
        fall = min(max((step - half) / max(half, 1.0), 0.0), 1.0)
        return self.learning_rate + fall * (
            self.final_learning_rate - self.learning_rate
        )
