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
from .defaults import BACKENDS, ORT_GPU_BACKENDS
from .errors import EngineError, InputError
from .optional import require
from .plan_engines import auto_plan, plan_engine, runnable_plan
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
    replay_rows: int = 0,
    compiled: bool | str = False,
) -> Engine:
    """The engine that runs ``model``; enter it before use.

    Args:
        model: An opened model.
        backend: ``onnxruntime``, ``onnxruntime-cuda``, ``onnxruntime-tensorrt`` or
            ``tensorrt`` (a bundle), ``torch`` (a checkpoint), or ``auto`` for the one
            that fits: a trusted plan that runs here, else ``onnxruntime``.
        precision: ``float32``, ``float16`` or ``bfloat16``; None takes the bundle's
            engine's, or float32.
        threads: CPU threads; 0 leaves the recipe's or the runtime's choice.
        device: ``cpu``, ``cuda`` or ``cuda:1``, for the torch backend and those of
            ONNX Runtime that are for GPUs, which take the first GPU by default.
        trust: The user answers for a plan that was neither built here nor signed.
        replay_rows: Table rows in a captured graph, where the backend replays them;
            see :class:`.backends.replay.ReplayEngine`.
        compiled: Have PyTorch compile the step, for the torch backend; True, or a mode
            of :data:`.backends.torch_body.COMPILE_MODES`.

    Raises:
        EngineError: The model cannot run on that backend; of a plan, the error says
            what it was built for, what was found, and what puts it right.
        BundleError: A file is not the one that the manifest describes.
        TrustError: Nobody answers for its plan.
    """
    if not 0 <= threads <= 1024:
        raise InputError("threads must be from 0 to 1024", why=f"it is {threads}")
    if backend == "auto":
        entry = auto_plan(model, precision, trust) if device == "cpu" else None
        if entry is not None:
            return plan_engine(model, entry, replay_rows)
        backend = "torch" if model.bundle is None else "onnxruntime"
    if backend == "torch":
        form = _torch_form(precision or "float32")
        options = TorchOptions(form, threads, device, replay_rows, compiled)
        return _torch_engine(model, options)
    _refuse_torch_options(backend, device, compiled)
    if backend in ORT_GPU_BACKENDS:
        return _ort_device_engine(model, backend, precision, device, replay_rows)
    if backend == "onnxruntime":
        return _onnxruntime_engine(model, precision, threads)
    if backend == "tensorrt":
        entry = runnable_plan(model, precision, trust)
        return plan_engine(model, entry, replay_rows)
    raise InputError(
        f"there is no backend {backend!r}", fix=f"use one of {', '.join(BACKENDS)}"
    )


def _refuse_torch_options(backend: str, device: str, compiled: bool | str) -> None:
    if compiled:
        raise InputError(
            "--compile is a setting of the torch backend",
            fix="leave it out, or give a CHECKPOINT",
        )
    if device != "cpu" and backend not in ORT_GPU_BACKENDS:
        raise InputError(
            f"the backend {backend} takes no --device {device}",
            why="it is a setting of the torch backend and of "
            + " and ".join(ORT_GPU_BACKENDS),
            fix="leave it out: a plan runs on the first GPU that CUDA_VISIBLE_DEVICES "
            "lets it see"
            if backend == "tensorrt"
            else "leave it out, or choose one of them with --backend",
        )


@dataclass(frozen=True)
class TorchOptions:
    """How the torch backend runs; see :func:`open_engine`."""

    form: BodyForm
    threads: int
    device: str
    replay_rows: int
    compiled: bool | str


def _torch_form(precision: str) -> BodyForm:
    if precision not in get_args(Precision):
        raise InputError(f"the torch backend has no precision {precision!r}")
    return BodyForm(cast(Precision, precision))


def _torch_engine(model: Model, options: TorchOptions) -> Engine:
    if model.bundle is not None:
        raise EngineError(
            "a BUNDLE has no PyTorch weights for the torch backend",
            fix="give the CHECKPOINT, or use --backend onnxruntime",
        )
    torch = require("torch", extra="export")
    require("diffusers", extra="export")
    from .backends.torch_body import torch_device
    from .reference.checkpoint import load_checkpoint

    kind = torch_device(options.device).type  # before the weights are read
    if options.threads:
        torch.set_num_threads(options.threads)
    network = load_checkpoint(model.path).network
    shapes = step_shapes(model.spec)
    given = (network, shapes, options.form, options.device)
    if kind != "cuda":
        from .backends.torch import TorchEngine

        return TorchEngine(*given, compile_with=options.compiled)
    from .backends.replay import ReplayEngine
    from .backends.torch_rig import TorchRig

    rig = TorchRig(*given, compile_with=options.compiled)
    return ReplayEngine(rig, options.replay_rows)


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


def _ort_device_engine(
    model: Model, backend: str, precision: str | None, device: str, replay_rows: int
) -> Engine:
    """ONNX Runtime's own graphs hold one table row; -1 switches them off."""
    bundle = _bundle_for(model, backend)
    from .backends.ort_device import OnnxDeviceEngine
    from .backends.ort_providers import target_of

    target = target_of(backend, device)
    graph = bundle_graph(bundle, precision, model.stage)
    return OnnxDeviceEngine(
        bundle.read(graph.file),
        step_shapes(model.spec),
        graph.precision,
        target,
        graphs=replay_rows >= 0,
    )


def _bundle_for(model: Model, backend: str) -> Bundle:
    if model.bundle is None:
        raise EngineError(
            f"a CHECKPOINT has no engine for the {backend} backend",
            fix=f"id3pm-deploy build-engine {model.path} --target cpu --out BUNDLE",
        )
    return model.bundle


def _onnxruntime_engine(model: Model, precision: str | None, threads: int) -> Engine:
    bundle = _bundle_for(model, "onnxruntime")
    from .backends.onnxruntime import OnnxRuntimeEngine

    graph = bundle_graph(bundle, precision, model.stage)
    engines = bundle.manifest.engines
    if not threads:
        wanted = next((e.threads for e in engines if e.graph == graph.file), 0)
        threads = min(wanted, os.cpu_count() or 1)  # it may be of a larger machine
    data = bundle.read(graph.file)
    return OnnxRuntimeEngine(data, step_shapes(model.spec), graph.precision, threads)
