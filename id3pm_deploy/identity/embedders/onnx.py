"""FR models as ONNX files, run by ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...backends.graph_check import check_graph
from ...backends.memory_limit import limit_memory
from ...errors import EngineError, IdentityError
from ...optional import require
from ..alignment import ARCFACE_SIZE
from ..preprocessing import InputSpec, function_sha256
from .base import Embedder, Image, model_bytes, not_loadable


class OnnxEmbedder(Embedder):
    """Any ArcFace-style ONNX file with one picture input and vectors as first output.

    NCHW or NHWC is read from the input's shape; a fixed batch is filled up, a free
    one runs one face at a time, so that a vector never depends on its neighbours.
    The weights must be inside the file: its SHA-256 stands for the whole model, and
    covers a preprocessing that is not the default (:func:`function_sha256`).

    Args:
        path: The ONNX file.
        spec: Pixel format.
        name: Name in identity files; None takes the file's stem.
        threads: Threads of ONNX Runtime; None leaves it the choice.
    """

    def __init__(
        self,
        path: Path,
        spec: InputSpec | None = None,
        *,
        name: str | None = None,
        threads: int | None = None,
    ) -> None:
        data = model_bytes(Path(path))
        self.name = name or Path(path).stem
        self._spec = spec or InputSpec()
        self._session = _session(data, Path(path), threads)
        chosen = self._read_shape(Path(path)) and self.size != ARCFACE_SIZE
        shown = replace(self._spec, size=self.size if chosen else None)
        self.sha256 = function_sha256(data, shown)

    def _read_shape(self, path: Path) -> bool:
        """Layout, size and batch from the model's only input.

        Returns:
            Whether the model leaves the size open.
        """
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape) if len(inputs) == 1 else []
        if len(shape) != 4 or 3 not in (shape[1], shape[3]):
            found = [(one.name, list(one.shape)) for one in inputs]
            raise IdentityError(
                f"{path} is not an FR model this can run",
                why=f"its inputs are {found}; one picture [n,3,H,W] or [n,H,W,3] is "
                "needed",
            )
        if inputs[0].type not in ("tensor(float)", "tensor(float16)"):
            raise IdentityError(f"{path} takes {inputs[0].type}, not floats")
        self._dtype = np.float16 if "16" in inputs[0].type else np.float32
        self._input = inputs[0].name
        self._channels_first = shape[1] == 3
        sides = shape[2:4] if self._channels_first else shape[1:3]
        fixed = [side for side in sides if isinstance(side, int) and side > 0]
        if len(set(fixed)) > 1 or (
            self._spec.size and fixed and self._spec.size not in fixed
        ):
            raise IdentityError(
                f"{path} takes pictures of {sides}",
                fix="square ones are needed; see size=",
            )
        self.size = fixed[0] if fixed else self._spec.size or ARCFACE_SIZE
        self._batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else 1
        return not fixed

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        scaled = self._spec.scaled(aligned)
        if self._channels_first:
            scaled = scaled.transpose(0, 3, 1, 2)
        rows = []
        for start in range(0, len(scaled), self._batch):
            part = scaled[start : start + self._batch]
            full = np.zeros((self._batch, *scaled.shape[1:]), dtype=self._dtype)
            full[: len(part)] = part
            rows.append(self._run(full)[: len(part)])
        return np.concatenate(rows)

    def _run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        try:
            answer = self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # ONNX Runtime's own classes are not public
            raise IdentityError(
                f"the FR model {self.name!r} failed on a face", why=str(error).strip()
            ) from error
        return np.asarray(answer).reshape(len(batch), -1)


def _session(data: bytes, path: Path, threads: int | None) -> Any:
    """An ONNX Runtime session on the CPU that prints nothing."""
    try:
        check_graph(data, standard_only=False)
    except EngineError as error:
        raise not_loadable(path, error.why) from error
    ort = require("onnxruntime", extra="faces")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    limit_memory(ort, options)
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes are not public
        raise not_loadable(path, error) from error
