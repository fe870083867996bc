"""Sizes as people type them: ``10GiB``, ``1.5 GB``, ``4096``."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import click

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MOST = 1 << 60


def bytes_from(text: str) -> int:
    """Bytes of a size such as ``10GiB``; K, M, G and T alone are powers of 1000.

    Raises:
        ValueError: It is no size, or too large to be one.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r:.40} is not a size such as 10GiB, 500MB or 4096")
    unit = 1024 if match[3] else 1000
    size = float(match[1]) * unit ** _POWERS[match[2].lower()]
    if not math.isfinite(size) or size > _MOST:
        raise ValueError(f"{text!r:.40} is too large")
    return int(size)


if TYPE_CHECKING:
    _Type = click.ParamType[int]
else:  # not generic in all releases of click that we take
    _Type = click.ParamType


class Size(_Type):
    """A size in bytes, typed as :func:`bytes_from` takes it."""

    name = "size"

    def convert(
        self,
        value: str | int,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        """The number of bytes; a number, such as a default, stays what it is."""
        if isinstance(value, int):
            return value
        try:
            return bytes_from(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()
