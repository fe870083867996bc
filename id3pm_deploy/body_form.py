"""In which form the UNet's body is exported and run; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError

Precision = Literal["float32", "float16", "bfloat16"]
Attention = Literal["scaled", "plain", "native"]
Normalisation = Literal["instance", "native"]
Embeddings = Literal["joined", "apart"]
Upsampling = Literal["resize", "transposed"]

KINDS = {
    "embedding": "timestep embedding and identity projection",
    "projection": "each residual block's projection of the embedding",
    "norm": "GroupNorm with its statistics",
    "softmax": "softmax of the attention",
    "attention": "whole attention blocks",
    "skip": "1x1 convolutions of the residual connections",
    "head": "the output layers",
}
"""Names that ``islands`` knows beside the names of modules."""

ISLANDS = ("embedding", "norm", "head")
"""What stays in float32 unless a recipe says otherwise."""


@dataclass(frozen=True)
class BodyForm:
    """How the UNet computes what the checkpoint says; the function stays the same.

    In float32 PyTorch runs the network as it is, and only an export takes its form.

    Attributes:
        precision: Of the body: weights, convolutions, matrix products.
        islands: What stays in float32 inside it: names out of KINDS, or of modules,
            such as ``unet.mid_block.attentions.0`` with all it holds.
        attention: ``scaled``: queries and keys are each scaled by 1/⁴√d before their
            product, as guided-diffusion does it; ``plain``: the product is scaled;
            ``native``: as one operator, in ONNX from opset 23 on.
        normalisation: ``instance``: GroupNorm as the exporter writes it; ``native``:
            as one operator, in ONNX from opset 21 on.
        embeddings: ``joined``: one matrix product projects the embedding for all
            residual blocks; ``apart``: each has its own.
        upsampling: ``resize``: pictures are enlarged and then convolved;
            ``transposed``: both at once, by one transposed convolution.

    Raises:
        RecipeError: An island is named twice or by nothing.
    """

    precision: Precision = "float32"
    islands: tuple[str, ...] = ISLANDS
    attention: Attention = "scaled"
    normalisation: Normalisation = "instance"
    embeddings: Embeddings = "joined"
    upsampling: Upsampling = "resize"

    def __post_init__(self) -> None:
        check_islands(self.islands)


def check_islands(islands: tuple[str, ...]) -> None:
    """Raise :class:`RecipeError` where an island is named twice or by nothing."""
    if len(set(islands)) != len(islands) or not all(islands):
        raise RecipeError(
            "each island must be named, and once",
            why=f"they are {', '.join(map(repr, islands))}",
        )


FLOAT32 = BodyForm()
"""The reference: the network as it is."""
