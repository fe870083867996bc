"""Guidance from the command line to the run record and the picture's mark."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.commands.options import sample_settings, sampling_options
from id3pm_deploy.errors import Id3pmError, InputError
from id3pm_deploy.generate import SampleSettings, conditions, sample_to_folder
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.marks import PictureMark, _parse_packet, read_mark, xmp_packet
from id3pm_deploy.models import Model, open_model
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.solvers import SolverSettings


def settings_of(*arguments: str) -> GuidanceSettings:
    """What a command with the shared options makes of its arguments."""
    found: list[SampleSettings] = []

    @click.command()
    @sampling_options
    def command(**values: Any) -> None:
        found.append(sample_settings(values))

    result = CliRunner().invoke(command, arguments)
    if isinstance(result.exception, Id3pmError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return found[0].guidance


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], GuidanceSettings()),
        (["--guidance", "3"], GuidanceSettings(3.0)),
        (["--guidance", "1,2.5,0"], GuidanceSettings(scales=(1.0, 2.5, 0.0))),
        (
            ["--guidance", "4", "--guidance-schedule", "cosine"],
            GuidanceSettings(4.0, "cosine"),
        ),
        (
            ["--guidance-interval", "200", "800", "--guidance-rescale", "0.7"],
            GuidanceSettings(interval=(200.0, 800.0), rescale=0.7),
        ),
        (["--guide-variance"], GuidanceSettings(guide_variance=True)),
    ],
)
def test_options_become_settings(
    arguments: list[str], expected: GuidanceSettings
) -> None:
    assert settings_of(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", "-1"], "guidance scale must be from 0 to 100"),
        (["--guidance", "1,nan"], "guidance scale must be from 0 to 100"),
        (["--guidance-interval", "9", "3"], "lower one first"),
        (["--guidance-rescale", "2"], "rescale must be from 0 to 1"),
        (["--guidance", "1,2", "--guidance-schedule", "linear"], "nor have a schedule"),
        (["--guide-variance", "--guidance-rescale", "1"], "learned variance is guided"),
    ],
)
def test_options_that_make_no_sense(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings_of(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--guidance", "many"],
        ["--guidance", "1,,2"],
        ["--guidance", ""],
        ["--guidance-schedule", "sine"],
        ["--guidance-interval", "1"],
    ],
)
def test_options_that_are_no_values(arguments: list[str]) -> None:
    with pytest.raises(AssertionError, match="--guidance"):
        settings_of(*arguments)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    return open_model(tiny_checkpoint)


def run(out: Path, model: Model, guidance: GuidanceSettings) -> dict[str, Any]:
    settings = SampleSettings(SolverSettings("ddim", 3), guidance, count=1)
    wanted = conditions(model.spec, None, 1)
    wanted.identity[...] = 1.0
    network = load_checkpoint(model.path).network
    engine = TorchEngine(network, step_shapes(model.spec))
    sample_to_folder(out, model, engine, settings, wanted)
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    return record


def test_the_record_holds_what_repeats_the_run(tmp_path: Path, model: Model) -> None:
    guidance = GuidanceSettings(4.0, "linear", None, (0.0, 800.0), 0.25)
    record = run(tmp_path / "a", model, guidance)
    values = record["guidance"]
    assert values == {
        "scale": 4.0,
        "schedule": "linear",
        "scales": None,
        "interval": [0.0, 800.0],
        "rescale": 0.25,
        "guide_variance": False,
        "rows": "parallel",
    }
    again = GuidanceSettings(**{**values, "interval": tuple(values["interval"])})
    assert again == guidance
    for name in ("sample-00000.png", "sheet.png"):
        mark = read_mark(tmp_path / "a" / name)
        assert (mark.guidance, mark.guidance_schedule) == (4.0, "linear")
        assert mark.guidance_interval == (0.0, 800.0)
        assert mark.guidance_rescale == 0.25


def test_listed_scales_are_in_the_record_and_named_in_the_mark(
    tmp_path: Path, model: Model
) -> None:
    record = run(tmp_path / "a", model, GuidanceSettings(scales=(1.0, 3.5, 2.0)))
    assert record["guidance"]["scales"] == [1.0, 3.5, 2.0]
    mark = read_mark(tmp_path / "a" / "sample-00000.png")
    assert (mark.guidance, mark.guidance_schedule) == (3.5, "listed")
    with pytest.raises(InputError, match="must be 3 guidance scales"):
        run(tmp_path / "b", model, GuidanceSettings(scales=(1.0, 3.5)))
    assert not (tmp_path / "b").exists()


AT_DEFAULT: dict[str, Any] = {
    "guidance_schedule": "constant",
    "guidance_interval": None,
    "guidance_rescale": 0.0,
}


def test_a_mark_says_how_guidance_moved() -> None:
    mark = PictureMark(
        tool_version="1",
        seed=0,
        sample=1,
        solver="ddim",
        steps=3,
        guidance=2.0,
        backend="torch",
        precision="float32",
        guidance_schedule="cosine",
        guidance_interval=(199.5, 800.0),
        guidance_rescale=0.7,
    )
    packet = xmp_packet(mark)
    assert _parse_packet(packet) == mark
    assert "<id3pm:guidance_interval>199.5 800.0</id3pm:guidance_interval>" in packet
    for bad in ("1", "1 2 3", "a b", "", "nan 1"):
        with pytest.raises(ValueError, match=r"number|float|range"):
            _parse_packet(packet.replace("199.5 800.0", bad))
    plain = xmp_packet(dataclasses.replace(mark, **AT_DEFAULT))
    assert plain.count("guidance") == 2, "the scale's own tag and no other"
