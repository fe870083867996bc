"""How an FR model file wants its pixels, and the SHA-256 that covers both."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from urllib.parse import parse_qsl

import numpy as np
import numpy.typing as npt

from ..errors import InputError

SFACE_SHA256 = "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"


@dataclass(frozen=True)
class InputSpec:
    """How an ONNX FR model wants its pixels: ``(pixel - mean) / std``, 0 to 255."""

    mean: float = 127.5
    std: float = 127.5
    order: str = "rgb"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ("rgb", "bgr"):
            raise InputError(f"unknown channel order {self.order!r}", fix="rgb or bgr")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise InputError(f"mean {self.mean} and std {self.std} are unusable")
        if self.size is not None and not 16 <= self.size <= 1024:
            raise InputError(
                f"input size {self.size} is out of range", fix="16 to 1024"
            )

    def scaled(self, aligned: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """What the model is fed for crops uint8 RGB [n, H, W, 3], in that layout."""
        pixels = aligned if self.order == "rgb" else aligned[..., ::-1]
        return (pixels.astype(np.float32) - self.mean) / self.std


def function_sha256(data: bytes, spec: InputSpec) -> str:
    """The SHA-256 that stands for an FR model file with its preprocessing.

    With the file's usual preprocessing it is the SHA-256 of the file. That is
    ``(pixel - 127.5) / 127.5``, RGB; for SFace's own file, plain RGB from 0 to 255.
    Otherwise it is the SHA-256 of a text of both, one ``key=value`` a line.

    Args:
        data: The file's bytes.
        spec: The preprocessing. ``size`` is left out (None) where it is 112 or where
            the file allows no other.
    """
    digest = hashlib.sha256(data).hexdigest()
    usual = InputSpec(mean=0.0, std=1.0) if digest == SFACE_SHA256 else InputSpec()
    if spec == usual:
        return digest
    lines = [
        f"file={digest}",
        f"mean={float(spec.mean) + 0.0!r}",  # + 0.0: minus zero is zero
        f"std={float(spec.std)!r}",
        f"order={spec.order}",
        f"size={spec.size or ''}",
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def file_options(query: str) -> tuple[InputSpec, str | None]:
    """The part after ``?`` of a file's spec: the preprocessing, and a name if given.

    Raises:
        InputError: A key is unknown or given twice, or a value unusable.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    values = dict(pairs)
    unknown = sorted(set(values) - {"mean", "std", "order", "size", "name"})
    if unknown or len(values) != len(pairs) or (query and not pairs):
        raise InputError(
            f"cannot read the FR model options {query!r}",
            why=f"unknown: {', '.join(unknown)}" if unknown else "given twice or empty",
            fix="use mean=, std=, order=rgb|bgr, size= and name=, joined by &",
        )
    try:
        size = int(values["size"]) if "size" in values else None
        mean, std = (float(values.get(key, 127.5)) for key in ("mean", "std"))
    except ValueError as error:
        raise InputError(
            f"an FR model option in {query!r} is not a number", why=str(error)
        ) from error
    spec = InputSpec(mean=mean, std=std, order=values.get("order", "rgb"), size=size)
    return spec, values.get("name") or None
