"""The step graph as a PyTorch module: one whole solver step, the thing exported.

Solver and guidance arithmetic is elementwise float32, never a matrix product, so that
no TF32 slips in; only the UNet may run in half precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..body_form import BodyForm
from ..solvers import CARRY_COLUMN, RESCALE_COLUMN, STATE_SLOTS, STEP_HEAD
from .precision import body_in
from .unet import IdentityUNet

_LEAST_SPREAD = 1e-12
"""Standard deviation below which a prediction counts as constant."""


class StepOutputs(NamedTuple):
    """What one step gives.

    Attributes:
        state: [K, B, C, H, W] float32.
        x0: [B, C, H, W] float32, the clamped prediction of the clean image.
        finite: [R] float32, 1 where a UNet row was finite and 0 where not.
    """

    state: Tensor
    x0: Tensor
    finite: Tensor


class StepModule(nn.Module):
    """One solver step around an :class:`IdentityUNet`."""

    def __init__(self, network: IdentityUNet) -> None:
        super().__init__()
        self.network = network
        self.channels = network.spec.image_channels
        self.learned_variance = network.spec.learned_variance

    def forward(
        self,
        state: Tensor,
        noise: Tensor,
        identity: Tensor | None,
        row: Tensor,
        mix: Tensor,
        step: Tensor,
        low_res: Tensor | None = None,
    ) -> StepOutputs:
        """Run one table row.

        Args:
            state: [K, B, C, H, W] float32; slot 0 is x_t.
            noise: [B, C, H, W] float32.
            identity: [R, D] float32, normalised; zeros for null. Not used by a model
                without identity.
            row: [R] int32, the sample of each UNet row.
            mix: [2, B, R] float32, weights of UNet rows in each sample: plane 0 for
                the prediction, plane 1 for learned variance and for the prediction
                that guidance rescale refers to.
            step: [B, S] float32, the table row of each sample (``solvers.py``).
            low_res: [B, C, h, w] float32 in [-1, 1], what a super-resolution model
                enlarges; None for all other models.
        """
        index = row.to(torch.int64)
        x = state[0]
        scaled = x * step[:, 1, None, None, None]
        if low_res is not None:
            scaled = with_enlarged(scaled, low_res)
        rows = scaled.index_select(0, index)
        out = self.network(rows, step[:, 0].index_select(0, index), identity)
        out, finite = self._only_finite(out)
        prediction = self._mixed(mix[0], out[:, : self.channels])
        carried = step[:, CARRY_COLUMN, None, None, None] * state[STATE_SLOTS - 1]
        prediction = prediction + carried
        conditional = self._mixed(mix[1], out[:, : self.channels])
        prediction = self._rescaled(prediction, conditional, step)
        clip = step[:, 4, None, None, None]
        x0 = (
            step[:, 2, None, None, None] * x + step[:, 3, None, None, None] * prediction
        )
        x0 = torch.minimum(torch.maximum(x0, -clip), clip)
        noise = noise * self._noise_scale(mix[1], out, step)
        return StepOutputs(self._advance(state, x0, noise, step), x0, finite)

    @staticmethod
    def _only_finite(out: Tensor) -> tuple[Tensor, Tensor]:
        """Zero the UNet rows that hold NaN or infinity, and say which they are.

        x - x is 0 for finite numbers and NaN for the others; a maximum over NaN-free
        flags keeps the check independent of how a runtime reduces NaN.
        """
        bad = ((out - out) != 0).to(torch.float32).amax(dim=(1, 2, 3))
        finite = 1.0 - bad
        kept = torch.where(
            finite[:, None, None, None] > 0.5, out, torch.zeros_like(out)
        )
        return kept, finite

    @staticmethod
    def _mixed(weights: Tensor, rows: Tensor) -> Tensor:
        """Σ_r weights[b, r]·rows[r] as multiply and sum: [B, C, H, W]."""
        return (weights[:, :, None, None, None] * rows[None]).sum(dim=1)

    @staticmethod
    def _rescaled(prediction: Tensor, conditional: Tensor, step: Tensor) -> Tensor:
        """Guidance rescale (Lin et al. 2024, eq. 15 and 16), φ from the table row.

        Where φ is 0 or the prediction is constant the factor is exactly 1, whatever
        the division gives.
        """
        wanted, there = _spread(conditional), _spread(prediction)
        ratio = wanted / torch.clamp(there, min=_LEAST_SPREAD)
        phi = step[:, RESCALE_COLUMN, None, None, None]
        used = torch.logical_and(phi > 0, there > _LEAST_SPREAD)
        factor = torch.where(used, 1 + phi * (ratio - 1), torch.ones_like(phi))
        return prediction * factor

    def _noise_scale(self, weights: Tensor, out: Tensor, step: Tensor) -> Tensor:
        """exp(½·log variance) between min_log and max_log (Nichol & Dhariwal 2021,
        eq. 15); v = 0 without learned variance."""
        low, high = step[:, 5, None, None, None], step[:, 6, None, None, None]
        if self.learned_variance:
            share = (self._mixed(weights, out[:, self.channels :]) + 1) / 2
        else:
            share = torch.full_like(low, 0.5)
        return torch.exp(0.5 * (share * high + (1 - share) * low))

    def _advance(
        self, state: Tensor, x0: Tensor, noise: Tensor, step: Tensor
    ) -> Tensor:
        """A·[state, x0, noise], each entry of A a scalar a sample."""
        slots = STATE_SLOTS
        matrix = step[:, STEP_HEAD:RESCALE_COLUMN].reshape(-1, slots, slots + 2)
        matrix = matrix.permute(1, 2, 0)[..., None, None, None]
        columns = [*[state[k] for k in range(slots)], x0, noise]
        new = []
        for i in range(slots):
            total = matrix[i, 0] * columns[0]
            for j in range(1, slots + 2):
                total = total + matrix[i, j] * columns[j]
            new.append(total)
        return torch.stack(new)


def with_enlarged(x: Tensor, low_res: Tensor) -> Tensor:
    """Noisy pictures with the small ones, enlarged, behind their channels, as
    guided-diffusion's ``SuperResModel`` puts them together: [B, 2C, H, W].

    Args:
        x: [B, C, H, W]; scaled by c_in, as the small pictures never are.
        low_res: [B, C, h, w], enlarged bilinearly with half-pixel centres.
    """
    size = x.shape[-2:]
    large = F.interpolate(low_res, size, mode="bilinear", align_corners=False)
    return torch.cat([x, large], dim=1)


class StepWithoutIdentity(nn.Module):
    """The step of a model without identity: its graph has no such input."""

    def __init__(self, step: StepModule) -> None:
        super().__init__()
        self.step = step

    def forward(
        self,
        state: Tensor,
        noise: Tensor,
        row: Tensor,
        mix: Tensor,
        step: Tensor,
        low_res: Tensor | None = None,
    ) -> StepOutputs:
        """As :meth:`StepModule.forward`."""
        made: StepOutputs = self.step(state, noise, None, row, mix, step, low_res)
        return made


def _spread(x: Tensor) -> Tensor:
    """Standard deviation over channels and pixels of each sample: [B, 1, 1, 1]."""
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return (centred * centred).mean(dim=(1, 2, 3), keepdim=True).sqrt()


def step_module(network: IdentityUNet, form: BodyForm) -> StepModule:
    """The step module of a network in the given form, in evaluation mode."""
    return StepModule(body_in(network, form)).eval()
