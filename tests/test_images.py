"""Grey levels, marked PNG files and contact sheets."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ET
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from id3pm_deploy import marks
from id3pm_deploy.errors import EngineError, InputError, NonFiniteError, OutputError
from id3pm_deploy.images import (
    PictureMark,
    Pixels,
    contact_sheet,
    pixels_sha256,
    read_mark,
    save_png,
    save_sheet,
    to_uint8,
)

MARK = PictureMark(
    tool_version="0.1.0",
    seed=7,
    sample=3,
    solver="ddim",
    steps=25,
    guidance=2.5,
    backend="onnxruntime",
    precision="fp32",
    checkpoint="demo-32",
)
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
OURS = "urn:id3pm-deploy:1.0#"
AT_DEFAULT = {f"guidance_{x}" for x in ("schedule", "interval", "rescale")}
AT_DEFAULT |= {"composite"}
AT_DEFAULT |= {field.name for field in fields(MARK) if field.name.startswith("sr_")}
"""Properties that MARK does not say, because they are at their defaults."""


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def packet_of(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.info["XML:com.adobe.xmp"])


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png_with(packet: str, head: bytes = b"\0\0\0\0") -> bytes:
    """As much of a PNG as a reader of marks looks at."""
    text = b"XML:com.adobe.xmp\0" + head + packet.encode()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)) + chunk(b"iTXt", text)


def test_grey_levels_at_the_ends_the_middle_and_beyond() -> None:
    x = np.zeros((1, 3, 1, 4), np.float32)
    x[0, 0, 0] = [-1, 0, 1, 7]
    x[0, 1, 0] = [-9, 1 / 255, -1 / 255, 0.5]
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 128, 255, 255]
    assert to_uint8(x)[0, 0, :, 1].tolist() == [0, 128, 127, 191]


def test_halves_go_to_the_even_level() -> None:
    x = np.array([-1.0, -0.5, 0.0, 0.5, 1.0], np.float32)
    exact = (x.astype(np.float64) + 1) * 127.5  # 0, 63.75, 127.5, 191.25, 255
    assert exact[2] == 127.5
    levels = to_uint8(np.tile(x, (1, 3, 1, 1)))[0, 0, :, 0]
    assert levels.tolist() == [0, 64, 128, 191, 255]


def test_every_grey_level_survives_the_way_out_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8)
    x = (levels.astype(np.float32) / 127.5 - 1).astype(np.float32)
    assert (to_uint8(np.tile(x, (2, 3, 1, 1)))[1, 0, :, 2] == levels).all()


def test_axes_become_height_width_colour() -> None:
    x = np.full((2, 3, 4, 5), -1, np.float32)
    x[1, 2, 3, 4] = 1
    pixels = to_uint8(x)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.flags.c_contiguous
    assert pixels[1, 3, 4, 2] == 255
    assert pixels.sum() == 255


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_a_picture(bad: float) -> None:
    x = np.zeros((3, 3, 2, 2), np.float32)
    x[1, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match="1 of 3"):
        to_uint8(x)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((3, 2, 2), np.float32),
        np.zeros((1, 2, 2, 3), np.float32),
        np.zeros((1, 3, 2, 2), np.float64),
        np.zeros((1, 3, 2, 2), np.uint8),
    ],
)
def test_other_shapes_and_types_are_refused(x: Any) -> None:
    with pytest.raises(EngineError):
        to_uint8(x)


def test_a_png_keeps_its_pixels_and_its_mark(tmp_path: Path) -> None:
    pixels = noise(9, 7, 3)
    save_png(tmp_path / "a.png", pixels, MARK)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB"
        assert (np.asarray(image) == pixels).all()
    assert read_mark(tmp_path / "a.png") == MARK


def test_the_same_picture_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, noise(8, 8, 3), MARK)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_xmp_is_xml_and_calls_the_picture_generated(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(8, 8, 3), MARK)
    root = ET.fromstring(packet_of(tmp_path / "a.png"))  # noqa: S314 - our own
    text = {element.tag: element.text for element in root.iter()}
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert text[iptc] == GENERATED
    assert text["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == "id3pm-deploy 0.1.0"
    values = {k: v for k, v in asdict(MARK).items() if k not in AT_DEFAULT}
    values["pixels_sha256"] = pixels_sha256(noise(8, 8, 3))
    expected = {f"{{{OURS}}}{key}": str(value) for key, value in values.items()}
    assert {k: v for k, v in text.items() if k.startswith(f"{{{OURS}}}")} == expected


def test_a_png_holds_nothing_beside_picture_and_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_png(path, noise(8, 8, 3), MARK)
    with Image.open(path) as image:
        image.load()
        assert set(image.info) <= {"XML:com.adobe.xmp", "xmp"}
    names = {field.name for field in fields(PictureMark)}
    assert names == {
        "tool_version",
        "seed",
        "sample",
        "solver",
        "steps",
        "guidance",
        "backend",
        "precision",
        "checkpoint",
        "guidance_schedule",
        "guidance_interval",
        "guidance_rescale",
        "composite",
        *(f"sr_{x}" for x in ("solver", "steps", "guidance")),
        *(f"sr_{x}" for x in ("backend", "precision", "checkpoint")),
    }


def test_a_sheet_with_a_photo_is_called_a_composite(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    mark = replace(MARK, composite=True)
    save_png(path, noise(8, 8, 3), mark)
    packet = packet_of(path)
    assert "/compositeWithTrainedAlgorithmicMedia<" in packet
    assert "/trainedAlgorithmicMedia<" not in packet
    assert read_mark(path) == mark
    assert str(tmp_path).encode() not in path.read_bytes()


def test_text_from_outside_cannot_break_the_xmp(tmp_path: Path) -> None:
    wild = replace(MARK, checkpoint="<a&b>\"'\x00\n]]>\ud800é名", solver="x</id3pm:y>")
    save_png(tmp_path / "a.png", noise(8, 8, 3), wild)
    found = read_mark(tmp_path / "a.png")
    assert found == wild
    assert found.checkpoint == "<a&b>\"'\ufffd ]]>\ufffdé名"
    assert found.solver == "x</id3pm:y>"
    assert len(replace(MARK, checkpoint="x" * 9999).checkpoint) == 200


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1},
        {"sample": -1},
        {"steps": 0},
        {"guidance": float("nan")},
        {"guidance": float("inf")},
        {"guidance_rescale": float("nan")},
        {"guidance_interval": (0.0, float("inf"))},
    ],
)
def test_a_mark_out_of_range_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(MARK, **change)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 2**127])
def test_large_seeds_come_back_exactly(tmp_path: Path, seed: int) -> None:
    mark = replace(MARK, seed=seed, guidance=0.1 + 0.2)
    save_png(tmp_path / "a.png", noise(8, 8, 3), mark)
    assert read_mark(tmp_path / "a.png") == mark


def test_the_compact_form_that_editors_write_is_read(tmp_path: Path) -> None:
    values = " ".join(
        f'i:{key}="{value}"'
        for key, value in asdict(MARK).items()
        if key not in AT_DEFAULT
    )
    packet = (
        '<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<r:Description xmlns:i="{OURS}" {values} '
        'xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'e:DigitalSourceType="{GENERATED}"/></r:RDF>'
    )
    path = tmp_path / "a.png"
    path.write_bytes(png_with(packet))
    assert read_mark(path) == MARK


GOOD = marks.xmp_packet(MARK)
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no PNG"),
        (b"GIF89a" + bytes(99), "no PNG"),
        (png_with(GOOD)[:8], "no XMP"),
        (png_with(GOOD)[:60], "damaged"),
        (png_with(GOOD)[:-30] + b"X" + png_with(GOOD)[-29:], "damaged"),
        (png_with(GOOD, b"\1\0\0\0"), "compressed"),
        (png_with(""), "no element"),
        (png_with("<a>"), "no element"),
        (png_with("<a/>"), "generated"),
        (png_with(BOMB + "<x>&b;</x>"), "declaration"),
        (png_with(GOOD.replace("<x:xmpmeta", BOMB + "<x:xmpmeta")), "declaration"),
        (png_with("<a>" * 20000 + "</a>" * 20000), "longer"),
        (png_with("<a>" * 9000 + "</a>" * 9000), "generated"),
        (png_with(GOOD + " " * 70000), "longer"),
        (png_with(GOOD.replace(GENERATED, "x")), "generated"),
        (png_with(GOOD.replace("<id3pm:seed>7</id3pm:seed>", "")), "lacks seed"),
        (png_with(GOOD.replace(">7<", ">-7<")), "seed"),
        (png_with(GOOD.replace(">7<", ">1e3<")), "seed"),
        (png_with(GOOD.replace(">7<", f">{'9' * 5000}<")), "seed"),
        (png_with(GOOD.replace(">2.5<", ">nan<")), "range"),
        (png_with(GOOD.replace(">2.5<", ">two<")), "float"),
        (png_with(GOOD.replace(">25<", ">0<")), "range"),
        (png_with(GOOD.replace("</rdf:D", "<id3pm:seed>8</id3pm:seed></rdf:D")), "two"),
    ],
)
def test_files_without_a_mark_of_ours_are_refused(
    tmp_path: Path, data: bytes, why: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_mark(path)
    assert why in caught.value.why


def test_the_control_of_those_files_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_with(GOOD))
    assert read_mark(path) == MARK


def test_a_plain_png_has_no_mark(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="not a marked picture"):
        read_mark(tmp_path / "a.png")
    with pytest.raises(InputError, match="cannot read"):
        read_mark(tmp_path / "missing.png")
    with pytest.raises(InputError, match="cannot read"):
        read_mark(tmp_path)


def test_a_failed_write_leaves_the_older_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_png(path, noise(8, 8, 3), MARK)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="cannot write"):
        save_png(path, noise(8, 8, 3, seed=1), MARK)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
)
def test_what_is_no_picture_is_not_written(tmp_path: Path, pixels: Any) -> None:
    with pytest.raises(InputError):
        save_png(tmp_path / "a.png", pixels, MARK)
    assert list(tmp_path.iterdir()) == []


def holds(sheet: Pixels, pixels: Pixels) -> list[tuple[int, int]]:
    """Where exactly these pixels stand on a sheet."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, pixels.shape)
    hits = (windows[:, :, 0] == pixels).all(axis=(2, 3, 4))
    return [(int(y), int(x)) for y, x in np.argwhere(hits)]


