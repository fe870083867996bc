"""What ``sample`` and ``parity`` are pointed at: a CHECKPOINT, or a stage of a BUNDLE.

Only the tier that is needed is imported: a bundle on a device loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from .backends.base import Engine, step_shapes
from .body_form import BodyForm, Precision
from .bundle import (
    BASE,
    SUPER_RESOLUTION,
    Bundle,
    GraphEntry,
    is_bundle,
    open_bundle,
)
from .checkpoint_config import is_checkpoint, load_spec, weights_sha256
from .defaults import BACKENDS
from .errors import EngineError, InputError
from .optional import require
from .spec import DiffusionSpec, check_chain


@dataclass(frozen=True)
class Model:
    """An opened CHECKPOINT or a stage of a BUNDLE; ``bundle`` is None for a
    checkpoint."""

    path: Path
    spec: DiffusionSpec
    bundle: Bundle | None
    stage: str = BASE

    @property
    def title(self) -> str:
        """What the model calls itself; no path."""
        return self.spec.title or "untitled"

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the checkpoint's weights file."""
        if self.bundle is not None:
            return self.bundle.manifest.stages[self.stage].checkpoint_sha256
        return weights_sha256(self.path)

    @property
    def second_stage(self) -> Model | None:
        """The super-resolution model that the same BUNDLE holds behind this one."""
        if self.bundle is None or self.stage != BASE:
            return None
        found = self.bundle.manifest.super_resolution
        if found is None:
            return None
        return Model(self.path, found.diffusion, self.bundle, SUPER_RESOLUTION)


def open_model(path: Path) -> Model:
    """Open a CHECKPOINT or BUNDLE folder; weights and graphs are read later.

    Raises:
        InputError: It is neither.
        CheckpointError, BundleError: It is damaged.
    """
    if is_bundle(path):
        bundle = open_bundle(path)
        return Model(path, bundle.manifest.diffusion, bundle)
    if is_checkpoint(path):
        return Model(path, load_spec(path), None)
    fix = "give the folder that `train` or `build-engine` wrote"
    if path.is_file():
        fix = f"if it is a packed BUNDLE: id3pm-deploy bundle unpack {path} FOLDER"
    raise InputError(
        f"{path} is neither a CHECKPOINT nor a BUNDLE",
        why="it has no config.json and no manifest.json"
        if path.is_dir()
        else "there is no such folder",
        fix=fix,
    )


def open_second_stage(model: Model, path: Path | None) -> Model | None:
    """What enlarges the pictures of ``model``: the model at ``path``, or the one that
    its own BUNDLE holds; None where there is neither.

    Raises:
        InputError: It cannot enlarge what ``model`` makes, or there are two.
        CheckpointError, BundleError: It is damaged.
        EngineError: A bundle holds no graph of it.
    """
    own = model.second_stage
    if path is not None and own is not None:
        raise InputError(
            "the BUNDLE has a second stage of its own",
            fix="leave out --super-resolution",
        )
    second = own if path is None else open_model(path)
    if second is not None:
        check_chain(model.spec, second.spec)
        if second.bundle is not None:
            bundle_graph(second.bundle, None, second.stage)
    return second


def with_fresh_plans(
    model: Model, backend: str, precision: str | None, say: Callable[[str], None]
) -> Model:
    """``model``, opened again if a stale plan of it had to be built again.

    Args:
        model: An opened model.
        backend: What will run it; only ``tensorrt`` uses plans.
        precision: Of which plans; None takes any.
        say: Called with what is done, a line at a time.

    Raises:
        EngineError: A plan is stale and cannot be built here.
        Id3pmError: The build fails.
    """
    from .preflight import rebuild_if_stale

    if backend != "tensorrt":
        say(f"--rebuild-if-stale: the backend {backend} uses no plan")
        return model
    if model.bundle is None:
        return model
    if not rebuild_if_stale(model.path, model.stage, precision, say=say):
        return model
    again = open_model(model.path)
    second = again.second_stage
    return again if second is None or model.stage == BASE else second


