"""The two sides of a comparison: what runs, at which precision, and whether both are
the same function."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import Engine, EngineInfo
from ..bundle import BASE
from ..errors import InputError, ParityError
from ..models import Model, bundle_graph, open_engine, open_model
from ..optional import require
from ..tolerances import CEILINGS, Tolerances

_NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}


@dataclass(frozen=True)
class SideRequest:
    """What to open: the arguments of :func:`~id3pm_deploy.models.open_engine`.

    ``precision`` None takes a bundle's own engine's; for a second side, that of the
    first. ``stage`` says which of a bundle's models it is; a super-resolution model
    that stands alone is both.
    """

    path: Path
    backend: str = "auto"
    precision: str | None = None
    threads: int = 0
    device: str = "cpu"
    trust: bool = False
    stage: str = BASE

    def open_model(self) -> Model:
        """The model that is asked for.

        Raises:
            InputError: There is no such stage.
            CheckpointError, BundleError: It is damaged.
        """
        model = open_model(self.path)
        alone = model.spec.model.low_res_size is not None
        if self.stage == BASE or alone:
            return model
        if model.second_stage is None:
            raise InputError(
                f"{self.path} holds no super-resolution stage",
                fix="leave out --stage, or give a model that has one",
            )
        return model.second_stage


@dataclass(frozen=True)
class Side:
    """One side: its model and the engine that runs it, not yet entered.

    ``threads`` says how many threads of a CPU it takes; empty on other devices.
    """

    model: Model
    engine: Engine
    threads: str

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself."""
        return self.engine.info

    @property
    def precision(self) -> str:
        """Of the UNet's weights, whatever they are computed in."""
        return self.info.precision.split()[0]

    @property
    def half(self) -> bool:
        """Whether that is less than float32."""
        return self.precision != "float32"

    @property
    def name(self) -> str:
        """Backend and precision, for people."""
        backend = _NAMES.get(self.info.backend, self.info.backend)
        return f"{backend} ({self.info.precision})"

    @property
    def stage(self) -> str:
        """Which model of a chain it is, for people; empty where there is no chain."""
        model = self.model
        if model.spec.model.low_res_size is not None:
            return "super-resolution stage"
        return "base stage" if model.second_stage is not None else ""

    @property
    def title(self) -> str:
        """What the model calls itself, and its stage."""
        return ", ".join(filter(None, (self.model.title, self.stage)))

    @property
    def facts(self) -> str:
        """Backend, version, precision, device and threads, in a line."""
        info = self.info
        ran = (f"{info.backend} {info.version}", info.precision, info.device)
        return ", ".join(part for part in (*ran, self.threads) if part)

    @property
    def tolerances(self) -> Tolerances:
        """What its graph was promised to keep, under the project's ceiling."""
        most = CEILINGS[self.precision]
        if self.model.bundle is None:
            return most
        graph = bundle_graph(self.model.bundle, self.precision, self.model.stage)
        own = Tolerances(graph.tolerance_step, graph.tolerance_trajectory)
        return most.tightest(own)


def open_side(request: SideRequest) -> Side:
    """Open a CHECKPOINT or a BUNDLE with an engine for it.

    Raises:
        InputError, CheckpointError, BundleError, EngineError: See ``open_model`` and
            ``open_engine``.
    """
    model = request.open_model()
    engine = open_engine(
        model,
        request.backend,
        precision=request.precision,
        threads=request.threads,
        device=request.device,
        trust=request.trust,
    )
    return Side(model, engine, _threads(model, engine.info, request.threads))


def open_reference(request: SideRequest, engine: Side) -> Side:
    """Open the side that ``engine`` is held against.

    Where no precision is asked for, it is the engine's, if that is not PyTorch itself:
    PyTorch in half precision is the oracle of such engines, and is itself held against
    float32.

    Raises:
        ParityError: It is not the same function.
        Id3pmError: See :func:`open_side`.
    """
    model = request.open_model()
    check_same_function(engine.model, model)
    precision = request.precision
    if precision is None and engine.info.backend != "torch":
        wanted = engine.precision
        there = model.bundle
        if there is None or there.graph("step", wanted, model.stage) is not None:
            precision = wanted
    return open_side(dataclasses.replace(request, precision=precision))


def check_same_function(engine: Model, reference: Model) -> None:
    """Refuse to compare two models that do not compute the same function.

    Raises:
        ParityError: Facts of the model or the weights differ; they are named.
    """
    differ = engine.spec.differences(reference.spec)
    if engine.weights_sha256 != reference.weights_sha256:
        differ.append("the weights' SHA-256")
    if differ:
        raise ParityError(
            f"{engine.path} and {reference.path} are not the same model",
            why=f"they differ in {', '.join(differ)}",
            fix="compare a BUNDLE with the CHECKPOINT that it was exported from, or "
            "with another BUNDLE of that",
        )


def pair_tolerances(engine: Side, reference: Side | None) -> Tolerances:
    """What two sides are held to: the tighter one's promise in the coarser precision.

    A float16 side differs from a float32 one by its own rounding, so that the float32
    side's promise cannot be asked of the pair.
    """
    if reference is None or reference.half == engine.half:
        sides = [side for side in (engine, reference) if side is not None]
    else:
        sides = [side for side in (engine, reference) if side.half]
    found = sides[0].tolerances
    for side in sides[1:]:
        found = found.tightest(side.tolerances)
    return found


def _threads(model: Model, info: EngineInfo, asked: int) -> str:
    if info.device.lower() != "cpu":
        return ""
    count = asked
    if info.backend == "torch":
        count = int(require("torch", extra="export").get_num_threads())
    elif not asked and model.bundle is not None:
        engines = model.bundle.manifest.engines
        precision = info.precision.split()[0]
        graph = bundle_graph(model.bundle, precision, model.stage).file
        count = next((e.threads for e in engines if e.graph == graph), 0)
    if not count:
        return "the runtime's choice of threads"
    return f"{count} threads" if count != 1 else "1 thread"
