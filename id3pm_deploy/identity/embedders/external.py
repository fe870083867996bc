"""FR models as programs: crops through standard input, vectors through standard output.

The program is started once and fed batches until its input ends. All numbers are
little-endian, pixels RGB from 0 to 255, rows from top to bottom:

- a request is ``FACE``, uint32 n, height, width, then n x height x width x 3 bytes;
- the answer is one or more frames that hold n vectors in all, in order: ``VECS``,
  uint32 m, D, then m x D float32.

What it prints on standard error is shown only where it fails. When it ends, answers
too late or with something else, it is ended with all processes of its session and
started again, and the faces without a vector are sent again, one at a time, so that a
face that it cannot bear costs no other. docs/fr-models.md has an example.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import shlex
import shutil
import signal
import struct
import subprocess
import time
import weakref
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from ...errors import IdentityError, InputError
from ..alignment import ARCFACE_SIZE
from ..preprocessing import InputSpec
from ..vectors import is_model_name
from .base import Embedder, Float32Array, Image

REQUEST = struct.Struct("<4sIII")
ANSWER = struct.Struct("<4sII")
ASK, SAY = b"FACE", b"VECS"

_LOG = logging.getLogger("id3pm_deploy")
_MAX_DIM = 1 << 16
_CHUNK = 1 << 18
_GRACE = 3.0  # seconds that a program has to end by itself
_TAIL = 2000  # bytes of its standard error that are kept
_SIGNALS = frozenset(map(int, signal.Signals))
_FIX = "try the program alone; docs/fr-models.md says what it is given and returns"


class CommandEmbedder(Embedder):
    """An FR model behind a program; nothing shows what is in it.

    There is no file to hash, so ``sha256`` is None. The program runs from the first
    face on, until :meth:`close`, until this object is gone or Python ends; should
    Python be killed, the program sees its input end.

    Args:
        command: The program and its arguments; no shell is involved.
        name: Name in identity files; None takes the command without its folders.
        size: Side of the crops it is given, in pixels.
        batch: Most faces in a request.
        limit: Seconds until a request has to be answered; the program's start counts.
        retries: How often in a row it may fail without a single vector more.

    Raises:
        InputError: There is no such program, or a number is out of range.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str | None = None,
        size: int = ARCFACE_SIZE,
        batch: int = 32,
        limit: float = 120.0,
        retries: int = 2,
    ) -> None:
        if not command or shutil.which(command[0]) is None:
            raise InputError(
                f"there is no program {command[0] if command else ''!r}",
                fix="give command:PROGRAM ARG..., a name on PATH or a path",
            )
        InputSpec(size=size)  # for its check
        name = name or " ".join(word.rpartition("/")[2] for word in command)
        if not is_model_name(name):
            raise InputError(
                "an FR program needs a name of 1 to 200 printable characters",
                why=f"found {name[:80]!r}",
                fix="give command?name=NAME:PROGRAM ARG...",
            )
        if batch < 1 or retries < 0 or not 0 < limit < math.inf:
            raise InputError(
                "an FR program's batch, limit or retries is out of range",
                why=f"batch {batch}, limit {limit:g} s, retries {retries}",
            )
        self.name = name
        self.sha256 = None
        self.size = size
        self.notice = (
            f"{self.name} is a program: its vectors carry no SHA-256, so nothing can "
            "show later that they are of the model a checkpoint was trained on"
        )
        self._program = _Program(command, limit)
        self._batch, self._retries = batch, retries

    def close(self) -> None:
        """End the program; it is started again when it is needed."""
        self._program.stop()

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        parts = []
        for start in range(0, len(aligned), self._batch):
            parts += self._answered(aligned[start : start + self._batch])
        return np.stack(parts)

    def _answered(self, crops: Image) -> list[Float32Array]:
        """The vectors of one batch, however often the program has to be started."""
        rows: list[Float32Array] = []
        most, failures = len(crops), 0
        while len(rows) < len(crops):
            before = len(rows)
            try:
                self._program.exchange(crops[before : before + most], rows)
            except _Failed as failed:
                failures = failures + 1 if len(rows) == before else 1
                if failures > self._retries:
                    raise IdentityError(
                        f"the FR program {self.name!r} failed at face {len(rows) + 1} "
                        f"of {len(crops)}",
                        why=f"{failed}; tried {failures} times",
                        fix=_FIX,
                    ) from failed
                _LOG.warning("FR program started again: %s", failed)
                most = 1
            else:
                failures = 0
        return rows


