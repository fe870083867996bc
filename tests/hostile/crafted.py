"""Builders of hostile files, byte by byte, and of valid ones of the same making."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# NumPy


def npy(
    header: str, data: bytes = b"", *, version: int = 1, length: int | None = None
) -> bytes:
    """A .npy file whose header is any text.

    Args:
        header: In place of the dictionary.
        data: What follows it.
        version: Major version; from 2 on the header's length takes four bytes.
        length: What the file says the header's length is; None says the truth.
    """
    text = header.encode() + b"\n"
    size = len(text) if length is None else length
    packed = struct.pack("<H" if version == 1 else "<I", size)
    return b"\x93NUMPY" + bytes([version, 0]) + packed + text + data


def npy_header(descr: str, shape: str, fortran: str = "False") -> str:
    """The dictionary of a .npy file from the texts of its values."""
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def npy_of(array: npt.ArrayLike) -> bytes:
    """A true .npy file."""
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def identity_members() -> dict[str, bytes]:
    """The members of a valid identity file: two vectors of 16 elements."""
    vectors = np.arange(1, 33, dtype=np.float32).reshape(2, 16)
    arrays: dict[str, npt.ArrayLike] = {
        "format_version": np.int64(1),
        "vectors": vectors,
        "ids": np.array(["0a", "0b"]),
        "model_name": np.array("test model"),
        "model_sha256": np.array("0" * 64),
    }
    return {f"{name}.npy": npy_of(array) for name, array in arrays.items()}


# Zip


def deflated(data: bytes) -> bytes:
    """``data`` packed as zip archives do."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


def deflated_zeros(size: int, head: bytes = b"") -> bytes:
    """``head`` and ``size`` zero bytes, whole MiB, packed as zip archives do, soon."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = compressor.compress(head) + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(1 << 20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return first + block * (size >> 20) + compressor.flush()


class Zip:
    """A zip archive of which every record can lie.

    ``add`` writes a member; its keywords replace fields of the local header and of the
    central directory's entry alike, those with ``central_`` only the latter; ``packed``
    stands in for what ``deflate`` would make of the data.
    """

    def __init__(self) -> None:
        self._body = bytearray()
        self._central: list[bytes] = []

    def add(
        self,
        name: str,
        data: bytes,
        *,
        deflate: bool = False,
        flags: int = 0,
        crc: int | None = None,
        size: int | None = None,
        packed: bytes | None = None,
        central_size: int | None = None,
        central_offset: int | None = None,
    ) -> Zip:
        """Add a member and return the archive."""
        if packed is None:
            packed = deflated(data) if deflate else data
        crc = zlib.crc32(data) if crc is None else crc
        size = len(data) if size is None else size
        method = 8 if deflate else 0
        common = struct.pack("<HHHHII", flags, method, 0, 33, crc, len(packed))
        names = struct.pack("<HH", len(name), 0)
        offset = len(self._body) if central_offset is None else central_offset
        local = b"PK\x03\x04" + struct.pack("<H", 20) + common
        self._body += local + struct.pack("<I", size) + names + name.encode() + packed
        size = size if central_size is None else central_size
        self._central.append(
            b"PK\x01\x02"
            + struct.pack("<HH", 20, 20)
            + common
            + struct.pack("<I", size)
            + names
            + struct.pack("<HHHII", 0, 0, 0, 0, offset)
            + name.encode()
        )
        return self

    def add_all(self, members: Mapping[str, bytes]) -> Zip:
        """Add several members as they are."""
        for name, data in members.items():
            self.add(name, data)
        return self

    def repeat_last(self, times: int) -> Zip:
        """List the last member so many times more."""
        self._central += self._central[-1:] * times
        return self

    def bytes(self) -> bytes:
        """The archive."""
        central = b"".join(self._central)
        count = min(len(self._central), 0xFFFF)
        end = struct.pack(
            "<HHHHIIH", 0, 0, count, count, len(central), len(self._body), 0
        )
        return bytes(self._body) + central + b"PK\x05\x06" + end


def npz(**changes: bytes | None) -> bytes:
    """An identity file with some members replaced, or left out where None."""
    members = identity_members()
    for name, data in changes.items():
        members.pop(f"{name}.npy", None)
        if data is not None:
            members[f"{name}.npy"] = data
    return Zip().add_all(members).bytes()


# Pictures


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file with its length and checksum."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def png(
    width: int,
    height: int,
    *,
    rows: int | None = None,
    extra: bytes = b"",
    depth: int = 8,
    colour: int = 2,
) -> bytes:
    """A black PNG, of which fewer rows may be there than it says.

    Args:
        width: What it says, in pixels.
        height: The same.
        rows: How many there are; None is all.
        extra: Chunks between header and data.
        depth: Bits a channel.
        colour: Colour type; 2 is RGB, 0 grey.
    """
    channels = {0: 1, 2: 3, 6: 4}[colour]
    line = bytes(1 + (width * channels * depth + 7) // 8)
    packer = zlib.compressobj(9)
    parts = [packer.compress(line) for _ in range(height if rows is None else rows)]
    data = b"".join([*parts, packer.flush()])
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + extra
        + png_chunk(b"IDAT", data)
        + png_chunk(b"IEND", b"")
    )


# Checkpoints


def config(**changes: Any) -> dict[str, Any]:
    """The values of a valid ``config.json``, of a network of 7,000 parameters or so.

    Args:
        changes: Values in place of its own.
    """
    model = {
        "image_size": 16,
        "base_channels": 4,
        "channel_multipliers": [1],
        "residual_blocks": 1,
        "attention_resolutions": [],
        "num_head_channels": 4,
        "norm_groups": 2,
    }
    values = {
        "format": "id3pm-checkpoint",
        "format_version": 1,
        "model": model,
        "identity": {"dim": 16, "model_name": "test model", "model_sha256": "0" * 64},
    }
    return {**values, **changes}


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file whose header is any text, bytes or JSON value.

    Args:
        header: In place of the header.
        data: What follows it.
        length: What the file says the header's length is; None says the truth.
    """
    if not isinstance(header, bytes | str):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
