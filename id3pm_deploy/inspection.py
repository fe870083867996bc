"""What a CHECKPOINT, BUNDLE, picture or identity file holds, as plain values.

``inspect_path`` loads nothing into a runtime; ``self_test_errors`` runs engines. No
identity vector is shown.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .bundle import is_bundle, open_bundle
from .errors import BundleError, InputError


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
    bundle = open_bundle(path)
    bundle.verify()
    return {"kind": "bundle", "files_verified": True, **bundle.manifest.to_json()}


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


def self_test_errors(path: Path) -> dict[str, float | None]:
    """Run every engine of a BUNDLE that can run here on its golden data.

    Returns:
        Relative error by target; None for an engine that cannot run here.

    Raises:
        InputError: ``path`` is no BUNDLE.
        BundleError: It is damaged, or an engine's graph is not in it.
        ParityError: An engine computes something else than PyTorch did.
    """
    from .models import open_engine, open_model
    from .selftest import self_test

    if not is_bundle(path):
        raise InputError(f"{path} is not a BUNDLE", fix="self-tests need a bundle")
    model = open_model(path)
    assert model.bundle is not None
    graphs = {g.file: g for g in model.bundle.manifest.graphs if g.kind == "step"}
    found: dict[str, float | None] = {}
    for entry in model.bundle.manifest.engines:
        if entry.backend != "onnxruntime":
            found[entry.target] = None
            continue
        if entry.graph not in graphs:
            raise BundleError(
                f"the engine {entry.target!r} names a step graph that is not listed",
                why=f"its graph is {entry.graph!r:.80}",
                fix="build it again with `id3pm-deploy build-engine CHECKPOINT "
                "--target TARGET --out BUNDLE`",
            )
        graph = graphs[entry.graph]
        with open_engine(model, "onnxruntime", precision=graph.precision) as engine:
            found[entry.target] = self_test(engine, model.bundle, graph)
    return found
