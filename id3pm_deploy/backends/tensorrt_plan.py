"""A plan, loaded and checked: its tensors, its optimisation profiles.

``trt`` is the module, ``tensorrt`` or ``tensorrt_rtx``; what only some releases have is
looked for by name. A GPU's context has to be current.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..builders.tensorrt_events import make_logger, says_memory
from ..errors import DeviceMemoryError, EngineError
from ..solvers import STATE_SLOTS, STEP_WIDTHS
from .base import STEP_OUTPUTS, StepShapes

if TYPE_CHECKING:
    import tensorrt

_KEPT_MESSAGES = 20
_AGAIN = "build it again with `id3pm-deploy build-engine`"

Shapes = dict[str, tuple[int, ...]]
"""Shapes by a tensor's name; -1 is a size that is free in a plan."""


@dataclass
class Heard:
    """What TensorRT said while a plan was loaded or ran, each text once.

    Its messages come from any thread, those of work on the GPU long after the call.
    """

    errors: list[str] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Keep a message; warnings are of no use to who runs a plan."""
        text = " ".join(text.split())
        kept = self.errors
        if severity != "WARNING" and text not in kept and len(kept) < _KEPT_MESSAGES:
            kept.append(text)

    def error(self, what: str, why: str = "", fix: str = "") -> EngineError:
        """An error whose cause is what was said, which is then forgotten."""
        said, self.errors[:] = "; ".join(self.errors), []
        why = "; ".join(filter(None, (why, said)))
        if says_memory(why):
            less = "use a smaller --batch-size, or close other programs that use it"
            return DeviceMemoryError(what, why=why, fix=less)
        return EngineError(what, why=why, fix=fix)

    def check(self, what: str) -> None:
        """Raise :class:`EngineError` if an error was said since the last look."""
        if self.errors:
            raise self.error(what, fix="run `id3pm-deploy doctor`")

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Turn what TensorRT raises, or says, into one error."""
        try:
            yield
        except EngineError as error:
            if self.errors:  # CUDA says that it failed, TensorRT says where
                raise self.error(what, why=error.why, fix=error.fix) from error
            raise
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise self.error(what, why=str(error), fix=_AGAIN) from error


@dataclass(frozen=True)
class PlanProfile:
    """Sizes that a plan was built for: fewest, usual and most samples and UNet rows."""

    index: int
    samples: tuple[int, ...]
    rows: tuple[int, ...]

    def holds(self, samples: int, rows: int) -> bool:
        """Whether it admits these sizes."""
        low, high = (self.samples[0], self.rows[0]), (self.samples[2], self.rows[2])
        return low[0] <= samples <= high[0] and low[1] <= rows <= high[1]

    def __str__(self) -> str:
        b, r = self.samples, self.rows
        return f"B {b[0]}-{b[2]} (best {b[1]}), R {r[0]}-{r[2]} (best {r[1]})"


@dataclass(frozen=True)
class Plan:
    """A plan that was loaded.

    Attributes:
        engine: TensorRT's.
        runtime: What loaded it, and has to outlive it.
        profiles: Its optimisation profiles.
        step_width: Numbers in a table row that it takes.
        streams_weights: Part of its weights stays in the host's memory.
    """

    engine: Any
    runtime: Any
    profiles: tuple[PlanProfile, ...]
    step_width: int
    streams_weights: bool


def tensor_shapes(
    shapes: StepShapes, samples: int, rows: int, step_width: int
) -> Shapes:
    """All tensors of a step graph for B samples and R UNet rows."""
    picture = (samples, *shapes.picture)
    found: Shapes = {
        "state": (STATE_SLOTS, *picture),
        "noise": picture,
        "identity": (rows, shapes.identity_dim),
        "row": (rows,),
        "mix": (2, samples, rows),
        "step": (samples, step_width),
    }
    if shapes.low_res is not None:
        found["low_res"] = (samples, *shapes.low_res)
    found = {name: found[name] for name in shapes.inputs}
    outputs = ((STATE_SLOTS, *picture), picture, (rows,))
    return found | dict(zip(STEP_OUTPUTS, outputs, strict=True))


def load_plan(trt: Any, data: bytes, shapes: StepShapes, heard: Heard) -> Plan:
    """Load a plan and hold it against the model.

    Host code that a plan may carry (of version compatible ones) stays forbidden.

    Raises:
        EngineError: TensorRT does not take it, or it is no step graph of the model.
        DeviceMemoryError: The GPU has too little memory for its weights.
    """
    what = f"{trt.__name__} {trt.__version__} cannot load the plan"
    with heard.told(what):
        runtime: tensorrt.Runtime | None = trt.Runtime(make_logger(trt, heard))
        if runtime is None:
            raise heard.error(f"{trt.__name__} makes no runtime")
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise heard.error(what, fix=_AGAIN)
    heard.errors.clear()  # what it got over
    width = _check_tensors(engine, shapes)
    with heard.told("the plan's weights cannot be streamed"):
        streams = _stream_weights(engine)
    return Plan(engine, runtime, _profiles(engine), width, streams)


