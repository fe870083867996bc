"""Guidance tables: which UNet rows there are and how they mix."""

from __future__ import annotations

import math

import numpy as np
import pytest
from models import random_identity, tiny_spec

from id3pm_deploy.errors import InputError
from id3pm_deploy.guidance import GuidanceTable, guidance_table

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
