"""Plans that were built before, kept under everything that determined them.

One folder a plan, ``KEY/`` with ``plan`` and ``entry.json``, is made beside its place
and renamed, so that it is there whole or not at all. What is served was hashed on the
way out; what does not fit is removed and built again. A plan is native code: nothing is
taken from a folder that somebody else may write to. A cache that cannot be used costs a
note, never a build.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import BuildError, Id3pmError, OutputError
from ..files import hold, open_plain, remove, temporary_folder, temporary_name
from ..user_folders import cache_folder, make_private, why_not_ours
from .cache_entry import (
    ENTRY_NAME,
    PLAN_NAME,
    Facts,
    Listed,
    listed,
    read_entry,
    reason_of,
    write_entry,
)
from .cache_files import copy_hashed, held_lock, remove_free_lock, unlink_lock

DEFAULT_LIMIT_BYTES = 10 << 30

Check = Callable[[Facts], object]
"""Raises Id3pmError for facts that are not to be used."""

_KEY = re.compile(r"[0-9a-f]{64}")
_LOCK = re.compile(r"[0-9a-f]{64}\.lock")
_LEFTOVER = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{12}\.tmp")


@dataclass(frozen=True)
class Pruned:
    """What was removed: a number of plans, and bytes in all."""

    plans: int
    size: int


@dataclass(frozen=True)
class Served:
    """A plan that a file was filled with.

    Attributes:
        facts: What was known of it when it was built.
        from_cache: Whether that was before.
        sha256: Of the bytes that were written, where the cache wrote them; else empty.
    """

    facts: Facts
    from_cache: bool = False
    sha256: str = ""


class PlanCache:
    """Plans in one folder of the user's, up to a size.

    Args:
        folder: Where they lie; made when the first one is kept. None: there is no
            place, so nothing is kept.
        limit_bytes: Least recently used plans go when they are more than this.

    Attributes:
        notes: What kept the cache from being used or was wrong in it, for the user.
    """

    def __init__(
        self, folder: Path | None, limit_bytes: int = DEFAULT_LIMIT_BYTES
    ) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.notes: list[str] = []

    @classmethod
    def default(cls, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> PlanCache:
        """The one in the user's cache folder."""
        place = cache_folder()
        return cls(None if place is None else place / "plans", limit_bytes)

    def get_or_build(
        self, key: str, build: Callable[[], Facts], file: Path, check: Check
    ) -> Served:
        """Fill ``file`` with the plan of ``key``: from the cache, or by building it.

        Of several processes that want the same plan one builds, the others wait for
        it. If it fails or dies, the next one builds.

        Args:
            key: 64 hexadecimal digits; see ``plan_key``.
            build: Writes the plan to ``file`` and returns what is known of it.
            file: Is overwritten.
            check: Looks at what is known of a kept plan before it is taken.

        Raises:
            OutputError: ``file`` cannot be written.
            Id3pmError: Whatever ``build`` raises.
        """
        if _KEY.fullmatch(key) is None:
            raise ValueError(f"{key!r} is no key")
        if (taken := self._taken(key, file, check, alone=False)) is not None:
            return taken
        with self._locked(key) as usable:
            if usable:
                taken = self._taken(key, file, check, alone=True)
                if taken is not None:
                    return taken
            facts = build()
            if usable:
                self._keep(key, file, facts)
        return Served(facts)

    def entries(self) -> list[Listed]:
        """What is kept, the most recently used first.

        Raises:
            OSError: The folder is not to be believed, or cannot be read.
        """
        found = [listed(self._place() / key) for key in self._names(_KEY)]
        return sorted(filter(None, found), key=lambda one: (-one.used_at, one.key))

    def prune(self, max_bytes: int | None = None) -> Pruned:
        """Remove what killed processes left, what cannot be read, and plans, the least
        recently used first, until the others take no more than ``max_bytes``.

        Args:
            max_bytes: None is the cache's own limit.

        Raises:
            OSError: The folder is not to be believed, or cannot be changed.
        """
        self._sweep()
        found = self.entries()
        damaged = [one for one in found if one.plan is None]
        sound = [one for one in found if one.plan is not None]
        limit = self.limit_bytes if max_bytes is None else max_bytes
        gone = [o for o in [*damaged, *_past(sound, limit)] if self._remove(o.key)]
        return Pruned(len(gone), sum(one.size for one in gone))

    # taking

    def _taken(
        self, key: str, file: Path, check: Check, *, alone: bool
    ) -> Served | None:
        """Copy a kept plan to ``file``; None if there is none that is right.

        ``alone``, with the key's lock, a wrong one is removed.
        """
        if self.folder is None or not os.path.lexists(self.folder / key):
            return None
        try:
            if reason := why_not_ours(self.folder):
                self._note_unusable(reason)
                return None
            served = self._copied(key, file, check)
        except (OSError, BuildError) as error:
            if alone and os.path.lexists(self.folder / key):
                self._discard(key, reason_of(error))
            return None
        with contextlib.suppress(OSError):
            self._tidy(key)
        return served

    def _copied(self, key: str, file: Path, check: Check) -> Served:
        """Raises OSError or BuildError for an entry that is not to be used."""
        folder = self._place() / key
        entry = read_entry(folder)
        try:
            check(entry.facts)
        except Id3pmError as error:
            raise BuildError(error.what) from error
        path = folder / PLAN_NAME
        for place in (folder, folder / ENTRY_NAME, path):
            if reason := why_not_ours(place):
                raise BuildError(reason)
        with open_plain(path) as handle:
            if os.fstat(handle.fileno()).st_size != entry.size:
                raise BuildError("the plan's size is another one")
            if copy_hashed(handle, file) != entry.sha256:
                raise BuildError("the plan's SHA-256 is another one")
        with contextlib.suppress(OSError):
            os.utime(folder / ENTRY_NAME)
        return Served(entry.facts, True, entry.sha256)

    def _discard(self, key: str, reason: str) -> None:
        self._note(
            f"the plan {key[:12]} in the cache cannot be used ({reason}); it is "
            "removed and built again"
        )
        with contextlib.suppress(OSError):
            self._remove(key)

    # keeping

    def _keep(self, key: str, file: Path, facts: Facts) -> None:
        try:
            size = os.stat(file).st_size
            if size > self.limit_bytes:
                self._note(
                    f"the plan ({size / 1e6:.0f} MB) is larger than the cache may be "
                    f"({self.limit_bytes / 1e6:.0f} MB) and was not kept there"
                )
                return
            try:
                self._put(key, file, facts)
            except OutputError as error:
                # Another process may take a folder for a dead one's, when it was made
                # and not yet held.
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                self._put(key, file, facts)
            self._tidy(key)
        except (OSError, Id3pmError) as error:
            self._note_unusable(reason_of(error), "the plan was not kept in")

    def _tidy(self, key: str) -> None:
        """Remove what is left over, and plans past the limit, ``key`` the last."""
        self._sweep()
        newest_first = sorted(self.entries(), key=lambda one: one.key != key)
        for one in _past(newest_first, self.limit_bytes):
            self._remove(one.key)

    def _put(self, key: str, file: Path, facts: Facts) -> None:
        place = self._place() / key
        with temporary_folder(place) as staging:
            write_entry(staging, key, file, facts)
            self._remove(key)
            os.rename(staging, place)

    # files

    def _place(self) -> Path:
        assert self.folder is not None
        return self.folder

    def _names(self, wanted: re.Pattern[str]) -> list[str]:
        """Names in the folder; none where there is no folder."""
        if self.folder is None or not os.path.lexists(self.folder):
            return []
        if reason := why_not_ours(self.folder):
            raise PermissionError(errno.EPERM, reason, str(self.folder))
        return sorted(filter(wanted.fullmatch, os.listdir(self.folder)))

    def _remove(self, key: str) -> bool:
        """Remove an entry, whole at once; False if there is none.

        Raises:
            OSError: It cannot be removed.
        """
        folder = self._place() / key
        away = temporary_name(folder)
        try:
            os.rename(folder, away)
        except FileNotFoundError:
            return False
        remove(away)
        return True

    def _sweep(self) -> None:
        """Remove what killed processes left; what is held is in use."""
        for name in self._names(_LEFTOVER):
            path = self._place() / name
            if (descriptor := hold(path)) is not None:
                remove(path)
                os.close(descriptor)
        for name in self._names(_LOCK):
            remove_free_lock(self._place() / name)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """Hold the lock of a key; yields False where the cache cannot be used."""
        path, descriptor = None, None
        try:
            if self.folder is None:
                raise OSError(errno.ENOENT, "there is no home folder")
            make_private(self.folder)
            path = self.folder / f"{key}.lock"
            while descriptor is None:
                descriptor = held_lock(path)
        except OSError as error:
            self._note_unusable(reason_of(error))
        if path is None or descriptor is None:
            yield False
            return
        try:
            yield True
        finally:
            unlink_lock(path, descriptor)
            os.close(descriptor)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _note_unusable(
        self, reason: str, what: str = "the build went on without"
    ) -> None:
        self._note(
            f"{what} the plan cache {self.folder or ''}: {reason}. Repair that folder, "
            "set XDG_CACHE_HOME to another place, or give --no-cache"
        )


def _past(entries: list[Listed], limit: int) -> list[Listed]:
    """Those behind the first ones that fit into ``limit`` bytes together."""
    total = 0
    for index, one in enumerate(entries):
        total += one.size
        if total > limit:
            return entries[index:]
    return []
