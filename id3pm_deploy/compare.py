"""How far apart two arrays are, in numbers to print and to judge by.

Everything is computed in float64. A value that is not finite counts as an infinite
error, wherever it stands and on whichever side: such a comparison never passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, ParityError

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

QUANTILES = (0.5, 0.9, 0.99, 0.999)
_LOW_PRECISION = ("bfloat16", "float8_", "float6_", "float4_")
_EXACT = 1 << 53
"""Integers beyond it do not all exist in float64."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; errors are ``|actual - expected|``, per element.

    ``max_rel`` is the project's error, ``max|a - b| / max|b|``: infinite where the
    expected array is all zero and the actual one is not. ``quantiles`` belong to
    :data:`QUANTILES`; each is an error that really occurs, the next higher one.
    ``psnr`` is in decibels, infinite for equal arrays. ``count`` is the number of
    elements compared, fewer than the shape's where a mask was given; the two
    ``nonfinite`` counts are over the whole arrays all the same.
    """

    shape: tuple[int, ...]
    dtype_actual: str
    dtype_expected: str
    count: int
    max_abs: float
    max_rel: float
    mean_abs: float
    rms: float
    quantiles: tuple[float, ...]
    cosine: float
    psnr: float
    nonfinite_actual: int
    nonfinite_expected: int

    @property
    def finite(self) -> bool:
        """Whether every value on both sides is a finite number."""
        return self.nonfinite_actual == 0 and self.nonfinite_expected == 0

    def passes(self, tolerance: float) -> bool:
        """Whether all is finite and ``max_rel`` is at most ``tolerance``.

        Raises:
            InputError: The tolerance is negative, infinite or not a number.
        """
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise InputError(f"a tolerance is a number of at least 0, not {tolerance}")
        return self.finite and self.max_rel <= tolerance

    def to_json(self) -> dict[str, Any]:
        """Flat keys, the same ones always; None for what is not a finite number."""
        found: dict[str, Any] = {
            "shape": list(self.shape),
            "dtype_actual": self.dtype_actual,
            "dtype_expected": self.dtype_expected,
            "count": self.count,
            "max_abs": _json_number(self.max_abs),
            "max_rel": _json_number(self.max_rel),
            "mean_abs": _json_number(self.mean_abs),
            "rms": _json_number(self.rms),
        }
        for share, value in zip(QUANTILES, self.quantiles, strict=True):
            found[quantile_key(share)] = _json_number(value)
        found |= {
            "cosine": _json_number(self.cosine),
            "psnr": _json_number(self.psnr),
            "nonfinite_actual": self.nonfinite_actual,
            "nonfinite_expected": self.nonfinite_expected,
        }
        return found


def quantile_key(share: float) -> str:
    """The JSON key of a quantile: 0.5 is ``q50``, 0.999 is ``q99_9``."""
    return "q" + f"{share * 100:g}".replace(".", "_")


def format_error(value: float) -> str:
    """An error or tolerance for people: ``1.65e-05``, ``1e-04``, ``0``."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "not finite"
    short = f"{value:.0e}"
    return short if float(short) == value else f"{value:.2e}"


def compare(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    mask: npt.ArrayLike | None = None,
    *,
    peak: float = 2.0,
) -> Comparison:
    """Compare ``actual`` with ``expected``, both of one shape and one kind of number.

    Args:
        actual: What is judged; floats of any width (float16 and ml_dtypes' bfloat16
            are widened first) or integers.
        expected: The oracle.
        mask: Booleans that broadcast to the arrays' shape; only elements where it is
            true are measured. Non-finite values are looked for everywhere.
        peak: Range of the signal, for the PSNR: 2 for [-1, 1], 255 for uint8.

    Raises:
        ParityError: The two cannot be compared: shapes differ, one holds integers and
            the other floats, neither holds numbers, or there is nothing to compare.
    """
    a, b = np.asarray(actual), np.asarray(expected)
    _check_alike(a, b)
    if not (math.isfinite(peak) and peak > 0):
        raise InputError(f"a peak is a number above 0, not {peak}")
    wide_a, wide_b = _widen(a), _widen(b)
    bad_a, bad_b = ~np.isfinite(wide_a), ~np.isfinite(wide_b)
    chosen = _selection(mask, a.shape)
    return Comparison(
        shape=a.shape,
        dtype_actual=a.dtype.name,
        dtype_expected=b.dtype.name,
        nonfinite_actual=int(bad_a.sum()),
        nonfinite_expected=int(bad_b.sum()),
        **_measure(wide_a[chosen], wide_b[chosen], peak),
    )


