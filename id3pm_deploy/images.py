"""Pictures: grey levels, PNG files that say they are generated, contact sheets.

Every PNG written here carries the mark of :mod:`id3pm_deploy.marks`.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, features
from PIL.PngImagePlugin import PngInfo

from .errors import EngineError, InputError, NonFiniteError
from .files import write_bytes
from .marks import KEYWORD, PictureMark, read_mark, xmp_packet

__all__ = [
    "PictureMark",
    "Pixels",
    "check_pixels",
    "contact_sheet",
    "encode_png",
    "pixels_sha256",
    "read_mark",
    "save_png",
    "save_sheet",
    "to_uint8",
]

Pixels = npt.NDArray[np.uint8]

_PAPER, _INK, _FAINT = (250, 249, 246), (38, 38, 42), (110, 110, 118)
_MARGIN, _GAP, _TEXT, _TITLE = 20, 8, 14, 19
_LABEL_WIDTH, _TITLE_WIDTH, _LONGEST_LABEL = 260, 2000, 300
_SPELLINGS = str.maketrans({"×": "x", "−": "-", "–": "-", "—": "-", "\t": " "})
"""Pillow's own font has ASCII and little else."""


def to_uint8(x: npt.NDArray[np.float32]) -> Pixels:
    """Grey levels from the model's range: clip, scale, round half to even.

    Args:
        x: [B,3,H,W] float32 in [-1, 1]; what lies outside is clipped.

    Returns:
        [B,H,W,3] uint8, contiguous.

    Raises:
        EngineError: Another shape or dtype.
        NonFiniteError: NaN or infinity, which a clip could hide.
    """
    if x.ndim != 4 or x.shape[1] != 3 or x.dtype != np.float32:
        raise EngineError(
            "pictures have to be [B,3,H,W] float32",
            why=f"found {list(x.shape)} {x.dtype.name}",
        )
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if bad.size:
        raise NonFiniteError(
            f"{bad.size} of {len(x)} pictures hold NaN or infinity",
            why=f"samples at {', '.join(map(str, bad[:8]))} of this batch",
        )
    levels = np.rint((np.clip(x, -1, 1).astype(np.float64) + 1) * 127.5)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))


def encode_png(pixels: Pixels | Image.Image, mark: PictureMark) -> bytes:
    """A marked PNG file's bytes.

    Args:
        pixels: [H,W,3] uint8, or a picture that is drawn already.
        mark: What the file says of itself.

    Raises:
        InputError: The array is no RGB picture.
    """
    if not isinstance(pixels, Image.Image):
        pixels = Image.fromarray(check_pixels(pixels))
    info = PngInfo()
    info.add_itxt(KEYWORD, xmp_packet(mark, pixels_sha256(np.asarray(pixels))))
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def pixels_sha256(pixels: Pixels) -> str:
    """SHA-256 of a picture [H,W,3] uint8: of ``HxW`` in decimal, then its bytes."""
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"{height}x{width}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def check_pixels(pixels: Pixels) -> Pixels:
    """``pixels`` if it is a non-empty [H,W,3] uint8 array, or :class:`InputError`."""
    fits = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    if not fits or pixels.dtype != np.uint8:
        raise InputError(
            "a picture has to be [H,W,3] uint8",
            why=f"found {list(pixels.shape)} {pixels.dtype.name}",
        )
    return pixels


def save_png(path: Path, pixels: Pixels, mark: PictureMark) -> None:
    """Write one picture, [H,W,3] uint8, atomically and marked.

    Raises:
        InputError: The array is no RGB picture.
        OutputError: The file cannot be written; an older one stays as it was.
    """
    write_bytes(path, encode_png(pixels, mark))


def save_sheet(path: Path, image: Image.Image, mark: PictureMark) -> None:
    """Write a contact sheet, atomically and marked.

    Raises:
        OutputError: The file cannot be written; an older one stays as it was.
    """
    write_bytes(path, encode_png(image, mark))


