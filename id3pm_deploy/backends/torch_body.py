"""The step module as PyTorch runs it: its device, layout, precision and compilation.

Shared by the engine that runs row by row (:mod:`.torch`) and by the rig that replays
(:mod:`.torch_rig`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..body_form import BodyForm
from ..errors import DeviceMemoryError, EngineError, InputError, first_line
from ..reference.step import StepModule, step_module
from ..reference.unet import IdentityUNet
from .base import EngineInfo

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Of torch.compile. The others capture graphs of their own, which ours cannot hold."""

_SHAPES_COMPILED = 64
"""Pairs of B and R that are compiled. PyTorch's own limit is 8, past which it runs
uncompiled and only warns."""


def compile_mode(asked: bool | str) -> str:
    """A mode of torch.compile, empty for none; True is the default one.

    Raises:
        InputError: There is no such mode.
    """
    mode = "default" if asked is True else asked or ""
    if mode and mode not in COMPILE_MODES:
        raise InputError(
            f"there is no way to compile called {mode!r}",
            fix=f"use {' or '.join(COMPILE_MODES)}",
        )
    return mode


def torch_info(form: BodyForm, device: torch.device, mode: str) -> EngineInfo:
    """What an engine over PyTorch says of itself."""
    version = torch.__version__ + (f", compiled ({mode})" if mode else "")
    return EngineInfo("torch", version, form.precision, str(device))


def torch_device(name: str) -> torch.device:
    """A device of this PyTorch; nothing is asked of the device itself.

    Raises:
        EngineError: There is no such kind of device, or PyTorch was built without it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise no_device(name, first_line(error)) from error
    cuda: Any = torch.backends.cuda  # some of it has no annotations
    if device.type == "cuda" and not cuda.is_built():
        raise no_device(
            name,
            f"this torch, {torch.__version__}, has no CUDA",
            "install a torch with CUDA from pytorch.org, or use --device cpu",
        )
    return device


def no_device(name: str, why: str, fix: str = "use --device cpu") -> EngineError:
    """The error for a device that PyTorch cannot use."""
    return EngineError(f"PyTorch cannot use the device {name!r}", why=why, fix=fix)


def step_on(
    network: IdentityUNet,
    form: BodyForm,
    device: torch.device,
    channels_last: bool | None = None,
) -> StepModule:
    """The step module on a device.

    Args:
        network: In float32 it is not copied, so it is itself what moves there.
        form: Precision of the body.
        device: Where.
        channels_last: The layout of pictures and weights. None takes it for half
            precision alone: tensor cores want it, and on a CPU half-precision
            convolutions are otherwise up to a hundred times slower.

    Raises:
        EngineError: The device is not there.
        DeviceMemoryError: Its memory is not enough.
    """
    half = form.precision != "float32"
    try:
        module: Any = step_module(network, form).to(device)
        if half if channels_last is None else channels_last:
            module = module.to(memory_format=torch.channels_last)
    except torch.OutOfMemoryError as error:
        raise out_of_memory("the weights", error) from error
    except (RuntimeError, AssertionError) as error:
        raise no_device(str(device), first_line(error)) from error
    made: StepModule = module
    return made


def compiled(module: StepModule, mode: str) -> Callable[..., Any]:
    """``module``, compiled when it first runs with sizes that are new; itself where
    ``mode`` is empty."""
    if not mode:
        return module
    with warnings.catch_warnings():
        # Importing its own compiler, PyTorch calls what it has deprecated.
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        made: Callable[..., Any] = torch.compile(module, mode=mode, dynamic=False)
    return made


@contextlib.contextmanager
def exact_float32(benchmark: bool = False) -> Iterator[None]:
    """No TF32 in here, neither in convolutions nor in matrix products.

    Args:
        benchmark: Let cuDNN pick each convolution's algorithm by timing them. What it
            picks differs from run to run, and so do the last bits of what it computes;
            without, the same algorithms run every time.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=benchmark, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def many_shapes(mode: str) -> Iterator[None]:
    """Code that is compiled with ``mode`` may be compiled for many sizes in here."""
    if not mode:
        yield
        return
    import torch._dynamo.config as settings

    held: Any = settings
    names = ("recompile_limit", "cache_size_limit")  # by the release
    known = [name for name in names if hasattr(held, name)][:1]
    with held.patch(dict.fromkeys(known, _SHAPES_COMPILED)):
        yield


@contextlib.contextmanager
def torch_errors(doing: str, mode: str = "") -> Iterator[None]:
    """PyTorch's exceptions become ours.

    Args:
        doing: What goes on inside, for the message.
        mode: How the module was compiled.

    Raises:
        DeviceMemoryError: The memory was not enough.
        EngineError: Anything else that PyTorch or its compiler says.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(doing, error) from error
    except RuntimeError as error:  # the compiler's are RuntimeErrors, too
        fix = "use a smaller batch if memory is short"
        if mode:
            fix = "leave out --compile"
        raise EngineError(
            f"PyTorch failed in {doing}", why=first_line(error), fix=fix
        ) from error


def out_of_memory(doing: str, error: BaseException) -> DeviceMemoryError:
    """The error for a device whose memory is full."""
    return DeviceMemoryError(
        f"the device's memory is not enough for {doing}",
        why=first_line(error),
        fix="use a smaller batch, or half precision",
    )