def embedder_from_command(spec: str) -> CommandEmbedder:
    """The program that a spec names.

    Args:
        spec: ``command:PROGRAM ARG...``, quoted as in a shell, or
            ``command?batch=32&limit=120&retries=2&size=112&name=NAME:PROGRAM ARG...``
            with any of these options.

    Raises:
        InputError: It cannot be read, or there is no such program.
    """
    head, _, line = spec.partition(":")
    query = head.removeprefix("command").removeprefix("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    kinds = {"batch": int, "limit": float, "retries": int, "size": int, "name": str}
    try:
        values: dict[str, Any] = {key: kinds[key](value) for key, value in pairs}
        command = shlex.split(line)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"cannot read the FR program {spec!r}",
            why=f"unknown option {error}"
            if isinstance(error, KeyError)
            else f"{error}",
            fix="use command:PROGRAM ARG..., or command?batch=32&limit=120&retries=2&"
            "size=112&name=NAME:PROGRAM ARG...",
        ) from error
    if len(values) != len(pairs) or (query and not pairs):
        raise InputError(f"an option of {head!r} is given twice or is empty")
    return CommandEmbedder(command, **values)


class _Failed(Exception):
    """Why the program has to be started again, in one clause."""


class _Program:
    """A program that runs from the first exchange on."""

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self._command, self._limit = list(command), limit
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._said = b""
        self._dim = 0

    def exchange(self, crops: Image, rows: list[Float32Array]) -> None:
        """Append the vectors of ``crops`` as they come.

        Raises:
            _Failed: There are fewer; the program does not run any more.
            IdentityError: The program cannot be started.
        """
        process = self._started()
        try:
            self._talk(process, crops, rows)
        except BaseException as error:  # half an exchange cannot be continued
            self.stop()
            if not isinstance(error, _Failed):
                raise
            why = str(error) or _how_it_ended(process.returncode)
            lines = self._said.decode("utf-8", "replace").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            raise _Failed(f"{why}; it said: {said[-1]:.300}" if said else why) from None

    def stop(self) -> None:
        """End the program if it runs, with all processes of its session."""
        process, self._process = self._process, None
        if process is None or self._end is None:
            return
        self._said = (self._said + (self._end() or b""))[-_TAIL:]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise IdentityError(
                f"the FR program {self._command[0]} cannot be started",
                why=error.strerror or str(error),
            ) from error
        self._end = weakref.finalize(self, _end_session, process, os.getpid())
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._process, self._said = process, b""
        return process

    def _talk(
        self, process: subprocess.Popen[bytes], crops: Image, rows: list[Float32Array]
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        with contextlib.suppress(BlockingIOError):
            unasked = os.read(process.stdout.fileno(), ANSWER.size)
            raise _Failed("it answers before it is asked" if unasked else "")
        request = _Request(crops)
        answer = _Answer(len(crops), self._dim, rows)
        deadline = time.monotonic() + self._limit
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE, request.send)
            selector.register(process.stdout, selectors.EVENT_READ, answer.hear)
            selector.register(process.stderr, selectors.EVENT_READ, self._hear)
            while request.left or answer.missing:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _Failed(f"it gave no whole answer within {self._limit:g} s")
                for key, _ in selector.select(left):
                    if not key.data(key.fd):
                        selector.unregister(key.fileobj)
        self._dim = answer.dim

    def _hear(self, descriptor: int) -> bool:
        """Keep the last of what is on standard error; whether there may be more."""
        data = os.read(descriptor, _CHUNK)
        self._said = (self._said + data)[-_TAIL:]
        return bool(data)