def contact_sheet(
    pictures: Sequence[Pixels],
    *,
    columns: int,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    scale: int | None = None,
    smooth: bool = False,
    title: str = "",
) -> Image.Image:
    """Arrange pictures of one size in rows, with labels, on light paper.

    Args:
        pictures: [H,W,3] uint8 each, row after row; the last row may be short.
        columns: Pictures in a row.
        row_labels: One for each row, to its left; a newline starts a second line.
        column_labels: One for each column, above it.
        scale: Whole-number enlargement; None enlarges to about 128 pixels.
        smooth: Enlarge with a smooth filter instead of showing the pixels.
        title: A line above everything.

    Raises:
        InputError: No pictures, of different sizes or no RGB, or a number of labels
            that does not fit.
    """
    size, factor = _check_sheet(pictures, columns, row_labels, column_labels, scale)
    height, width = size[0] * factor, size[1] * factor
    small, large = _font(_TEXT), _font(_TITLE)
    names = [_fit(text, small, _LABEL_WIDTH) for text in row_labels or ()]
    heads = [_fit(text, small, width) for text in column_labels or ()]
    heading = _fit(title, large, _TITLE_WIDTH)
    left = top = _MARGIN
    if any(names):
        left += int(max(_text_size(name, small)[0] for name in names)) + 2 * _GAP
    top += _TITLE + 2 * _GAP if heading else 0
    top += _TEXT + _GAP if any(heads) else 0
    grid = _Grid(left, top, width, height)
    right, bottom = grid.corner(-(-len(pictures) // columns), columns)
    right = max(right - _GAP, _MARGIN + int(_text_size(heading, large)[0]))
    sheet = Image.new("RGB", (right + _MARGIN, bottom - _GAP + _MARGIN), _PAPER)
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    for index, pixels in enumerate(pictures):
        large_picture = Image.fromarray(pixels).resize((width, height), resample)
        sheet.paste(large_picture, grid.corner(*divmod(index, columns)))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 2), heading, fill=_INK, font=large)
    _draw_labels(draw, grid, names, heads, small)
    return sheet


class _Grid(NamedTuple):
    """Where the first picture of a sheet stands, and the size of each; pixels."""

    left: int
    top: int
    width: int
    height: int

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """The upper left corner of a picture."""
        x = self.left + column * (self.width + _GAP)
        return x, self.top + row * (self.height + _GAP)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    grid: _Grid,
    names: Sequence[str],
    heads: Sequence[str],
    font: Any,
) -> None:
    """Names to the left of the rows, heads above the columns, both centred."""
    for column, text in enumerate(heads):
        x = grid.corner(0, column)[0] + (grid.width - _text_size(text, font)[0]) / 2
        draw.text((x, grid.top - _GAP - _TEXT), text, fill=_FAINT, font=font)
    for row, text in enumerate(names):
        y = grid.corner(row, 0)[1] + (grid.height - _text_size(text, font)[1]) / 2
        draw.multiline_text((_MARGIN, y), text, fill=_INK, font=font)


def _check_sheet(
    pictures: Sequence[Pixels],
    columns: int,
    row_labels: Sequence[str] | None,
    column_labels: Sequence[str] | None,
    scale: int | None,
) -> tuple[tuple[int, int], int]:
    """The size of one picture and its enlargement, or :class:`InputError`."""
    if len(pictures) == 0 or columns < 1 or (scale is not None and scale < 1):
        raise InputError(
            "a contact sheet needs a picture, a column and a scale of at least 1",
            why=f"{len(pictures)} pictures, {columns} columns, scale {scale}",
        )
    shapes = {check_pixels(pixels).shape for pixels in pictures}
    if len(shapes) > 1:
        raise InputError(
            "the pictures of a contact sheet have different sizes",
            why=", ".join(f"{h}x{w}" for h, w, _ in sorted(shapes)),
        )
    rows = -(-len(pictures) // columns)
    for labels, count in ((row_labels, rows), (column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise InputError(f"{len(labels)} labels for {count} rows or columns")
    height, width, _ = shapes.pop()
    return (height, width), scale or max(1, round(128 / max(height, width)))


def _font(size: int) -> Any:
    """Pillow's own font; its tiny fixed one where Pillow was built without FreeType."""
    if features.check_module("freetype2"):
        return ImageFont.load_default(size=size)
    return ImageFont.load_default()


def _text_size(text: str, font: Any) -> tuple[float, float]:
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = draw.multiline_textbbox((0, 0), text, font=font) if text else (0, 0, 0, 0)
    return box[2], box[3]


def _fit(text: str, font: Any, width: int) -> str:
    """``text`` in characters that the font has, each line cut to ``width`` pixels."""
    plain = unicodedata.normalize("NFKD", text.translate(_SPELLINGS))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    lines = []
    for line in plain.encode("ascii", "replace").decode().split("\n"):
        cut = line[:_LONGEST_LABEL]
        while cut and _text_size(cut + "..." * (cut != line), font)[0] > width:
            cut = cut[:-1]
        lines.append(cut if cut == line else cut.rstrip() + "...")
    return "\n".join(lines)
