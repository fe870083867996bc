"""Which plan of a BUNDLE runs here, and its engine."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from .backends.base import Engine, step_shapes
from .bundle import EngineEntry
from .errors import EngineError, Id3pmError

if TYPE_CHECKING:
    from .models import Model

_LOG = logging.getLogger("id3pm_deploy")


def auto_plan(model: Model, precision: str | None, trust: bool) -> EngineEntry | None:
    """The plan that ``auto`` takes; None where none runs here or none is trusted.

    Nothing is looked at where the bundle has no plan.
    """
    if model.bundle is None:
        return None
    plans = [e for e in model.bundle.manifest.plans if e.stage == model.stage]
    if not plans or importlib.util.find_spec("cuda") is None:
        return None
    try:
        return runnable_plan(model, precision, trust)
    except Id3pmError as error:
        _LOG.info("no plan: %s (%s)", error.what, error.why)
        return None


def runnable_plan(model: Model, precision: str | None, trust: bool) -> EngineEntry:
    """The plan that runs here, a trusted one first.

    Raises:
        EngineError: There is none.
        TrustError: Nobody answers for it.
    """
    from .bundle.trust import check_plan_trusted, plan_trust
    from .preflight import runnable_plans

    bundle = model.bundle
    fitting = [] if bundle is None else runnable_plans(bundle, model.stage, precision)
    if bundle is None or not fitting:
        wanted = f" in {precision}" if precision else ""
        raise EngineError(
            f"{model.path} holds no TensorRT plan{wanted}",
            fix=f"id3pm-deploy build-engine {model.path} --target NAME; "
            "`id3pm-deploy doctor` lists the targets",
        )
    trusted = [e for e in fitting if trust or plan_trust(bundle, e).trusted]
    entry = (trusted or fitting)[0]
    check_plan_trusted(bundle, entry, trust=trust)
    bundle.path_of(entry.file)
    return entry


def plan_engine(model: Model, entry: EngineEntry, replay_rows: int = 0) -> Engine:
    """The engine of a plan of ``model``'s bundle, which is trusted and runs here.

    Args:
        model: An opened stage of a BUNDLE.
        entry: Of its manifest, an engine with a plan.
        replay_rows: As for :func:`open_engine`.
    """
    from .backends.replay import ReplayEngine
    from .backends.tensorrt import PlanSource, TensorRtRig
    from .preflight import fitting_gpu
    from .user_folders import cache_folder

    bundle = model.bundle
    assert bundle is not None
    folder = cache_folder()
    name = f"{bundle.manifest.file_entry(entry.file).sha256}.bin"
    source = PlanSource(
        read=lambda: bundle.read(entry.file),
        flavour=entry.flavour,
        version=entry.version,
        precision=entry.precision,
        cache=None if folder is None else folder / "kernels" / name,
    )
    rig = TensorRtRig(source, step_shapes(model.spec), fitting_gpu(entry))
    return ReplayEngine(rig, replay_rows)
