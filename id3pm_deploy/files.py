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
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError

_CHUNK = 1 << 20


def output_error(path: Path, error: OSError) -> OutputError:
    """Say in our words why ``path`` could not be written."""
    fixes = {
        errno.ENOSPC: "free some space or choose another place",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.EACCES: "choose a place you may write to, or change its permissions",
        errno.EPERM: "choose a place you may write to, or change its permissions",
        errno.ENOENT: "create the folder above it first",
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
    system; it is removed when the block raises, Ctrl-C included. As everywhere, the
    process's umask takes bits off ``mode``.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        granted = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
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


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, mode: int = 0o644) -> None:
    """Write ``text`` to ``path`` atomically, in UTF-8."""
    write_bytes(path, text.encode(), mode)


def json_text(value: Any) -> str:
    """``value`` as indented JSON; NaN and infinity are refused."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_json(path: Path, value: Any, mode: int = 0o644) -> None:
    """Write :func:`json_text` of ``value`` to ``path`` atomically."""
    write_text(path, json_text(value), mode)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
