"""The flavours of engines: which package and extra bring one, and how to install it.

The doctor, the preflight of plans and the builder say the same of them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MissingPackageError, first_line
from ..optional import require
from .host import Host
from .machine import jetson_facts
from .packages import Packages

EXTRAS = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
"""Flavour to the extra of this package that brings it."""

PACKAGES = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
}
"""Flavour to the package that the extra asks for."""

DISTRIBUTIONS = {
    "tensorrt": (
        "tensorrt",
        "tensorrt-cu12",
        "tensorrt-cu13",
        "tensorrt-cu12-bindings",
        "tensorrt-cu13-bindings",
    ),
    "tensorrt_rtx": (
        "tensorrt-rtx",
        "tensorrt-rtx-cu12",
        "tensorrt-rtx-cu13",
        "tensorrt-rtx-cu12-bindings",
        "tensorrt-rtx-cu13-bindings",
    ),
}
"""Module of TensorRT to the packages under whose names it is installed."""

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX 1.7 runs on."""

RTX_DEFAULT_FROM = (8, 0)
"""Where TensorRT-RTX is not told which GPUs a plan is for, it is for this compute
capability and later ones ("CPU-Only AOT and TensorRT-RTX Engines" in its manual)."""


def jetson_install(host: Host, *, again: bool = False) -> str:
    """TensorRT of a Jetson comes from apt, for the system's Python alone."""
    package = "python3-libnvinfer"
    if again:
        return f"sudo apt install --reinstall {package}"
    for folder in host.glob("usr/lib/python3*/dist-packages/tensorrt"):
        python = folder.parent.parent.name
        return f"{python} -m venv --system-site-packages .venv"
    return f"sudo apt install {package}"


def install_fix(
    flavour: str,
    packages: Packages,
    jetson: Mapping[str, Any] | None,
    *,
    again: bool = False,
) -> str:
    """The command that installs the runtime of a flavour.

    Args:
        flavour: One of ``EXTRAS``.
        packages: What is installed.
        jetson: As ``machine.jetson_facts`` gives it.
        again: It is installed and does not work.
    """
    if jetson is not None and flavour == "tensorrt":
        return jetson_install(packages.host, again=again)
    extra = EXTRAS[flavour]
    wanted = packages.find(PACKAGES[flavour], extra).requirement
    return packages.install_command(extra, (wanted,))


def require_flavour(flavour: str, host: Host | None = None) -> Any:
    """Import the TensorRT of a flavour.

    Args:
        flavour: ``tensorrt`` or ``tensorrt_rtx``, the name of the module.
        host: The machine; None is this one.

    Raises:
        MissingPackageError: It is not there, or it is and cannot be imported; the error
            says how it is installed on this machine, which on a Jetson is not pip.
    """
    try:
        return require(flavour, extra=EXTRAS[flavour])
    except (MissingPackageError, OSError) as error:
        cause = error.__cause__ or error
        absent = isinstance(cause, ModuleNotFoundError) and cause.name == flavour
        packages = Packages(host or Host())
        jetson = jetson_facts(packages.host)
        raise MissingPackageError(
            f"this needs the Python module {flavour!r}, which "
            + ("is not installed" if absent else "cannot be imported"),
            why=first_line(cause),
            fix=install_fix(flavour, packages, jetson, again=not absent),
        ) from error
