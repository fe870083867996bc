"""Just enough of protocol buffers to read an ONNX file without a package."""

from __future__ import annotations

from typing import Any


def fields(data: memoryview) -> list[tuple[int, Any]]:
    """Field numbers and values (numbers, or bytes as views) of a protocol buffer."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            found.append((key >> 3, varint()))
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        found.append((key >> 3, data[at : at + size]))
        at += size
    return found


def every(data: memoryview, number: int) -> list[Any]:
    return [value for key, value in fields(data) if key == number]


def text(data: memoryview, number: int) -> str:
    return "".join(bytes(value).decode() for value in every(data, number)[:1])


def numbers(packed: memoryview) -> list[int]:
    found, value, shift = [], 0, 0
    for byte in packed:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found
