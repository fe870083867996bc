"""Flags of a training run, from JSON or from the command line that began it.

A command line is only read: nothing in it is run, and of a shell's language it may hold
assignments, such as ``MODEL_FLAGS="..."``, and references to them.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import open_plain
from ..reference.guided_flags import flag_type
from ..versioned_json import parse_json

_MAX_BYTES = 1 << 15
_MAX_WORD = 1 << 13
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\+?=(.*)", re.DOTALL)
_REFERENCE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_FLAG = re.compile(r"--([A-Za-z_][A-Za-z0-9_]*)(?:=(.*))?", re.DOTALL)
# As guided-diffusion reads them.
_BOOLS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
_FIX = (
    'give a JSON file of flags, or the command line as "--image_size 64 '
    '--num_channels 192 ..." or a file that holds it'
)


def load_flags(given: str) -> dict[str, Any]:
    """Flags from what the user gave.

    Args:
        given: The path of a JSON file, the path of a text file with a command line, or
            either text itself.

    Raises:
        InputError: There is no such file, it is neither, or a flag's value is not of
            its type; the flag is named.
    """
    written_out = given.lstrip().startswith("{") or "--" in given
    text = given
    if not written_out or os.path.exists(given):
        text = _read(Path(given))
    if text.lstrip().startswith("{"):
        return _from_json(text)
    return flags_from_command_line(text)


def _read(path: Path) -> str:
    try:
        with open_plain(path, follow=True) as handle:
            data = handle.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise InputError(f"{path} is too large to hold flags", fix=_FIX)
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read the flags {path}", why=why, fix=_FIX) from error


def _from_json(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise InputError("the flags are not JSON", why=str(error), fix=_FIX) from error
    return found


def flags_from_command_line(text: str) -> dict[str, Any]:
    """Flags in a command line, in several of them, or in a shell's assignments.

    What comes before the first flag of a line is the program's name and its like, and
    is left aside. A flag may be stated twice if it says the same.

    Raises:
        InputError: See :func:`load_flags`.
    """
    variables: dict[str, str] = {}
    flags: dict[str, str] = {}
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        for word_list in _commands(line, variables):
            _collect(word_list, flags)
    if not flags:
        raise InputError("there are no flags", why="no word starts with --", fix=_FIX)
    return {name: _value(name, text) for name, text in flags.items()}


def _commands(line: str, variables: dict[str, str]) -> list[list[str]]:
    """The words of a line; what it assigns goes to ``variables``, too."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise InputError(
            "the command line cannot be read", why=str(error), fix=_FIX
        ) from error
    plain: list[str] = []
    found = [plain]
    for word in words:
        assigned = None if word.startswith("-") else _ASSIGNMENT.fullmatch(word)
        if assigned is not None and not plain:
            value = _expanded(assigned[2], variables)
            variables[assigned[1]] = value
            found.append(value.split())
        elif word != "export" or plain:
            whole = _REFERENCE.fullmatch(word)
            value = _expanded(word, variables)
            # What was assigned is collected there.
            plain.extend([] if whole is not None and "--" in value else [value])
    return found


def _expanded(word: str, variables: dict[str, str]) -> str:
    """``word`` with values in the place of references."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise InputError(
                f"the command line uses ${name}",
                why="nothing in it says what that is",
                fix=f'add a line {name}="..." or put its value in its place',
            )
        return variables[name]

    made = _REFERENCE.sub(value, word)
    if len(made) > _MAX_WORD:
        raise InputError("the command line is too long", fix=_FIX)
    return made


def _collect(words: list[str], flags: dict[str, str]) -> None:
    """Add the flags among ``words``."""
    name: str | None = None
    seen = False
    for word in words:
        match = _FLAG.fullmatch(word)
        if name is not None and match is None:
            _state(name, word, flags)
            name = None
        elif name is not None:
            raise _valueless(name)
        elif match is not None:
            seen, name = True, match[1]
            if match[2] is not None:
                _state(name, match[2], flags)
                name = None
        elif seen:
            raise InputError(
                f"the command line holds {word!r:.60}",
                why="it is no flag and no flag's value",
                fix=_FIX,
            )
    if name is not None:
        raise _valueless(name)


def _valueless(name: str) -> InputError:
    return InputError(
        f"the flag --{name} has no value", fix=f"write --{name} True, or its number"
    )


def _state(name: str, value: str, flags: dict[str, str]) -> None:
    if flags.setdefault(name, value) != value:
        raise InputError(
            f"the flag --{name} is stated twice",
            why=f"as {flags[name]!r:.60} and as {value!r:.60}",
            fix="keep the one the model was trained with",
        )


def _value(name: str, text: str) -> Any:
    """The value of a flag as its type has it; of an unknown one, the text."""
    kind = flag_type(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if kind is None or str in kinds:
        return text
    if kind is type(None):
        return None if text == "None" else text
    if kind is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    for one in (int, float):
        if one in kinds:
            try:
                return one(text)
            except ValueError:
                continue
    expected = "True or False" if kind is bool else "a number"
    raise InputError(f"the flag --{name} is {text!r:.60}", why=f"it takes {expected}")
