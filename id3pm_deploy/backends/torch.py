"""The step module run by PyTorch itself: the reference as an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..body_form import FLOAT32, BodyForm
from ..errors import EngineError
from ..guidance import GuidanceTable
from ..reference.step import StepModule
from ..reference.unet import IdentityUNet
from .base import (
    Float32,
    RowEngine,
    StepShapes,
    check_array,
    empty_state,
)
from .torch_body import (
    compile_mode,
    compiled,
    exact_float32,
    many_shapes,
    step_on,
    torch_device,
    torch_errors,
    torch_info,
)


class TorchEngine(RowEngine):
    """Engine over the PyTorch step module, on a CPU or a CUDA device.

    Args:
        network: The reference network, in float32.
        shapes: Sizes of the model.
        form: The precision of the body and what stays in float32 in it; a float16
            body is the oracle of FP16 engines.
        device: A torch device.
        compile_with: A mode of torch.compile, see
            :data:`.torch_body.COMPILE_MODES`; empty runs the module as it is.

    Raises:
        EngineError: The device is not there.
    """

    def __init__(
        self,
        network: IdentityUNet,
        shapes: StepShapes,
        form: BodyForm = FLOAT32,
        device: str = "cpu",
        compile_with: bool | str = "",
    ) -> None:
        self._mode = compile_mode(compile_with)
        self._device = torch_device(device)
        module = step_on(network, form, self._device)
        self._module: StepModule | None = module
        self._step: Any = compiled(module, self._mode)
        info = torch_info(form, self._device, self._mode)
        super().__init__(info, shapes)
        self._state: Any = None
        self._x0: Any = None
        self._low_res: Any = None
        self._constant: tuple[Any, ...] = ()

    @property
    def network(self) -> IdentityUNet:
        """The network as it runs: in the engine's precision, on its device."""
        if self._module is None:
            raise EngineError("the engine was closed")
        return self._module.network

    def close(self) -> None:
        """Drop the module and its tensors."""
        self._module = self._step = None
        self._state = self._x0 = self._low_res = None
        self._constant = ()

    def _tensor(self, array: Any) -> Any:
        return torch.from_numpy(np.array(array)).to(self._device)

    def _begin(
        self, x_t: Float32, guidance: GuidanceTable, low_res: Float32 | None
    ) -> None:
        if self._module is None:
            raise EngineError("the engine was closed")
        state = empty_state(guidance.samples, self.shapes)
        state[0] = x_t
        self._state = self._tensor(state)
        self._x0 = torch.zeros_like(self._state[0])
        self._zero_noise = torch.zeros_like(self._state[0])
        self._low_res = None if low_res is None else self._tensor(low_res)
        self._guide(guidance)

    @torch.inference_mode()
    def _replace(
        self, samples: Sequence[int], x_t: Float32, low_res: Float32 | None
    ) -> None:
        places = list(samples)
        # In a copy: the state may be a tensor that the module still holds.
        self._state = self._state.clone()
        self._state[:, places] = 0.0
        self._state[0, places] = self._tensor(x_t)
        if low_res is not None:
            self._low_res[places] = self._tensor(low_res)

    def _guide(self, guidance: GuidanceTable) -> None:
        self._constant = tuple(
            self._tensor(part)
            for part in (guidance.identity, guidance.row, guidance.mix)
        )

    @torch.inference_mode()
    def _run(self, step: Float32, noise: Float32 | None) -> Float32:
        drawn = self._zero_noise if noise is None else self._tensor(noise)
        inputs = (self._state, drawn, *self._constant, self._tensor(step))
        if self._low_res is not None:
            inputs += (self._low_res,)
        with (
            torch_errors("a table row", self._mode),
            many_shapes(self._mode),
            exact_float32(),
        ):
            out = self._step(*inputs)
        self._state, self._x0 = out.state, out.x0
        finite: Float32 = out.finite.cpu().numpy()
        return finite

    def state(self) -> Float32:
        """A copy of the state, [K, B, C, H, W]."""
        return self._copied(self._state)

    def load_state(self, state: Float32) -> None:
        """Put a state [K, B, C, H, W] of a begun trajectory in place."""
        check_array(state, self.state().shape, "state")
        self._state = self._tensor(state)

    def preview(self) -> Float32:
        """A copy of the last row's predicted x0, [B, C, H, W]."""
        return self._copied(self._x0)

    @staticmethod
    def _copied(tensor: Any) -> Float32:
        if tensor is None:
            raise EngineError("no trajectory was begun")
        copy: Float32 = tensor.cpu().numpy().copy()
        return copy
