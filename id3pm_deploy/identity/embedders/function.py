"""FR models as Python callables."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import IdentityError, InputError
from .base import Embedder, Image


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

    def _forward(self, aligned: Image) -> npt.NDArray[Any]:
        try:
            answer = np.asarray(self._function(aligned))
        except Exception as error:  # somebody else's code can raise anything
            raise IdentityError(
                f"the FR model {self.name} failed",
                why=f"{type(error).__name__}: {error}",
            ) from error
        return answer


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