def open_engine(
    model: Model,
    backend: str = "auto",
    *,
    precision: str | None = None,
    threads: int = 0,
    device: str = "cpu",
    trust: bool = False,
) -> Engine:
    """The engine that runs ``model``; enter it before use.

    Args:
        model: An opened model.
        backend: ``onnxruntime`` or ``tensorrt`` (a bundle), ``torch`` (a checkpoint),
            or ``auto`` for the one that fits, which in this release is no plan.
        precision: ``float32``, ``float16`` or ``bfloat16``; None takes the bundle's
            engine's, or float32.
        threads: CPU threads; 0 leaves the recipe's or the runtime's choice.
        device: A torch device, for the torch backend.
        trust: The user answers for a plan that was neither built here nor signed.

    Raises:
        EngineError: The model cannot run on that backend; of a plan, the error says
            what it was built for, what was found, and what puts it right.
        BundleError: A file is not the one that the manifest describes.
        TrustError: Nobody answers for its plan.
    """
    if not 0 <= threads <= 1024:
        raise InputError("threads must be from 0 to 1024", why=f"it is {threads}")
    if backend == "auto":
        backend = "torch" if model.bundle is None else "onnxruntime"
    if backend == "torch":
        return _torch_engine(model, precision or "float32", threads, device)
    if device != "cpu" and backend != "torch":
        raise InputError(
            f"--device {device} is a setting of the torch backend",
            fix="leave it out, or give a CHECKPOINT",
        )
    if backend == "onnxruntime":
        return _onnxruntime_engine(model, precision, threads)
    if backend == "tensorrt":
        return _tensorrt_engine(model, precision, trust)
    raise InputError(
        f"there is no backend {backend!r}", fix=f"use one of {', '.join(BACKENDS)}"
    )


def _tensorrt_engine(model: Model, precision: str | None, trust: bool) -> Engine:
    from .bundle.trust import check_plan_trusted, plan_trust
    from .preflight import runnable_plans

    bundle = model.bundle
    if bundle is not None:
        fitting = runnable_plans(bundle, model.stage, precision)
        trusted = [e for e in fitting if trust or plan_trust(bundle, e).trusted]
        for entry in (trusted or fitting)[:1]:
            check_plan_trusted(bundle, entry, trust=trust)
            bundle.path_of(entry.file)
    raise EngineError(
        "this release builds TensorRT plans but has no runtime for them yet",
        fix="use --backend onnxruntime",
    )


def _torch_engine(model: Model, precision: str, threads: int, device: str) -> Engine:
    if model.bundle is not None:
        raise EngineError(
            "a BUNDLE has no PyTorch weights for the torch backend",
            fix="give the CHECKPOINT, or use --backend onnxruntime",
        )
    torch = require("torch", extra="export")
    require("diffusers", extra="export")
    from .backends.torch import TorchEngine
    from .reference.checkpoint import load_checkpoint

    if precision not in get_args(Precision):
        raise InputError(f"the torch backend has no precision {precision!r}")
    form = BodyForm(cast(Precision, precision))
    if threads:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(model.path)
    shapes = step_shapes(model.spec)
    return TorchEngine(checkpoint.network, shapes, form, device)


def bundle_graph(
    bundle: Bundle, precision: str | None, stage: str = BASE
) -> GraphEntry:
    """The step graph of ``precision``, or of the stage's ONNX Runtime engine.

    Raises:
        EngineError: The bundle holds no such graph.
    """
    wanted = precision
    if wanted is None:
        fitting = [
            entry.precision
            for entry in bundle.manifest.engines
            if (entry.backend, entry.stage) == ("onnxruntime", stage)
        ]
        wanted = fitting[0] if fitting else None
    for kind in (wanted,) if wanted else get_args(Precision):
        graph = bundle.graph("step", kind, stage)
        if graph is not None:
            return graph
    graphs = [g for g in bundle.manifest.graphs if g.stage == stage]
    there = ", ".join(f"{g.kind} {g.precision}" for g in graphs)
    raise EngineError(
        f"{bundle.folder} holds no step graph of the stage {stage} for ONNX Runtime",
        why=f"wanted {wanted or 'any'}; graphs in it: {there or 'none'}",
        fix="build it with `id3pm-deploy build-engine CHECKPOINT --target cpu`",
    )


def _onnxruntime_engine(model: Model, precision: str | None, threads: int) -> Engine:
    if model.bundle is None:
        raise EngineError(
            "a CHECKPOINT has no engine for the onnxruntime backend",
            fix=f"id3pm-deploy build-engine {model.path} --target cpu --out BUNDLE",
        )
    from .backends.onnxruntime import OnnxRuntimeEngine

    graph = bundle_graph(model.bundle, precision, model.stage)
    engines = model.bundle.manifest.engines
    if not threads:
        wanted = next((e.threads for e in engines if e.graph == graph.file), 0)
        threads = min(wanted, os.cpu_count() or 1)  # it may be of a larger machine
    data = model.bundle.read(graph.file)
    return OnnxRuntimeEngine(data, step_shapes(model.spec), graph.precision, threads)