def _stream_weights(engine: tensorrt.ICudaEngine) -> bool:
    """Leave to the host what the GPU has no room for, in a plan that allows it."""
    streamable = int(engine.streamable_weights_size)
    if not streamable:
        return False
    budget = int(engine.get_weight_streaming_automatic_budget())
    if budget < streamable:
        engine.weight_streaming_budget_v2 = budget
    return budget < streamable


def _check_tensors(engine: tensorrt.ICudaEngine, shapes: StepShapes) -> int:
    """The width of a table row of a plan of that model's step graph.

    Raises:
        EngineError: It is none, or of another model or release.
    """
    found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        mode, kind = engine.get_tensor_mode(name), engine.get_tensor_dtype(name)
        sizes = tuple(int(size) for size in engine.get_tensor_shape(name))
        found[name] = (mode.name, kind.name, sizes)
    if set(STEP_OUTPUTS) - set(found) or "step" not in found:
        listed = ", ".join(sorted(found))
        raise EngineError(
            "the plan is not one of a step graph",
            why=f"its tensors are {listed:.200}",
            fix="build it from a step graph (export --graph step)",
        )
    width = found["step"][2][-1]
    wanted = tensor_shapes(shapes, -1, -1, width)
    for name, noun in (("identity", "identity"), ("low_res", "small pictures")):
        if (name in found) != (name in wanted):
            has, wants = ("", "no ") if name in found else ("no ", "")
            raise EngineError(
                "the plan is not the model's",
                why=f"it has {has}input for {noun}, the model takes {wants}{noun}",
                fix=_AGAIN,
            )
    if width not in STEP_WIDTHS:
        raise EngineError(
            "the plan is of another release",
            why=f"a table row of it has {width} numbers, this release makes "
            f"{' or '.join(map(str, STEP_WIDTHS))}",
            fix="export the checkpoint again and build it from that",
        )
    for name in sorted(found.keys() | wanted.keys()):
        way = "OUTPUT" if name in STEP_OUTPUTS else "INPUT"
        number = "INT32" if name == "row" else "FLOAT"
        right = (way, number, wanted.get(name, ()))
        if found.get(name) != right:
            raise EngineError(
                "the plan is not the model's",
                why=f"{name!r:.80} should be {_named(right)}; it is "
                f"{_named(found[name]) if name in found else 'not there'}",
                fix=_AGAIN,
            )
    return width


def _named(tensor: tuple[str, str, tuple[int, ...]]) -> str:
    way, number, sizes = tensor
    shown = ", ".join("?" if size < 0 else str(size) for size in sizes)
    return f"an {way.lower()} of {number} [{shown}]"


def _profiles(engine: tensorrt.ICudaEngine) -> tuple[PlanProfile, ...]:
    found = []
    for index in range(engine.num_optimization_profiles):
        by_b = engine.get_tensor_profile_shape("state", index)
        by_r = engine.get_tensor_profile_shape("row", index)
        samples = tuple(int(sizes[1]) for sizes in by_b)
        rows = tuple(int(sizes[0]) for sizes in by_r)
        found.append(PlanProfile(index, samples, rows))
    return tuple(found)


def choose_profile(plan: Plan, samples: int, rows: int) -> PlanProfile:
    """The profile for B samples and R UNet rows: one that was tuned for just these
    sizes, or else the smallest that holds them.

    Raises:
        EngineError: There is none.
    """
    fitting = [one for one in plan.profiles if one.holds(samples, rows)]
    if not fitting:
        there = "; ".join(map(str, plan.profiles[:8]))
        raise EngineError(
            f"the plan was not built for {samples} samples and {rows} UNet rows",
            why=f"its profiles: {there}",
            fix="choose a --batch-size and guidance that one of them holds, or build "
            "it with `id3pm-deploy build-engine BUNDLE --target NAME --set "
            f"'dynamic_samples=[1, {samples}, {samples}]'`, and "
            "dynamic_rows_per_sample for more rows a sample",
        )

    def distance(one: PlanProfile) -> tuple[bool, int, int, int]:
        tuned = (one.samples[1], one.rows[1]) == (samples, rows)
        return not tuned, one.rows[2], one.samples[2], one.index

    return min(fitting, key=distance)
