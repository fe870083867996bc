"""How a graph is exported: the recipes in ``export/``. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..body_form import ISLANDS, BodyForm, Precision
from ..errors import RecipeError
from ..tolerances import check_ceiling


@dataclass(frozen=True)
class ExportRecipe:
    """How a graph is exported; files of this form lie in ``export/``.

    Attributes:
        summary: One line for people.
        graph: ``step`` for a whole solver step, ``unet`` for the bare UNet.
        precision: Of the UNet's body.
        islands: What stays in float32; see BodyForm.
        opset: ONNX opset.
        tolerance_step: Largest max|a-b|/max|b| of one table row against PyTorch in
            the same precision.
        tolerance_trajectory: The same for a whole trajectory.
    """

    summary: str
    graph: Literal["step", "unet"] = "step"
    precision: Precision = "float32"
    islands: tuple[str, ...] = ISLANDS
    opset: int = 20
    tolerance_step: float = 1e-5
    tolerance_trajectory: float = 1e-4

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 24:
            raise RecipeError("opset must be from 18 to 24", why=f"it is {self.opset}")
        check_ceiling(self.precision, self.tolerance_step, self.tolerance_trajectory)

    @property
    def form(self) -> BodyForm:
        """The form of the UNet's body."""
        return BodyForm(self.precision, self.islands)
