"""Whether a picture says that it was generated, and is still the one that said so.

A mark is metadata: whoever saves the picture again may lose it, and anybody may write
one. So a mark shows where a picture comes from among people who mean well, and the lack
of one shows nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError
from .identity.embed import read_photo
from .images import pixels_sha256
from .marks import PictureMark, find_mark

UNCHANGED, CHANGED = "unchanged", "changed"
NOT_STATED, NOT_READ = "not stated", "not read"


@dataclass(frozen=True)
class MarkCheck:
    """What a picture says of itself.

    Attributes:
        mark: Its mark, or None.
        why: Why there is none, in one clause.
        pixels: ``unchanged`` since they were marked; ``changed``, as when the picture
            was edited, saved with loss, or given another one's mark; ``not stated`` by
            a mark of an early version; ``not read`` where they cannot be decoded; empty
            without a mark.
    """

    mark: PictureMark | None
    why: str = ""
    pixels: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is marked as generated and nothing speaks against its mark."""
        return self.pixels in (UNCHANGED, NOT_STATED)

    def to_json(self) -> dict[str, Any]:
        """``ok``, ``marked``, ``why``, ``pixels`` and ``mark`` (null without)."""
        mark = None if self.mark is None else dataclasses.asdict(self.mark)
        return {
            "ok": self.ok,
            "marked": mark is not None,
            "why": self.why,
            "pixels": self.pixels,
            "mark": mark,
        }


def check_mark(path: Path) -> MarkCheck:
    """Look for the mark of a picture of any format, and hold its pixels against it.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        mark, stated = find_mark(path)
    except ValueError as error:
        return MarkCheck(None, why=str(error))
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"cannot read {path}", why=why) from error
    if not stated:
        return MarkCheck(mark, pixels=NOT_STATED)
    try:
        same = pixels_sha256(read_photo(path)) == stated
    except InputError:
        return MarkCheck(mark, pixels=NOT_READ)
    return MarkCheck(mark, pixels=UNCHANGED if same else CHANGED)
