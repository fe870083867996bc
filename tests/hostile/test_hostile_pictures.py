"""Pictures that lie, through `embed` and `inspect`, with little memory."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from crafted import png, png_chunk
from PIL import Image
from sandbox import Sandbox, check_refused

GIGABYTE = 1 << 30
BOMB = zlib.compress(bytes(64 << 20))


def saved(kind: str, size: tuple[int, int], mode: str = "RGB", **rest: object) -> bytes:
    """A black picture as Pillow writes it."""
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind, **rest)
    return stream.getvalue()


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of 8x8 pixels that says it has others."""
    data = bytearray(saved("JPEG", (8, 8)))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan, some bytes long."""
    data = saved("JPEG", (64, 64), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def tiff(width: int, height: int, **more: int) -> bytes:
    """A TIFF of one uncompressed strip of 12 bytes that says it is large."""
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1}
    tags |= {278: height, 279: 12, **{int(k[1:]): v for k, v in more.items()}}
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())
    )
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + bytes(12)


def gif(width: int, height: int) -> bytes:
    """A GIF of a few bytes."""
    size = struct.pack("<HH", width, height)
    frame = b"," + bytes(4) + size + b"\0\x02\x02L\x01\0;"
    return b"GIF89a" + size + bytes(3) + frame


def bmp(width: int, height: int) -> bytes:
    """A BMP without pixels."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


