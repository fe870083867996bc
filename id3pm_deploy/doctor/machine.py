"""Processor, memory and board, from ``/proc``, ``/sys`` and ``/etc``.

All sizes are in bytes. What cannot be read is None or empty, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .host import Host

FEATURES = {
    "x86_64": (
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "avx_vnni",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
    ),
    "aarch64": ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}
"""By architecture, what makes convolutions and matrix products faster, in the kernel's
words: wide vectors, dot products of bytes, half precision, matrix units."""

_ARM_CORES = {
    ("0x41", "0xd07"): "Arm Cortex-A57",
    ("0x41", "0xd08"): "Arm Cortex-A72",
    ("0x41", "0xd0b"): "Arm Cortex-A76",
    ("0x41", "0xd0c"): "Arm Neoverse N1",
    ("0x41", "0xd40"): "Arm Neoverse V1",
    ("0x41", "0xd42"): "Arm Cortex-A78AE",
    ("0x41", "0xd49"): "Arm Neoverse N2",
    ("0x41", "0xd4f"): "Arm Neoverse V2",
    ("0x41", "0xd83"): "Arm Neoverse V3AE",
    ("0x4e", "0x004"): "NVIDIA Carmel",
}
"""Implementer and part in ``/proc/cpuinfo``, which names no Arm processor."""

_JETPACK = {"32": "4", "35": "5", "36": "6", "38": "7"}
"""Major release of Jetson Linux (L4T) to the JetPack it belongs to."""

_NO_LIMIT = 1 << 60
"""Control groups of version 1 write a number near 2**63 for no limit."""

_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"


def system_name(host: Host) -> str:
    """The distribution's name for itself, as ``Debian GNU/Linux 12 (bookworm)``."""
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', host.text("etc/os-release"), re.M)
    return found[1] if found else host.system


def cpu_facts(host: Host) -> dict[str, Any]:
    """Model, features and how many cores there are for this process.

    ``usable`` is what is left of ``logical`` after ``affinity`` and ``quota``.
    """
    text = host.text("proc/cpuinfo")
    quota = cpu_quota(host)
    usable = host.affinity if quota is None else min(host.affinity, int(quota))
    return {
        "model": _cpu_model(text),
        "features": _features(text, host.machine),
        "logical": host.logical,
        "physical": _physical_cores(host),
        "affinity": host.affinity,
        "quota": quota,
        "usable": max(1, usable),
        "omp_num_threads": host.environment.get("OMP_NUM_THREADS"),
    }


def _entries(text: str, key: str) -> list[str]:
    return re.findall(rf"^{re.escape(key)}\s*:\s*(.+?)\s*$", text, re.MULTILINE)


def _cpu_model(text: str) -> str:
    names = _entries(text, "model name")
    if not names:
        implementers = _entries(text, "CPU implementer")
        pairs = zip(implementers, _entries(text, "CPU part"), strict=False)
        names = [_ARM_CORES.get(pair, f"Arm part {pair[1]}") for pair in pairs]
    return " + ".join(dict.fromkeys(names)) or "unknown"


def _features(text: str, machine: str) -> dict[str, bool]:
    lines = _entries(text, "flags") or _entries(text, "Features")
    have = set(lines[0].split()) if lines else set()
    return {name: name in have for name in FEATURES.get(machine, ())}


def _physical_cores(host: Host) -> int | None:
    folders = host.glob("sys/devices/system/cpu/cpu[0-9]*/topology")
    siblings = set()
    for folder in folders:
        here = str(folder.relative_to(host.root))
        siblings.add(
            host.text(f"{here}/core_cpus_list")
            or host.text(f"{here}/thread_siblings_list")
        )
    return len(siblings - {""}) or None


def _control_groups(host: Host, controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each control group this process is in, for one controller.

    A limit may stand in a group or in any above it; inside a container the group's own
    path may not exist, and the limit stands at the top.
    """
    for line in host.text("proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            version, bases = 2, ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in names.split(","):
            version, bases = 1, [f"sys/fs/cgroup/{n}" for n in {controller, names}]
        else:
            continue
        inner = Path(path.strip().lstrip("/"))
        if ".." in inner.parts:
            inner = Path()
        for base in bases:
            for part in (inner, *inner.parents):
                yield version, Path(base) / part


def cpu_quota(host: Host) -> float | None:
    """Cores' worth of time that control groups allow; None for no limit."""
    found = []
    for version, folder in _control_groups(host, "cpu"):
        if version == 2:
            words = host.text(f"{folder}/cpu.max").split()
        else:
            words = [
                host.text(f"{folder}/cpu.cfs_quota_us"),
                host.text(f"{folder}/cpu.cfs_period_us"),
            ]
        numbers = [_number(word) for word in words]
        if len(numbers) == 2 and numbers[0] and numbers[1]:
            found.append(numbers[0] / numbers[1])
    return round(min(found), 3) if found else None


def memory_limit(host: Host) -> int | None:
    """Memory that control groups allow, in bytes; None for no limit."""
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = [
        _number(host.text(f"{folder}/{names[version]}"))
        for version, folder in _control_groups(host, "memory")
    ]
    return min((n for n in limits if n and n < _NO_LIMIT), default=None)


def _number(text: str) -> int:
    """A positive number; 0 for anything else (``max``, ``-1``, nothing)."""
    return int(text) if re.fullmatch(r"[0-9]+", text) else 0


def memory_facts(host: Host) -> dict[str, Any]:
    """``total``, ``available`` (free or easily freed) and ``limit``, in bytes."""
    text = host.text("proc/meminfo")
    found: dict[str, Any] = {"total": None, "available": None}
    for name, key in (("MemTotal", "total"), ("MemAvailable", "available")):
        values = _entries(text, name)
        if values and values[0].endswith(" kB"):
            found[key] = _number(values[0][:-3].strip()) * 1024
    return {**found, "limit": memory_limit(host)}


def jetson_facts(host: Host) -> dict[str, Any] | None:
    """Board, Jetson Linux and JetPack of a Jetson; None for any other machine."""
    model = host.text("proc/device-tree/model")
    release = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", host.text("etc/nv_tegra_release")
    )
    if release is None and "jetson" not in model.lower():
        return None
    return {
        "model": model or "unknown",
        "l4t": f"{release[1]}.{release[2]}" if release else None,
        "jetpack": _JETPACK.get(release[1]) if release else None,
    }


def nvidia_cards(host: Host) -> int:
    """NVIDIA display controllers on the PCI bus, with or without a driver."""
    count = 0
    for folder in host.glob("sys/bus/pci/devices/*"):
        here = str(folder.relative_to(host.root))
        count += (
            host.text(f"{here}/vendor") == _NVIDIA_VENDOR
            and host.text(f"{here}/class")[:4] == _DISPLAY_CLASS
        )
    return count
