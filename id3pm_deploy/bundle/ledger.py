"""The ledger: which plans this machine's user built. A plan is native code.

One file a plan in the user's state folder, named after the plan's SHA-256, readable by
its owner alone. Nothing in it says where the bundle lies.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..errors import BundleError, Id3pmError
from ..files import write_json
from ..user_folders import make_private, state_folder, why_not_ours
from ..versioned_json import JsonFormat

LEDGER = JsonFormat(
    name="id3pm-built-plan",
    version=1,
    what="a plan that was built here",
    noun="ledger entry",
    max_bytes=4096,
    error=BundleError,
)


@dataclass(frozen=True)
class _Entry:
    sha256: str
    built_at: str
    tool_version: str


def record_plan(sha256: str) -> str:
    """Note that this user built the plan of that hash.

    A build is never lost over it: what goes wrong is returned.

    Returns:
        Why the plan is not noted and what follows from it; empty if it is.
    """
    entry = {
        "format": LEDGER.name,
        "format_version": LEDGER.version,
        "sha256": sha256,
        "built_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "tool_version": __version__,
    }
    folder = _folder()
    try:
        if folder is None:
            raise OSError("there is no home folder")
        make_private(folder)
        write_json(folder / f"{sha256}.json", entry, mode=0o600)
    except (OSError, Id3pmError) as error:
        why = error.why if isinstance(error, Id3pmError) else error.strerror
        return (
            "the plan could not be noted as built by you "
            f"({folder or 'HOME'}: {why or error}); it will be loaded only with "
            "--trust, or from a bundle that was signed with a key you trust. "
            "Repair that folder or set XDG_STATE_HOME, and build again"
        )
    return ""


def why_not_built_here(sha256: str) -> str:
    """Why a plan does not count as built by this user; empty if it does."""
    folder = _folder()
    if folder is None:
        return "there is no home folder with a ledger"
    path = folder / f"{sha256}.json"
    try:
        for place in (folder, path):
            if reason := why_not_ours(place):
                return f"the ledger {place} is not believed: {reason}"
        body = LEDGER.body(LEDGER.values(LEDGER.read(path), "it"), "it")
        found = LEDGER.into(_Entry, body, "it").sha256
    except FileNotFoundError:
        return "it was not built on this machine by you"
    except OSError as error:
        return f"the ledger cannot be read: {error.strerror or error}"
    except BundleError as error:
        return f"its entry in the ledger is damaged: {error.what}"
    return "" if found == sha256 else "its entry in the ledger is of another plan"


def _folder() -> Path | None:
    state = state_folder()
    return None if state is None else state / "plans"
