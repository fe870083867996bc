"""The step graph under ONNX Runtime on a GPU: its CUDA and TensorRT providers.

All arrays are on the device, bound once for each number of samples and UNet rows; the
state lives in two of them that change roles from row to row. The provider may capture
its work and replay it: one graph for each set of addresses, by ONNX Runtime itself.
With a target of kind ``cpu`` it is the same code on the CPU, for tests.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError, first_line
from ..guidance import GuidanceTable
from ..optional import require
from .base import (
    EngineInfo,
    Float32,
    RowEngine,
    StepShapes,
    check_array,
    empty_state,
)
from .onnxruntime import bind_step, check_graph_inputs, graph_step_width, make_session
from .ort_providers import BACKENDS, Target, check_available, check_in_use, providers

_LOG = logging.getLogger("id3pm_deploy")

_GRAPH_ID = "gpu_graph_id"
_NO_GRAPH = "-1"


class OnnxDeviceEngine(RowEngine):
    """Engine over a provider of ONNX Runtime whose arrays are on a device.

    Args:
        graph: The serialised step graph.
        shapes: Sizes of the model.
        precision: What the graph was exported as.
        target: Where it runs.
        graphs: Have the provider capture and replay its work. Where it cannot, the
            reason is logged and it runs without.

    Raises:
        EngineError: The provider is not there or would not be used, the graph cannot
            be loaded, or it is no step graph.
    """

    def __init__(
        self,
        graph: bytes,
        shapes: StepShapes,
        precision: str,
        target: Target,
        graphs: bool = True,
    ) -> None:
        self._runtime = require("onnxruntime", extra="cuda")
        check_available(self._runtime, target)
        self._graph, self._target, self._precision = graph, target, precision
        self._numbers = itertools.count(1)
        self._session: Any = None
        self._graphs = False
        self._load(graphs)
        names = {provider: name for name, provider in BACKENDS.items()}
        info = EngineInfo(
            names.get(target.provider, "onnxruntime"),
            self._runtime.__version__,
            precision,
            f"{target.kind}:{target.device}",
        )
        super().__init__(info, shapes, graph_step_width(self._session))
        check_graph_inputs(self._session, shapes)
        self._samples: _Samples | None = None
        self._by_rows: dict[int, _Rows] = {}
        self._now: _Rows | None = None
        self._note()

    def _load(self, graphs: bool) -> None:
        """Make the session, without capturing if it refuses that."""
        self._session = None
        try:
            self._session = self._made(graphs)
            self._graphs = graphs
        except EngineError as error:
            if not graphs:
                raise
            self._without_graphs(error)

    def _made(self, graphs: bool) -> Any:
        asked = providers(self._target, self._precision, graphs)
        session = make_session(self._graph, 0, asked)
        check_in_use(session, self._target)
        return session

    def _without_graphs(self, error: EngineError) -> None:
        """Go on with a session that captures nothing, and say why; an error that has
        another cause comes again."""
        self._session = None  # its memory first
        self._session = self._made(graphs=False)
        self._graphs = False
        reason = error.why or error.what
        _LOG.warning("%s runs without CUDA graphs: %s", self._target.provider, reason)
        self._why_not = reason

    _why_not = ""

    def _note(self) -> None:
        self.replay_note = "the provider's graphs" if self._graphs else "no graphs"
        if self._why_not:
            self.replay_note += f"; {self._why_not}"

    def close(self) -> None:
        """Drop the session and its buffers."""
        self._forget()
        self._session = self._bad = None

    def _forget(self) -> None:
        self._samples = self._now = None
        self._by_rows = {}

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        if self._session is None:
            raise EngineError("the engine was closed")
        held = self._samples
        if held is None or held.samples != guidance.samples:
            self._forget()
            held = self._samples = _Samples(self, guidance.samples)
        state = empty_state(guidance.samples, self.shapes)
        state[0] = x_t
        held.states[held.turn].update_inplace(state)
        if low_res is not None:
            held.values["low_res"].update_inplace(np.ascontiguousarray(low_res))
        self._guide(guidance)

    def _guide(self, guidance: GuidanceTable) -> None:
        size = guidance.unet_rows
        if size not in self._by_rows:
            self._by_rows[size] = _Rows(self, self._buffers(), size)
        self._now = self._by_rows[size]
        for name in self._now.values.keys() & {"identity", "row", "mix"}:
            given = np.ascontiguousarray(getattr(guidance, name))
            self._now.values[name].update_inplace(given)

    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        held, places = self._buffers(), list(samples)
        state = self.state()
        state[:, places] = 0.0
        state[0, places] = x_t
        held.states[held.turn].update_inplace(state)
        if low_res is not None:
            small = held.values["low_res"].numpy().copy()
            small[places] = low_res
            held.values["low_res"].update_inplace(small)

    def _buffers(self) -> _Samples:
        if self._samples is None:
            raise EngineError("no trajectory was begun")
        return self._samples

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        held, now = self._buffers(), self._now
        assert now is not None
        held.values["step"].update_inplace(step)
        held.put_noise(noise)
        try:
            self._run_bound(now, held.turn)
        except EngineError as error:
            if not self._graphs:
                raise
            # What the step reads is untouched, so it can be run again.
            self._without_graphs(error)
            self._note()
            for rows in self._by_rows.values():
                rows.bind(self, held)
            self._run_bound(now, held.turn)
        held.turn = 1 - held.turn
        finite: Float32 = now.values["finite"].numpy().copy()
        return finite

    def _run_bound(self, rows: _Rows, turn: int) -> None:
        options = self._runtime.RunOptions()
        options.log_severity_level = 4  # what goes wrong becomes an exception
        number = str(rows.numbers[turn]) if self._graphs else _NO_GRAPH
        options.add_run_config_entry(_GRAPH_ID, number)
        binding = rows.bindings[turn]
        try:
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
        except Exception as error:  # its exceptions share no base class of their own
            raise EngineError(
                "ONNX Runtime failed in a table row",
                why=first_line(error),
                fix="use a smaller batch if memory is short",
            ) from error

    def array(self, shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> Any:
        """A zeroed OrtValue on the device."""
        kind, device = self._target.kind, self._target.device
        try:
            made = self._runtime.OrtValue.ortvalue_from_shape_and_type(
                list(shape), np.dtype(dtype).type, kind, device
            )
            if 0 not in shape:
                made.update_inplace(np.zeros(shape, dtype))
        except Exception as error:  # as above
            raise EngineError(
                f"ONNX Runtime cannot make an array on {kind}:{device}",
                why=first_line(error),
                fix="use a smaller batch if memory is short",
            ) from error
        return made

    def bound(self, arrays: dict[str, Any]) -> Any:
        """A binding of the session to these arrays."""
        return bind_step(self._session, self.shapes.inputs, arrays)

    def next_number(self) -> int:
        """A number for a graph that no other has: a captured one must never meet
        other addresses, which nobody would notice."""
        return next(self._numbers)

    def state(self) -> Float32:
        """A copy of the state, [K, B, C, H, W]."""
        held = self._buffers()
        copy: Float32 = held.states[held.turn].numpy().copy()
        return copy

    def load_state(self, state: Float32) -> None:
        """Put a state [K, B, C, H, W] of a begun trajectory in place."""
        held = self._buffers()
        wanted = empty_state(held.samples, self.shapes).shape
        check_array(state, wanted, "state")
        held.states[held.turn].update_inplace(np.ascontiguousarray(state))

    def preview(self) -> Float32:
        """A copy of the last row's predicted x0, [B, C, H, W]."""
        copy: Float32 = self._buffers().values["x0"].numpy().copy()
        return copy


