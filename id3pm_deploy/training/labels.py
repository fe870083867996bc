"""Attributes of the pictures to train on: declared, read and encoded.

They stand in the JSON file of a picture's key, as ``{"age": 30}``, or in a CSV table
with a column ``file``, relative to the table, and a column for each attribute. An empty
cell, null and a missing key all mean that nothing is stated; other keys and columns are
left alone. What a table says counts before the JSON file.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attributes import encode_attributes, parse_value
from ..errors import CheckpointError, InputError, first_line
from ..spec import AttributeSpec
from ..versioned_json import parse_json
from .pictures import Picture

FILE_COLUMN = "file"
_MAX_LABEL = 2**20
_DECLARE = "write it as NAME=LOW..HIGH or NAME=ONE|OTHER"

Row = dict[str, float | str]
Tables = Mapping[str, Mapping[str, str]]
"""Cells by column, by the absolute path of the file they are about."""


def declared_attribute(text: str) -> AttributeSpec:
    """The attribute that ``age=0..100`` or ``glasses=yes|no`` declares.

    Raises:
        InputError: It is written in another way, or the attribute makes no sense.
    """
    name, _, values = (part.strip() for part in text.partition("="))
    low, dots, high = values.partition("..")
    try:
        if "|" in values or not dots:
            choices = tuple(part.strip() for part in values.split("|"))
            return AttributeSpec(name, "categorical", categories=choices)
        return AttributeSpec(name, "numeric", low=float(low), high=float(high))
    except (ValueError, CheckpointError) as error:
        why = error.why if isinstance(error, CheckpointError) else str(error)
        raise InputError(
            f"{text!r:.80} declares no attribute", why=why, fix=_DECLARE
        ) from error


def read_tables(paths: Sequence[Path], specs: Sequence[AttributeSpec]) -> Tables:
    """The cells of some CSV tables that are about declared attributes.

    Raises:
        InputError: A table cannot be read, has no column ``file`` or none of an
            attribute, or a file stands in two rows.
    """
    cells: dict[str, dict[str, str]] = {}
    for path in paths:
        for row in _rows(path, specs):
            file = row.pop(FILE_COLUMN)
            key = os.path.abspath(path.parent / file)
            if key in cells:
                raise InputError(f"{path} has two rows of {file!r:.80}")
            cells[key] = row
    return cells


def _rows(path: Path, specs: Sequence[AttributeSpec]) -> list[dict[str, str]]:
    names = [spec.name for spec in specs]
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, strict=True)
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read as a table of attributes",
            why=first_line(error),
            fix="give a CSV file in UTF-8 with a heading",
        ) from error
    if FILE_COLUMN not in columns or not set(names) & set(columns):
        raise InputError(
            f"{path} has no column {FILE_COLUMN!r}, or none of an attribute",
            why=f"attributes: {', '.join(names) or 'none are declared'}",
            fix="put a heading above the columns; declare attributes by name",
        )
    wanted = {FILE_COLUMN, *names} & set(columns)
    return [{name: (row[name] or "").strip() for name in wanted} for row in rows]


def stated_attributes(
    picture: Picture, specs: Sequence[AttributeSpec], tables: Tables
) -> Row:
    """What is stated about a picture.

    Raises:
        InputError: Its JSON file cannot be read, or a value is none that the attribute
            may have.
    """
    found: dict[str, Any] = {}
    if picture.label is not None:
        try:
            found = parse_json(picture.label.read(_MAX_LABEL))
            if not isinstance(found, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{picture.label.name} is not JSON", why=first_line(error)
            ) from error
    if not picture.place.member:
        cells = tables.get(os.path.abspath(picture.place.path), {})
        found = {**found, **{name: cell for name, cell in cells.items() if cell}}
    row: Row = {}
    for spec in specs:
        value = found.get(spec.name)
        text = value if isinstance(value, str) else json.dumps(value)
        if value is not None and text:
            row[spec.name] = parse_value(spec, text)
    encode_attributes(specs, [row])  # or an error that is about this picture
    return row


def check_stated(rows: Sequence[Row], specs: Sequence[AttributeSpec]) -> None:
    """Refuse an attribute that no picture states: nothing could be learned of it.

    Raises:
        InputError: The first of them, named.
    """
    for spec in specs:
        if not any(spec.name in row for row in rows):
            raise InputError(
                f"no picture states the attribute {spec.name!r}",
                fix="check names and paths in the tables and JSON files",
            )
