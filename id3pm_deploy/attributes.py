"""Attributes beside identity: values that people write, and columns that networks see.

A numeric attribute has two columns, its value scaled to [-1, 1] and a 1 that says it
is stated; a categorical one has a column for each category. What is not stated is all
zeros, so that each attribute has its own null, apart from every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import cast

import numpy as np
import numpy.typing as npt

from .errors import InputError, some_of
from .spec import AttributeSpec

Float32 = npt.NDArray[np.float32]
Attributes = Mapping[str, float | str]
"""Values of one picture by the attributes' names; what is missing is not stated."""
Stated = Attributes | Sequence[Attributes]
"""Those of all pictures alike, or of one identity after the other; ``()``: none."""


def encode_attributes(
    specs: Sequence[AttributeSpec], rows: Sequence[Attributes]
) -> Float32:
    """The columns of some pictures' attributes, [n, A] float32.

    Args:
        specs: The model's attributes, A columns in all.
        rows: One mapping a picture.

    Raises:
        InputError: A name is unknown, a number out of its range or none, or a category
            unknown.
    """
    names = {spec.name for spec in specs}
    columns = []
    for row in rows:
        if unknown := [name for name in row if name not in names]:
            raise _unknown(specs, unknown[0])
        columns.append([number for spec in specs for number in _encoded(spec, row)])
    width = sum(spec.columns for spec in specs)
    return np.array(columns, np.float32).reshape(len(rows), width)


def of_each(stated: Stated, count: int) -> tuple[Attributes, ...]:
    """The attributes of each of ``count`` identities.

    Raises:
        InputError: There are several, and not one for each.
    """
    rows = (stated,) if isinstance(stated, Mapping) else tuple(stated) or ({},)
    if len(rows) not in (1, count):
        raise InputError(
            f"there must be attributes for all {count} identities alike, or for each",
            why=f"there are {len(rows)}",
        )
    return rows if len(rows) == count else rows * count


def known_to(specs: Sequence[AttributeSpec], stated: Stated) -> tuple[Attributes, ...]:
    """Of what is stated, what a second stage knows, which need not be all."""
    names = {spec.name for spec in specs}
    rows = (stated,) if isinstance(stated, Mapping) else stated
    return tuple({n: v for n, v in row.items() if n in names} for row in rows)


def parse_attributes(
    specs: Sequence[AttributeSpec], texts: Sequence[str]
) -> dict[str, float | str]:
    """Attributes that are written ``NAME=VALUE``, as ``age=30`` and ``glasses=yes``.

    Raises:
        InputError: A text has another form, an attribute is there twice or unknown, or
            its value is none that it may have.
    """
    known = {spec.name: spec for spec in specs}
    found: dict[str, float | str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise InputError(
                f"{text!r:.80} states no attribute", fix="write it as NAME=VALUE"
            )
        if name in found:
            raise InputError(f"the attribute {name!r:.80} is stated twice")
        if name not in known:
            raise _unknown(specs, name)
        found[name] = parse_value(known[name], value)
    return found


def parse_value(spec: AttributeSpec, text: str) -> float | str:
    """The value of one attribute from its text, checked.

    Raises:
        InputError: It is none that the attribute may have.
    """
    value: float | str = text
    if spec.kind == "numeric":
        try:
            value = float(text)
        except ValueError:
            raise _not_a_number(spec, text) from None
    _encoded(spec, {spec.name: value})
    return value


def described(spec: AttributeSpec) -> str:
    """An attribute and what it may be, for people: ``age=0..100``."""
    if spec.kind == "numeric":
        return f"{spec.name}={spec.low:g}..{spec.high:g}"
    return f"{spec.name}={'|'.join(spec.categories)}"


def _encoded(spec: AttributeSpec, row: Attributes) -> list[float]:
    """One attribute's columns."""
    if spec.name not in row:
        return [0.0] * spec.columns
    value: object = row[spec.name]
    if spec.kind == "categorical":
        if value not in spec.categories:
            raise InputError(
                f"the attribute {spec.name!r} cannot be {value!r:.60}",
                fix=f"use one of {some_of(spec.categories)}",
            )
        return [float(value == one) for one in spec.categories]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _not_a_number(spec, value)
    number, low, high = float(value), cast(float, spec.low), cast(float, spec.high)
    if not low <= number <= high:
        raise InputError(
            f"the attribute {spec.name!r} must be from {low:g} to {high:g}",
            why="it is NaN" if math.isnan(number) else f"it is {number:g}",
        )
    return [2 * (number - low) / (high - low) - 1, 1.0]


def _not_a_number(spec: AttributeSpec, value: object) -> InputError:
    return InputError(
        f"the attribute {spec.name!r} must be a number",
        why=f"it is {value!r:.60}",
        fix=f"give one from {spec.low:g} to {spec.high:g}",
    )


def _unknown(specs: Sequence[AttributeSpec], name: object) -> InputError:
    if not specs:
        return InputError(
            "this model was trained without attributes",
            why=f"it would make the same pictures whatever {name!r:.60} is",
            fix="leave out the attributes",
        )
    return InputError(
        f"the model has no attribute {name!r:.60}",
        fix=f"it has {', '.join(map(described, specs))}",
    )
