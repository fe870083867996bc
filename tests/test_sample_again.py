"""``sample --replay`` and ``--deadline``, as a user gives them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from id3pm_deploy.cli import main
from id3pm_deploy.shipped import shipped_checkpoint, shipped_identities


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("replay") / "bundle"
    found = run("build-engine", shipped_checkpoint(), "--target", "cpu", "--out", out)
    assert found.exit_code == 0, found.output
    return out


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def pixels_of(folder: Path) -> dict[str, bytes]:
    found = sorted(folder.glob("sample-*.png"))
    return {one.name: np.asarray(Image.open(one)).tobytes() for one in found}


@pytest.mark.slow
def test_a_run_is_made_again_from_its_record(bundle: Path, tmp_path: Path) -> None:
    who = ("--identity", shipped_identities())
    first = run(
        *("sample", bundle, *who, "--out", tmp_path / "a", "--count", "1"),
        *("--solver", "dpmpp-2m-sde", "--steps", "4", "--seed", "7"),
        *("--guidance", "3", "--guidance-interval", "100", "900"),
    )
    assert first.exit_code == 0, first.output
    record = tmp_path / "a" / "record.json"
    again = ("sample", bundle, "--replay", record, "--out", tmp_path / "b")
    second = run(*again, *who)
    assert second.exit_code == 0, second.output
    assert "pictures in" in second.output
    assert pixels_of(tmp_path / "b") == pixels_of(tmp_path / "a") != {}
    one, other = (json.loads((tmp_path / n / "record.json").read_text()) for n in "ab")
    for values in (one, other):
        assert values.pop("seconds") > 0
    assert one == other
    refused = run(*again[:4], "--out", tmp_path / "c", *who, "--steps", "9")
    assert refused.exit_code == 2
    assert "--steps cannot go with --replay" in refused.output
    nobody = run(*again[:4], "--out", tmp_path / "c")
    assert nobody.exit_code in (1, 2)
    assert not (tmp_path / "c").exists()
    full = run(*again, *who)
    assert full.exit_code == 2
    assert "is not empty" in full.output


@pytest.mark.slow
def test_a_run_that_is_too_late_writes_nothing(bundle: Path, tmp_path: Path) -> None:
    late = run(
        *("sample", bundle, "--unconditional", "--out", tmp_path / "late"),
        *("--deadline", "0.01", "--steps", "50"),
    )
    assert late.exit_code == 1
    assert "did not end before its deadline" in late.output
    assert list(tmp_path.iterdir()) == []
    none = run(
        *("sample", bundle, "--unconditional", "--out", tmp_path / "late"),
        *("--deadline", "0"),
    )
    assert none.exit_code == 2
    soon = run(
        *("sample", bundle, "--unconditional", "--out", tmp_path / "soon"),
        *("--deadline", "500", "--steps", "2", "--count", "1", "--json"),
    )
    assert soon.exit_code == 0, soon.output
    assert len(json.loads(soon.stdout.splitlines()[-1])["samples"]) == 1
