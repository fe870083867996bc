"""What each recipe needs, what of it is missing here, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..builders.recipe import CURRENT_GPU, EngineRecipe
from .flavours import (
    EXTRAS,
    PACKAGES,
    RTX_CAPABILITIES,
    RTX_DEFAULT_FROM,
    jetson_install,
)
from .host import Host
from .packages import CORE, Found, Packages
from .probe import Outcome
from .requirements import satisfies

RUNTIMES = (
    ("onnxruntime", "cpu"),
    ("tensorrt", "tensorrt"),
    ("tensorrt", "tensorrt_rtx"),
)
"""Backends and flavours whose engines are built, and can be run."""

EXPORT_PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "safetensors")
"""What an export imports, beside ONNX Runtime."""

IMPORTED = ("numpy", "pillow")
"""What every picture needs, where the package's own metadata is not to be had."""


@dataclass(frozen=True)
class Lack:
    """One thing that is missing, and the command or the act that puts it right."""

    what: str
    fix: str


_NO_ENGINE = Lack(
    "an engine to build: on CUDA, ONNX Runtime runs a BUNDLE's graph as it is",
    "use the recipe cpu, and run the BUNDLE with --backend onnxruntime-cuda",
)


@dataclass(frozen=True)
class Verdict:
    """Whether something can be done here; it can if nothing is missing."""

    lacks: tuple[Lack, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it can be done."""
        return not self.lacks

    @property
    def fix(self) -> str:
        """What to do first; empty if nothing is missing."""
        return self.lacks[0].fix if self.lacks else ""

    def to_json(self) -> dict[str, Any]:
        """``ok``, ``missing`` and ``fix``."""
        missing = [lack.what for lack in self.lacks]
        return {"ok": self.ok, "missing": missing, "fix": self.fix}


@dataclass(frozen=True)
class Facts:
    """What verdicts are drawn from.

    Attributes:
        host: The machine.
        packages: What is installed.
        outcomes: Of the probes, by name.
        gpus: Devices, as ``gpu_facts`` gives them.
        jetson: As ``machine.jetson_facts`` gives it.
    """

    host: Host
    packages: Packages
    outcomes: Mapping[str, Outcome]
    gpus: tuple[Mapping[str, Any], ...] = ()
    jetson: Mapping[str, Any] | None = None


def core_verdict(facts: Facts, extra: str = CORE) -> Verdict:
    """Whether the packages that every command needs are there and can be imported.

    The command that installs them installs ``extra``, too.
    """
    found = facts.packages.found(CORE)
    lacks = _unmet(facts, found, extra)
    outcome = facts.outcomes.get("core", Outcome())
    if not lacks and not outcome.ok:
        there = found or tuple(facts.packages.find(name, CORE) for name in IMPORTED)
        lacks = [Lack(outcome.problem, _again(facts, *there))]
    return Verdict(tuple(lacks))


def extra_verdict(facts: Facts, extra: str) -> Verdict:
    """Whether everything that an extra asks for is installed."""
    if extra not in facts.packages.declared:
        what = f"to know what the extra {extra} asks for: id3pm-deploy is not installed"
        return Verdict((Lack(what, facts.packages.install_command(extra)),))
    return Verdict(tuple(_unmet(facts, facts.packages.found(extra), extra)))


def _unmet(facts: Facts, found: tuple[Found, ...], extra: str) -> list[Lack]:
    bad = [one for one in found if not one.ok]
    wanted = [*bad, *(one for one in facts.packages.found(extra) if not one.ok)]
    lacking = tuple(dict.fromkeys(one.requirement for one in wanted))
    command = facts.packages.install_command(extra, lacking)
    return [Lack(_named(one), command) for one in bad]


def _named(found: Found) -> str:
    have = f", not {found.version}" if found.version else ""
    return f"{found.requirement}{have}"


def _again(facts: Facts, *found: Found) -> str:
    """The command that installs broken packages anew, in the versions they have."""
    rivals = [name for one in found for name in facts.packages.rivals(one.by)]
    pins = " ".join(f"{one.by}=={one.version}" if one.ok else one.by for one in found)
    if rivals:  # what one of them overwrote, removing it would take away
        names = " ".join((*(one.by for one in found), *rivals))
        return f"pip uninstall -y {names} && pip install {pins}"
    return f"pip install --force-reinstall --no-deps {pins}"


def export_verdict(facts: Facts) -> Verdict:
    """Whether a CHECKPOINT can be exported to a step graph here."""
    packages = facts.packages
    found = tuple(packages.find(name, "export") for name in EXPORT_PACKAGES)
    lacks = _unmet(facts, found, "export")
    for one in found:
        outcome = facts.outcomes.get(one.requirement.name, Outcome())
        if one.ok and outcome.broken:
            lacks.append(Lack(outcome.problem, _again(facts, one)))
    lacks += _runtime_lacks(facts, "export")
    return Verdict(tuple(lacks))


def _runtime_lacks(facts: Facts, extra: str) -> list[Lack]:
    """What keeps ONNX Runtime from running on the CPU."""
    found = facts.packages.find("onnxruntime", extra)
    return _module_lacks(facts, "onnxruntime", found, extra)


def _module_lacks(facts: Facts, module: str, found: Found, extra: str) -> list[Lack]:
    """What is wrong with a runtime's module: absent, broken or too old.

    The module counts, not the package: TensorRT of a Jetson comes without pip.
    """
    outcome = facts.outcomes[module]
    version = str(outcome.facts.get("version") or found.version or "")
    if not outcome.ok and found.ok:
        return [Lack(outcome.problem, _again(facts, found))]
    if outcome.broken:
        return [Lack(outcome.problem, _install(facts, found, extra, again=True))]
    if outcome.absent:
        return [Lack(str(found.requirement), _install(facts, found, extra))]
    specifier = found.requirement.specifier
    if version and specifier and not satisfies(specifier, version):
        what = f"{found.requirement}, not {version}"
        return [Lack(what, _install(facts, found, extra))]
    return []


def _install(facts: Facts, found: Found, extra: str, *, again: bool = False) -> str:
    if facts.jetson is not None and found.requirement.name == "tensorrt":
        return jetson_install(facts.host, again=again)
    return facts.packages.install_command(extra, (found.requirement,))


def build_verdict(recipe: EngineRecipe, facts: Facts) -> Verdict:
    """Whether the engine can be built here from a graph that exists (a BUNDLE)."""
    if recipe.backend == "onnxruntime":
        if recipe.flavour != "cpu":
            return Verdict((_NO_ENGINE,))
        return Verdict(tuple(_runtime_lacks(facts, "cpu")))
    lacks = []
    if recipe.flavour == "tensorrt_rtx" and facts.host.machine != "x86_64":
        here = facts.host.machine or "another machine"
        lacks.append(
            Lack(
                f"an x86-64 machine: TensorRT-RTX is not made for {here}",
                "build it on an x86-64 machine",
            )
        )
    if recipe.flavour == "tensorrt" or CURRENT_GPU in recipe.compute_capabilities:
        lacks += _builder_lacks(recipe, facts)
    lacks += _tensorrt_lacks(recipe, facts)
    return Verdict(tuple(lacks))


def _tensorrt_lacks(recipe: EngineRecipe, facts: Facts) -> list[Lack]:
    extra = EXTRAS[recipe.flavour]
    found = facts.packages.find(PACKAGES[recipe.flavour], extra)
    return _module_lacks(facts, recipe.flavour, found, extra)


def _bindings_lacks(recipe: EngineRecipe, facts: Facts) -> list[Lack]:
    """What is wrong with ``cuda-bindings``, without which no plan is run."""
    jetpack = ""
    if facts.jetson is not None and recipe.flavour == "tensorrt":
        jetpack = str(facts.jetson["jetpack"] or "")
    extra = "jetson" if jetpack.startswith("6") else EXTRAS[recipe.flavour]
    found = facts.packages.find("cuda-bindings", extra)
    if found.ok:
        return []
    fix = facts.packages.install_command(extra, (found.requirement,))
    if jetpack and extra != "jetson":  # TensorRT itself comes from apt
        fix = "pip install 'cuda-bindings>=13,<14'"
    return [Lack(_named(found), fix)]


def run_verdict(recipe: EngineRecipe, facts: Facts) -> Verdict:
    """Whether the engine, once built, can be run here."""
    lacks: list[Lack] = []
    if (recipe.backend, recipe.flavour) not in RUNTIMES:
        lacks.append(_NO_ENGINE)
    if recipe.flavour != "cpu":
        lacks += _gpu_lacks(recipe, facts)
    lacks += core_verdict(facts, EXTRAS[recipe.flavour]).lacks
    if recipe.backend == "tensorrt":
        lacks += _tensorrt_lacks(recipe, facts)
        lacks += _bindings_lacks(recipe, facts)
    elif recipe.flavour == "cpu":
        lacks += _runtime_lacks(facts, "cpu")
    return Verdict(tuple(lacks))


def _builder_lacks(recipe: EngineRecipe, facts: Facts) -> list[Lack]:
    """What keeps a plan from being built for the GPU that is there."""
    wanted = _named_gpus(recipe)
    here = _gpus_here(facts)
    if here and (not wanted or set(here) & set(wanted)):
        return []
    fix = "build it on the machine that will run it"
    if here:
        fix += ", or use the recipe of this GPU"
    return [Lack(f"{_gpu_of(wanted, here)}: it builds for the one that is there", fix)]


def _gpu_lacks(recipe: EngineRecipe, facts: Facts) -> list[Lack]:
    """What keeps a plan from running here, as far as the GPU goes."""
    wanted = _named_gpus(recipe)
    here = _gpus_here(facts)
    if recipe.hardware_compatibility == "ampere_plus":
        if any(_generation(one) >= 8 for one in here):
            return []
    elif here and (not wanted or set(here) & set(wanted)):
        return []
    fix = "run it on a machine with such a GPU"
    if recipe.flavour == "tensorrt_rtx" and set(here) & set(RTX_CAPABILITIES):
        fix = "name this GPU in the recipe's compute_capabilities and build again"
    return [Lack(_gpu_of(wanted, here), fix)]


def _named_gpus(recipe: EngineRecipe) -> tuple[str, ...]:
    """Compute capabilities that a plan of the recipe is for; empty for any."""
    named = recipe.compute_capabilities
    if named not in ((), (CURRENT_GPU,)):
        return named
    if recipe.flavour != "tensorrt_rtx":
        return ()
    if named:
        return RTX_CAPABILITIES
    first = RTX_DEFAULT_FROM[0]
    return tuple(one for one in RTX_CAPABILITIES if _generation(one) >= first)


def _gpus_here(facts: Facts) -> tuple[str, ...]:
    found = [str(gpu["compute_capability"]) for gpu in facts.gpus]
    return tuple(dict.fromkeys(found))


def _generation(capability: str) -> int:
    first = capability.partition(".")[0]
    return int(first) if first.isdigit() else 0


def _gpu_of(wanted: tuple[str, ...], here: tuple[str, ...]) -> str:
    of = f" of compute capability {_listed(wanted)}" if wanted else ""
    but = f"; here: {_listed(here)}" if here else ""
    return f"an NVIDIA GPU{of}{but}"


def _listed(words: tuple[str, ...]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} or {words[-1]}"
