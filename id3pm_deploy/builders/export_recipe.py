"""How a graph is exported: the recipes in ``export/``. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..body_form import (
    ISLANDS,
    Attention,
    BodyForm,
    Embeddings,
    Normalisation,
    Precision,
    Upsampling,
    check_islands,
)
from ..errors import RecipeError
from ..tolerances import check_ceiling

_LEAST_OPSET = {
    ("normalisation", "native"): 21,
    ("precision", "bfloat16"): 22,
    ("attention", "native"): 23,
}
"""Since when ONNX has GroupNormalization as it is now, bfloat16 convolutions, and
Attention."""


@dataclass(frozen=True)
class ExportRecipe:
    """How a graph is exported; files of this form lie in ``export/``.

    Attributes:
        summary: One line for people.
        graph: ``step`` for a whole solver step, ``unet`` for the bare UNet.
        precision: Of the UNet's body.
        islands: What stays in float32; see BodyForm.
        attention: How attention is written; see BodyForm.
        normalisation: How GroupNorm is written; see BodyForm.
        embeddings: How the embedding is projected; see BodyForm.
        upsampling: How pictures are enlarged; see BodyForm.
        opset: ONNX opset.
        tolerance_step: Largest max|a-b|/max|b| of one table row against PyTorch in
            the same precision.
        tolerance_trajectory: The same for a whole trajectory.
    """

    summary: str
    graph: Literal["step", "unet"] = "step"
    precision: Precision = "float32"
    islands: tuple[str, ...] = ISLANDS
    attention: Attention = "scaled"
    normalisation: Normalisation = "instance"
    embeddings: Embeddings = "joined"
    upsampling: Upsampling = "resize"
    opset: int = 20
    tolerance_step: float = 1e-5
    tolerance_trajectory: float = 1e-4

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 24:
            raise RecipeError("opset must be from 18 to 24", why=f"it is {self.opset}")
        for (key, value), least in _LEAST_OPSET.items():
            if getattr(self, key) == value and self.opset < least:
                raise RecipeError(
                    f"{key} = {value!r} needs opset {least} or later",
                    why=f"the recipe has opset {self.opset}",
                )
        check_islands(self.islands)
        check_ceiling(self.precision, self.tolerance_step, self.tolerance_trajectory)

    @property
    def form(self) -> BodyForm:
        """The form of the UNet's body."""
        return BodyForm(
            self.precision,
            self.islands,
            self.attention,
            self.normalisation,
            self.embeddings,
            self.upsampling,
        )
