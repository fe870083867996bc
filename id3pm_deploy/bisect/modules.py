"""A network's modules as candidates: their cost, and how large their numbers get."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from ..backends.base import StepShapes
from ..backends.torch import TorchEngine
from ..body_form import FLOAT32, BodyForm
from ..reference.precision import exported_body, island_names
from ..reference.unet import IdentityUNet
from .measure import RecordedRow, run_recorded
from .search import Candidate

Costs = Mapping[str, float]

_NETWORK = ".network."
"""What stands before a module's name where the whole step runs."""


def multiply_accumulates(network: IdentityUNet) -> dict[str, float]:
    """Multiply-accumulates of one UNet row by module name; "" is the whole network.

    Counted by PyTorch on tensors without memory: convolutions and matrix products,
    those of the attention too.
    """
    spec = network.spec
    size, pictures = spec.image_size, 1 if spec.low_res_size is None else 2
    with torch.device("meta"), torch.no_grad():
        empty = IdentityUNet(spec, network.identity_dim).eval()
        empty.frequencies = torch.empty(network.frequencies.shape)
        x = torch.empty(1, pictures * spec.image_channels, size, size)
        with FlopCounterMode(display=False) as counter:
            empty(x, torch.empty(1), torch.empty(1, network.identity_dim))
    root = type(empty).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(found.values()) / 2
        for name, found in counter.get_flop_counts().items()
        if name.startswith(root)
    }


def candidates(
    network: IdentityUNet, form: BodyForm, costs: Costs
) -> tuple[Candidate, ...]:
    """The modules that ``form`` leaves in half precision, as a tree.

    Args:
        network: The reference network.
        form: With its own islands, which are no candidates.
        costs: Of :func:`multiply_accumulates`.
    """
    stays = frozenset(island_names(network, form))
    found: list[Candidate] = []
    for name, module in network.named_children():
        found += _candidates(name, module, stays, costs)
    return tuple(found)


def _candidates(
    name: str, module: nn.Module, stays: frozenset[str], costs: Costs
) -> Iterator[Candidate]:
    """The candidate of a module; those of its parts where it is never called itself."""
    if name in stays or next(module.parameters(), None) is None:
        return
    parts = [
        one
        for child, inner in module.named_children()
        for one in _candidates(f"{name}.{child}", inner, stays, costs)
    ]
    if isinstance(module, nn.ModuleList) or name == "unet":
        yield from parts
        return
    islands = [other for other in stays if other.startswith(f"{name}.")]
    outermost = [one for one in islands if not _inside(one, islands)]
    cost = costs.get(name, 0.0) - sum(costs.get(one, 0.0) for one in outermost)
    if len(parts) == 1 and parts[0].cost == cost:
        yield parts[0]
    else:
        yield Candidate(name, cost, tuple(parts))


def _inside(name: str, others: Sequence[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the largest number that any operator gives, by the module it runs in."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker = tracker
        self.by_module: dict[str, float] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator."""
        out = func(*args, **(kwargs or {}))
        largest = _largest(out)
        # What only passes numbers on, such as a reshape, is not where they arose.
        if largest > max(map(_largest, args), default=0.0):
            name = max(self.tracker.parents, key=len)
            self.by_module[name] = max(largest, self.by_module.get(name, 0.0))
        return out


def _largest(value: Any) -> float:
    """Largest |number| of a tensor; 0 for all else."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    return float(value.detach().abs().amax()) if value.numel() else 0.0


def largest_numbers(
    network: IdentityUNet,
    shapes: StepShapes,
    form: BodyForm,
    rows: Sequence[RecordedRow],
    device: str = "cpu",
) -> dict[str, float]:
    """Largest |number| in float32, by module: of its weights, and of what its own
    operators give.

    Args:
        network: The reference network.
        shapes: Sizes of the model.
        form: Written in this form, but in float32.
        rows: What to run.
        device: A torch device.
    """
    wide = dataclasses.replace(form, precision="float32")
    body = exported_body(network, wide)
    tracker = ModuleTracker()
    seen = _Largest(tracker)
    with TorchEngine(body, shapes, FLOAT32, device) as engine, tracker, seen:
        for row in rows:
            run_recorded(engine, row)
    found: dict[str, float] = {}
    for name, weight in network.named_parameters():
        module = name.rpartition(".")[0]
        found[module] = max(found.get(module, 0.0), _largest(weight))
    for name, largest in seen.by_module.items():
        module = name.partition(_NETWORK)[2]
        if module:
            found[module] = max(found.get(module, 0.0), largest)
    return found


def holders(names: Sequence[str], tree: Sequence[Candidate]) -> tuple[str, ...]:
    """The smallest candidates that hold modules of these names."""
    found: dict[str, None] = {}
    for name in names:
        holder, inner = None, tree
        while True:
            step = next((c for c in inner if f"{name}.".startswith(f"{c.name}.")), None)
            if step is None:
                break
            holder, inner = step.name, step.parts
        if holder is not None:
            found[holder] = None
    return tuple(found)
