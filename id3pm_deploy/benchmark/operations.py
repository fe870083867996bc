"""What a step has to compute and to move, from the facts of the model alone.

Only convolutions, linear layers and the products of attention are counted: all else
can be fused into them. The layers are those of the UNet that ``reference/unet.py``
builds, whose step graph holds just these; a test counts them in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..spec import DiffusionSpec, ModelSpec


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of one UNet row; numbers of elements.

    Attributes:
        macs: Multiply-adds.
        weights: Elements that all UNet rows share; 0 for a product of two activations.
        moved: Elements read and written, weights apart.
    """

    macs: int
    weights: int
    moved: int


@dataclass(frozen=True)
class StepCost:
    """What a step of R UNet rows takes at least.

    Attributes:
        operations: Floating-point operations, two a multiply-add.
        bytes: Weights once, and what each product reads and writes.
        unet_rows: R.
    """

    operations: int
    bytes: int
    unet_rows: int


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def step_cost(spec: DiffusionSpec, unet_rows: int, precision: str) -> StepCost:
    """The cost of one table row.

    Args:
        spec: Facts of the model.
        unet_rows: R.
        precision: Of the UNet's body; ``float32``, ``float16`` or ``bfloat16``.
    """
    found = list(products(spec))
    weights = sum(one.weights for one in found)
    moved = unet_rows * sum(one.moved for one in found)
    operations = 2 * unet_rows * sum(one.macs for one in found)
    return StepCost(operations, BYTES[precision] * (weights + moved), unet_rows)


def products(spec: DiffusionSpec) -> Iterator[Product]:
    """Every convolution and matrix product of one UNet row."""
    model = spec.model
    channels, pictures = model.level_channels, 1 if model.low_res_size is None else 2
    yield _conv(pictures * model.image_channels, channels[0], model.image_size)
    yield _linear(model.base_channels, model.embedding_dim)
    yield _linear(model.embedding_dim, model.embedding_dim)
    if spec.condition_dim:
        yield _linear(spec.condition_dim, model.embedding_dim)
    skips = [channels[0]]
    yield from _down(model, skips)
    middle, size = channels[-1], model.image_size >> (len(channels) - 1)
    yield from _resnet(model, middle, middle, size)
    yield from _attention(middle, size)
    yield from _resnet(model, middle, middle, size)
    yield from _up(model, skips)
    variance = model.image_channels if model.learned_variance else 0
    yield _conv(channels[0], model.image_channels + variance, model.image_size)


def _down(model: ModelSpec, skips: list[int]) -> Iterator[Product]:
    """The way down; ``skips`` gets the widths of what is kept for the way up."""
    width = skips[0]
    for level, wide in enumerate(model.level_channels):
        size = model.image_size >> level
        for _ in range(model.residual_blocks):
            yield from _resnet(model, width, wide, size)
            if size in model.attention_resolutions:
                yield from _attention(wide, size)
            width = wide
            skips.append(width)
        if level < len(model.level_channels) - 1:
            yield from _resampling(model, width, size // 2)
            skips.append(width)


def _up(model: ModelSpec, skips: list[int]) -> Iterator[Product]:
    width = model.level_channels[-1]
    for level in reversed(range(len(model.level_channels))):
        wide, size = model.level_channels[level], model.image_size >> level
        for _ in range(model.residual_blocks + 1):
            yield from _resnet(model, width + skips.pop(), wide, size)
            if size in model.attention_resolutions:
                yield from _attention(wide, size)
            width = wide
        if level:
            yield from _resampling(model, width, 2 * size)


def _resampling(model: ModelSpec, width: int, size: int) -> Iterator[Product]:
    """Halving or doubling, which both compute at the new size."""
    if model.resblock_updown:
        yield from _resnet(model, width, width, size)
    else:
        yield _conv(width, width, size)


def _resnet(model: ModelSpec, width: int, wide: int, size: int) -> Iterator[Product]:
    yield _conv(width, wide, size)
    yield _linear(model.embedding_dim, wide * (2 if model.scale_shift_norm else 1))
    yield _conv(wide, wide, size)
    if width != wide:
        yield _conv(width, wide, size, kernel=1)


def _attention(width: int, size: int) -> Iterator[Product]:
    tokens = size * size
    for _ in range(4):  # queries, keys, values, output
        yield _linear(width, width, tokens)
    # Scores and what they weigh, for all heads; scores need not leave the chip.
    yield Product(2 * tokens * tokens * width, 0, 4 * tokens * width)


def _conv(width: int, wide: int, size: int, kernel: int = 3) -> Product:
    pixels, weights = size * size, width * wide * kernel * kernel
    return Product(weights * pixels, weights, (width + wide) * pixels)


def _linear(width: int, wide: int, tokens: int = 1) -> Product:
    return Product(width * wide * tokens, width * wide, (width + wide) * tokens)
