"""Baselines in PyTorch: the step module in a loop, eager or compiled.

They compute what the product's step graph computes, and keep everything on the device:
noise is drawn there, but in the trajectory that is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from ..backends.base import Float32, empty_state, step_shapes
from ..body_form import BodyForm, Precision
from ..compare import Comparison, compare
from ..errors import EngineError, first_line
from ..reference.checkpoint import load_checkpoint
from ..reference.step import step_module
from ..selftest import Arrays
from .case import Case
from .column import Runner

_RECOMPILATIONS = 64
"""Each size of batch is compiled for itself; PyTorch would give up after eight."""

HALF_ON_CPU = "a CPU computes half precision slowly: no fair baseline"


def step_loop(case: Case, device: str, mode: str, precision: str) -> Runner:
    """The loop in one of its modes.

    Args:
        case: What is measured; it has a checkpoint.
        device: A torch device.
        mode: ``eager``, or one of torch.compile's.
        precision: Of the body; empty takes the graph's, or float32 on a CPU.

    Raises:
        EngineError: It is no fair baseline here, or cannot be made.
    """
    on_gpu = device.startswith("cuda")
    precision = precision or (case.graph.precision if on_gpu else "float32")
    if precision != "float32" and not on_gpu:
        raise EngineError(HALF_ON_CPU)
    if mode == "reduce-overhead" and not on_gpu:
        raise EngineError("CUDA graphs need a GPU")
    return StepLoop(case, device, mode, precision)


class StepLoop(Runner):
    """See :func:`step_loop`."""

    def __init__(self, case: Case, device: str, mode: str, precision: str) -> None:
        assert case.checkpoint is not None
        if case.settings.threads:
            torch.set_num_threads(case.settings.threads)
        self._case, self._device, self._mode = case, torch.device(device), mode
        form = BodyForm(cast(Precision, precision))
        try:
            network = load_checkpoint(case.checkpoint).network
            module: Any = step_module(network, form).to(self._device)
            self._module = module.to(memory_format=torch.channels_last)
        except (RuntimeError, AssertionError) as error:
            raise EngineError("PyTorch failed", why=first_line(error)) from error
        self._call: Callable[..., Any] = self._module
        self._inputs: list[tuple[Any, ...]] = []
        if mode != "eager":
            dynamo: Any = torch._dynamo
            dynamo.config.recompile_limit = _RECOMPILATIONS
            dynamo.config.fail_on_recompile_limit_hit = True
            self._call = torch.compile(self._module, mode=mode, dynamic=False)
        self.precision, self.device = precision, self._device.type
        self.label = f"PyTorch {torch.__version__}, {precision}, {device}"

    def close(self) -> None:
        """Drop the module and its tensors."""
        self._module, self._inputs = None, []
        self._call = lambda *_: None

    def _tensor(self, array: Any) -> Any:
        return torch.from_numpy(np.array(array)).to(self._device)

    def _step(self, state: Any, noise: Any, rest: tuple[Any, ...]) -> Any:
        if self._mode != "eager":
            _new_step()
        made = self._call(state, noise, *rest).state
        # A replayed graph writes its outputs to the same place every time.
        return made if self._mode == "eager" else made.clone()

    def golden(self, golden: Arrays) -> Comparison | None:
        """The golden step; a compiled module is judged by its trajectory, at the sizes
        that it is timed at."""
        if self._mode != "eager":
            return None
        names = ("state", "noise", "identity", "row", "mix", "step", "low_res")
        nobody = np.zeros((len(golden["row"]), 0), np.float32)
        given = {"identity": nobody, **golden}
        tensors = [self._tensor(given[name]) for name in names if name in given]
        with torch.no_grad(), no_tf32():
            made = self._step(tensors[0], tensors[1], tuple(tensors[2:]))
        return compare(made.cpu().numpy(), golden["expected.state_next"])

    def begin(self, samples: int) -> None:
        """Put the inputs of all table rows on the device."""
        case = self._case
        self._samples, job, calls = samples, case.job(samples), case.calls(samples)
        self._shape = (samples, *step_shapes(case.model.spec).picture)
        low = () if job.low_res is None else (self._tensor(job.low_res),)
        tables = [
            (self._tensor(t.identity), self._tensor(t.row), self._tensor(t.mix))
            for t in calls.tables
        ]
        steps = [
            self._tensor(np.repeat(values[None], samples, axis=0))
            for values in calls.rows
        ]
        pairs = zip(calls.guidance, steps, strict=True)
        self._inputs = [(*tables[now], step, *low) for now, step in pairs]
        self._zero = torch.zeros(self._shape, device=self._device)
        self._calls, self._timed = calls, case.timed_row(samples)

    def _trajectory(self, x_t: Any, noise: Callable[[int], Any]) -> Any:
        table = self._case.table
        state = torch.zeros(
            (empty_state(0, step_shapes(self._case.model.spec)).shape[0], *self._shape),
            device=self._device,
        )
        state[0] = x_t * float(table.x_scale)
        with torch.no_grad(), no_tf32():
            for m, rest in enumerate(self._inputs):
                j = int(self._calls.solver_row[m])
                drawn = noise(j) if self._calls.stochastic[m] else self._zero
                state = self._step(state, drawn, rest)
        return state[0].cpu()

    def check(self) -> Float32:
        """A trajectory on the product's noise."""
        source, numbers = self._case.job(self._samples).noise, range(self._samples)
        shape = self._shape[1:]
        try:
            made = self._trajectory(
                self._tensor(source.start(numbers, shape)),
                lambda j: self._tensor(source.row(j, numbers, shape)),
            )
        except Exception as error:  # the compiler's exceptions are of many kinds
            raise EngineError("PyTorch failed", why=first_line(error)) from error
        images: Float32 = made.numpy()
        return images

    def prepare_row(self) -> None:
        """Put the timed row's start in place."""
        state = empty_state(self._samples, step_shapes(self._case.model.spec))
        state[0] = self._timed.x_t
        self._state = self._tensor(state)
        noise = self._timed.noise
        self._noise = self._zero if noise is None else self._tensor(noise)

    def run_row(self) -> None:
        """One step, and a wait."""
        with torch.no_grad(), no_tf32():
            rest = self._inputs[self._timed.call]
            self._state = self._step(self._state, self._noise, rest)
        self._wait()

    def run_trajectory(self) -> None:
        """A trajectory on noise that is drawn on the device."""
        self._trajectory(self._random(), lambda j: self._random())

    def _random(self) -> Any:
        return torch.randn(self._shape, device=self._device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _new_step() -> None:
    """What a replayed graph wrote before may be written over."""
    compiler: Any = torch.compiler
    compiler.cudagraph_mark_step_begin()


def no_tf32() -> Any:
    """cuDNN's convolutions take TF32 unless told; what is fastest is found out."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
