"""A process that has imported what commands need and forks one child a command.

Run as ``python forkserver.py REPOSITORY MODULE...``. Importing takes most of a short
command's time, and a fork spares it; what runs in the child is the command line
itself, ``id3pm_deploy.cli.main``, with limits, an environment and a session of its
own. Requests and answers are JSON, a line each; see ``sandbox.py``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink"}
_WRITING = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC


def own_bytes(field: str) -> int:
    """``VmSize`` or ``VmRSS`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def watch_changes(folder: str, log: str, kill_before: int | None) -> None:
    """Note each change of files under ``folder``; die just before one of them.

    Args:
        folder: Where changes count; those by a directory's descriptor always do.
        log: File that gets a line a change.
        kill_before: Number of the change that is not made; None lives on.
    """
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    count = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = values
            if isinstance(path, int) or not (flags or 0) & _WRITING:
                return
        elif event not in _CHANGES:
            return
        name = os.fsdecode(values[0])
        if os.path.isabs(name) and not name.startswith(folder):
            return
        os.write(output, os.fsencode(f"{event} {os.path.basename(name)!r}\n"))
        if count == kill_before:
            os.killpg(0, signal.SIGKILL)
        count += 1

    sys.addaudithook(hook)


def become_child(request: dict[str, Any]) -> None:
    """Take the session, environment, files and limits that were asked for."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None
    os.chdir(request["cwd"])
    # A closed door for whatever the child may ask for.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        os.dup2(os.open(request[name], flags, 0o600), number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if request["memory"] is not None:
        most = own_bytes("VmSize") + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    sys.path[:0] = request["path"]
    if request["watch"] is not None:
        watch_changes(*request["watch"])


def run_command(arguments: list[str]) -> int:
    """The command line's exit status; a traceback is printed as Python would."""
    from id3pm_deploy.cli import main

    try:
        main(arguments, prog_name="id3pm-deploy")
    except SystemExit as exit_:
        return (
            exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        )
    except BaseException:
        traceback.print_exc()
    return 1


def child(request: dict[str, Any]) -> None:
    """Run one command and end the process, whatever happens."""
    status = 70
    try:
        become_child(request)
        for spec in request["before"]:
            module, _, name = spec.partition(":")
            getattr(importlib.import_module(module), name)()
        status = run_command(request["args"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def forked(request: dict[str, Any]) -> tuple[int, int]:
    """Fork a child for a command: its process, and the bytes resident at its start."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        os.write(writing, str(own_bytes("VmRSS")).encode())
        os.close(writing)
        child(request)
    os.close(writing)
    resident = int(os.read(reading, 32))
    os.close(reading)
    return pid, resident


def waited(pid: int, resident: int, begun: float, most: float) -> dict[str, Any]:
    """Wait for a child, killing its session after ``most`` seconds."""
    timed_out = False
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() - begun > most and not timed_out:
            timed_out = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "peak": usage.ru_maxrss * 1024 - resident,
        "cpu": usage.ru_utime + usage.ru_stime,
        "seconds": time.monotonic() - begun,
        "timed_out": timed_out,
    }


def main() -> None:
    """Import, say how many threads there are, then serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, sys.argv[1])
    for name in sys.argv[2:]:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    print(json.dumps({"threads": threads}), file=answers, flush=True)
    pid, resident, begun = 0, 0, 0.0
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = waited(pid, resident, begun, request["wait"])
        else:
            begun = time.monotonic()
            pid, resident = forked(request)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
