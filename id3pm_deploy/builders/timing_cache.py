"""Timings of kernels, kept from one build to the next on the same GPU.

Plain TensorRT times kernels for each layer, which a build that finds the timings need
not do again. They hold for one version of the library and one GPU, so each pair has a
file, in the user's cache folder. TensorRT-RTX times nothing when it builds: it has the
calls, and warns that they do nothing. With a GPU none of this has been run.

The file and its lock (``NAME.lock``, locked as ``polygraphy.util.LockFile`` does) are
those of Polygraphy's ``load_timing_cache`` and ``save_timing_cache``, so that its tools
can be given the same file while a build of ours runs. Its own loaders are not used:
they write in place, so that a build that is killed then leaves half a file, and they
are not there on a device. What they cannot do on TensorRT 11 does not concern us:
``CreateConfig(fp16=True)`` fails there for want of ``BuilderFlag.FP16``, and ``debug
precision`` with it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Id3pmError
from ..files import open_plain, write_bytes
from ..user_folders import cache_folder, make_private

if TYPE_CHECKING:
    import tensorrt

MOST_BYTES = 256 << 20
"""A file larger than that is not ours, and is left alone."""


def timing_cache_path(
    flavour: str, version: str, gpu: dict[str, Any] | None
) -> Path | None:
    """Where the timings of this library on this GPU are kept.

    Args:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: The library's full version.
        gpu: ``name``, ``compute_capability`` and ``multiprocessors``.

    Returns:
        None for TensorRT-RTX, without a GPU, or without a home.
    """
    folder = cache_folder()
    if flavour != "tensorrt" or gpu is None or folder is None:
        return None
    parts = [flavour, version, gpu["name"], gpu["compute_capability"]]
    name = "-".join([*parts, str(gpu["multiprocessors"])])
    return folder / "timings" / f"{re.sub('[^A-Za-z0-9.-]', '_', name)}.cache"


class TimingCache:
    """The timings in one file, given to a builder and taken back from it.

    Without it a build is slow and otherwise the same, so nothing here fails one.

    Args:
        path: The file; None for none.

    Attributes:
        problem: Why there are no timings, if there should be; empty if all is well.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.problem = ""

    def load(self, config: tensorrt.IBuilderConfig) -> None:
        """Give the builder what earlier builds timed, or an empty cache to fill."""
        if self._path is None or not hasattr(config, "create_timing_cache"):
            self._path = None
            return
        try:
            make_private(self._path.parent)
            with _locked(self._path):
                data = _read(self._path)
        except OSError as error:
            self._give_up(error)
            return
        if not _set(config, data) and not (data and _set(config, b"")):
            self._give_up("the library takes none")

    def save(self, config: tensorrt.IBuilderConfig) -> None:
        """Keep what the builder knows now, with what another build saved meanwhile."""
        if self._path is None:
            return
        cache = config.get_timing_cache()
        if cache is None:
            return
        try:
            make_private(self._path.parent)
            with _locked(self._path):
                data = _read(self._path)
                others = config.create_timing_cache(data) if data else None
                if others is not None:
                    cache.combine(others, ignore_mismatch=False)
                write_bytes(self._path, bytes(cache.serialize()), mode=0o600)
        except (OSError, Id3pmError) as error:
            self._give_up(error)

    def _give_up(self, reason: object) -> None:
        """Go on without; the reason is recorded, so it names no path."""
        if isinstance(reason, OSError):
            reason = reason.strerror or reason
        elif isinstance(reason, Id3pmError):
            reason = reason.why
        self.problem = f"kernel timings are not kept for the next build: {reason}"
        self._path = None


def _set(config: tensorrt.IBuilderConfig, data: bytes) -> bool:
    """Whether the builder takes ``data``; it refuses another version's or GPU's."""
    cache = config.create_timing_cache(data)
    return cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)


def _read(path: Path) -> bytes:
    try:
        with open_plain(path) as handle:
            data = handle.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return b""
    if len(data) > MOST_BYTES:
        raise OSError(f"it is larger than {MOST_BYTES >> 20} MiB")
    return data


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the lock that goes with ``path``; the system takes it from the dead."""
    import fcntl

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(f"{path}.lock", flags, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
