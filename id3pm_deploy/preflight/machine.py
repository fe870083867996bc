"""What this machine has to run a plan on: GPUs, driver, and the TensorRT libraries.

The driver is asked in a child process with a time limit, as it may crash or hang.
Versions come from package metadata, so that nothing is imported; only a TensorRT
without metadata is asked itself, in a child process as well.
"""

from __future__ import annotations

import importlib.machinery
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..doctor.flavours import DISTRIBUTIONS, install_fix
from ..doctor.gpus import CUDA, gpu_facts
from ..doctor.host import Host
from ..doctor.machine import jetson_facts
from ..doctor.packages import UNKNOWN, Packages
from ..doctor.probe import Outcome, Prober, importing, run_probe
from ..doctor.verdicts import Facts, Lack
from ..errors import MissingPackageError

LIMIT_SECONDS = 60.0
"""For each question; a driver that has to wake many GPUs takes its time."""

_RELEASE = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,7}(?![0-9])")


@dataclass(frozen=True)
class Gpu:
    """A GPU, as the driver describes it.

    Attributes:
        name: Its product name.
        compute_capability: As ``8.9``.
        multiprocessors: How many streaming multiprocessors it has.
        memory: Bytes; on an integrated GPU, those of the machine.
        integrated: It shares the machine's memory, as a Jetson's does.
    """

    name: str
    compute_capability: str
    multiprocessors: int
    memory: int = 0
    integrated: bool = False

    def __str__(self) -> str:
        return (
            f"{self.name} (compute capability {self.compute_capability}, "
            f"{self.multiprocessors} multiprocessors)"
        )


@dataclass(frozen=True)
class Here:
    """What of this machine decides whether a plan can run.

    Attributes:
        gpus: The GPUs that this process may use, in the driver's order.
        cuda: Newest CUDA that the driver runs, as ``13.0``; None without a driver.
        gpu_problem: Why there is no GPU; empty if there is one.
        gpu_fix: What can be done about that.
        versions: TensorRT libraries that are installed, by flavour, with their version.
        lacks: The others that were asked for: what is missing and how to get it.
        jetson: The board, as ``doctor.machine.jetson_facts`` describes it.
        host: The machine.
    """

    gpus: tuple[Gpu, ...] = ()
    cuda: str | None = None
    gpu_problem: str = ""
    gpu_fix: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    lacks: Mapping[str, Lack] = field(default_factory=dict)
    jetson: Mapping[str, Any] | None = None
    host: Host = field(default_factory=Host, repr=False)

    def facts(self) -> Facts:
        """The same as the doctor's verdicts take it."""
        outcomes = {
            flavour: Outcome(facts={"version": version})
            for flavour, version in self.versions.items()
        }
        for flavour, lack in self.lacks.items():
            outcomes[flavour] = Outcome(problem=lack.what, absent=True)
        gpus = tuple(asdict(gpu) for gpu in self.gpus)
        return Facts(self.host, Packages(self.host), outcomes, gpus, self.jetson)


def here(
    flavours: Iterable[str] = tuple(DISTRIBUTIONS),
    *,
    host: Host | None = None,
    limit: float = LIMIT_SECONDS,
    prober: Prober | None = None,
) -> Here:
    """Look at this machine.

    Args:
        flavours: ``tensorrt`` or ``tensorrt_rtx``, those that matter; what is neither
            is passed over.
        host: The machine; None is this one.
        limit: Seconds that each child process may take.
        prober: Runs one probe; None runs it in a child process.
    """
    host = host or Host()
    packages, ask = Packages(host), prober or run_probe
    gpu = gpu_facts(host, ask(CUDA, host, limit))
    versions, lacks = {}, {}
    for flavour in dict.fromkeys(flavours):
        if flavour not in DISTRIBUTIONS:
            continue
        found = _library(flavour, packages, limit, ask)
        if isinstance(found, str):
            versions[flavour] = found
        else:
            lacks[flavour] = found
    return Here(
        gpus=tuple(_gpu(device) for device in gpu["devices"]),
        cuda=gpu["cuda"],
        gpu_problem=gpu["problem"],
        gpu_fix=gpu["fix"],
        versions=versions,
        lacks=lacks,
        jetson=gpu["jetson"],
        host=host,
    )


def library_version(
    flavour: str,
    *,
    host: Host | None = None,
    limit: float = LIMIT_SECONDS,
    prober: Prober | None = None,
) -> str:
    """Version of an installed TensorRT, which is not imported into this process.

    Args:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        host: The machine; None is this one.
        limit: Seconds that a child process may take.
        prober: Runs one probe; None runs it in a child process.

    Raises:
        MissingPackageError: It is not installed, or cannot be imported.
    """
    packages = Packages(host or Host())
    found = _library(flavour, packages, limit, prober or run_probe)
    if isinstance(found, Lack):
        raise MissingPackageError(
            f"{flavour} cannot be used here", why=found.what, fix=found.fix
        )
    return found


def release(version: str) -> tuple[int, ...] | None:
    """The numbers of a version, without what packaging adds (``10.9.0.34.post1``)."""
    found = _RELEASE.match(version)
    return tuple(map(int, found[0].split("."))) if found else None


def same_version(one: str, other: str) -> bool:
    """Whether two versions are one, whatever packaging added to them."""
    return one == other or (release(one) is not None and release(one) == release(other))


def _gpu(device: Mapping[str, Any]) -> Gpu:
    known = Gpu.__dataclass_fields__
    return Gpu(**{name: value for name, value in device.items() if name in known})


def _library(
    flavour: str, packages: Packages, limit: float, prober: Prober
) -> str | Lack:
    """The version of an installed library, or what is missing."""
    host = packages.host
    if not _is_there(flavour, host):
        what = f"the Python module {flavour} is not installed"
        return Lack(what, _fix(flavour, packages))
    stated = {packages.version(name) for name in DISTRIBUTIONS[flavour]}
    known = sorted(str(version) for version in stated - {None, UNKNOWN})
    if known and all(same_version(known[0], one) for one in known):
        return known[0]
    outcome = prober(importing(flavour), host, limit)
    if outcome.ok and outcome.facts.get("version"):
        return str(outcome.facts["version"])
    what = outcome.problem or f"the module {flavour} does not say which version it is"
    return Lack(what, _fix(flavour, packages, again=True))


def _is_there(module: str, host: Host) -> bool:
    """Whether a module could be imported; a mere folder of that name is none."""
    found = importlib.machinery.PathFinder.find_spec(module, list(host.search))
    return found is not None and found.origin is not None


def _fix(flavour: str, packages: Packages, *, again: bool = False) -> str:
    return install_fix(flavour, packages, jetson_facts(packages.host), again=again)