def test_a_sheet_holds_every_picture_in_reading_order() -> None:
    pictures = [noise(6, 5, 3, seed=i) for i in range(5)]
    sheet = np.asarray(contact_sheet(pictures, columns=2, scale=1))
    places = [holds(sheet, picture) for picture in pictures]
    assert all(len(place) == 1 for place in places)
    order = [place[0] for place in places]
    assert order == sorted(order)
    assert order[0][0] == order[1][0]
    assert order[0][1] == order[2][1] == order[4][1]
    assert order[4][0] > order[3][0]


def test_a_sheet_enlarges_by_whole_pixels() -> None:
    picture = noise(4, 4, 3)
    sheet = np.asarray(contact_sheet([picture], columns=1, scale=3))
    assert len(holds(sheet, picture.repeat(3, 0).repeat(3, 1))) == 1
    smooth = np.asarray(contact_sheet([picture], columns=1, scale=3, smooth=True))
    assert smooth.shape == sheet.shape
    assert not holds(smooth, picture.repeat(3, 0).repeat(3, 1))


def test_small_pictures_are_enlarged_to_be_seen() -> None:
    bare = contact_sheet([noise(32, 32, 3)], columns=1)
    assert bare.size == (128 + 40, 128 + 40)
    assert contact_sheet([noise(300, 300, 3)], columns=1).size == (340, 340)


