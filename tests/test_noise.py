"""Addressed noise: bits from a second implementation, and what they are made into."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest

from id3pm_deploy.errors import InputError
from id3pm_deploy.noise import batch_normals, normals, raw_bits
from id3pm_deploy.sampler import SeededNoise

MASK = (1 << 64) - 1
SHAPE = (3, 16, 16)


def philox_block(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox 4x64-10 in plain integers (Salmon et al. 2011, sec. 3.3)."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b = (right >> 64) ^ b ^ k, right & MASK
        c, d = (left >> 64) ^ d ^ m, left & MASK
        k, m = (k + 0x9E3779B97F4A7C15) & MASK, (m + 0xBB67AE8584CAA73B) & MASK
    return [a, b, c, d]


def own_bits(seed: int, sample: int, stage: int, draw: int, count: int) -> list[int]:
    """The words of an address; NumPy counts up before its first block."""
    words: list[int] = []
    for block in range(1, count // 4 + 2):
        words += philox_block((block, draw, stage, 0), (seed, sample))
    return words[:count]


def test_the_second_implementation_against_published_answers() -> None:
    # The generator's authors publish these two in their library, Random123.
    assert philox_block((0,) * 4, (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox_block((MASK,) * 4, (MASK, MASK)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


ADDRESSES = [
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 1),
    (42, 7, 1, 26),
    (MASK, MASK, MASK, MASK),
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_bits_equal_the_second_implementation(
    address: tuple[int, int, int, int],
) -> None:
    found = raw_bits(*address, 11)
    assert found.dtype == np.uint64
    assert found.tolist() == own_bits(*address, 11)


def test_pinned_bits_and_normals() -> None:
    """A picture of today must be the picture of the next release."""
    assert [hex(word) for word in raw_bits(42, 7, 1, 26, 4).tolist()] == [
        "0x7e091637023dc2ca",
        "0x72e83f6e639ff8c6",
        "0x3ca0a7389f44168a",
        "0x19adb720b441b7ac",
    ]
    found = normals(42, 7, 1, 26, (3, 3))
    assert [hex(word) for word in found.view(np.uint32).ravel()] == [
        "0xbd00108c",
        "0xbf83866d",
        "0xbe1fc654",
        "0x3fad1a91",
        "0xbfccd856",
        "0x3f9853fd",
        "0x3f3d3592",
        "0x3fd855e7",
        "0x3fd50a13",
    ]


@pytest.mark.parametrize("count", [1, 2, 7, 768])
def test_normals_are_box_and_mullers(count: int) -> None:
    pairs = (count + 1) // 2
    uniforms = [((w >> 11) + 0.5) / 2**53 for w in own_bits(3, 1, 4, 1, 2 * pairs)]
    polar = [
        (math.sqrt(-2 * math.log(u)), 2 * math.pi * v)
        for u, v in zip(uniforms[:pairs], uniforms[pairs:], strict=True)
    ]
    expected = [r * math.cos(a) for r, a in polar] + [r * math.sin(a) for r, a in polar]
    found = normals(3, 1, 4, 1, (count,))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:count], rtol=1e-6, atol=1e-9)


def test_a_sample_sees_the_same_numbers_in_any_batch() -> None:
    alone = [normals(5, i, 0, 3, SHAPE) for i in range(7)]
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4], [3], [1, 1, 0]):
        batch = batch_normals(5, chosen, 0, 3, SHAPE)
        assert batch.shape == (len(chosen), *SHAPE)
        for place, sample in enumerate(chosen):
            assert batch[place].tobytes() == alone[sample].tobytes()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_chunking_does_not_change_the_numbers(size: int) -> None:
    whole = batch_normals(9, range(7), 2, 1, SHAPE)
    chunks = [
        batch_normals(9, range(i, min(i + size, 7)), 2, 1, SHAPE)
        for i in range(0, 7, size)
    ]
    assert np.concatenate(chunks).tobytes() == whole.tobytes()


def test_the_shape_only_arranges_the_numbers() -> None:
    flat = normals(1, 2, 3, 4, (768,))
    assert normals(1, 2, 3, 4, SHAPE).tobytes() == flat.tobytes()


def test_other_calls_in_between_change_nothing() -> None:
    first = normals(8, 0, 0, 0, SHAPE)
    np.random.default_rng(0).normal(size=10)
    normals(8, 1, 0, 0, (5,))
    assert normals(8, 0, 0, 0, SHAPE).tobytes() == first.tobytes()


def test_the_seeded_source_names_its_draws() -> None:
    source = SeededNoise(seed=11, stage=2)
    start = source.start([4, 5], SHAPE)
    assert start.tobytes() == batch_normals(11, [4, 5], 2, 0, SHAPE).tobytes()
    row = source.row(6, [4, 5], SHAPE)
    assert row.tobytes() == batch_normals(11, [4, 5], 2, 7, SHAPE).tobytes()


def test_every_part_of_the_address_counts() -> None:
    """No two addresses share a word, small swapped numbers included."""
    addresses = list(itertools.product(range(3), repeat=4))
    words = np.concatenate([raw_bits(a, b, c, d, 64) for a, b, c, d in addresses])
    assert len(np.unique(words)) == 64 * len(addresses)


def test_moments_of_a_standard_normal() -> None:
    count = 1_000_000
    x = normals(2024, 0, 0, 0, (count,)).astype(np.float64)
    assert np.isfinite(x).all()
    # Five standard errors each.
    assert abs(x.mean()) < 5 / math.sqrt(count)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert 4.0 < np.abs(x).max() < 6.5


def test_quantiles_of_a_standard_normal() -> None:
    count = 200_000
    x = np.sort(normals(7, 0, 0, 1, (count,)).astype(np.float64))
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    # Kolmogorov and Smirnov: a distance of 1.95/√n is passed once in a thousand.
    assert np.abs(cdf - (np.arange(count) + 0.5) / count).max() < 1.95 / count**0.5


def test_neighbouring_addresses_are_not_correlated() -> None:
    addresses = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    count = 100_000
    x = np.stack([normals(*address, (count,)) for address in addresses])
    matrix = np.corrcoef(x.astype(np.float64))
    assert np.abs(matrix - np.eye(len(addresses))).max() < 5 / math.sqrt(count)
    # Nor are the cosine and the sine half of one draw, nor neighbours in it.
    half = count // 2
    assert abs(np.corrcoef(x[0, :half], x[0, half:])[0, 1]) < 5 / math.sqrt(half)
    assert abs(np.corrcoef(x[0, :-1], x[0, 1:])[0, 1]) < 5 / math.sqrt(count)


@pytest.mark.parametrize("word", [0, MASK])
def test_extreme_bits_stay_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """log(0) must not happen, whatever the generator gives."""

    def constant_bits(*address: int) -> npt.NDArray[np.uint64]:
        return np.full(address[-1], word, dtype=np.uint64)

    monkeypatch.setattr("id3pm_deploy.noise.raw_bits", constant_bits)
    found = normals(0, 0, 0, 0, (8,))
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 9


@pytest.mark.parametrize("name", ["seed", "sample", "stage", "draw"])
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_addresses_out_of_range(name: str, value: int) -> None:
    address = {"seed": 0, "sample": 0, "stage": 0, "draw": 0, name: value}
    with pytest.raises(InputError, match=f"the {name} must be"):
        normals(**address, shape=(4,))
