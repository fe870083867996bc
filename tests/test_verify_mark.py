"""``id3pm-deploy verify-mark``: what a picture says of itself, and of which pixels."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from id3pm_deploy.cli import main
from id3pm_deploy.images import (
    Pixels,
    contact_sheet,
    pixels_sha256,
    save_png,
    save_sheet,
)
from id3pm_deploy.mark_check import check_mark
from id3pm_deploy.marks import KEYWORD, PictureMark, find_mark, xmp_packet

MARK = PictureMark(
    tool_version="0.1.0",
    seed=7,
    sample=3,
    solver="ddim",
    steps=25,
    guidance=2.5,
    backend="onnxruntime",
    precision="fp32",
)


def noise(seed: int = 0, size: int = 8) -> Pixels:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def with_mark_of(donor: Path, pixels: Pixels, path: Path) -> Path:
    """Another picture that is given the donor's mark."""
    from PIL.PngImagePlugin import PngInfo

    with Image.open(donor) as picture:
        packet = str(picture.info[KEYWORD])
    info = PngInfo()
    info.add_itxt(KEYWORD, packet)
    Image.fromarray(pixels).save(path, pnginfo=info, compress_level=1)
    return path


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify-mark", *map(str, arguments)])


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "ours.png"
    save_png(path, noise(), MARK)
    return path


def test_a_picture_of_ours_is_marked_and_unchanged(ours: Path) -> None:
    found = check_mark(ours)
    assert (found.mark, found.pixels, found.ok) == (MARK, "unchanged", True)
    plain = hashlib.sha256(b"8x8" + noise().tobytes()).hexdigest()
    assert find_mark(ours) == (MARK, plain)
    result = verify(ours)
    assert result.exit_code == 0
    assert result.stdout == (
        f"{ours}: marked as generated (id3pm-deploy 0.1.0, seed 7, sample 3); "
        "the pixels are those that were marked\n"
    )


def test_saving_it_again_without_loss_changes_nothing(
    ours: Path, tmp_path: Path
) -> None:
    again = with_mark_of(ours, noise(), tmp_path / "again.png")
    assert again.read_bytes() != ours.read_bytes()
    assert check_mark(again).pixels == "unchanged"


@pytest.mark.parametrize("other", [noise(1), noise(0, 16), noise().reshape(4, 16, 3)])
def test_a_mark_on_other_pixels_is_seen(
    ours: Path, tmp_path: Path, other: Pixels
) -> None:
    forged = with_mark_of(ours, other, tmp_path / "forged.png")
    assert check_mark(forged).pixels == "changed"
    result = verify(forged)
    assert result.exit_code == 1
    assert "the pixels are not those that were marked" in result.stdout


def test_a_damaged_picture_keeps_its_mark(ours: Path) -> None:
    ours.write_bytes(ours.read_bytes()[:-40])
    found = check_mark(ours)
    assert (found.mark, found.pixels, found.ok) == (MARK, "not read", False)


def test_a_mark_of_an_earlier_version_says_nothing_of_pixels(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    text = KEYWORD.encode() + bytes(5) + xmp_packet(MARK).encode()
    path = tmp_path / "early.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"iTXt", text))
    found = check_mark(path)
    assert (found.mark, found.pixels, found.ok) == (MARK, "not stated", True)
    assert verify(path).exit_code == 0


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_mark_survives_in_formats_that_keep_xmp(
    tmp_path: Path, ours: Path, kind: str
) -> None:
    packet = xmp_packet(MARK, pixels_sha256(noise())).encode()
    path = tmp_path / "other"
    if kind == "TIFF":
        tags: dict[int, bytes] = {700: packet}
        Image.fromarray(noise()).save(path, format=kind, tiffinfo=tags)
    else:
        Image.fromarray(noise()).save(path, format=kind, xmp=packet)
    found = check_mark(path)
    assert found.mark == MARK
    assert found.pixels == ("unchanged" if kind == "TIFF" else "changed")


def test_a_sheet_with_a_photo_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    sheet = contact_sheet([noise(), noise(1)], columns=2)
    save_sheet(path, sheet, replace(MARK, sample=None, composite=True))
    result = verify(path)
    assert result.exit_code == 0
    assert "put together with a photo (id3pm-deploy 0.1.0, seed 7);" in result.stdout


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("empty", b"", "it is empty"),
        ("text", b"hello", "it has no XMP"),
        ("long", b"<?xpacket begin=" + b" " * 70_000 + b"<?xpacket end=", "no XMP"),
        ("bytes", b"<?xpacket begin=\xff\xfe<?xpacket end=", "decode"),
        ("xml", b"<?xpacket begin=''?><a><?xpacket end=", "no"),
        ("other", b"<?xpacket begin=''?><a/><?xpacket end=", "call it generated"),
    ],
)
def test_what_has_no_mark(tmp_path: Path, name: str, data: bytes, why: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    found = check_mark(path)
    assert found.mark is None
    assert why in found.why
    assert not found.ok
    result = verify(path)
    assert result.exit_code == 1
    assert "no mark of id3pm-deploy" in result.stdout
    assert "which shows nothing" in result.stdout


def test_several_files_and_json(ours: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    Image.fromarray(noise()).save(plain)
    shutil.copy(ours, tmp_path / "copy.png")
    result = verify(ours, plain, tmp_path / "copy.png", "--json")
    assert result.exit_code == 1
    first, second, third = json.loads(result.stdout)
    assert first == {
        "file": str(ours),
        "ok": True,
        "marked": True,
        "why": "",
        "pixels": "unchanged",
        "mark": json.loads(json.dumps(vars(MARK))),
    }
    assert (second["marked"], second["mark"], second["pixels"]) == (False, None, "")
    assert third["ok"]


def test_what_cannot_be_read_is_no_verdict(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        result = verify(path)
        assert result.exit_code == 2
        assert "cannot read" in result.stderr
