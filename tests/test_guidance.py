"""Guidance tables: which UNet rows there are, how they mix, and when."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity, tiny_spec

from id3pm_deploy.defaults import GUIDANCE_SCHEDULES
from id3pm_deploy.errors import InputError
from id3pm_deploy.guidance import (
    SCHEDULES,
    GuidanceSettings,
    GuidanceTable,
    guidance_plan,
    guidance_scales,
    guidance_table,
)

IDENTITY = random_identity(3, tiny_spec())


def null_rows(table: GuidanceTable) -> list[bool]:
    return [not vector.any() for vector in table.identity]


def check_types(table: GuidanceTable, samples: int, rows: int) -> None:
    assert (table.samples, table.unet_rows) == (samples, rows)
    assert table.row.dtype == np.int32
    assert table.row.shape == (rows,)
    assert table.identity.dtype == np.float32
    assert table.identity.shape == (rows, IDENTITY.shape[1])
    assert table.mix.dtype == np.float32
    assert table.mix.shape == (2, samples, rows)


@pytest.mark.parametrize("guide_variance", [False, True])
def test_scale_one_needs_one_row_a_sample(guide_variance: bool) -> None:
    table = guidance_table(IDENTITY, 1.0, guide_variance=guide_variance)
    check_types(table, 3, 3)
    assert table.row.tolist() == [0, 1, 2]
    assert (table.identity == IDENTITY).all()
    assert (table.mix == np.eye(3)).all()


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5, 100.0])
def test_any_other_scale_needs_two(scale: float) -> None:
    table = guidance_table(IDENTITY, scale)
    check_types(table, 3, 6)
    assert table.row.tolist() == [0, 1, 2, 0, 1, 2]
    assert (table.identity[:3] == IDENTITY).all()
    assert null_rows(table) == [False] * 3 + [True] * 3
    wanted = np.concatenate([np.eye(3) * scale, np.eye(3) * (1 - scale)], axis=1)
    np.testing.assert_allclose(table.mix[0], wanted, rtol=1e-7)


def test_the_variance_is_the_conditional_branch_s_or_guided() -> None:
    plain = guidance_table(IDENTITY, 3.0)
    assert (plain.mix[1] == np.eye(3, 6)).all()
    guided = guidance_table(IDENTITY, 3.0, guide_variance=True)
    assert (guided.mix[1] == guided.mix[0]).all()
    assert (guided.mix[0] == plain.mix[0]).all()


def test_the_mix_is_classifier_free_guidance() -> None:
    """null + s·(id - null), Ho & Salimans 2022, eq. 6 with s = 1 + w."""
    scale, rng = 2.5, np.random.default_rng(1)
    conditional, null = rng.normal(size=(2, 3, 8))
    table = guidance_table(IDENTITY, scale)
    outputs = np.where(
        np.array(null_rows(table))[:, None], null[table.row], conditional[table.row]
    )
    found = table.mix[0].astype(np.float64) @ outputs
    np.testing.assert_allclose(found, null + scale * (conditional - null), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_unconditional_samples_need_one_row(scale: float) -> None:
    table = guidance_table(np.zeros_like(IDENTITY), scale)
    check_types(table, 3, 3)
    assert null_rows(table) == [True] * 3
    assert (table.mix == np.eye(3)).all()


def test_a_batch_cannot_change_an_unconditional_sample() -> None:
    """Beside guided samples it still is one row of weight exactly 1."""
    mixed = IDENTITY.copy()
    mixed[1] = 0.0
    table = guidance_table(mixed, 1.7, guide_variance=True)
    check_types(table, 3, 5)
    assert table.row.tolist() == [0, 1, 2, 0, 2]
    assert null_rows(table) == [False, True, False, True, True]
    assert (table.mix[:, 1] == [0, 1, 0, 0, 0]).all()
    np.testing.assert_allclose(table.mix.sum(axis=2), 1.0, rtol=1e-6)
    np.testing.assert_allclose(table.mix[0, 0], [1.7, 0, 0, -0.7, 0], rtol=1e-6)
    np.testing.assert_allclose(table.mix[0, 2], [0, 0, 1.7, 0, -0.7], rtol=1e-6)


def test_the_callers_vectors_are_left_alone() -> None:
    before = IDENTITY.copy()
    guidance_table(IDENTITY, 2.0)
    assert (before == IDENTITY).all()


@pytest.mark.parametrize("scale", [-0.1, 100.1, math.nan, math.inf, -math.inf])
def test_scales_out_of_range(scale: float) -> None:
    with pytest.raises(InputError, match="guidance scale must be from 0 to 100"):
        guidance_table(IDENTITY, scale)


TIMES = np.array([900.0, 600.0, 300.0, 0.0])


def scales(times: Any = TIMES, **settings: Any) -> list[float]:
    found = guidance_scales(GuidanceSettings(**settings), np.array(times))
    assert found.dtype == np.float64
    values: list[float] = found.tolist()
    return values


def test_the_scale_may_move() -> None:
    """By hand: cos(π/3) = ½, so the cosine is at ¼ and ¾ of its way."""
    assert scales(scale=4.0) == [4, 4, 4, 4]
    assert scales(scale=4.0, schedule="linear") == pytest.approx([1, 2, 3, 4])
    assert scales(scale=4.0, schedule="cosine") == pytest.approx([1, 1.75, 3.25, 4])
    assert scales(scale=0.0, schedule="linear") == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert scales(scales=(3.0, 1.0, 0.5, 7.0)) == [3, 1, 0.5, 7]
    assert tuple(SCHEDULES) == GUIDANCE_SCHEDULES


def test_the_ends_are_exact() -> None:
    for schedule in ("linear", "cosine"):
        found = scales(np.linspace(995, 0, 50), scale=0.1, schedule=schedule)
        assert (found[0], found[-1]) == (1.0, 0.1)
        assert len(set(found)) == 50
        # No row of scale 1 may be taken for a guided one.
        assert set(scales(np.linspace(995, 0, 50), scale=1.0, schedule=schedule)) == {1}
    assert set(scales(scale=0.1)) == {0.1}


def test_a_schedule_follows_the_timestep() -> None:
    """Uneven steps move it unevenly, and two rows at one timestep share a scale."""
    assert scales([900, 450, 450, 0], scale=3.0, schedule="linear") == [1, 2, 2, 3]
    assert scales([999, 90, 0], scale=100.0, schedule="linear") == pytest.approx(
        [1, 1 + 99 * 909 / 999, 100]
    )
    assert scales([995], scale=3.0, schedule="cosine") == [3]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((300, 600), [1, 3, 3, 1]),
        ((300.5, 599.5), None),
        ((0, 300), [1, 1, 3, 3]),
        ((600, 600), [1, 3, 1, 1]),
        ((0, 900), [3, 3, 3, 3]),
    ],
)
def test_outside_the_interval_the_scale_is_one(
    interval: tuple[float, float], expected: list[float] | None
) -> None:
    if expected is None:
        with pytest.raises(InputError, match="no table row lies in the guidance") as e:
            scales(scale=3.0, interval=interval)
        assert "900 to 0" in e.value.why
    else:
        assert scales(scale=3.0, interval=interval) == expected


def test_an_interval_of_a_schedule() -> None:
    """The schedule runs over the whole trajectory, the interval cuts it."""
    moved = {"scale": 4.0, "schedule": "linear"}
    assert scales(**moved, interval=(300, 600)) == pytest.approx([1, 2, 3, 1])
    listed = (3.0, 1.0, 0.5, 7.0)
    assert scales(scales=listed, interval=(0, 300)) == [1, 1, 0.5, 7]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_list_has_one_scale_for_each_table_row(count: int) -> None:
    with pytest.raises(InputError, match="must be 4 guidance scales") as error:
        scales(scales=(2.0,) * count)
    assert error.value.why == f"there are {count}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": math.nan}, "guidance scale must be from 0 to 100"),
        ({"scale": 101.0}, "guidance scale must be from 0 to 100"),
        ({"scales": (1.0, -2.0)}, "guidance scale must be from 0 to 100"),
        ({"scales": (1.0, math.inf)}, "guidance scale must be from 0 to 100"),
        ({"scales": ()}, "must not be empty"),
        ({"scales": (1.0,), "schedule": "linear"}, "nor have a schedule"),
        ({"schedule": "sine"}, "no guidance schedule 'sine'"),
        ({"interval": (5.0, 4.0)}, "lower one first"),
        ({"interval": (-1.0, 4.0)}, "lower one first"),
        ({"interval": (0.0, math.inf)}, "lower one first"),
        ({"interval": (math.nan, 4.0)}, "lower one first"),
        ({"interval": (0.0, math.nan)}, "lower one first"),
        ({"rescale": -0.1}, "rescale must be from 0 to 1"),
        ({"rescale": 1.1}, "rescale must be from 0 to 1"),
        ({"rescale": math.nan}, "rescale must be from 0 to 1"),
        ({"rescale": 0.5, "guide_variance": True}, "learned variance is guided"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GuidanceSettings(**settings)


def plan_scales(identity: npt.NDArray[np.float32], **settings: Any) -> list[float]:
    """The scale of sample 0 in every table row, read out of the plan's mixes."""
    plan = guidance_plan(identity, GuidanceSettings(**settings), TIMES)
    return [float(plan.tables[i].mix[0, 0, 0]) for i in plan.index]


