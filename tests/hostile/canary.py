"""An identity vector and a photo's name that can be recognised, and their search.

The vector is looked for as numbers of every width and order, as text of several
precisions, in hexadecimal and base64, as it is and normalised; in files as they lie,
and in what archives, pictures and pages have packed into them.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import numpy.typing as npt

DIM = 16
PHOTO = "canary-photo-7f3a91"
FOLDER = "canary-folder-c04d52"
MODEL = "makers:canary_fr"


def vector() -> npt.NDArray[np.float32]:
    """The vector, [16] float32, of lengths and digits that nothing else has."""
    rng = np.random.default_rng(20231002)
    values = rng.uniform(1.1, 9.9, DIM) * rng.choice([-1, 1], DIM)
    return np.asarray(values, dtype=np.float32)


def _scaled() -> dict[str, npt.NDArray[np.float64]]:
    raw = vector().astype(np.float64)
    unit = raw / np.linalg.norm(raw)
    return {"raw": raw, "unit": unit, "unit_sqrt_dim": unit * DIM**0.5}


@cache
def needles() -> dict[str, bytes]:
    """What to look for, by what it is; each is eight bytes or digits at least."""
    found: dict[str, bytes] = {}
    for scale, values in _scaled().items():
        for kind, count in (("f8", 1), ("f4", 2), ("f2", 4)):
            for order in "<>":
                name = f"{scale} {order}{kind}"
                data = values.astype(order + kind).tobytes()
                step = len(data) // DIM * count
                for place in range(0, len(data), step):
                    found[f"{name} {place}"] = data[place : place + step]
                found[f"{name} hexadecimal"] = data[:8].hex().encode()
                found[f"{name} HEXADECIMAL"] = data[:8].hex().upper().encode()
                for shift in range(3):
                    text = base64.b64encode(bytes(shift) + data)[4:-4]
                    found[f"{name} base64 {shift}"] = text
                    found[f"{name} URL {shift}"] = text.translate(
                        bytes.maketrans(b"+/", b"-_")
                    )
        for index, value in enumerate(np.abs(values)):
            found[f"{scale} text {index}"] = f"{value:.12f}"[:10].encode()
            shortest = str(np.float32(value))
            if len(shortest) > 8:
                found[f"{scale} shortest {index}"] = shortest.encode()
    for what, word in (("photo", PHOTO), ("folder", FOLDER)):
        for code in ("utf-8", "utf-16-le", "utf-16-be"):
            found[f"{what} {code}"] = word.encode(code)
    return found


@cache
def _short() -> list[tuple[str, int, list[set[bytes]]]]:
    """Texts of few digits: a name, how many elements must be there, their texts."""
    found = []
    for scale, values in _scaled().items():
        six = [
            {
                f"{value:.12f}"[:7].encode(),
                f"{value:.6g}".encode(),
                f"{value:.12e}"[:7].encode(),
            }
            for value in np.abs(values)
        ]
        four = [{f"{value:.4f}".encode()} for value in np.abs(values)]
        found += [(f"{scale} in six digits", 2, six)]
        found += [(f"{scale} in four digits", 4, four)]
    return found


def unpacked(data: bytes, depth: int = 4) -> Iterator[bytes]:
    """``data``, and what is packed into it: zip, gzip, PNG, base64 in pages."""
    yield data
    if depth == 0:
        return
    inner: list[bytes] = []
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inner += [archive.read(name) for name in archive.namelist()]
    if data[:2] == b"\x1f\x8b":
        inner.append(zlib.decompress(data, 31))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        inner += _chunks(data)
    for text in re.findall(rb"base64,\s*([A-Za-z0-9+/=]+)", data):
        try:
            inner.append(base64.b64decode(text))
        except binascii.Error:
            continue
    for part in inner:
        yield from unpacked(part, depth - 1)


def _chunks(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG beside its pixels; packed text unpacked."""
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        place += 12 + length
        if kind == b"IDAT":
            continue
        yield body
        for start in (m.end() for m in re.finditer(b"\0", body)):
            try:
                yield zlib.decompress(body[start:])
            except zlib.error:
                continue


def traces(data: bytes) -> list[str]:
    """What of the canary is in ``data``, by name."""
    found = set()
    for part in unpacked(data):
        found |= {name for name, needle in needles().items() if needle in part}
        for name, least, texts in _short():
            if sum(any(text in part for text in one) for one in texts) >= least:
                found.add(name)
    return sorted(found)
