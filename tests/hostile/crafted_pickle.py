"""Pickles of tensors, byte by byte, and what ``import`` needs to read them quickly."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = "archive"


def program(body: bytes) -> bytes:
    """A pickle of protocol 2 that leaves what ``body`` puts on the stack."""
    return b"\x80\x02" + body + b"."


def name(module: str, attribute: str) -> bytes:
    """A global."""
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """A string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """An integer of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def row(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    """What ``function`` returns."""
    return function + row(*arguments) + b"R"


def table(entries: Mapping[str, bytes]) -> bytes:
    """A dictionary."""
    return b"}(" + b"".join(text(k) + v for k, v in entries.items()) + b"u"


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    """A storage of ``count`` numbers, kept in the archive's ``data/KEY``."""
    where = (text("storage"), name("torch", kind), text(key), text("cpu"))
    return row(*where, number(count)) + b"Q"


def tensor(
    numbers: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> bytes:
    """A tensor over a storage."""
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        numbers,
        number(offset),
        row(*map(number, size)),
        row(*map(number, stride)),
        b"\x89",
        call(name("collections", "OrderedDict")),
    )


def archive(
    body: bytes,
    data: Mapping[str, bytes] | None = None,
    *,
    more: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """What torch.save writes: a zip archive of a pickle and its storages.

    Args:
        body: The pickle is the program of it.
        data: Bytes of the storages by key.
        more: Further members.
        compression: torch.save uses none.
    """
    members = {f"{ROOT}/data.pkl": program(body), f"{ROOT}/byteorder": b"little"}
    members |= {f"{ROOT}/data/{key}": value for key, value in (data or {}).items()}
    members |= {f"{ROOT}/version": b"3\n", **(more or {})}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for member, value in members.items():
            file.writestr(member, value)
    return stream.getvalue()


def numbers(count: int) -> bytes:
    """Float32 ones."""
    return struct.pack("<f", 1.0) * count


def forked_reader() -> None:
    """Let ``import`` fork the process that reads a pickle instead of starting a Python
    that has to import torch first: the same function with the same limits."""
    from id3pm_deploy.importing import pickle_file

    pickle_file._run_child = _run_forked


def _run_forked(request: dict[str, Any], work: Path, seconds: float, name: str) -> int:
    begun = time.monotonic()
    pid = os.fork()
    if not pid:
        _become_reader(request, work)
    while time.monotonic() - begun < seconds:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    raise AssertionError(f"the reader of {name} hangs")


def _become_reader(request: dict[str, Any], work: Path) -> None:
    from id3pm_deploy.importing.pickle_child import main

    try:
        os.setsid()
        os.environ.clear()
        os.chdir(work)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(work / "log", os.O_CREAT | os.O_WRONLY, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv[:] = ["-c", "[]", json.dumps(request)]
        main()
    finally:
        os._exit(70)


def record_reader() -> None:
    """Write what the real process has to ``seen.json`` while it runs."""
    import stat
    import subprocess

    start = subprocess.Popen.__init__

    def popen(self: Any, *arguments: Any, **settings: Any) -> None:
        start(self, *arguments, **settings)
        place = Path(f"/proc/{self.pid}")
        while b"pickle_child" not in (place / "cmdline").read_bytes():
            time.sleep(0.001)
        pairs = (place / "environ").read_bytes().decode().split("\0")
        seen = {
            "environment": dict(pair.split("=", 1) for pair in pairs if pair),
            "input": os.readlink(place / "fd" / "0"),
            "folder_mode": stat.S_IMODE(os.stat(place / "cwd").st_mode),
            "own_session": os.getsid(self.pid) == self.pid,
        }
        Path("seen.json").write_text(json.dumps(seen))

    subprocess.Popen.__init__ = popen  # type: ignore[method-assign]