def test_a_plan_has_the_tables_it_needs() -> None:
    settings = GuidanceSettings(2.0, interval=(300, 600), rescale=0.7)
    plan = guidance_plan(IDENTITY, settings, TIMES)
    assert [plan.tables[i].unet_rows for i in plan.index] == [3, 6, 6, 3]
    assert len(plan.tables) == 2
    assert plan.rescale.dtype == np.float32
    assert plan.rescale.tolist() == pytest.approx([0, 0.7, 0.7, 0])
    for i, scale in zip(plan.index, (1.0, 2.0, 2.0, 1.0), strict=True):
        expected = guidance_table(IDENTITY, scale)
        check_types(plan.tables[i], 3, expected.unet_rows)
        for part in ("row", "identity", "mix"):
            found = getattr(plan.tables[i], part)
            assert (found == getattr(expected, part)).all()


def test_a_plan_of_many_scales_keeps_the_vectors_once() -> None:
    plan = guidance_plan(IDENTITY, GuidanceSettings(4.0, "cosine"), TIMES)
    assert plan_scales(IDENTITY, scale=4.0, schedule="cosine") == pytest.approx(
        [1, 1.75, 3.25, 4]
    )
    assert [plan.tables[i].unet_rows for i in plan.index] == [3, 6, 6, 6]
    guided = [plan.tables[i] for i in plan.index[1:]]
    assert all(table.identity is guided[0].identity for table in guided)