class _Request:
    """A request, and what is left to be sent of it."""

    def __init__(self, crops: Image) -> None:
        head = REQUEST.pack(ASK, *crops.shape[:3])
        self.left = memoryview(head + crops.tobytes())

    def send(self, descriptor: int) -> bool:
        """Send some of it; whether there is more to send."""
        try:
            self.left = self.left[os.write(descriptor, self.left[:_CHUNK]) :]
        except BrokenPipeError:  # how the program ended is to be seen elsewhere
            self.left = self.left[:0]
        return bool(self.left)


class _Answer:
    """The answer to one request, taken apart as it comes.

    Args:
        missing: How many vectors it must hold.
        dim: Their length; 0 where it is not known yet.
        rows: Gets the vectors.
    """

    def __init__(self, missing: int, dim: int, rows: list[Float32Array]) -> None:
        self.missing, self.dim = missing, dim
        self._rows = rows
        self._data = bytearray()
        self._in_frame = 0

    def hear(self, descriptor: int) -> bool:
        """Take what has come; True, for more may come.

        Raises:
            _Failed: It ends, or is not what was asked for.
        """
        data = os.read(descriptor, _CHUNK)
        if not data:
            raise _Failed
        self._data += data
        while self._take_vector() if self._in_frame else self._take_head():
            pass
        return True

    def _take_head(self) -> bool:
        """Read the head of a frame, if it is there."""
        if not SAY.startswith(self._data[: len(SAY)]):
            begin = bytes(self._data[: ANSWER.size])
            raise _Failed(f"its answer begins with {begin!r}, not with {SAY!r}")
        if len(self._data) < ANSWER.size:
            return False
        _, count, dim = ANSWER.unpack_from(self._data)
        if not 0 < count <= self.missing or not 0 < dim <= _MAX_DIM:
            raise _Failed(
                f"it answers with {count} vectors of {dim} elements where "
                f"{self.missing} are missing"
            )
        if self.dim not in (0, dim):
            raise _Failed(f"its vectors had {self.dim} elements and now have {dim}")
        del self._data[: ANSWER.size]
        self._in_frame, self.dim = count, dim
        return True

    def _take_vector(self) -> bool:
        """Read the next vector, if it is there."""
        size = 4 * self.dim
        if len(self._data) < size:
            return False
        row = np.frombuffer(bytes(self._data[:size]), dtype="<f4")
        self._rows.append(row.astype(np.float32))
        del self._data[:size]
        self._in_frame -= 1
        self.missing -= 1
        return True


def _end_session(process: subprocess.Popen[bytes], owner: int) -> bytes:
    """End a program: its input ends, then SIGTERM, then SIGKILL to all of its session.

    Nothing is ended by a fork of the process that started it.

    Returns:
        What it said on standard error and nobody has read.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        process.stdin.close()
        if os.getpid() == owner:
            _end_processes(process)
        with contextlib.suppress(BlockingIOError):
            return os.read(process.stderr.fileno(), _CHUNK)
    return b""


def _end_processes(process: subprocess.Popen[bytes]) -> None:
    if not _ends_within(process.pid, _GRACE):
        os.killpg(process.pid, signal.SIGTERM)
        _ends_within(process.pid, _GRACE)
    # Not waited for yet, it keeps its number: no other group can have it.
    os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)


def _ends_within(pid: int, seconds: float) -> bool:
    """Whether a child ends in that time; it is not waited for."""
    deadline = time.monotonic() + seconds
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, pid, look) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "it closed its standard output"
    if status < 0:
        name = signal.Signals(-status).name if -status in _SIGNALS else f"{-status}"
        return f"it was ended by signal {name}"
    return f"it ended with status {status} before its answer was whole"
