"""Mappings (TOML, JSON) to frozen dataclasses, strictly: an unknown key is an error.

Recipes live in ``export/`` and ``engines/`` beside the package, or inside it in a
wheel; those of training in ``training/recipes`` of the package. A recipe is named
(``cpu``) or given as the path of a file of the same form.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import RecipeError
from .files import open_plain

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - exercised on Python 3.10 only
    import tomli as tomllib

T = TypeVar("T")

_WRAPPED = 3
"""Lists of more items than this get one line each in a file."""

# The time to parse some TOML grows with the square of its length.
_MAX_BYTES = 1 << 14
_BARE_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*")


def dataclass_from_mapping(kind: type[T], values: Any, where: str) -> T:
    """Build the dataclass ``kind`` from a mapping, checking names and types.

    Args:
        kind: A dataclass whose fields are str, int, float, bool, None, tuples of
            these, or further dataclasses.
        values: What a TOML or JSON parser returned.
        where: How to call the place in an error message.

    Raises:
        RecipeError: Unknown or missing keys, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} must be a table", why=f"it is {values!r:.60}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise RecipeError(
            f"{where} has unknown keys: {', '.join(map(str, unknown))}",
            fix=f"known keys are {', '.join(fields)}",
        )
    hints = typing.get_type_hints(kind)
    arguments = {
        name: _value_from(hints[name], values[name], f"{where}, {name}")
        for name in fields
        if name in values
    }
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}", fix="add the keys")
    return kind(**arguments)


def _value_from(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        plain = [choice for choice in choices if choice is not type(None)]
        return _value_from(plain[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} must be a list", why=f"it is {value!r:.60}")
        inner = typing.get_args(hint)[0]
        return tuple(_value_from(inner, item, where) for item in value)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise RecipeError(
                f"{where} must be one of {known}", why=f"it is {value!r:.60}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return dataclass_from_mapping(typing.cast(type, hint), value, where)
    if hint is float and type(value) in (int, float):
        return _finite_float(value, where)
    if hint is dict or origin is dict:
        hint = dict
    if hint is not Any and type(value) is not hint:
        raise RecipeError(
            f"{where} must be {hint.__name__}",
            why=f"it is {type(value).__name__} {value!r:.60}",
        )
    return value


def _finite_float(value: float, where: str) -> float:
    """No field means NaN or infinity: as a tolerance either would pass anything."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecipeError(
            f"{where} must be a finite number", why=f"it is {value!r:.60}"
        )
    return number


def recipe_folder(kind: str) -> Path:
    """Where the recipes of ``kind`` (``export``, ``engines`` or ``training``) lie.

    A wheel carries them inside the package; an editable install or a checkout has
    them at the top of the repository.
    """
    package = Path(__file__).resolve().parent
    for inside in (package / "_recipes" / kind, package / kind / "recipes"):
        if inside.is_dir():
            return inside
    return package.parent / kind


def recipe_names(kind: str) -> list[str]:
    """Names that ``load_recipe`` accepts for ``kind``, sorted."""
    return sorted(path.stem for path in recipe_folder(kind).glob("*.toml"))


def load_recipe(kind: str, name: str, into: type[T], settings: Iterable[str] = ()) -> T:
    """Read the recipe ``name`` of ``kind``, or the TOML file of that path.

    Args:
        kind: ``export``, ``engines`` or ``training``.
        name: Name of a recipe, or path of a file ending in ``.toml``.
        into: The dataclass that a recipe of this kind is.
        settings: ``KEY=VALUE`` that replace what the file says, the later of two for
            the same key. A value is TOML; a bare word is a string.

    Raises:
        RecipeError: No such recipe, not TOML, or not of the form of ``into``; a
            setting that is at fault is named.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = recipe_folder(kind) / f"{name}.toml"
        if name not in recipe_names(kind):
            raise RecipeError(
                f"there is no recipe {name!r} in {kind}/",
                fix=f"use one of {', '.join(recipe_names(kind))}, or a .toml file",
            )
    values = _read_toml(path)
    given = [_setting(text, into) for text in settings]
    where = f"recipe {path.name}"
    try:
        return dataclass_from_mapping(into, {**values, **dict(given)}, where)
    except RecipeError as error:
        if given:
            shown = ", ".join(f"{key} = {value!r:.60}" for key, value in given)
            what = f"{where} with {shown}: {error.what}"
        elif where in error.what:
            raise
        else:
            what = f"{where}: {error.what}"
        raise RecipeError(what, why=error.why, fix=error.fix) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open_plain(path, follow=True) as handle:
            text = handle.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise RecipeError(f"{path} is too large to be a recipe")
        values: dict[str, Any] = tomllib.loads(text.decode("utf-8"))
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe {path}", why=error.strerror or str(error)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is not TOML", why=str(error)) from error
    return values


def _setting(text: str, into: type) -> tuple[str, Any]:
    """``KEY=VALUE`` as a TOML parser gives it; it fits the field of that name."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    where = f"the setting {text!r:.60}"
    if not equals or not key:
        raise RecipeError(f"{where} is not KEY=VALUE")
    hints = typing.get_type_hints(into)
    if key not in hints:
        raise RecipeError(
            f"{where} has an unknown key", fix=f"known keys are {', '.join(hints)}"
        )
    found = _toml_value(value, where)
    try:
        _value_from(hints[key], found, where)
    except RecipeError as error:
        if error.fix or hints[key] != tuple[str, ...]:
            raise
        fix = f"""quote words in a list, and all for the shell: '{key}=["word"]'"""
        raise RecipeError(error.what, why=error.why, fix=fix) from error
    return key, found


def _toml_value(text: str, where: str) -> Any:
    if len(text) <= _MAX_BYTES:
        try:
            values = tomllib.loads(f"value = {text}")
        except (tomllib.TOMLDecodeError, RecursionError):
            values = {}
        if list(values) == ["value"]:
            return values["value"]
        if _BARE_WORD.fullmatch(text):
            return text
    raise RecipeError(
        f"{where} has a value that is not TOML",
        fix="write a number, true, false, a word, or a list such as '[1, 2]'; quote "
        "it for the shell",
    )


def recipe_text(recipe: Any, comments: Sequence[str] = ()) -> str:
    """A recipe as TOML that ``load_recipe`` reads back as the same.

    Args:
        recipe: A dataclass; what is None is left out.
        comments: Lines that stand above it.
    """
    lines = [f"# {line}" for line in comments]
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if value is not None:
            lines.append(f"{field.name} = {toml_value(value, wrap=_WRAPPED)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any, wrap: int | None = None) -> str:
    """A string, number, truth value or list of these as TOML.

    JSON's form of them is TOML's, but for the one control character that JSON leaves as
    it is.

    Args:
        value: What to write.
        wrap: Lists of more items than this get one line each; None for none.
    """
    if isinstance(value, tuple | list):
        items = [toml_value(item) for item in value]
        if wrap is None or len(items) <= wrap:
            return f"[{', '.join(items)}]"
        return "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
