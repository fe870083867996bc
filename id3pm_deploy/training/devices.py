"""The device of a process, by accelerate: placement, mixed precision, its fellows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed

from ..errors import InputError
from .config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@contextlib.contextmanager
def open_accelerator(config: TrainingConfig, threads: int = 0) -> Iterator[Accelerator]:
    """accelerate's view of this process, as long as the block runs.

    A process that ``join_fellows`` or ``accelerate launch`` told its rank finds the
    others of its run.

    Args:
        config: Its device and precision.
        threads: CPU threads; 0 leaves torch's choice.

    Raises:
        InputError: accelerate cannot use this device in this way.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = torch.device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    ours = not AcceleratorState._shared_state  # nobody in this process uses it yet
    try:
        made = Accelerator(
            cpu=device.type == "cpu", mixed_precision=_PRECISIONS[config.precision]
        )
        if made.device.type != device.type:
            raise ValueError(f"it would run on {made.device}")
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{config.precision} on the device {config.device} cannot be used",
            why=(str(error).splitlines() or ["accelerate does not say why"])[0],
            fix="use --precision float32, or another --device",
        ) from error
    if threads:
        torch.set_num_threads(threads)
    try:
        yield made
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)


def join_fellows(meeting: str, rank: int, config: TrainingConfig) -> None:
    """Join the processes of a run on this machine, which meet in a file.

    Args:
        meeting: ``file://`` and its path.
        rank: Number of this process; with CUDA, also of its GPU.
        config: How many processes there are, and on which device.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(config.processes)
    backend = "gloo"
    if config.device == "cuda":
        backend = "nccl"
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=config.processes
    )