CASES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a PNG of 50,000 squared": (lambda: png(50_000, 50_000, rows=0), "pixels"),
    "a PNG of 2**31 squared": (lambda: png(2**31 - 1, 2**31 - 1, rows=0), "pixels"),
    "a PNG of no pixels": (lambda: png(0, 0), "cannot be read"),
    "a PNG that ends early": (lambda: png(3_000, 3_000, rows=2), ""),
    "text of 64 MiB": (
        lambda: png(8, 8, extra=png_chunk(b"zTXt", b"a\0\0" + BOMB)),
        "cannot be read",
    ),
    "text of 64 MiB in Unicode": (
        lambda: png(8, 8, extra=png_chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
        "cannot be read",
    ),
    "a colour profile of 64 MiB": (
        lambda: png(8, 8, extra=png_chunk(b"iCCP", b"a\0\0" + BOMB)),
        "cannot be read",
    ),
    "a JPEG of 65,500 squared": (lambda: jpeg(65_500, 65_500), "pixels"),
    "a JPEG that ends early": (lambda: jpeg(3_000, 3_000), ""),
    "a JPEG of 2,000 scans": (lambda: scans(2_000), "more than 100 scans"),
    "a TIFF of 60,000 squared": (lambda: tiff(60_000, 60_000), "pixels"),
    "a TIFF that ends early": (lambda: tiff(9_000, 9_000), "cannot be read"),
    "a TIFF of huge tiles": (
        lambda: tiff(64, 64, t322=1 << 30, t323=1 << 30, t324=200, t325=12),
        "",
    ),
    "a TIFF with 2**32 channels": (lambda: tiff(64, 64, t277=2**32 - 1), ""),
    "a GIF of 65,535 squared": (lambda: gif(65_535, 65_535), "pixels"),
    "a GIF that ends early": (lambda: gif(9_000, 9_000), "cannot be read"),
    "a BMP of 2**31": (lambda: bmp(2**31 - 1, -(2**31)), "pixels"),
    "a BMP that ends early": (lambda: bmp(9_000, -9_000), "cannot be read"),
    "a PPM of 60,000 squared": (lambda: b"P6 60000 60000 255\n", "pixels"),
    "a PPM that ends early": (lambda: b"P6 9000 9000 65535\n", "cannot be read"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot identify"),
    "something else": (lambda: b"#!/bin/sh\n", "cannot identify"),
    "nothing": (lambda: b"", "cannot identify"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_photo_that_lies(device: Sandbox, case: str) -> None:
    make, words = CASES[case]
    path = device.work / "photo.jpg"
    path.write_bytes(make())
    found = device.run("embed", path, "--out", "who.npz")
    check_refused(found, words, "photo.jpg", peak=GIGABYTE // 2, seconds=10)
    assert device.files() == ["work/photo.jpg"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "PPM", "BMP"])
def test_a_valid_photo_of_the_same_making(device: Sandbox, kind: str) -> None:
    """Black is read, and no face is found in it."""
    path = device.work / "photo.jpg"
    path.write_bytes(saved(kind, (64, 64)))
    check_refused(device.run("embed", path, "--out", "who.npz"), "no face was found")


@pytest.mark.parametrize("made", [png(64, 64), gif(64, 64), jpeg(8, 8), scans(10)])
def test_a_valid_photo_of_our_own_making(device: Sandbox, made: bytes) -> None:
    path = device.work / "photo.jpg"
    path.write_bytes(made)
    found = device.run("embed", path, "--out", "who.npz")
    check_refused(found)
    assert ("no face was found" in found.stderr) == (made[:3] != b"GIF")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_the_largest_photo_that_is_let_in(device: Sandbox, kind: str) -> None:
    """A hundred megapixels in some 300 kB: memory and time stay bounded."""
    path = device.work / "photo.jpg"
    if kind == "PNG":
        path.write_bytes(png(10_000, 10_000, colour=6))
    else:
        path.write_bytes(saved(kind, (10_000, 10_000), quality=1))
    assert path.stat().st_size < 2_000_000
    device.limits["memory"] = 3 * GIGABYTE
    found = device.run("embed", path, "--out", "who.npz")
    check_refused(found, "no face was found", peak=2 * GIGABYTE)


@pytest.mark.parametrize("kind", ["pipe", "device", "endless", "folder", "loop"])
def test_what_is_no_photo(device: Sandbox, kind: str) -> None:
    path = device.work / "photo.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/full", "endless": "/dev/zero"}.get(kind, path))
    check_refused(device.run("embed", path, "--out", "who.npz"), seconds=5)
    model = ("--model", f"onnx:{path}")
    check_refused(device.run("embed", path, "--out", "who.npz", *model), seconds=5)


# The mark of a picture

XMP = b"XML:com.adobe.xmp\0\0\0\0\0"
LAUGHS = b"<!DOCTYPE x [" + b"".join(
    b'<!ENTITY e%d "&e%d;&e%d;">' % (i + 1, i, i) for i in range(60)
)
MARKS: dict[str, bytes] = {
    "no mark": b"",
    "a billion laughs": png_chunk(b"iTXt", XMP + LAUGHS + b"]><x>&e60;</x>"),
    "10,000 levels": png_chunk(b"iTXt", XMP + b"<x>" * 10_000),
    "a mark of 1 MB": png_chunk(b"iTXt", XMP + b"<x>" + bytes([32]) * 1_000_000),
    "a packed mark": png_chunk(b"iTXt", XMP[:-4] + b"\1\0\0\0" + BOMB),
    "no UTF-8": png_chunk(b"iTXt", XMP + b"<x>\xff</x>"),
    "another encoding": png_chunk(
        b"iTXt", XMP + b'<?xml version="1.0" encoding="UTF-7"?><x/>'
    ),
    "a chunk of 4 GiB": struct.pack(">I", 0xFFFFFFFF) + b"iTXt",
    "100,000 chunks": png_chunk(b"tEXt", b"a\0b") * 100_000,
}


@pytest.mark.parametrize("case", MARKS)
def test_a_mark_that_lies(device: Sandbox, case: str) -> None:
    path = device.work / "picture.png"
    path.write_bytes(png(8, 8, extra=MARKS[case]))
    check_refused(device.run("inspect", path), "picture.png", seconds=5)


def test_a_valid_mark_of_the_same_making(device: Sandbox) -> None:
    from id3pm_deploy.marks import PictureMark, xmp_packet

    mark = PictureMark("1", 0, 0, "ddim", 1, 1.0, "onnxruntime", "float32", "title")
    path: Path = device.work / "picture.png"
    chunk = png_chunk(b"iTXt", XMP + xmp_packet(mark).encode())
    path.write_bytes(png(8, 8, extra=chunk))
    found = device.run("inspect", path)
    assert found.status == 0, found.stderr
    assert "onnxruntime" in found.stdout
