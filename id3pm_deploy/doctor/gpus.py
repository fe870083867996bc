"""NVIDIA's GPUs, driver and board, from the probes of the driver and from files."""

from __future__ import annotations

from typing import Any

from .host import Host
from .machine import jetson_facts, nvidia_cards
from .probe import Outcome, Probe

CUDA = Probe("cuda", (), "asking the NVIDIA driver")
NVML = Probe("nvml", (), "asking NVIDIA's management library")


def gpu_facts(host: Host, cuda: Outcome, nvml: Outcome | None = None) -> dict[str, Any]:
    """What there is of NVIDIA, and what keeps it from being used.

    Args:
        host: The machine.
        cuda: What came of the probe ``CUDA``.
        nvml: What came of ``NVML``, if it was run.

    Returns:
        ``driver``, ``cuda``, ``cards``, ``devices``, ``jetson``, ``problem`` and
        ``fix``, as :mod:`.examine` describes them.
    """
    jetson, cards = jetson_facts(host), nvidia_cards(host)
    problem, fix = "", ""
    if cuda.absent:
        problem = "there is no NVIDIA driver (libcuda.so.1)"
        if cards or jetson:
            problem = "there is an NVIDIA GPU, and its driver is not to be found"
            fix = "install the driver, or start the container with its GPUs"
    elif not cuda.ok:
        problem = cuda.problem
        fix = "look at what nvidia-smi says; after an update of the driver, reboot"
    elif not cuda.facts["devices"]:
        problem, fix = "the driver shows no GPU", "look at CUDA_VISIBLE_DEVICES"
    return {
        "driver": None if nvml is None else nvml.facts.get("driver"),
        "cuda": cuda.facts.get("cuda"),
        "cards": cards,
        "devices": list(cuda.facts.get("devices", [])),
        "jetson": jetson,
        "problem": problem,
        "fix": fix,
    }
