"""On what machine a comparison ran, for its report."""

from __future__ import annotations

import numpy as np

from .. import __version__
from ..doctor.host import Host
from ..doctor.machine import cpu_facts, system_name


def machine_facts() -> dict[str, str]:
    """Processor, system and versions; no name of the machine or its user."""
    host = Host()
    cpu = cpu_facts(host)
    return {
        "Processor": f"{cpu['model']}, {cpu['usable']} cores usable",
        "System": f"{system_name(host)}, {host.system} {host.kernel}, {host.machine}",
        "Python": f"{host.python}, NumPy {np.__version__}",
        "Tool": f"id3pm-deploy {__version__}",
    }
