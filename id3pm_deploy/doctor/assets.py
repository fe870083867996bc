"""The shipped checkpoint and the folders that the product writes to."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import Id3pmError
from ..user_folders import cache_folder, settings_folder, state_folder, why_not_ours
from .host import Host

_CARD = "README.md"
_PLAIN_PLACES = ("/tmp", "/var/tmp")  # noqa: S108 - only named, never written to
_BELOW_HOME = (".cache", ".local/state", ".config")


def checkpoint_facts(folder: Path, host: Host) -> dict[str, Any]:
    """Whether a CHECKPOINT is whole: its config reads, its weights are those of its
    card, which states their SHA-256."""
    digest, problem = None, ""
    try:
        from ..checkpoint_config import load_spec, weights_sha256

        load_spec(folder)
        digest = weights_sha256(folder)
        card = (folder / _CARD).read_text(encoding="utf-8")
        if digest not in re.findall(r"\b[0-9a-f]{64}\b", card):
            problem = "its weights are not those that its card describes"
    except ImportError as error:
        problem = f"it cannot be read: {error}"
    except Id3pmError as error:
        problem = host.redacted(error.what + (f": {error.why}" if error.why else ""))
    except (OSError, ValueError) as error:
        problem = f"its card cannot be read: {host.redacted(str(error))}"
    return {"ok": not problem, "problem": problem, "sha256": digest}


def folder_facts(host: Host) -> list[dict[str, Any]]:
    """The folders that the product writes to unasked: may it, and how much fits."""
    temporary = Path(tempfile.gettempdir())
    return [
        _folder("cache", cache_folder(), "$XDG_CACHE_HOME", host),
        _folder("state", state_folder(), "$XDG_STATE_HOME", host),
        _folder("settings", settings_folder(), "$XDG_CONFIG_HOME", host),
        _folder("temporary", temporary, "$TMPDIR", host, private=False),
    ]


def _folder(
    name: str, path: Path | None, variable: str, host: Host, *, private: bool = True
) -> dict[str, Any]:
    """Facts about one folder; nothing is made, and no place is named that says whose
    it is."""
    if path is None:
        return {
            "name": name,
            "place": variable,
            "writable": False,
            "free": None,
            "problem": "there is no home folder for it",
        }
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    problem = "" if writable else "it may not be written to"
    if private and writable and there == path:
        problem = why_not_ours(path)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    return {
        "name": name,
        "place": _place(path, variable, host),
        "writable": writable,
        "free": free,
        "problem": problem,
    }


def _place(path: Path, variable: str, host: Host) -> str:
    for below in _BELOW_HOME:
        if path.parent == host.home / below:
            return f"~/{below}/{path.name}"
    return str(path) if str(path) in _PLAIN_PLACES else variable
