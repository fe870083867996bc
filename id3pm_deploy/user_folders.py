"""The user's own folders: cache, state and settings, as the XDG specification has them.

What is trusted lies in them (the ledger of plans, trusted keys), so a folder that
somebody else may write to is not believed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_NAME = "id3pm-deploy"


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/id3pm-deploy``; None without a home. It may not exist yet."""
    return _folder("XDG_CACHE_HOME", ".cache")


def state_folder() -> Path | None:
    """``$XDG_STATE_HOME/id3pm-deploy``; as above."""
    return _folder("XDG_STATE_HOME", ".local/state")


def settings_folder() -> Path | None:
    """``$XDG_CONFIG_HOME/id3pm-deploy``; as above."""
    return _folder("XDG_CONFIG_HOME", ".config")


def _folder(variable: str, below_home: str) -> Path | None:
    """A relative path is ignored, as the specification says."""
    chosen = os.environ.get(variable, "")
    if os.path.isabs(chosen):
        return Path(chosen) / _NAME
    home = os.path.expanduser("~")
    return Path(home) / below_home / _NAME if os.path.isabs(home) else None


def make_private(folder: Path) -> None:
    """Make ``folder`` and what is above it; what is new is for its owner alone.

    Raises:
        OSError: It cannot be made, or others may write to it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    if reason := why_not_ours(folder):
        raise PermissionError(1, reason, str(folder))


def why_not_ours(path: Path) -> str:
    """Why what ``path`` holds cannot be believed; empty if it can.

    Raises:
        OSError: There is no such file or folder.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return "it is a symbolic link"
    if status.st_uid != os.geteuid():
        return "it belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it"
    return ""
