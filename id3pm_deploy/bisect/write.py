"""Export recipes as TOML; imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..builders.export_recipe import ExportRecipe
from ..errors import InputError, OutputError
from ..files import beside, output_error, temporary_name, write_text
from ..recipes import load_recipe

_SUFFIX = ".toml"
_WRAPPED = 3
"""Lists of more items than this get one line each."""


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


def recipe_text(recipe: ExportRecipe, comments: Sequence[str] = ()) -> str:
    """A recipe as TOML that ``load_recipe`` reads back as the same.

    Args:
        recipe: What to write.
        comments: Lines that stand above it.
    """
    lines = [f"# {line}" for line in comments]
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value is not None:
            lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


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


def _toml(value: Any) -> str:
    """A string, number, truth value or list of these; JSON's form of them is TOML's,
    but for the one control character that JSON leaves as it is."""
    if isinstance(value, tuple):
        items = [_toml(item) for item in value]
        if len(items) <= _WRAPPED:
            return f"[{', '.join(items)}]"
        return "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