class _Samples:
    """Arrays for B samples: two states that take turns, noise, table rows, x0, and
    what a super-resolution model enlarges."""

    def __init__(self, engine: OnnxDeviceEngine, samples: int) -> None:
        shapes, self.samples, self.turn = engine.shapes, samples, 0
        picture = (samples, *shapes.picture)
        shape = empty_state(samples, shapes).shape
        self.states = [engine.array(shape), engine.array(shape)]
        self.values: dict[str, Any] = {
            "noise": engine.array(picture),
            "step": engine.array((samples, engine.step_width)),
            "x0": engine.array(picture),
        }
        if shapes.low_res is not None:
            self.values["low_res"] = engine.array((samples, *shapes.low_res))
        self._no_noise = np.zeros(picture, np.float32)
        self._noisy = False

    def put_noise(self, noise: Float32 | None) -> None:
        """Upload noise; none is zeros, which are uploaded once."""
        if noise is not None or self._noisy:
            given = self._no_noise if noise is None else np.ascontiguousarray(noise)
            self.values["noise"].update_inplace(given)
        self._noisy = noise is not None


class _Rows:
    """Arrays for R UNet rows of B samples, and the two bindings that swap the state."""

    def __init__(self, engine: OnnxDeviceEngine, of: _Samples, unet_rows: int) -> None:
        self.values: dict[str, Any] = {
            "row": engine.array((unet_rows,), np.int32),
            "mix": engine.array((2, of.samples, unet_rows)),
            "finite": engine.array((unet_rows,)),
        }
        if engine.shapes.identity_dim:
            vectors = (unet_rows, engine.shapes.identity_dim)
            self.values["identity"] = engine.array(vectors)
        self.bindings: list[Any] = []
        self.numbers: list[int] = []
        self.bind(engine, of)

    def bind(self, engine: OnnxDeviceEngine, of: _Samples) -> None:
        """Bind them to the engine's session, anew where it is a new one."""
        arrays = {**of.values, **self.values}
        self.numbers = [engine.next_number() for _ in (0, 1)]
        self.bindings = [
            engine.bound(
                {**arrays, "state": of.states[i], "state_next": of.states[1 - i]}
            )
            for i in (0, 1)
        ]
