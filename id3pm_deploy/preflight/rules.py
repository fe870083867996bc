"""Which plan runs where: what the manifest says of it, held against this machine.

The rules are TensorRT's: a plan runs on the version that built it, and on the GPU that
it was tuned for; both can be loosened when it is built ("Engine Compatibility" in its
manual). A TensorRT-RTX plan is for the compute capabilities that were named instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..builders.recipe import CURRENT_GPU, is_portable
from ..bundle import EngineEntry
from ..doctor.flavours import DISTRIBUTIONS, RTX_CAPABILITIES, RTX_DEFAULT_FROM
from ..errors import EngineError
from .commands import fitting_targets, rebuild_command
from .machine import Gpu, Here, release, same_version

Kind = Literal["flavour", "library", "version", "gpu", "cuda"]

_AMPERE = (8, 0)
_MAJORS = {8: 10, 10: 11}
"""Major version that built a version-compatible plan to the next one that runs it."""


@dataclass(frozen=True)
class PlanProblem:
    """Why a plan cannot run here.

    Attributes:
        kind: What does not fit.
        engine: The engine's label.
        reason: One sentence.
        built_for: What the plan was built for.
        found: What there is here.
        fix: The command, or the act, that puts it right.
        stale: It is put right by building it here again with the same settings.
    """

    kind: Kind
    engine: str
    reason: str
    built_for: str
    found: str
    fix: str
    stale: bool = False

    @property
    def why(self) -> str:
        """What it was built for and what was found, in a line."""
        return f"it was built for {self.built_for}; here: {self.found}"

    def error(self) -> EngineError:
        """The problem as an error."""
        hint = "; --rebuild-if-stale does it for you" if self.stale else ""
        return EngineError(
            f"the plan of the engine {self.engine!r:.80} cannot run here: "
            f"{self.reason}",
            why=self.why,
            fix=self.fix + hint,
        )


@dataclass(frozen=True)
class _Case:
    """A plan, the machine and the bundle that it lies in."""

    entry: EngineEntry
    here: Here
    bundle: Path | None

    def problem(
        self, kind: Kind, reason: str, fix: str = "", *, stale: bool = False
    ) -> PlanProblem:
        entry = self.entry
        return PlanProblem(
            kind=kind,
            engine=entry.label,
            reason=reason,
            built_for=built_for(entry),
            found=found_here(entry, self.here),
            fix=fix or rebuild_command(entry, self.bundle),
            stale=stale,
        )


def plan_problem(
    entry: EngineEntry, here: Here, bundle: Path | None = None
) -> PlanProblem | None:
    """Why the plan of ``entry`` cannot run here; None if nothing stands against it.

    It goes by the manifest alone: whether the file is the one that the manifest
    describes, and whether it may be trusted, is another question.

    Args:
        entry: An engine with a plan.
        here: The machine.
        bundle: The plan's BUNDLE, to be named in commands.
    """
    case = _Case(entry, here, bundle)
    return _library_problem(case) or _gpu_problem(case) or _cuda_problem(case)


def built_for(entry: EngineEntry) -> str:
    """Library, version and GPUs that a plan is for, for people."""
    parts = [f"{entry.flavour:.40} {entry.version:.40}"]
    if entry.version_compatible:
        parts[0] += " or later"
    parts.append(_built_for_gpu(entry))
    if entry.cuda and not is_portable(entry):
        parts.append(f"CUDA {entry.cuda:.20}")
    return ", ".join(parts)


def found_here(entry: EngineEntry, here: Here) -> str:
    """Library, GPUs and CUDA of this machine, for people."""
    version = here.versions.get(entry.flavour)
    library = f"{entry.flavour:.40} {version}" if version else f"no {entry.flavour:.40}"
    gpus = ", ".join(dict.fromkeys(map(str, here.gpus)))
    cuda = f", CUDA {here.cuda}" if here.cuda else ""
    return f"{library}, {gpus or 'no NVIDIA GPU'}{cuda}"


def _built_for_gpu(entry: EngineEntry) -> str:
    if not is_portable(entry):
        if bound := _bound_to(entry):
            return f"{bound!s:.160}"
        return "a GPU that the bundle does not name"
    if entry.hardware_compatibility == "ampere_plus":
        return "GPUs of compute capability 8.0 or later"
    named = _capabilities(entry)
    if not named:
        return "GPUs of compute capability 8.0 or later"
    return f"GPUs of compute capability {_listed(named)}"


def _capabilities(entry: EngineEntry) -> tuple[str, ...]:
    """Compute capabilities of a portable plan; empty where the library decided."""
    if entry.flavour == "tensorrt_rtx":
        return entry.compute_capabilities
    return (entry.compute_capability,) if entry.compute_capability else ()


def _bound_to(entry: EngineEntry) -> Gpu | None:
    """The GPU of a plan that is for one alone; None where the bundle is silent."""
    name, capability = entry.gpu_name, entry.compute_capability
    if not name or not capability or not entry.multiprocessors:
        return None
    return Gpu(name, capability, entry.multiprocessors)


def _library_problem(case: _Case) -> PlanProblem | None:
    entry, here = case.entry, case.here
    if entry.backend != "tensorrt" or entry.flavour not in DISTRIBUTIONS:
        fix = "update id3pm-deploy, or use another engine of the bundle"
        return case.problem("flavour", "this release does not know its kind", fix)
    lack = here.lacks.get(entry.flavour)
    if entry.flavour == "tensorrt_rtx" and here.host.machine not in ("x86_64", ""):
        reason = f"TensorRT-RTX is not made for {here.host.machine}"
        return case.problem("library", reason, _other_target(case))
    if lack is not None or entry.flavour not in here.versions:
        what = lack.what if lack else f"{entry.flavour} was not looked for"
        return case.problem("library", what, lack.fix if lack else "")
    return _version_problem(case, here.versions[entry.flavour])


def _version_problem(case: _Case, version: str) -> PlanProblem | None:
    built = case.entry.version
    if same_version(built, version):
        return None
    if not case.entry.version_compatible:
        reason = "a plan runs on the version that built it"
        return case.problem("version", reason, stale=True)
    old, new = release(built), release(version)
    if old and new and old <= new and new[0] in (old[0], _MAJORS.get(old[0])):
        return None
    reason = "it runs on the version that built it and on later ones of the same major"
    if old and old[0] in _MAJORS:
        reason += f" or of {_MAJORS[old[0]]}"
    return case.problem("version", reason, stale=True)


def _gpu_problem(case: _Case) -> PlanProblem | None:
    entry, here = case.entry, case.here
    if not here.gpus:
        reason = here.gpu_problem or "there is no NVIDIA GPU"
        fix = here.gpu_fix or "run it on a machine with such a GPU"
        return case.problem("gpu", reason, fix)
    if is_portable(entry):
        return _portable_problem(case)
    bound = _bound_to(entry)
    if bound is None:
        reason = "the bundle does not say for which GPU it was built"
        return case.problem("gpu", reason, stale=True)
    if any(_same_gpu(bound, gpu) for gpu in here.gpus):
        return None
    wanted = set(entry.compute_capabilities) - {CURRENT_GPU}
    if wanted and not wanted & {gpu.compute_capability for gpu in here.gpus}:
        reason = "it is for GPUs of another compute capability"
        return case.problem("gpu", reason, _other_target(case))
    return case.problem("gpu", "it was tuned for another GPU", stale=True)


def _same_gpu(bound: Gpu, gpu: Gpu) -> bool:
    """The compute capability alone is not enough: a plan is tuned for a GPU's size."""
    return (bound.name, bound.compute_capability, bound.multiprocessors) == (
        gpu.name,
        gpu.compute_capability,
        gpu.multiprocessors,
    )


