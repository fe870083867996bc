"""Compiles the package's CUDA C to PTX with NVRTC, which needs no GPU.

Run as ``python tests/cuda_ptx.py`` after a change to a ``.cu`` file, where the wheel
WHEEL is installed: the PTX of later ones needs later drivers than JetPack 6 has
(CUDA 12.6). The PTX is for compute capability 7.5: the driver compiles it for
every later GPU. Its first line holds the SHA-256 of the source that it was made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "id3pm_deploy" / "backends"
SOURCES = tuple(sorted(FOLDER.glob("*.cu")))
OPTIONS = (b"--gpu-architecture=compute_75", b"--fmad=false")
LIBRARY = "libnvrtc.so.12"
WHEEL = "nvidia-cuda-nvrtc-cu12==12.1.105"


def header(source: bytes) -> str:
    """The first line of PTX that was made from ``source``."""
    return f"// source SHA-256: {hashlib.sha256(source).hexdigest()}\n"


def nvrtc() -> Any:
    """The compiler, from its wheel; None where it is not installed."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or () if found else ():
        path = Path(folder) / "cuda_nvrtc" / "lib" / LIBRARY
        if path.is_file():
            return ctypes.CDLL(str(path))
    return None


def compile_ptx(library: Any, source: bytes, name: str) -> str:
    """PTX of a CUDA C source, with its header."""
    program = ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source, name.encode(), 0, None, None
        )
    )
    options = (ctypes.c_char_p * len(OPTIONS))(*OPTIONS)
    status = library.nvrtcCompileProgram(program, len(OPTIONS), options)
    if status:
        raise RuntimeError(_text(library, program, "nvrtcGetProgramLog"))
    return header(source) + _text(library, program, "nvrtcGetPTX")


def _text(library: Any, program: Any, function: str) -> str:
    size = ctypes.c_size_t()
    _check(getattr(library, f"{function}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(library, function)(program, text))
    return text.value.decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC failed with status {status}")


def main() -> None:
    """Rewrite the PTX of all sources."""
    library = nvrtc()
    if library is None:
        raise SystemExit(f"install {WHEEL} first")
    for path in SOURCES:
        ptx = compile_ptx(library, path.read_bytes(), path.name)
        path.with_suffix(".ptx").write_text(ptx)


if __name__ == "__main__":
    main()
