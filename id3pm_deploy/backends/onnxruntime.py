"""The step graph under ONNX Runtime on a CPU.

All arrays are bound once for each number of samples and UNet rows; the state lives in
two buffers that change roles from row to row and that all numbers of UNet rows share,
so nothing is allocated or copied between steps, not even where guidance changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError, InputError, first_line
from ..guidance import GuidanceTable
from ..optional import require
from ..solvers import STEP_WIDTHS
from .base import (
    STEP_OUTPUTS,
    EngineInfo,
    Float32,
    RowEngine,
    StepShapes,
    check_array,
    empty_state,
)
from .graph_check import check_graph, check_graph_file
from .memory_limit import limit_memory

# What goes wrong becomes an exception; the log would only repeat it.
_FATAL_ONLY = 4


Provider = tuple[str, dict[str, str]]
"""An execution provider's name and its options."""

CPU_PROVIDER: Provider = ("CPUExecutionProvider", {})


def make_session(
    graph: bytes | Path, threads: int, providers: Sequence[Provider] = (CPU_PROVIDER,)
) -> Any:
    """An InferenceSession.

    Args:
        graph: A serialised ONNX model, or the path of a file that nobody else can
            change; it saves a copy in memory.
        threads: Intra-op threads; 0 leaves ONNX Runtime's choice.
        providers: What runs it, the first choice first.

    Raises:
        InputError: ``threads`` is negative.
        EngineError: The graph holds what it should not, or ONNX Runtime refuses it.
    """
    if not 0 <= threads <= 1024:
        raise InputError("threads must be from 0 to 1024", why=f"it is {threads}")
    if isinstance(graph, Path):
        check_graph_file(graph)
    else:
        check_graph(graph)
    runtime = require("onnxruntime", extra="cpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    limit_memory(runtime, options)
    try:
        source = str(graph) if isinstance(graph, Path) else graph
        # Its own fall-back would print, and run on the CPU what was meant for a GPU.
        return runtime.InferenceSession(
            source, options, providers=list(providers), enable_fallback=0
        )
    except Exception as error:  # its exceptions share no base class of their own
        raise EngineError(
            "ONNX Runtime cannot load the graph",
            why=first_line(error),
            fix="update onnxruntime, or export the bundle again",
        ) from error


class _SampleBuffers:
    """Arrays for B samples, whatever guides them: two states that take turns, noise,
    table rows, x0 and what a super-resolution model enlarges."""

    def __init__(self, shapes: StepShapes, samples: int, step_width: int) -> None:
        picture = (samples, *shapes.picture)
        self.states = [empty_state(samples, shapes), empty_state(samples, shapes)]
        self.state_values = [_value_over(state) for state in self.states]
        self.arrays: dict[str, Any] = {
            "noise": np.zeros(picture, np.float32),
            "step": np.zeros((samples, step_width), np.float32),
            "x0": np.zeros(picture, np.float32),
        }
        if shapes.low_res is not None:
            small = (samples, *shapes.low_res)
            self.arrays["low_res"] = np.zeros(small, np.float32)
        self.values = {k: _value_over(v) for k, v in self.arrays.items()}
        self.turn = 0


class _RowBuffers:
    """Arrays for R UNet rows of B samples, and the two bindings that swap the state."""

    def __init__(
        self, session: Any, shapes: StepShapes, of: _SampleBuffers, unet_rows: int
    ) -> None:
        samples = len(of.arrays["step"])
        self.names = shapes.inputs
        self.arrays: dict[str, Any] = {
            "row": np.zeros(unet_rows, np.int32),
            "mix": np.zeros((2, samples, unet_rows), np.float32),
            "finite": np.zeros(unet_rows, np.float32),
        }
        if shapes.identity_dim:
            vectors = (unet_rows, shapes.identity_dim)
            self.arrays["identity"] = np.zeros(vectors, np.float32)
        own = {k: _value_over(v) for k, v in self.arrays.items()}
        self.values = {**of.values, **own}
        self.bindings = [
            self._bind(session, of.state_values[i], of.state_values[1 - i])
            for i in (0, 1)
        ]

    def _bind(self, session: Any, state: Any, state_next: Any) -> Any:
        arrays = {**self.values, "state": state, "state_next": state_next}
        return bind_step(session, self.names, arrays)


def bind_step(session: Any, inputs: Sequence[str], arrays: Mapping[str, Any]) -> Any:
    """A binding of a step graph's session to OrtValues.

    Args:
        session: Of the graph, which may lack an input that it does not use.
        inputs: Names of the model's inputs.
        arrays: Inputs and outputs by their names.
    """
    binding = session.io_binding()
    known = {item.name for item in session.get_inputs()}
    for name in inputs:
        if name in known:
            binding.bind_ortvalue_input(name, arrays[name])
    for name in STEP_OUTPUTS:
        binding.bind_ortvalue_output(name, arrays[name])
    return binding


def _value_over(array: Any) -> Any:
    """An OrtValue over the memory of ``array`` (no copy on a CPU)."""
    runtime = require("onnxruntime", extra="cpu")
    return runtime.OrtValue.ortvalue_from_numpy(array)


def graph_step_width(session: Any) -> int:
    """Numbers in a table row of a step graph.

    Raises:
        EngineError: The graph is no step graph, or one that this release cannot feed.
    """
    outputs = [item.name for item in session.get_outputs()]
    if outputs != list(STEP_OUTPUTS):
        raise EngineError(
            "the graph is not a step graph", why=f"its outputs are {outputs}"
        )
    widths = [x.shape[-1] for x in session.get_inputs() if x.name == "step" and x.shape]
    if widths not in [[width] for width in STEP_WIDTHS]:
        raise EngineError(
            "the graph is of another release",
            why=f"a table row of it has {widths} numbers, this release makes "
            f"{' or '.join(map(str, STEP_WIDTHS))}",
            fix="export the checkpoint again",
        )
    return int(widths[0])


def check_graph_inputs(session: Any, shapes: StepShapes) -> None:
    """Raise :class:`EngineError` for a graph whose inputs are another model's."""
    known = {item.name for item in session.get_inputs()}
    for name, noun in (("identity", "identity"), ("low_res", "small pictures")):
        if (name in known) != (name in shapes.inputs):
            has, wants = ("", "no ") if name in known else ("no ", "")
            raise EngineError(
                "the graph is not the model's",
                why=f"it has {has}input for {noun}, the model takes {wants}{noun}",
                fix="export the checkpoint again",
            )


class OnnxRuntimeEngine(RowEngine):
    """Engine over ONNX Runtime's CPU provider.

    Args:
        graph: The serialised step graph.
        shapes: Sizes of the model.
        precision: What the graph was exported as.
        threads: Intra-op threads; 0 leaves ONNX Runtime's choice.

    Raises:
        EngineError: The graph cannot be loaded, or is no step graph.
    """

    def __init__(
        self, graph: bytes, shapes: StepShapes, precision: str, threads: int = 0
    ) -> None:
        self._session = make_session(graph, threads)
        label = precision if precision == "float32" else f"{precision} weights"
        version = require("onnxruntime", extra="cpu").__version__
        info = EngineInfo("onnxruntime", version, label, "CPU")
        super().__init__(info, shapes, graph_step_width(self._session))
        check_graph_inputs(self._session, shapes)
        self._samples: _SampleBuffers | None = None
        self._by_rows: dict[int, _RowBuffers] = {}
        self._now: _RowBuffers | None = None

    def close(self) -> None:
        """Drop the session and its buffers."""
        self._forget()
        self._session = None

    def _forget(self) -> None:
        self._samples = self._now = None
        self._by_rows = {}

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        if self._session is None:
            raise EngineError("the engine was closed")
        held = self._samples
        if held is None or len(held.arrays["step"]) != guidance.samples:
            self._forget()
            held = _SampleBuffers(self.shapes, guidance.samples, self.step_width)
            self._samples = held
        held.turn = 0
        held.states[0][...] = 0.0
        held.states[0][0] = x_t
        held.arrays["noise"][...] = 0.0
        if low_res is not None:
            held.arrays["low_res"][...] = low_res
        self._guide(guidance)

    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        held, places = self._buffers(), list(samples)
        state = held.states[held.turn]
        state[:, places] = 0.0
        state[0, places] = x_t
        if low_res is not None:
            held.arrays["low_res"][places] = low_res

    def _guide(self, guidance: GuidanceTable) -> None:
        size = guidance.unet_rows
        if size not in self._by_rows:
            self._by_rows[size] = _RowBuffers(
                self._session, self.shapes, self._buffers(), size
            )
        self._now = self._by_rows[size]
        for name in self._now.arrays.keys() & {"identity", "row", "mix"}:
            self._now.arrays[name][...] = getattr(guidance, name)

    def _buffers(self) -> _SampleBuffers:
        if self._samples is None:
            raise EngineError("no trajectory was begun")
        return self._samples

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        held, now = self._buffers(), self._now
        assert now is not None
        held.arrays["step"][...] = step
        if noise is not None:
            held.arrays["noise"][...] = noise
        try:
            self._session.run_with_iobinding(now.bindings[held.turn])
        except Exception as error:  # its exceptions share no base class of their own
            raise EngineError(
                "ONNX Runtime failed in a table row",
                why=first_line(error),
                fix="use a smaller batch if memory is short",
            ) from error
        held.turn = 1 - held.turn
        finite: Float32 = now.arrays["finite"]
        return finite

    def state(self) -> Float32:
        """A copy of the state, [K, B, C, H, W]."""
        held = self._buffers()
        copy: Float32 = held.states[held.turn].copy()
        return copy

    def load_state(self, state: Float32) -> None:
        """Put a state [K, B, C, H, W] of a begun trajectory in place."""
        held = self._buffers()
        place = held.states[held.turn]
        check_array(state, place.shape, "state")
        place[...] = state

    def preview(self) -> Float32:
        """A copy of the last row's predicted x0, [B, C, H, W]."""
        copy: Float32 = self._buffers().arrays["x0"].copy()
        return copy
