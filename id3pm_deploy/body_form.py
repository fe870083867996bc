"""In which form the UNet's body is exported and run; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["float32", "float16", "bfloat16"]

ISLANDS = ("embedding", "norm", "head")
"""What stays in float32 unless a recipe says otherwise."""


@dataclass(frozen=True)
class BodyForm:
    """How the UNet computes what the checkpoint says.

    Attributes:
        precision: Of the body: weights, convolutions, matrix products.
        islands: What stays in float32 inside it: ``embedding`` (timestep and identity),
            ``norm`` (GroupNorm with its statistics), ``softmax``, ``head`` (the output
            layers), or the name of a module, such as
            ``unet.mid_block.attentions.0``.
    """

    precision: Precision = "float32"
    islands: tuple[str, ...] = ISLANDS


FLOAT32 = BodyForm()
