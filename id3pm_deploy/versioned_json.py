"""Reading the versioned JSON files of this package: all of them strictly, one way.

Such a file is an object whose ``format`` and ``format_version`` say what it is. What
readers in other languages would take differently is refused: duplicate keys, NaN and
infinity, numbers that a double cannot hold, lone surrogates, deep nesting.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import Id3pmError, RecipeError
from .files import open_plain
from .recipes import dataclass_from_mapping

T = TypeVar("T")

MAX_DEPTH = 32
MAX_INTEGER = (1 << 53) - 1
_HEAD = ("format", "format_version")


@dataclass(frozen=True)
class JsonFormat:
    """One format, and how its errors are called.

    Attributes:
        name: Value of ``format``.
        version: The newest ``format_version`` that this release reads.
        what: What such a file describes, as "an ID3PM bundle".
        noun: What the file is, as "manifest".
        max_bytes: Largest file.
        error: Raised for anything wrong.
        oldest: The oldest ``format_version`` that it reads; None: ``version`` alone.
    """

    name: str
    version: int
    what: str
    noun: str
    max_bytes: int
    error: type[Id3pmError]
    oldest: int | None = None

    def read(self, path: Path, *, follow: bool = False) -> bytes:
        """The bytes of a plain file that is not too large.

        Args:
            path: The file.
            follow: Whether it may be a symbolic link.

        Raises:
            OSError: It is missing, unreadable or no plain file.
            Id3pmError: It is too large.
        """
        with open_plain(path, follow=follow) as handle:
            data = handle.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise self.error(
                f"{path} is too large to be a {self.noun}",
                why=f"it is longer than {self.max_bytes} bytes",
            )
        return data

    def values(self, data: bytes, where: str) -> dict[str, Any]:
        """The object in ``data``, ``format`` and ``format_version`` included.

        Raises:
            Id3pmError: It is not JSON as above, or of another format.
        """
        try:
            values = parse_json(data)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{where} is not JSON", why=str(error)) from error
        if not isinstance(values, Mapping) or values.get("format") != self.name:
            raise self.error(f"{where} does not describe {self.what}")
        return dict(values)

    def body(
        self, values: Mapping[str, Any], where: str, *, older: str = ""
    ) -> dict[str, Any]:
        """``values`` without format and version, which must be one that it reads.

        Args:
            values: From :meth:`values`.
            where: How the message calls the file.
            older: What to do about an older version.

        Raises:
            Id3pmError: The version is another one.
        """
        version = values.get("format_version")
        oldest = self.version if self.oldest is None else self.oldest
        if type(version) is not int or not oldest <= version <= self.version:
            old = type(version) is int and 0 < version < oldest
            reads = f"{oldest} to {self.version}"
            raise self.error(
                f"{where} has format version {version!r:.40}; this release reads "
                f"{reads if oldest < self.version else self.version}",
                fix=older if old and older else "use the release that wrote it",
            )
        return {key: item for key, item in values.items() if key not in _HEAD}

    def into(self, kind: type[T], body: Mapping[str, Any], where: str) -> T:
        """The dataclass ``kind`` from ``body``; see ``recipes``.

        Raises:
            Id3pmError: A key or a type is wrong.
        """
        try:
            return dataclass_from_mapping(kind, body, where)
        except RecipeError as error:
            raise self.error(error.what, why=error.why, fix=error.fix) from error


def parse_json(data: bytes) -> Any:
    """The value in ``data``, UTF-8 JSON without what the module refuses.

    Raises:
        ValueError: It is something else.
        RecursionError: It is nested too deeply for the parser.
    """
    value = json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_object,
        parse_constant=_constant,
        parse_int=_integer,
        parse_float=_float,
    )
    _check_tree(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r:.80} is there twice")
            seen.add(key)
    return values


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise ValueError(f"{text:.20} is past 2**53, not a finite number everywhere")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is not a finite number")
    return number


def _check_tree(value: Any) -> None:
    """Refuse deep nesting and text that is not Unicode."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.keys()
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                item.encode()
        level, depth = inner, depth + 1
