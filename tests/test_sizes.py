"""Sizes on the command line."""

from __future__ import annotations

import click
import pytest

from id3pm_deploy.commands.sizes import SIZE, bytes_from


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("10GiB", 10 << 30),
        ("10gib", 10 << 30),
        ("10 GiB", 10 << 30),
        ("10Gi", 10 << 30),
        ("1.5GiB", 3 << 29),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("2k", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert bytes_from(text) == size
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1e9", "10 XB", "ten", "1,5GB", "10iB", "10GG", "nan"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size such as 10GiB"):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize("text", ["9999999TiB", "9" * 400])
def test_sizes_that_nothing_has(text: str) -> None:
    with pytest.raises(ValueError, match="too large") as caught:
        bytes_from(text)
    assert len(str(caught.value)) < 100


def test_a_default_in_bytes_stays_as_it_is() -> None:
    assert SIZE.convert(1 << 30, None, None) == 1 << 30