def test_variance_is_guided_in_every_table() -> None:
    settings = GuidanceSettings(4.0, "linear", guide_variance=True)
    for table in guidance_plan(IDENTITY, settings, TIMES).tables:
        assert (table.mix[0] == table.mix[1]).all()


def test_a_plan_without_identities_has_one_table() -> None:
    """And the same rescale as beside guided samples: the batch changes nothing."""
    settings = GuidanceSettings(4.0, "linear", rescale=0.5)
    plan = guidance_plan(np.zeros_like(IDENTITY), settings, TIMES)
    assert len(plan.tables) == 1
    check_types(plan.tables[0], 3, 3)
    assert plan.index.tolist() == [0, 0, 0, 0]
    beside = guidance_plan(IDENTITY, settings, TIMES)
    assert plan.rescale.tolist() == beside.rescale.tolist() == [0, 0.5, 0.5, 0.5]


def test_a_plain_scale_is_one_table_and_no_rescale() -> None:
    for scale in (1.0, 2.0):
        plan = guidance_plan(IDENTITY, GuidanceSettings(scale), TIMES)
        assert len(plan.tables) == 1
        assert not plan.rescale.any()
    plan = guidance_plan(IDENTITY, GuidanceSettings(1.0, rescale=1.0), TIMES)
    assert not plan.rescale.any(), "nothing to rescale"
