"""The process that :mod:`.cold_start` starts: one picture, and when it was there."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a request, make the picture, and print what was found on the last line."""
    request = json.load(sys.stdin)
    # What libraries print goes to where their errors go.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        found = _measured(request)
    except Exception as error:  # whatever it is becomes the column's reason
        from ..errors import first_line

        found = {
            "reason": getattr(error, "what", None) or first_line(error),
            "why": getattr(error, "why", ""),
        }
    os.write(answer, b"\n" + json.dumps(found).encode() + b"\n")


def _measured(request: dict[str, Any]) -> dict[str, Any]:
    from .case import open_case, settings_from_json
    from .cold_start import gpu_bytes, peak_bytes
    from .columns import BY_NAME

    checkpoint = request["checkpoint"]
    case = open_case(
        Path(request["bundle"]),
        None if checkpoint is None else Path(checkpoint),
        settings_from_json(request["settings"]),
    )
    runner = BY_NAME[request["column"]].open(case)
    try:
        opened = time.monotonic()
        runner.begin(1)
        runner.check()
        picture = time.monotonic()
        found = {"opened": opened, "picture": picture}
        return {**found, "peak_bytes": peak_bytes(), "gpu_bytes": gpu_bytes()}
    finally:
        runner.close()
