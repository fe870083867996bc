"""Runs of the step graph with nothing of the product around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from id3pm_deploy.backends.base import STEP_INPUTS, STEP_OUTPUTS
from id3pm_deploy.optional import require

Arrays = dict[str, npt.NDArray[Any]]
Float32 = npt.NDArray[np.float32]


class BareRuns:
    """Bound runs of a session and nothing else, the state in two buffers.

    Args:
        session: An InferenceSession of the step graph.
        arrays: The graph's inputs; ``state`` is copied.
    """

    def __init__(self, session: Any, arrays: Arrays) -> None:
        self._session = session
        state = np.array(arrays["state"])
        self.states = [state, np.zeros_like(state)]
        self.arrays = {k: np.array(v) for k, v in arrays.items() if k != "state"}
        outputs = {
            "x0": np.zeros_like(self.arrays["noise"]),
            "finite": np.zeros(len(self.arrays["row"]), np.float32),
        }
        self._known = {item.name for item in session.get_inputs()}
        values = {k: _value(v) for k, v in {**self.arrays, **outputs}.items()}
        ends = [_value(one) for one in self.states]
        self._bindings = [self._bind(values, ends[i], ends[1 - i]) for i in (0, 1)]
        self._turn = 0

    def _bind(self, values: dict[str, Any], state: Any, state_next: Any) -> Any:
        binding = self._session.io_binding()
        for name in STEP_INPUTS:
            if name in self._known:
                value = state if name == "state" else values[name]
                binding.bind_ortvalue_input(name, value)
        for name in STEP_OUTPUTS:
            value = state_next if name == "state_next" else values[name]
            binding.bind_ortvalue_output(name, value)
        return binding

    def run(self) -> None:
        """One run; the next one starts from the state that it made."""
        self._session.run_with_iobinding(self._bindings[self._turn])
        self._turn = 1 - self._turn

    @property
    def state(self) -> Float32:
        """The state after the last run: [K, B, C, H, W] float32."""
        return self.states[self._turn]


def _value(array: Any) -> Any:
    runtime = require("onnxruntime", extra="cpu")
    return runtime.OrtValue.ortvalue_from_numpy(array)
