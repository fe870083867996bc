"""What a model is: the facts that a checkpoint and a bundle both carry.

Tensor shapes do not tell the head mode, the prediction type or the noise schedule, so
all of it is written down and none of it is inferred.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import CheckpointError, InputError, some_of

PredictionType = Literal["epsilon", "x0", "v"]
Normalisation = Literal["raw", "unit", "unit_sqrt_dim"]

MAX_PICTURE = 1 << 22
"""1024 x 1024 pixels of four channels; a sampler holds a dozen such arrays each."""

_MAX_WORD = 64
_MAX_CATEGORIES = 1000
_MAX_CONDITION = 1 << 17


@dataclass(frozen=True)
class ModelSpec:
    """The UNet's shape, in guided-diffusion's terms.

    Exactly one of ``num_heads`` (the same number of heads at every level) and
    ``num_head_channels`` (channels of one head) is set: both give the same tensor
    shapes and different functions. A model with a ``low_res_size`` is for
    super-resolution: beside the noisy picture it sees one of that size, enlarged.
    """

    image_size: int
    base_channels: int
    channel_multipliers: tuple[int, ...]
    residual_blocks: int
    attention_resolutions: tuple[int, ...]
    num_heads: int | None = None
    num_head_channels: int | None = None
    learned_variance: bool = False
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    dropout: float = 0.0
    norm_groups: int = 32
    image_channels: int = 3
    low_res_size: int | None = None

    def __post_init__(self) -> None:
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise CheckpointError(
                "the model needs exactly one of num_heads and num_head_channels",
                why=f"num_heads={self.num_heads}, "
                f"num_head_channels={self.num_head_channels}",
                fix="state the one the checkpoint was trained with",
            )
        self._check_positive()
        self._check_divisible()
        self._check_embedding()

    def _check_positive(self) -> None:
        values: dict[str, tuple[int, ...]] = {
            "image_size": (self.image_size,),
            "base_channels": (self.base_channels,),
            "channel_multipliers": self.channel_multipliers or (0,),
            "residual_blocks": (self.residual_blocks,),
            "norm_groups": (self.norm_groups,),
            "image_channels": (self.image_channels,),
            "num_heads or num_head_channels": (
                self.num_heads or self.num_head_channels or 0,
            ),
        }
        for name, numbers in values.items():
            if min(numbers) < 1 or max(numbers) > 16384:
                raise CheckpointError(
                    f"the model's {name} must be from 1 to 16384",
                    why=f"it is {numbers}",
                )
        numbers_each = self.image_channels * self.image_size**2
        if numbers_each > MAX_PICTURE:
            raise CheckpointError(
                f"the model's pictures have more than {MAX_PICTURE} numbers each",
                why=f"{self.image_channels} x {self.image_size} x {self.image_size}",
            )
        small = 1 if self.low_res_size is None else self.low_res_size
        if not 1 <= small <= self.image_size:
            raise CheckpointError(
                "the model's low_res_size must be from 1 to its image_size",
                why=f"it is {small}, the image_size {self.image_size}",
            )
        if not 0.0 <= self.dropout < 1.0:
            raise CheckpointError(
                "the model's dropout must be in [0, 1)", why=f"it is {self.dropout}"
            )

    def _check_divisible(self) -> None:
        halvings = len(self.channel_multipliers) - 1
        if halvings > 8 or self.image_size % (1 << halvings):
            raise CheckpointError(
                f"an image size of {self.image_size} cannot be halved {halvings} times",
                fix="use fewer channel_multipliers or another image_size",
            )
        for level, channels in enumerate(self.level_channels):
            if channels % self.norm_groups:
                raise CheckpointError(
                    f"{channels} channels do not split into {self.norm_groups} groups",
                    fix="make base_channels a multiple of norm_groups",
                )
            heads = self.num_heads or self.num_head_channels or 1
            if channels % heads and self.attends(level):
                raise CheckpointError(
                    f"{channels} channels do not split into heads by {heads}",
                    fix="choose num_heads or num_head_channels that divides them",
                )

    def _check_embedding(self) -> None:
        """Half of the timestep embedding are cosines, the other half sines."""
        if self.base_channels % 2:
            raise CheckpointError(
                "base_channels must be even", why=f"it is {self.base_channels}"
            )

    def attends(self, level: int) -> bool:
        """Whether there is attention among the level's channels; beside the levels
        asked for, the middle block attends in those of the last."""
        last = level == len(self.channel_multipliers) - 1
        return last or self.attended_levels[level]

    @property
    def attended_levels(self) -> tuple[bool, ...]:
        """Whether each level, finest first, is one of those asked for."""
        return tuple(
            self.image_size >> level in self.attention_resolutions
            for level in range(len(self.channel_multipliers))
        )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels at each resolution, finest first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def embedding_dim(self) -> int:
        """Width of the timestep embedding the identity is added to."""
        return 4 * self.base_channels


@dataclass(frozen=True)
class ScheduleSpec:
    """The noise schedule the model was trained on."""

    name: Literal["linear", "cosine"] = "cosine"
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 2 <= self.timesteps <= 100_000:
            raise CheckpointError(
                "the schedule's timesteps must be from 2 to 100000",
                why=f"it is {self.timesteps}",
            )


@dataclass(frozen=True)
class IdentitySpec:
    """Which FR model's vectors condition the model, and how they are scaled.

    ``model_sha256`` is null where the FR model was a Python callable. A ``dim`` of 0 is
    a model without identity: it has no projection, its step graph no such input.
    """

    dim: int
    model_name: str
    model_sha256: str | None = None
    normalisation: Normalisation = "unit_sqrt_dim"

    def __post_init__(self) -> None:
        if not 0 <= self.dim <= 65536:
            raise CheckpointError(
                "the identity dimension must be from 0 to 65536",
                why=f"it is {self.dim}",
            )


NO_IDENTITY = IdentitySpec(0, "", None, "raw")


@dataclass(frozen=True)
class AttributeSpec:
    """An attribute of faces that conditions the model beside identity.

    Attributes:
        name: As ``age``; what people write before the "=" of ``age=30``.
        kind: ``numeric``, a number from ``low`` to ``high``, or ``categorical``, one
            of ``categories``.
        low, high: The range of a numeric attribute; None for a categorical one.
        categories: At least two of a categorical attribute; none of a numeric one.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    low: float | None = None
    high: float | None = None
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = ""
        if not all(map(_is_word, (self.name, *self.categories))):
            problem = f"names are 1 to {_MAX_WORD} printable characters without '='"
        elif self.kind == "numeric":
            problem = self._numeric_problem()
        elif self.low is not None or self.high is not None:
            problem = "a categorical one has no range"
        elif not 2 <= len(self.categories) <= _MAX_CATEGORIES:
            problem = f"it must have from 2 to {_MAX_CATEGORIES} categories"
        elif len(set(self.categories)) != len(self.categories):
            problem = "a category is there twice"
        if problem:
            raise CheckpointError(
                f"the attribute {self.name!r:.80} cannot be used", why=problem
            )

    def _numeric_problem(self) -> str:
        low, high = self.low, self.high
        if self.categories:
            return "a numeric one has no categories"
        if low is None or high is None or not math.isfinite(high - low) or low >= high:
            return f"its range must be two numbers, low before high, not {low}, {high}"
        return ""

    @property
    def columns(self) -> int:
        """How many numbers of the condition it takes (``attributes.py``)."""
        return 2 if self.kind == "numeric" else len(self.categories)


