"""NVIDIA's driver, asked through its own C libraries; nothing needs to be installed.

Called in a process of its own, because a broken driver can crash or hang it. The
functions take the library as an argument. Names and numbers are those of the CUDA
driver API (``cuda.h``) and of NVML (``nvml.h``), which keep them for good. No context
is made and no memory is taken on a GPU.
"""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARIES = {
    "cuda": (
        "libcuda.so.1",
        "/usr/lib/wsl/lib/libcuda.so.1",
        "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
        "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
    ),
    "nvml": ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1"),
}
"""Where the libraries are looked for: the loader's path, then WSL's and Jetson's."""

_MULTIPROCESSORS = 16
_INTEGRATED = 18
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_NAME_BYTES = 256


class DriverError(Exception):
    """A call to the driver returned an error; the text names it."""


def load_library(kind: str) -> Any:
    """The library ``cuda`` or ``nvml``.

    Raises:
        FileNotFoundError: It is not on this machine.
        OSError: It is there and cannot be loaded.
    """
    broken: OSError | None = None
    for name in LIBRARIES[kind]:
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            if "No such file" not in str(error) or name not in str(error):
                broken = error
    if broken is not None:
        raise broken
    raise FileNotFoundError(LIBRARIES[kind][0])


def cuda_facts(library: Any) -> dict[str, Any]:
    """The CUDA version the driver can run and its GPUs, as this process sees them.

    Args:
        library: ``libcuda``.

    Raises:
        DriverError: The driver refuses, for want of a GPU among other reasons.
    """
    _call(library, "cuInit", ctypes.c_uint(0))
    version = ctypes.c_int()
    _call(library, "cuDriverGetVersion", ctypes.byref(version))
    count = ctypes.c_int()
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    return {
        "cuda": _version_text(version.value),
        "devices": [_device(library, index) for index in range(count.value)],
    }


def _device(library: Any, index: int) -> dict[str, Any]:
    device = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(library, "cuDeviceGetName", name, ctypes.c_int(_NAME_BYTES), device)
    memory = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        where = ctypes.byref(value)
        _call(library, "cuDeviceGetAttribute", where, ctypes.c_int(number), device)
        return value.value

    capability = attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)
    return {
        "name": name.value.decode("utf-8", "replace"),
        "compute_capability": f"{capability[0]}.{capability[1]}",
        "multiprocessors": attribute(_MULTIPROCESSORS),
        "memory": memory.value,
        "integrated": bool(attribute(_INTEGRATED)),
    }


def _version_text(number: int) -> str:
    """12040 is 12.4."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _call(library: Any, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status != 0:
        raise DriverError(f"{name} returned {_error_name(library, status)}")


def _error_name(library: Any, status: int) -> str:
    text = ctypes.c_char_p()
    found = library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
    name = text.value.decode() if found == 0 and text.value else "an unknown error"
    return f"{name} ({status})"


def nvml_facts(library: Any) -> dict[str, Any]:
    """The driver's own version, as ``580.65.06``.

    Args:
        library: ``libnvidia-ml``.

    Raises:
        DriverError: NVML refuses.
    """
    if status := library.nvmlInit_v2():
        raise DriverError(f"nvmlInit_v2 returned {status}")
    text = ctypes.create_string_buffer(_NAME_BYTES)
    status = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(_NAME_BYTES))
    library.nvmlShutdown()
    if status:
        raise DriverError(f"nvmlSystemGetDriverVersion returned {status}")
    return {"driver": text.value.decode("utf-8", "replace")}
