"""Runs `id3pm-deploy` in this process and prints the most memory it ever held.

    python memory_check_child.py ARGUMENT...

``memory_check.py`` starts it. The last line is the kernel's high-water mark of the
resident set in bytes: read in here, because what a parent is told of a child that ended
can be the parent's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from id3pm_deploy.cli import main


def peak_bytes() -> int:
    """``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name == "VmHWM":
            return int(rest.split()[0]) * 1024
    raise OSError("the kernel does not say VmHWM")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SystemExit as ended:
        if ended.code:
            raise
    print(peak_bytes())
