"""Export recipes as TOML; imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..builders.export_recipe import ExportRecipe
from ..errors import InputError, OutputError
from ..files import beside, output_error, temporary_name, write_text
from ..recipes import load_recipe, recipe_text

_SUFFIX = ".toml"


def check_recipe_path(path: Path, *, force: bool) -> None:
    """Refuse a path that could not be written in the end, before any work is done.

    Raises:
        InputError: It is not the name of a TOML file, or it exists and may not be
            replaced.
        OutputError: Nothing can be written there.
    """
    if path.suffix != _SUFFIX:
        raise InputError(
            f"a recipe's name ends in {_SUFFIX}: {path}",
            fix=f"use --out {beside(path, _SUFFIX).name}",
        )
    if os.path.lexists(path) and not force:
        raise InputError(
            f"{path} exists", fix="choose another --out, or replace it with --force"
        )
    if path.is_dir():
        raise OutputError(f"cannot write {path}", why="it is a folder")
    trial = temporary_name(path)
    try:
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        trial.unlink()
    except OSError as error:
        raise output_error(path, error) from error


def save_recipe(
    path: Path, recipe: ExportRecipe, comments: Sequence[str] = (), *, force: bool
) -> None:
    """Write a recipe and read it back.

    Raises:
        InputError, OutputError: See :func:`check_recipe_path`.
    """
    check_recipe_path(path, force=force)
    write_text(path, recipe_text(recipe, comments))
    assert load_recipe("export", os.fspath(path), ExportRecipe) == recipe
