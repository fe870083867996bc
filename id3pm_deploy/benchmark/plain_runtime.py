"""ONNX Runtime as its tutorial calls it: a session of its own defaults, session.run."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backends.base import STEP_OUTPUTS, Float32, empty_state, step_shapes
from ..compare import Comparison, compare
from ..guidance import GuidanceTable
from ..optional import require
from ..selftest import Arrays
from .case import Case, TimedRow
from .column import Runner


class PlainRuntimeRunner(Runner):
    """The bundle's own graph in a plain session, and a loop over table rows: nothing is
    bound, and each row's outputs are the next one's inputs.

    Args:
        case: What is measured.
    """

    def __init__(self, case: Case) -> None:
        runtime = require("onnxruntime", extra="cpu")
        assert case.model.bundle is not None
        options = runtime.SessionOptions()
        options.intra_op_num_threads = case.settings.threads
        self._session = runtime.InferenceSession(
            case.model.bundle.read(case.graph.file),
            options,
            providers=["CPUExecutionProvider"],
        )
        self._known = {item.name: item.shape for item in self._session.get_inputs()}
        self._case = case
        self.precision = case.graph.precision
        kind = self.precision
        kind += "" if kind == "float32" else " weights"
        self.label = f"ONNX Runtime {runtime.__version__}, {kind}, CPU"

    def close(self) -> None:
        """Drop the session."""
        self._session = None

    def _run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        width = self._known["step"][-1]
        given = {k: v for k, v in feeds.items() if k in self._known and v is not None}
        given["step"] = np.ascontiguousarray(given["step"][:, :width])
        made = self._session.run(list(STEP_OUTPUTS), given)
        return dict(zip(STEP_OUTPUTS, made, strict=True))

    def golden(self, golden: Arrays) -> Comparison | None:
        """The bundle's golden step."""
        inputs = {k: v for k, v in golden.items() if not k.startswith("expected.")}
        made = self._run(inputs)
        return compare(made["state_next"], golden["expected.state_next"])

    def begin(self, samples: int) -> None:
        """Take this batch size."""
        self._samples = samples
        self._row: TimedRow = self._case.timed_row(samples)
        self._job, self._calls = self._case.job(samples), self._case.calls(samples)
        self._shapes = step_shapes(self._case.model.spec)
        self._zero = np.zeros((samples, *self._shapes.picture), np.float32)

    def _state(self, x_t: Float32) -> Float32:
        state = empty_state(self._samples, self._shapes)
        state[0] = x_t
        return state

    def check(self) -> Float32:
        """The trajectory that is timed, too."""
        table, numbers = self._case.table, range(self._samples)
        shape, noise = self._shapes.picture, self._job.noise
        state = self._state(noise.start(numbers, shape) * np.float32(table.x_scale))
        calls = self._calls
        for m, values in enumerate(calls.rows):
            guidance, j = calls.tables[calls.guidance[m]], int(calls.solver_row[m])
            stochastic = calls.stochastic[m]
            drawn = noise.row(j, numbers, shape) if stochastic else self._zero
            step = np.repeat(values[None], self._samples, axis=0)
            state = self._run(self._feeds(state, drawn, guidance, step))["state_next"]
        images: Float32 = state[0]
        return images

    def _feeds(
        self, state: Float32, noise: Float32, guidance: GuidanceTable, step: Float32
    ) -> dict[str, Any]:
        return {
            "state": state,
            "noise": noise,
            "identity": guidance.identity,
            "row": guidance.row,
            "mix": guidance.mix,
            "step": step,
            "low_res": self._job.low_res,
        }

    def prepare_row(self) -> None:
        """Put the inputs of the timed row together."""
        row = self._row
        noise = self._zero if row.noise is None else row.noise
        state = self._state(row.x_t)
        self._fed = self._feeds(state, noise, row.guidance, row.step)

    def run_row(self) -> None:
        """One run."""
        self._fed["state"] = self._run(self._fed)["state_next"]

    def run_trajectory(self) -> None:
        """The loop."""
        self.check()