def unsaturated(expected: npt.ArrayLike, limit: float = 0.999) -> Mask:
    """Where ``|expected| < limit``: pixels that a clamp to [-1, 1] cannot have hidden.

    NaN counts as saturated. The mask may come out all false, and :func:`compare` then
    raises; ask ``mask.any()`` first.
    """
    return np.asarray(np.abs(_widen(np.asarray(expected))) < limit)


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _kind(dtype: np.dtype[Any]) -> str:
    """``float``, ``int`` or ``bool``; an empty string for all else."""
    if dtype.kind == "f" or dtype.name.startswith(_LOW_PRECISION):
        return "float"
    return {"i": "int", "u": "int", "b": "bool"}.get(dtype.kind, "")


def _check_alike(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise ParityError(
            "the two arrays have different shapes",
            why=f"{list(a.shape)} against {list(b.shape)}",
        )
    if a.size == 0:
        raise ParityError("there is nothing to compare", why=f"shape {list(a.shape)}")
    kinds = _kind(a.dtype), _kind(b.dtype)
    if not all(kinds) or kinds[0] != kinds[1]:
        raise ParityError(
            "the two arrays do not hold the same kind of number",
            why=f"{a.dtype.name} against {b.dtype.name}",
            fix="convert one of them on purpose before comparing",
        )


def _widen(x: Array) -> Float64:
    if _kind(x.dtype) == "int" and x.dtype.itemsize == 8 and x.size:
        low, high = int(x.min()), int(x.max())
        if low < -_EXACT or high > _EXACT:
            raise ParityError("integers beyond 2**53 cannot be compared exactly")
    return x.astype(np.float64)


def _selection(mask: npt.ArrayLike | None, shape: tuple[int, ...]) -> Mask:
    if mask is None:
        return np.ones(shape, np.bool_)
    given = np.asarray(mask)
    if given.dtype != np.bool_:
        raise ParityError("a mask holds booleans", why=f"found {given.dtype.name}")
    try:
        chosen = np.broadcast_to(given, shape)
    except ValueError as error:
        raise ParityError(
            "the mask does not fit the arrays",
            why=f"{list(given.shape)} against {list(shape)}",
        ) from error
    if not chosen.any():
        raise ParityError("there is nothing to compare", why="the mask is all false")
    return chosen


def _measure(a: Float64, b: Float64, peak: float) -> dict[str, Any]:
    """The figures of two flat arrays of the same length, at least 1."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        error = np.abs(a - b)
        error[~(np.isfinite(a) & np.isfinite(b))] = np.inf
        max_abs = float(error.max())
        rms = _rms(error, max_abs)
        quantiles = np.quantile(error, QUANTILES, method="higher")
        return {
            "count": int(a.size),
            "max_abs": max_abs,
            "max_rel": _ratio(max_abs, float(np.abs(b).max())),
            "mean_abs": float(error.mean()),
            "rms": rms,
            "quantiles": tuple(float(q) for q in quantiles),
            "cosine": _cosine(a, b),
            "psnr": _psnr(rms, peak),
        }


def _ratio(error: float, scale: float) -> float:
    """``error / scale``; 0/0 is 0, and what involves no finite number is infinite."""
    if error == 0:
        return 0.0
    if not (math.isfinite(error) and math.isfinite(scale)) or scale == 0:
        return math.inf
    return float(np.float64(error) / np.float64(scale))


def _rms(error: Float64, largest: float) -> float:
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * math.sqrt(float(np.mean(np.square(error / largest))))


def _psnr(rms: float, peak: float) -> float:
    if rms == 0:
        return math.inf
    return 20 * (math.log10(peak) - math.log10(rms)) if rms < math.inf else -math.inf


def _cosine(a: Float64, b: Float64) -> float:
    """Cosine between two arrays: 1 for two zeros, 0 for one, NaN past finite."""
    top_a, top_b = float(np.abs(a).max()), float(np.abs(b).max())
    if not (math.isfinite(top_a) and math.isfinite(top_b)):
        return math.nan
    if top_a == 0 or top_b == 0:
        return 1.0 if top_a == top_b else 0.0
    u, v = a / top_a, b / top_b
    norms = math.sqrt(float(np.vdot(u, u)) * float(np.vdot(v, v)))
    return max(-1.0, min(1.0, float(np.vdot(u, v)) / norms))