def _is_word(text: str) -> bool:
    """Whether it can stand on either side of NAME=VALUE."""
    plain = text.isprintable() and text == text.strip() and "=" not in text
    return plain and 0 < len(text) <= _MAX_WORD


@dataclass(frozen=True)
class DiffusionSpec:
    """Everything that fixes the function a checkpoint or a bundle computes."""

    model: ModelSpec
    identity: IdentitySpec
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    prediction_type: PredictionType = "epsilon"
    title: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    attributes: tuple[AttributeSpec, ...] = ()

    def __post_init__(self) -> None:
        names = [one.name for one in self.attributes]
        if len(set(names)) != len(names):
            raise CheckpointError(
                "two of the model's attributes have the same name",
                why=f"they are {some_of(names)}",
            )
        if self.condition_dim > _MAX_CONDITION:
            raise CheckpointError(
                f"identity and attributes have more than {_MAX_CONDITION} numbers",
                why=f"they have {self.condition_dim}",
            )

    @property
    def condition_dim(self) -> int:
        """Numbers of one condition: an identity vector, then the attributes' columns.
        0 is a model without any."""
        return self.identity.dim + sum(one.columns for one in self.attributes)

    def to_json(self) -> dict[str, Any]:
        """The same facts as plain JSON values; ``attributes`` only where there are
        some, so that what has none is written as it always was."""
        values = dataclasses.asdict(self)
        if not self.attributes:
            del values["attributes"]
        return values

    def function(self) -> DiffusionSpec:
        """The facts that fix what is computed: these, without title and origin."""
        return dataclasses.replace(self, title="", origin={})

    def differences(self, other: DiffusionSpec) -> list[str]:
        """Names of the facts in which two functions differ, as ``model.num_heads``."""
        ours, theirs = _flat(self.function()), _flat(other.function())
        return [name for name in ours if ours[name] != theirs[name]]


def check_chain(base: DiffusionSpec, second: DiffusionSpec) -> None:
    """Refuse a super-resolution model that cannot enlarge what a base model makes.

    Raises:
        InputError: The second one does not enlarge, the first one does, or sizes,
            channels, FR models or attributes differ.
    """
    small, large = base.model, second.model
    what, why = "", ""
    if large.low_res_size is None:
        what, why = "the second stage is no super-resolution model", "no low_res_size"
    elif small.low_res_size is not None:
        what, why = "the base is itself a super-resolution model", "it needs pictures"
    elif large.low_res_size != small.image_size:
        what = "the second stage enlarges pictures of another size"
        why = f"it takes {large.low_res_size}, the base makes {small.image_size}"
    elif large.image_channels != small.image_channels:
        what = "the two stages have different numbers of image channels"
        why = f"{small.image_channels} and {large.image_channels}"
    elif second.identity.dim and _whose(second) != _whose(base):
        what = "the two stages take identities of different FR models"
        why = f"{_whose(base)} and {_whose(second)}"
    elif not set(second.attributes) <= set(base.attributes):
        what = "the second stage takes attributes that the base does not"
        others = [one for one in second.attributes if one not in base.attributes]
        why = f"{some_of([one.name for one in others])}, or of other values"
    if what:
        raise InputError(what, why=why, fix="give two models of one chain")


def _whose(spec: DiffusionSpec) -> tuple[object, ...]:
    """Whose identity vectors a model takes; how it scales them is its own affair."""
    identity = spec.identity
    return identity.dim, identity.model_name, identity.model_sha256


def _flat(spec: DiffusionSpec) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(spec).items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{part}".strip("."): item for part, item in parts.items()}
    return flat