def test_labels_take_room_and_leave_the_pictures_alone() -> None:
    pictures = [np.zeros((32, 32, 3), np.uint8)] * 4
    bare = contact_sheet(pictures, columns=2)
    full = contact_sheet(
        pictures,
        columns=2,
        row_labels=["reference", "engine\nx 64"],
        column_labels=["sample 0", "a label much wider than its picture"],
        title="Titel – überall × 2 名",
    )
    assert full.width > bare.width + 40
    assert full.height > bare.height + 30
    dark = (np.asarray(full) == 0).all(axis=2).sum()
    assert dark == 4 * 128 * 128
    assert full.getpixel((0, 0)) == bare.getpixel((0, 0)) != (0, 0, 0)


def test_a_long_title_or_label_cannot_make_an_endless_sheet() -> None:
    picture = [noise(32, 32, 3)]
    assert contact_sheet(picture, columns=1, row_labels=["x" * 9999]).width < 600
    assert contact_sheet(picture, columns=1, title="x" * 3000).width < 2100


@pytest.mark.parametrize(
    ("pictures", "options"),
    [
        ([], {"columns": 1}),
        ([noise(4, 4, 3)], {"columns": 0}),
        ([noise(4, 4, 3)], {"columns": 1, "scale": 0}),
        ([noise(4, 4, 3), noise(5, 4, 3)], {"columns": 2}),
        ([noise(4, 4, 3)], {"columns": 1, "row_labels": ["a", "b"]}),
        ([noise(4, 4, 3)], {"columns": 2, "column_labels": ["a"]}),
        ([noise(4, 4)], {"columns": 1}),
    ],
)
def test_a_senseless_sheet_is_refused(
    pictures: list[Pixels], options: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        contact_sheet(pictures, **options)


def test_a_sheet_is_marked_too(tmp_path: Path) -> None:
    mark = replace(MARK, sample=None)
    save_sheet(tmp_path / "s.png", contact_sheet([noise(4, 4, 3)], columns=1), mark)
    assert read_mark(tmp_path / "s.png") == mark
    assert "sample" not in packet_of(tmp_path / "s.png")
