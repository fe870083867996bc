"""What a CHECKPOINT, BUNDLE, picture or identity file holds, as plain values.

``inspect_path`` loads nothing into a runtime; ``self_tests`` runs engines. No identity
vector is shown.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import Bundle, EngineEntry, is_bundle, open_bundle
from .errors import EngineError, InputError, MissingPackageError

_RUNS_HERE = "runs here"


def inspect_path(path: Path) -> dict[str, Any]:
    """Facts about what lies at ``path``; ``kind`` says what it is.

    Raises:
        InputError: It is none of the things this tool reads.
        Id3pmError: It is damaged.
    """
    if path.is_dir() and is_bundle(path):
        return _bundle_facts(path)
    if path.is_dir() and (path / "config.json").is_file():
        return _checkpoint_facts(path)
    if path.suffix.lower() == ".png" and path.is_file():
        from .marks import read_mark

        return {"kind": "picture", **dataclasses.asdict(read_mark(path))}
    if path.suffix == ".npz" and path.is_file():
        return _identity_facts(path)
    raise InputError(
        f"{path} is no CHECKPOINT, BUNDLE, picture or identity file",
        why="" if path.exists() else "there is no such file or folder",
        fix="give a folder that this tool wrote, a .png or a .npz",
    )


def _bundle_facts(path: Path) -> dict[str, Any]:
    from .bundle.verification import verify_path

    found = verify_path(path).to_json()
    bundle = open_bundle(path)
    manifest = bundle.manifest
    return {
        "kind": "bundle",
        "stages": list(manifest.stages),
        "files_verified": True,
        "signature": found["signature"],
        "plans": _plan_facts(bundle, found["plans"]),
        **manifest.to_json(),
    }


def _plan_facts(bundle: Bundle, trust: dict[str, Any]) -> dict[str, Any]:
    """Of each plan, by its engine's label: whether it runs here, and why not."""
    from .preflight import built_for, found_here, here, plan_problem

    plans = bundle.manifest.plans
    machine = here(entry.flavour for entry in plans) if plans else None
    facts = {}
    for entry in plans:
        assert machine is not None
        problem = plan_problem(entry, machine, bundle.folder)
        said, stale, fix = _RUNS_HERE, False, ""
        if problem is not None:
            said = f"does not run here: {problem.reason}"
            stale, fix = problem.stale, problem.fix
        facts[entry.label] = {
            "here": said,
            "runs_here": problem is None,
            "stale": stale,
            "built_for": built_for(entry),
            "found": found_here(entry, machine),
            "fix": fix,
            **trust.get(entry.label, {}),
        }
    return facts


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    from .optional import require

    require("torch", extra="export")
    require("diffusers", extra="export")
    from .reference.checkpoint import load_checkpoint

    loaded = load_checkpoint(path)
    parameters = sum(p.numel() for p in loaded.network.parameters())
    return {
        "kind": "checkpoint",
        "parameters": parameters,
        "weights_sha256": loaded.weights_sha256,
        **loaded.spec.to_json(),
    }


def _identity_facts(path: Path) -> dict[str, Any]:
    from .identity.vectors import load_identities

    file = load_identities(path)
    return {
        "kind": "identities",
        "vectors": len(file),
        "dim": file.dim,
        "model_name": file.model_name,
        "model_sha256": file.model_sha256,
        "ids": list(file.ids),
    }


@dataclass(frozen=True)
class SelfTests:
    """Self-tests of a bundle's engines, by label.

    Attributes:
        errors: Relative error; None for an engine that was not run.
        not_run: Why it was not.
    """

    errors: dict[str, float | None]
    not_run: dict[str, str]


def self_tests(path: Path, *, trust: bool = False) -> SelfTests:
    """Run every engine of a BUNDLE that can run here on its golden data.

    Args:
        path: The BUNDLE.
        trust: The user answers for plans that were neither built here nor signed.

    Raises:
        InputError: ``path`` is no BUNDLE.
        BundleError: It is damaged.
        ParityError: An engine computes something else than PyTorch did.
    """
    from .models import open_engine, open_model
    from .plan_engines import plan_engine
    from .selftest import self_test

    if not is_bundle(path):
        raise InputError(f"{path} is not a BUNDLE", fix="self-tests need a bundle")
    model = open_model(path)
    assert model.bundle is not None
    stages = {one.stage: one for one in (model, model.second_stage) if one}
    graphs = {(g.stage, g.file): g for g in model.bundle.manifest.graphs}
    found = SelfTests({}, {})
    for entry in model.bundle.manifest.engines:
        graph = graphs[entry.stage, entry.graph]
        reason = _why_not_run(model.bundle, entry, trust)
        if graph.kind != "step":
            reason = "its graph is not a step graph"
        if reason:
            found.errors[entry.label] = None
            found.not_run[entry.label] = reason
            continue
        own = stages[entry.stage]
        if entry.backend == "onnxruntime":
            made = open_engine(own, "onnxruntime", precision=graph.precision)
        else:
            made = plan_engine(own, entry)
        try:
            entered = made.__enter__()
        except (EngineError, MissingPackageError) as error:
            found.errors[entry.label] = None
            found.not_run[entry.label] = error.what
            continue
        with entered as engine:
            found.errors[entry.label] = self_test(engine, model.bundle, graph)
    return found


def _why_not_run(bundle: Bundle, entry: EngineEntry, trust: bool) -> str:
    if entry.backend == "onnxruntime":
        return ""
    from .bundle.trust import plan_trust

    found = plan_trust(bundle, entry)
    if not (found.trusted or trust):
        return f"its plan is not trusted: {found.reason}"
    from .preflight import here, plan_problem

    problem = plan_problem(entry, here([entry.flavour]), bundle.folder)
    return "" if problem is None else f"it does not run here: {problem.reason}"
