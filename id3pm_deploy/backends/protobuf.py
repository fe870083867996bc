"""The wire format of protocol buffers, read in place; needs no package.

A file is walked message by message, and nothing is copied. What is no protocol buffer
is a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""

Field = tuple[int, int, memoryview, int]
"""Field number, wire type, bytes and number (of which one is empty)."""


def inner(kind: int, value: memoryview) -> memoryview:
    """The message, text or packed numbers that a field holds."""
    if kind != BYTES:
        raise ValueError("its protocol buffer is damaged")
    return value


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message, in order; nothing is copied."""
    at, end = 0, len(message)
    empty = message[:0]
    while at < end:
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            item, at = varint(message, at)
            yield number, kind, empty, item
            continue
        if kind == BYTES:
            length, at = varint(message, at)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError("its protocol buffer is damaged")
        if length > end - at:
            raise ValueError("it is cut short")
        yield number, kind, message[at : at + length], 0
        at += length


def varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends."""
    number = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number & (1 << 64) - 1, at
        shift += 7
    raise ValueError("its protocol buffer is damaged")
