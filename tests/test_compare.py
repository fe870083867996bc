"""The comparator itself: it must never call two different things the same."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from id3pm_deploy.compare import compare, format_error, unsaturated
from id3pm_deploy.errors import InputError, ParityError

KEYS = [
    "shape",
    "dtype_actual",
    "dtype_expected",
    "count",
    "max_abs",
    "max_rel",
    "mean_abs",
    "rms",
    "q50",
    "q90",
    "q99",
    "q99_9",
    "cosine",
    "psnr",
    "nonfinite_actual",
    "nonfinite_expected",
]


def strict_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def test_figures_worked_out_by_hand() -> None:
    found = compare(np.array([1.0, 2.0, 5.0]), np.array([1.0, 4.0, 4.0]))
    assert found.max_abs == 2.0
    assert found.max_rel == 0.5
    assert found.mean_abs == 1.0
    assert found.rms == pytest.approx(math.sqrt(5 / 3))
    assert found.cosine == pytest.approx(29 / math.sqrt(30 * 33))
    assert found.psnr == pytest.approx(20 * math.log10(2 / math.sqrt(5 / 3)))
    assert found.quantiles == (1.0, 2.0, 2.0, 2.0)
    assert (found.shape, found.count) == ((3,), 3)


def test_quantiles_are_errors_that_occur_rounded_up() -> None:
    actual = np.arange(1001, dtype=np.float64)
    found = compare(actual, np.zeros(1001))
    assert found.quantiles == (500.0, 900.0, 990.0, 999.0)


def test_the_error_is_relative_to_the_expected_side() -> None:
    found = compare(np.array([10.0, 0.0]), np.array([4.0, 0.0]))
    assert found.max_rel == 1.5


def test_equal_arrays_pass_the_tolerance_of_zero() -> None:
    x = np.linspace(-1, 1, 50, dtype=np.float32)
    found = compare(x, x.copy())
    assert found.passes(0.0)
    assert found.max_abs == found.max_rel == found.rms == 0
    assert found.psnr == math.inf
    assert found.cosine == pytest.approx(1)
    assert found.to_json()["psnr"] is None


def test_an_error_just_past_the_tolerance_fails() -> None:
    found = compare(np.array([1.0, 1.01]), np.array([1.0, 1.0]))
    assert not found.passes(0.0099)
    assert found.passes(0.0101)


@pytest.mark.parametrize("tolerance", [-1e-9, math.nan, math.inf])
def test_a_senseless_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(InputError):
        compare(np.ones(1), np.ones(1)).passes(tolerance)


def test_two_zeros_are_equal() -> None:
    found = compare(np.zeros(4), np.zeros(4))
    assert found.passes(0.0)
    assert (found.max_rel, found.cosine) == (0.0, 1.0)


def test_something_against_zeros_fails_at_any_tolerance() -> None:
    found = compare(np.array([0.0, 1e-30]), np.zeros(2))
    assert found.max_rel == math.inf
    assert not found.passes(1e30)
    assert found.cosine == 0.0
    assert found.to_json()["max_rel"] is None
    strict_json(found.to_json())


def test_zeros_against_something_are_wholly_wrong() -> None:
    found = compare(np.zeros(2), np.array([0.0, 3.0]))
    assert (found.max_rel, found.cosine) == (1.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", ["actual", "expected", "both"])
def test_what_is_not_finite_never_passes(bad: float, sides: str) -> None:
    a, b = np.ones(1000), np.ones(1000)
    if sides != "expected":
        a[3] = bad
    if sides != "actual":
        b[3] = bad
    found = compare(a, b)
    assert not found.finite
    assert not found.passes(1e300)
    assert found.nonfinite_actual == int(sides != "expected")
    assert found.nonfinite_expected == int(sides != "actual")
    assert found.max_abs == found.max_rel == found.rms == math.inf
    assert found.quantiles[0] == 0.0  # the others do agree
    assert list(found.to_json()) == KEYS
    strict_json(found.to_json())


def test_what_is_not_finite_fails_outside_the_mask_too() -> None:
    a, b = np.ones(4), np.ones(4)
    a[0] = np.nan
    found = compare(a, b, np.array([False, True, True, True]))
    assert found.max_rel == 0.0
    assert found.nonfinite_actual == 1
    assert not found.passes(1.0)


def test_float16_that_overflowed_never_passes() -> None:
    wide = np.array([60000.0, 70000.0], np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    found = compare(narrow, wide)
    assert found.nonfinite_actual == 1
    assert not found.passes(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_same_broken_value_in_the_same_place_is_no_agreement(bad: float) -> None:
    """inf - inf and NaN - NaN are NaN, which is below every tolerance if one asks
    the wrong way round."""
    a = np.array([1.0, bad, -bad], np.float32)
    found = compare(a, a.copy())
    assert (found.nonfinite_actual, found.nonfinite_expected) == (2, 2)
    assert found.max_rel == math.inf
    assert not found.passes(1e300)
    opposite = compare(a, -a)
    assert not opposite.passes(1e300)


def test_nan_in_different_places_is_counted_on_both_sides() -> None:
    a, b = np.ones(5), np.ones(5)
    a[0] = b[4] = math.nan
    found = compare(a, b)
    assert (found.nonfinite_actual, found.nonfinite_expected) == (1, 1)
    assert found.quantiles[0] == 0.0
    assert not found.passes(1e300)


def test_negative_zero_is_zero() -> None:
    found = compare(np.array([-0.0, 0.0]), np.array([0.0, -0.0]))
    assert found.passes(0.0)
    assert found.cosine == 1.0


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(np.float16, 2.0**-24), (np.float32, 2.0**-149), (np.float64, 5e-324)],
)
def test_denormals_are_numbers_like_any_other(dtype: Any, least: float) -> None:
    """The smallest numbers of a type: neither flushed to zero nor divided into NaN."""
    a = np.array([3 * least, 0.0], dtype)
    b = np.array([2 * least, 0.0], dtype)
    found = compare(a, b)
    assert found.max_abs == least
    assert found.max_rel == 0.5
    assert found.finite
    assert found.cosine == pytest.approx(1.0)
    assert math.isfinite(found.psnr)
    assert not found.passes(0.4)
    gone = compare(np.zeros(2, dtype), b)
    assert (gone.max_rel, gone.cosine) == (1.0, 0.0)
    came = compare(b, np.zeros(2, dtype))
    assert came.max_rel == math.inf
    strict_json(found.to_json())


def test_a_denormal_error_beside_large_values_is_small_and_not_nothing() -> None:
    a = np.array([1.0, 2.0**-149], np.float32)
    found = compare(a, np.array([1.0, 0.0], np.float32))
    assert 0 < found.max_rel < 1e-44
    assert not found.passes(0.0)
    assert found.passes(1e-40)


def test_float16_is_widened_before_it_is_subtracted() -> None:
    a = np.array([60000.0, -60000.0], np.float16)
    found = compare(a, -a)
    exact = float(a[0])
    assert found.max_abs == 2 * exact
    assert math.isfinite(found.rms)
    assert found.max_rel == 2.0


def test_small_float16_differences_do_not_vanish() -> None:
    a = np.array([1.0, np.nextafter(np.float16(1), np.float16(2))], np.float16)
    found = compare(a, np.array([1.0, 1.0], np.float32))
    assert found.max_abs == 2.0**-10
    assert (found.dtype_actual, found.dtype_expected) == ("float16", "float32")


def test_bfloat16_is_a_float() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a = np.array([1.0, 3.0e38], ml_dtypes.bfloat16)
    found = compare(a, a.astype(np.float32))
    assert found.passes(0.0)
    assert found.dtype_actual == "bfloat16"
    a[0] = np.nan
    assert compare(a, np.ones(2)).nonfinite_actual == 1
    with pytest.raises(ParityError):
        compare(a, np.ones(2, np.int32))


def test_float64_extremes_give_no_warning_and_no_pass() -> None:
    found = compare(np.array([1e308, -1e308]), np.array([-1e308, 1e308]))
    assert found.max_rel == math.inf
    assert not found.passes(10.0)
    assert found.cosine == pytest.approx(-1)
    strict_json(found.to_json())


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    found = compare(np.array([3.0, 4.0]) * scale, np.array([1.0, 2.0]) * scale)
    assert found.rms == pytest.approx(2 * scale)
    assert found.max_rel == pytest.approx(1.0)
    assert found.cosine == pytest.approx(11 / math.sqrt(125))


def test_unsigned_integers_do_not_wrap() -> None:
    a, b = np.array([0, 255], np.uint8), np.array([255, 254], np.uint8)
    found = compare(a, b, peak=255)
    assert found.max_abs == 255
    assert found.mean_abs == 128


def test_integers_that_float64_cannot_hold_are_refused() -> None:
    a = np.array([2**60], np.int64)
    with pytest.raises(ParityError, match=r"2\*\*53"):
        compare(a, a + 1)
    small = np.array([2**53 - 1], np.int64)
    assert not compare(small, small - 1).passes(0.0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), "shapes"),
        (np.ones(3), np.ones((3, 1)), "shapes"),
        (np.ones(()), np.ones(1), "shapes"),
        (np.ones(0), np.ones(0), "nothing"),
        (np.ones(2, np.uint8), np.ones(2, np.float32), "kind"),
        (np.ones(2, np.bool_), np.ones(2, np.uint8), "kind"),
        (np.ones(2, np.complex64), np.ones(2, np.complex64), "kind"),
        (np.array(["a"]), np.array(["a"]), "kind"),
        (np.array([None]), np.array([None]), "kind"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        compare(a, b)


def test_a_mask_chooses_what_is_measured() -> None:
    a, b = np.array([1.0, 9.0, 3.0]), np.array([1.0, 2.0, 2.0])
    found = compare(a, b, np.array([True, False, True]))
    assert (found.count, found.max_abs, found.max_rel) == (2, 1.0, 0.5)
    assert found.shape == (3,)


def test_a_mask_broadcasts_but_has_to_fit() -> None:
    x = np.ones((2, 3))
    assert compare(x, x, np.array([True, False, False])).count == 2
    for mask in (np.ones(2, np.bool_), np.zeros(3, np.bool_), np.ones(3)):
        with pytest.raises(ParityError):
            compare(x, x, mask)


def test_unsaturated_leaves_out_what_a_clamp_could_hide() -> None:
    x = np.array([-1.0, -0.999, -0.5, 0.0, 0.9989, 1.0, np.nan], np.float32)
    assert unsaturated(x).tolist() == [False, False, True, True, True, False, False]
    assert unsaturated(x, 0.2).sum() == 1


@pytest.mark.parametrize("peak", [0.0, -1.0, math.nan, math.inf])
def test_a_senseless_peak_is_refused(peak: float) -> None:
    with pytest.raises(InputError):
        compare(np.ones(1), np.ones(1), peak=peak)


def test_the_keys_are_these_and_flat() -> None:
    found = compare(np.array([1.0, 2.0]), np.array([1.0, 3.0])).to_json()
    assert list(found) == KEYS
    assert not any(isinstance(value, dict) for value in found.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-4, "1e-04"), (1.654e-5, "1.65e-05"), (math.inf, "not finite")],
)
def test_errors_in_words(value: float, text: str) -> None:
    assert format_error(value) == text
