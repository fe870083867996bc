"""Writing files so that a reader never sees half of one.

Everything goes to a temporary name in the same folder, is flushed to disk and then
renamed over the target. A failure leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .errors import OutputError

_CHUNK = 1 << 20
_TEMPORARY = re.compile(r"[.].+[.][0-9a-f]{12}[.]tmp")


def output_error(path: Path, error: OSError) -> OutputError:
    """Say in our words why ``path`` could not be written."""
    fixes = {
        errno.ENOSPC: "free some space or choose another place",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.EACCES: "choose a place you may write to, or change its permissions",
        errno.EPERM: "choose a place you may write to, or change its permissions",
        errno.ENOENT: "create the folder above it first",
        errno.EEXIST: "choose another name; it is never overwritten",
        errno.ENOTDIR: "a part of the path is a file; choose another place",
    }
    return OutputError(
        f"cannot write {path}",
        why=error.strerror or str(error),
        fix=fixes.get(error.errno or 0, "choose another place"),
    )


def make_folder(path: Path) -> Path:
    """Create ``path`` with its parents, or raise :class:`OutputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(path, error) from error
    return path


def beside(path: Path, suffix: str) -> Path:
    """The sibling of ``path`` whose name has ``suffix`` behind it; ``.`` works too."""
    whole = Path(os.path.abspath(path))
    return whole.with_name(whole.name + suffix)


@contextlib.contextmanager
def atomic_path(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` when the block succeeds.

    The temporary file lies beside the target, so that the rename cannot cross a file
    system; it is removed when the block raises, Ctrl-C included, and by the next writer
    of the same target when the process was killed. As everywhere, the process's umask
    takes bits off ``mode``.
    """
    remove_leftovers(path)
    temporary, descriptor = temporary_name(path), None
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        _lock(descriptor)
        granted = stat.S_IMODE(os.fstat(descriptor).st_mode)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.chmod(temporary, granted)
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(target: Path, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that is removed when the block ends, if it
    is still there.

    What a killed process leaves of it is removed by the next writer of ``target``.

    Raises:
        OutputError: The folder cannot be made, or the block failed to write.
    """
    whole = Path(os.path.abspath(target))
    remove_leftovers(whole)
    folder, descriptor = temporary_name(whole), None
    try:
        folder.mkdir(mode=mode)
        descriptor = hold(folder)
        yield folder
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        remove(folder)
        if descriptor is not None:
            os.close(descriptor)


class ScratchFile:
    """A file without a name, for what is too large to be held in memory.

    The system takes its space back when this object is gone, even if the process was
    killed.

    Args:
        near: A path on the disk that is to be used; what is missing of it is not made.

    Raises:
        OutputError: There is no place for it.
    """

    def __init__(self, near: Path) -> None:
        place = Path(os.path.abspath(near))
        while not place.is_dir():
            place = place.parent
        try:
            self._descriptor = _unnamed(place)
        except OSError as error:
            raise output_error(place, error) from error
        _lock(self._descriptor)  # for the time when it has a temporary name
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def path(self) -> Path:
        """Where this process, and only it, can open the file by name."""
        return Path(f"/dev/fd/{self._descriptor}")

    @property
    def size(self) -> int:
        """Bytes in it."""
        return os.fstat(self._descriptor).st_size

    def write(self, pieces: Iterable[bytes]) -> None:
        """Fill it.

        Raises:
            OutputError: The disk is full.
        """
        try:
            with open(self.path, "wb") as handle:
                for piece in pieces:
                    handle.write(piece)
        except OSError as error:
            raise output_error(Path("a temporary file"), error) from error

    def read(self) -> bytes:
        """All of it."""
        return self.path.read_bytes()

    def sha256(self) -> str:
        """SHA-256, as 64 hexadecimal digits."""
        return sha256_of_file(self.path)

    def save_as(self, path: Path) -> None:
        """Put the file at ``path``, atomically; it is not to be written any more.

        Where the system can give it a name there, nothing is copied.

        Raises:
            OutputError: It cannot be written.
        """
        with atomic_path(path) as temporary:
            try:
                self._link_over(temporary, temporary_name(path))
            except OSError:
                shutil.copyfile(self.path, temporary)

    def _link_over(self, target: Path, name: Path) -> None:
        """Replace ``target`` with this very file, which has a ``name`` in between.

        Raises:
            OSError: The system cannot do that, or the file is on another disk.
        """
        # Python follows the link of ``self.path`` only where a folder is given.
        folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(self.path, name, src_dir_fd=folder)
            os.replace(name, target)
        finally:
            os.close(folder)
            with contextlib.suppress(OSError):
                name.unlink()


def _unnamed(folder: Path) -> int:
    """An open file in ``folder`` without a name, which may be given one if the system
    can do that."""
    kind = getattr(os, "O_TMPFILE", 0)
    if kind:
        with contextlib.suppress(OSError):
            return os.open(folder, kind | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with tempfile.TemporaryFile(dir=folder) as handle:
        return os.dup(handle.fileno())


def temporary_name(target: Path) -> Path:
    """A hidden name beside ``target`` that nothing else has."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")


def _lock(descriptor: int) -> bool:
    """Lock an open file; False if another process has, or where there are no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def hold(path: Path) -> int | None:
    """Lock a temporary file or folder; the system lets go of it when we are dead.

    Returns:
        A descriptor to close; None where it could not be locked.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError:
        return None
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it; nobody holds it.

    Nothing is looked for in a folder that is temporary itself and goes as a whole.
    """
    folder = target.parent
    if _TEMPORARY.fullmatch(folder.name):
        return
    start = f".{target.name}."
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if not name.startswith(start) or not _TEMPORARY.fullmatch(name):
                continue
            path = folder / name
            descriptor = hold(path)
            if descriptor is not None:
                remove(path)
                os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(data)


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files: all are on disk before any replaces an older one.

    The last one is replaced first, so that the first can say that all are there.
    """
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            stack.enter_context(atomic_path(path)).write_bytes(data)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    write_bytes(path, text.encode(), mode)


def json_text(value: Any) -> str:
    """``value`` as indented JSON; NaN and infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write :func:`json_text` of ``value`` to ``path`` atomically."""
    write_text(path, json_text(value), mode)


def write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` to a file that must not exist yet.

    Raises:
        OutputError: It exists, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        with open(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise output_error(path, error) from error
        raise


@contextlib.contextmanager
def open_plain(path: Path, *, follow: bool = False) -> Iterator[BinaryIO]:
    """Open a plain file for reading; a device, a pipe or a folder is refused.

    Args:
        path: The file.
        follow: Whether ``path`` itself may be a symbolic link.

    Raises:
        OSError: It is missing, unreadable or no plain file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(errno.EINVAL, "not a plain file", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    with open(descriptor, "rb") as handle:
        yield handle


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a plain file's bytes, as 64 hexadecimal digits.

    Raises:
        OSError: It cannot be read, or is a device, a pipe or a folder.
    """
    digest = hashlib.sha256()
    with open_plain(path, follow=True) as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
