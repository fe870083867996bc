"""An entry of the plan cache: a folder with a plan and what is known of it."""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import BuildError, Id3pmError
from ..files import json_text, write_new
from ..versioned_json import JsonFormat
from .cache_files import copy_hashed

ENTRY = JsonFormat(
    name="id3pm-cached-plan",
    version=1,
    what="a plan of the cache",
    noun="cache entry",
    max_bytes=4 << 20,
    error=BuildError,
)

PLAN_NAME, ENTRY_NAME = "plan", "entry.json"

Facts = dict[str, Any]
"""What is known of a plan, as JSON values; the cache takes it as it is."""


@dataclass(frozen=True)
class CachedPlan:
    """What ``entry.json`` says of the plan beside it."""

    key: str
    size: int
    sha256: str
    built_at: str
    tool_version: str
    facts: Facts


@dataclass(frozen=True)
class Listed:
    """An entry as ``cache list`` shows it.

    Attributes:
        key: Name of its folder.
        size: Bytes that it takes.
        used_at: When it was last built or taken, in seconds since 1970.
        plan: What it says of itself; None where that cannot be read.
        problem: Why not.
    """

    key: str
    size: int
    used_at: float
    plan: CachedPlan | None
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return dataclasses.asdict(self)


def read_entry(folder: Path) -> CachedPlan:
    """What the entry in ``folder``, which is named after its key, says of itself.

    Raises:
        OSError: There is none, or it cannot be read.
        BuildError: It is damaged, or another one's.
    """
    if not stat.S_ISDIR(folder.lstat().st_mode):
        raise BuildError("it is no folder")
    data = ENTRY.read(folder / ENTRY_NAME)
    entry = ENTRY.into(CachedPlan, ENTRY.body(ENTRY.values(data, "it"), "it"), "it")
    if entry.key != folder.name:
        raise BuildError("it is the entry of another plan")
    return entry


def write_entry(folder: Path, key: str, file: Path, facts: Facts) -> None:
    """Copy the plan in ``file`` to an empty folder and write down what is known of it.

    Raises:
        OSError: ``file`` cannot be read.
        OutputError: The folder cannot be written to.
    """
    path = folder / PLAN_NAME
    with open(file, "rb") as handle:
        write_new(path, b"", mode=0o600)
        digest = copy_hashed(handle, path, durable=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    entry = CachedPlan(key, path.stat().st_size, digest, now, __version__, facts)
    head = {"format": ENTRY.name, "format_version": ENTRY.version}
    text = json_text({**head, **dataclasses.asdict(entry)})
    write_new(folder / ENTRY_NAME, text.encode(), mode=0o600)


def listed(folder: Path) -> Listed | None:
    """The entry in ``folder`` as far as it can be read; None if there is no such."""
    plan, problem = None, ""
    try:
        plan = read_entry(folder)
    except (OSError, BuildError) as error:
        problem = reason_of(error)
    try:
        size = sum(path.lstat().st_size for path in folder.iterdir())
        used = (folder / ENTRY_NAME).lstat().st_mtime
    except OSError:
        size, used = 0, 0.0
    if not os.path.lexists(folder):
        return None
    return Listed(folder.name, size, used, plan, problem)


def reason_of(error: OSError | Id3pmError) -> str:
    """Why something failed, in a few words."""
    if isinstance(error, Id3pmError):
        return error.why or error.what
    return error.strerror or str(error)
