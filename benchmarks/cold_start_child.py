"""Runs `id3pm-deploy` in this process and writes down where the time went.

    python cold_start_child.py TRACE ARGUMENT...

``cold_start.py`` starts it. TRACE becomes a JSON file: when Python got here and when
the command was done (on the clock that all processes share), the seconds spent in each
part and not in a part inside it, and the files that were loaded.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGUN = time.monotonic()

PARTS = (
    ("id3pm_deploy.models", "open_model", "opening and verifying"),
    ("id3pm_deploy.bundle", "Bundle.read", "opening and verifying"),
    ("id3pm_deploy.backends.onnxruntime", "check_graph", "opening and verifying"),
    ("id3pm_deploy.identity.vectors", "load_identities", "opening and verifying"),
    ("id3pm_deploy.backends.onnxruntime", "make_session", "session"),
    ("id3pm_deploy.generate", "make_pictures", "sampling"),
    ("id3pm_deploy.generate", "save_pictures", "writing"),
)
"""Module, function in it, and the part that it is."""


class Spans:
    """Seconds by name, each without those of the spans inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def around(
        self, function: Callable[..., Any], name: Callable[..., str]
    ) -> Callable[..., Any]:
        """``function``, timed under what ``name`` makes of its arguments."""

        @functools.wraps(function)
        def timed(*args: Any, **rest: Any) -> Any:
            self._inner.append(0.0)
            begun = time.perf_counter()
            try:
                return function(*args, **rest)
            finally:
                whole = time.perf_counter() - begun
                own = whole - self._inner.pop()
                self._inner[-1] += whole
                key = name(*args, **rest)
                self.seconds[key] = self.seconds.get(key, 0.0) + own

        return timed


def imported_package(name: str, *rest: Any) -> str:
    """What an import is filed under, from the arguments of ``__import__`` (name,
    globals, locals, fromlist, level) or ``import_module`` (name, package)."""
    package = name
    if name.startswith("."):
        package = str(rest[0])
    elif len(rest) == 4 and rest[3]:
        package = str(rest[0]["__package__"])
    top = package.partition(".")[0]
    return f"import {'Python' if top in sys.stdlib_module_names else top}"


def watch(spans: Spans) -> None:
    """Time imports from now on, and the parts of the product."""
    builtins.__import__ = spans.around(builtins.__import__, _import_name)
    importlib.import_module = spans.around(importlib.import_module, _import_name)
    for module, path, part in PARTS:
        holder: Any = importlib.import_module(module)
        *owners, last = path.split(".")
        for owner in owners:
            holder = getattr(holder, owner)
        setattr(holder, last, spans.around(getattr(holder, last), _named(part)))


def _import_name(name: str, *args: Any, **rest: Any) -> str:
    return imported_package(name, *args, *rest.values())


def _named(part: str) -> Callable[..., str]:
    return lambda *args, **rest: part


def loaded_files() -> list[str]:
    """Files that this process has read code from."""
    found = {sys.executable}
    for module in list(sys.modules.values()):
        for name in ("__file__", "__cached__"):
            path = getattr(module, name, None)
            if isinstance(path, str):
                found.add(path)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = line.partition("/")[2]
        found.add(f"/{path}")
    return sorted(path for path in found if os.path.isfile(path))


def main() -> None:
    """Run the command, then write the trace."""
    spans = Spans()
    watch(spans)
    from id3pm_deploy.cli import main as command

    status: Any = 0
    try:
        command(args=sys.argv[2:], prog_name="id3pm-deploy")
    except SystemExit as stop:
        status = stop.code
    trace = {"begun": BEGUN, "finished": time.monotonic(), "seconds": spans.seconds}
    trace["files"] = loaded_files()
    Path(sys.argv[1]).write_text(json.dumps(trace), encoding="utf-8")
    sys.exit(status)


if __name__ == "__main__":
    main()