def _portable_problem(case: _Case) -> PlanProblem | None:
    entry, here = case.entry, case.here
    if any(_fits(entry, gpu) for gpu in here.gpus):
        if entry.hardware_compatibility == "none" or here.jetson is None:
            return None
        reason = "TensorRT's hardware compatibility does not extend to Jetson"
        return case.problem("gpu", reason, _other_target(case))
    reason = "none of the GPUs here has a compute capability that it is for"
    stale = entry.hardware_compatibility == "same_compute_capability"
    fix = "" if stale else _other_target(case)
    return case.problem("gpu", reason, fix, stale=stale)


def _fits(entry: EngineEntry, gpu: Gpu) -> bool:
    """Whether a portable plan is for GPUs of that compute capability."""
    found = release(gpu.compute_capability) or ()
    if entry.hardware_compatibility == "ampere_plus":
        return found >= _AMPERE
    named = _capabilities(entry)
    if not named and entry.flavour == "tensorrt_rtx":
        known = gpu.compute_capability in RTX_CAPABILITIES
        return known and found >= RTX_DEFAULT_FROM
    return gpu.compute_capability in named


def _other_target(case: _Case) -> str:
    """What to do where building the same again would not help."""
    entry, here = case.entry, case.here
    targets = fitting_targets(here, entry.precision)
    if targets:
        bundle = case.bundle or "BUNDLE"
        return f"id3pm-deploy build-engine {bundle} --target {' or '.join(targets)}"
    listed = [gpu.compute_capability for gpu in here.gpus]
    if entry.flavour == "tensorrt_rtx" and set(listed) & set(RTX_CAPABILITIES):
        return "name this GPU in the recipe's compute_capabilities and build it again"
    return "build it with a recipe for this machine's GPU"


def _cuda_problem(case: _Case) -> PlanProblem | None:
    entry, here = case.entry, case.here
    if is_portable(entry) and entry.flavour == "tensorrt_rtx":
        return None
    built, found = release(entry.cuda or ""), release(here.cuda or "")
    if not built or not found or found[0] >= built[0]:
        return None
    reason = f"the driver runs no CUDA {built[0]}"
    command = rebuild_command(entry, case.bundle)
    return case.problem("cuda", reason, f"update the driver, or: {command}", stale=True)


def _listed(words: Sequence[str]) -> str:
    shown = [f"{word:.12}" for word in words[:12]]
    return shown[0] if len(shown) < 2 else f"{', '.join(shown[:-1])} or {shown[-1]}"
