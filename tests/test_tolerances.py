"""What may differ, and by how much: nothing loosens itself past the ceilings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.errors import InputError, RecipeError
from id3pm_deploy.recipes import load_recipe, recipe_names
from id3pm_deploy.tolerances import CEILINGS, ORACLE, Tolerances, tightened

FIXED = {"float32": (1e-5, 1e-4), "float16": (1e-2, 2e-2), "bfloat16": (8e-2, 1.6e-1)}
"""Changing these needs a reason in the change that does it."""


def test_the_ceilings_are_these() -> None:
    found = {name: (t.step, t.trajectory) for name, t in CEILINGS.items()}
    assert found == FIXED
    assert ORACLE == 1e-4


def test_no_shipped_recipe_is_above_them() -> None:
    names = recipe_names("export")
    assert set(FIXED) <= set(names)
    for name in names:
        recipe = load_recipe("export", name, ExportRecipe)
        step, trajectory = FIXED[recipe.precision]
        assert 0 < recipe.tolerance_step <= step
        assert 0 < recipe.tolerance_trajectory <= trajectory


@pytest.mark.parametrize("precision", sorted(FIXED))
def test_no_recipe_of_a_users_own_is_above_them(tmp_path: Path, precision: str) -> None:
    step, trajectory = FIXED[precision]
    path = tmp_path / "mine.toml"

    def recipe(**values: Any) -> ExportRecipe:
        known = {"tolerance_step": step, "tolerance_trajectory": trajectory} | values
        lines = [f"{name} = {value!r}" for name, value in known.items()]
        head = f'summary = "mine"\nprecision = "{precision}"\nopset = 22\n'
        path.write_text(head + "\n".join(lines))
        return load_recipe("export", str(path), ExportRecipe)

    assert recipe().tolerance_step == step
    for name, most in (("tolerance_step", step), ("tolerance_trajectory", trajectory)):
        for bad in (most * 1.001, 0.9, 0.0, -1.0):
            with pytest.raises(RecipeError, match=f"{name} must be above 0") as caught:
                recipe(**{name: bad})
            assert f"{most:g}" in caught.value.what
        with pytest.raises(RecipeError):
            recipe(**{name: math.nan})


def test_tightening() -> None:
    known = Tolerances(1e-5, 1e-4)
    assert tightened(known, None, None) == known
    assert tightened(known, 1e-6, None) == Tolerances(1e-6, 1e-4)
    assert tightened(known, None, 0.0) == Tolerances(1e-5, 0.0)
    assert known.tightest(Tolerances(1.0, 1e-6)) == Tolerances(1e-5, 1e-6)
    for step, trajectory in (
        (2e-5, None),
        (None, 2e-4),
        (-1.0, None),
        (math.nan, None),
    ):
        with pytest.raises(InputError):
            tightened(known, step, trajectory)
