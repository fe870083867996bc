"""The step graph under ONNX Runtime on a CPU.

All arrays are bound once for each batch size; the state lives in two buffers that
change roles from row to row, so nothing is allocated or copied between steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import EngineError, InputError, first_line
from ..guidance import GuidanceTable
from ..optional import require
from ..solvers import STEP_WIDTH
from .base import (
    STEP_INPUTS,
    STEP_OUTPUTS,
    Engine,
    EngineInfo,
    Float32,
    StepShapes,
    check_array,
    empty_state,
)

_ERRORS_ONLY = 3


def make_session(graph: bytes, threads: int) -> Any:
    """An InferenceSession on the CPU provider.

    Args:
        graph: A serialised ONNX model.
        threads: Intra-op threads; 0 leaves ONNX Runtime's choice.

    Raises:
        InputError: ``threads`` is negative.
        EngineError: ONNX Runtime refuses the graph.
    """
    if not 0 <= threads <= 1024:
        raise InputError("threads must be from 0 to 1024", why=f"it is {threads}")
    runtime = require("onnxruntime", extra="cpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    try:
        return runtime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base class of their own
        raise EngineError(
            "ONNX Runtime cannot load the graph",
            why=first_line(error),
            fix="update onnxruntime, or export the bundle again",
        ) from error


class _Buffers:
    """Arrays for one (B, R) and the two bindings that swap the state."""

    def __init__(
        self, session: Any, shapes: StepShapes, samples: int, unet_rows: int
    ) -> None:
        picture = (samples, *shapes.picture)
        self.states = [empty_state(samples, shapes), empty_state(samples, shapes)]
        self.arrays: dict[str, Any] = {
            "noise": np.zeros(picture, np.float32),
            "identity": np.zeros((unet_rows, shapes.identity_dim), np.float32),
            "row": np.zeros(unet_rows, np.int32),
            "mix": np.zeros((2, samples, unet_rows), np.float32),
            "step": np.zeros((samples, STEP_WIDTH), np.float32),
            "x0": np.zeros(picture, np.float32),
            "finite": np.zeros(unet_rows, np.float32),
        }
        self.values = {k: _value_over(v) for k, v in self.arrays.items()}
        state_values = [_value_over(state) for state in self.states]
        self.bindings = [
            self._bind(session, state_values[i], state_values[1 - i]) for i in (0, 1)
        ]

    def _bind(self, session: Any, state: Any, state_next: Any) -> Any:
        binding = session.io_binding()
        inputs = {**self.values, "state": state}
        outputs = {**self.values, "state_next": state_next}
        known = {item.name for item in session.get_inputs()}
        for name in STEP_INPUTS:
            if name in known:
                binding.bind_ortvalue_input(name, inputs[name])
        for name in STEP_OUTPUTS:
            binding.bind_ortvalue_output(name, outputs[name])
        return binding


def _value_over(array: Any) -> Any:
    """An OrtValue over the memory of ``array`` (no copy on a CPU)."""
    runtime = require("onnxruntime", extra="cpu")
    return runtime.OrtValue.ortvalue_from_numpy(array)


class OnnxRuntimeEngine(Engine):
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
        outputs = [item.name for item in self._session.get_outputs()]
        if outputs != list(STEP_OUTPUTS):
            raise EngineError(
                "the graph is not a step graph", why=f"its outputs are {outputs}"
            )
        label = "float16 weights" if precision == "float16" else precision
        version = require("onnxruntime", extra="cpu").__version__
        super().__init__(EngineInfo("onnxruntime", version, label, "CPU"), shapes)
        self._size = (0, 0)
        self._now: _Buffers | None = None
        self._turn = 0

    def close(self) -> None:
        """Drop the session and its buffers."""
        self._now = None
        self._session = None

    def _begin(self, x_t: Float32, guidance: GuidanceTable) -> None:
        size = (guidance.samples, guidance.unet_rows)
        if self._now is None or size != self._size:
            self._now = _Buffers(self._session, self.shapes, *size)
            self._size = size
        self._turn = 0
        self._now.states[0][...] = 0.0
        self._now.states[0][0] = x_t
        for name in ("identity", "row", "mix"):
            self._now.arrays[name][...] = getattr(guidance, name)
        self._now.arrays["noise"][...] = 0.0

    def _buffers(self) -> _Buffers:
        if self._now is None:
            raise EngineError("no trajectory was begun")
        return self._now

    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        buffers = self._buffers()
        buffers.arrays["step"][...] = step
        if noise is not None:
            buffers.arrays["noise"][...] = noise
        try:
            self._session.run_with_iobinding(buffers.bindings[self._turn])
        except Exception as error:  # its exceptions share no base class of their own
            raise EngineError(
                "ONNX Runtime failed in a table row",
                why=first_line(error),
                fix="use a smaller batch if memory is short",
            ) from error
        self._turn = 1 - self._turn
        finite: Float32 = buffers.arrays["finite"]
        return finite

    def state(self) -> Float32:
        """A copy of the state, [K, B, C, H, W]."""
        copy: Float32 = self._buffers().states[self._turn].copy()
        return copy

    def load_state(self, state: Float32) -> None:
        """Put a state [K, B, C, H, W] of a begun trajectory in place."""
        held = self._buffers().states[self._turn]
        check_array(state, held.shape, "state")
        held[...] = state

    def preview(self) -> Float32:
        """A copy of the last row's predicted x0, [B, C, H, W]."""
        copy: Float32 = self._buffers().arrays["x0"].copy()
        return copy
