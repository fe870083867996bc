"""Presets fill in what the user leaves out, in both stages, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from models import tiny_network, tiny_spec

from id3pm_deploy import defaults
from id3pm_deploy.arguments import way_of
from id3pm_deploy.cli import main
from id3pm_deploy.commands.options import (
    fit_options,
    sample_settings,
    sampling_options,
    second_settings,
)
from id3pm_deploy.errors import InputError
from id3pm_deploy.generate import SampleSettings
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.identity.vectors import identity_file, save_identities
from id3pm_deploy.presets import PRESETS, Preset, StagePreset
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.replaying import repeat
from id3pm_deploy.solvers import SolverSettings
from id3pm_deploy.spec import NO_IDENTITY, DiffusionSpec, ScheduleSpec

KNOWN = tiny_spec()
UNKNOWN = tiny_spec(identity=NO_IDENTITY)
ENLARGES = tiny_spec(image_size=16, low_res_size=8)
FEW = tiny_spec(schedule=ScheduleSpec("cosine", 12))


def resolved(
    arguments: tuple[str, ...], spec: DiffusionSpec, second: DiffusionSpec = ENLARGES
) -> tuple[SampleSettings, SampleSettings]:
    """What ``sample`` makes of its arguments for two models."""
    found: list[SampleSettings] = []

    @click.command()
    @sampling_options
    @click.option("--sr-solver", default=defaults.SR_SOLVER)
    @click.option("--sr-steps", default=defaults.SR_STEPS)
    @click.option("--sr-guidance", default=defaults.SR_GUIDANCE)
    @click.option("--sr-batch-size", default=3)
    @click.pass_context
    def command(ctx: click.Context, /, **values: Any) -> None:
        fit_options(ctx, values, spec)
        first = sample_settings(values)
        found.extend((first, second_settings(ctx, values, first, second)))

    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    return found[0], found[1]


def test_balanced_is_what_no_preset_gives() -> None:
    for spec in (KNOWN, UNKNOWN, ENLARGES):
        plain = resolved((), spec)
        same = resolved(("--preset", "balanced"), spec)
        assert [one.preset for one in plain] == [None, None]
        assert [one.preset for one in same] == ["balanced"] * 2
        assert plain == tuple(dataclasses.replace(s, preset=None) for s in same)


def test_a_preset_is_of_both_stages() -> None:
    for name, steps in (("fast", 20), ("reference", 250)):
        first, second = resolved(("--preset", name), KNOWN)
        assert first.solver == SolverSettings("ddpm", steps)
        assert first.guidance == GuidanceSettings(2.0)
        assert second.solver == SolverSettings("ddpm", steps)
        assert second.guidance == GuidanceSettings(1.0)
        assert second.batch_size == 3


def test_what_the_user_says_wins() -> None:
    said: tuple[str, ...] = (
        "--steps",
        "7",
        "--solver",
        "ddim",
        "--guidance",
        "2.5",
        "--seed",
        "4",
    )
    said += ("--guidance-interval", "100", "800", "--eta", "0.5", "--clip", "0")
    first, second = resolved((*said, "--preset", "reference"), KNOWN)
    assert dataclasses.replace(first, preset=None) == resolved(said, KNOWN)[0]
    assert second.solver == SolverSettings("ddpm", 250)
    said = ("--sr-solver", "heun", "--sr-steps", "9", "--sr-guidance", "3")
    first, second = resolved((*said, "--preset", "fast"), KNOWN)
    assert first.solver == SolverSettings("ddpm", 20)
    assert second.solver == SolverSettings("heun", 9)
    assert second.guidance == GuidanceSettings(3.0)
    # A value that happens to be the default is the user's none the less.
    first, _ = resolved(("--preset", "fast", "--steps", "50"), KNOWN)
    assert first.solver.steps == 50


@pytest.mark.parametrize("spec", [KNOWN, UNKNOWN, FEW, ENLARGES])
@pytest.mark.parametrize("name", [None, *PRESETS])
def test_the_library_takes_what_the_command_line_takes(
    name: str | None, spec: DiffusionSpec
) -> None:
    words = () if name is None else ("--preset", name)
    if name is None and spec is FEW:
        words = ("--preset", "balanced")  # which has no more steps than there are
    for given, more in (({}, ()), ({"guidance": 1.5}, ("--guidance", "1.5"))):
        wanted, _ = resolved((*words, *more), spec)
        asked: dict[str, Any] = {"solver": None, "steps": None, "guidance": None}
        assert way_of(spec, name, **asked | given) == (wanted.solver, wanted.guidance)
    wanted, _ = resolved((*words, "--solver", "ddim", "--steps", "7"), spec)
    settings = SolverSettings("ddim", 7)
    for solver, steps in (("ddim", 7), (settings, None), (settings, 7)):
        assert way_of(spec, name, solver, steps, None)[0] == wanted.solver
    with pytest.raises(InputError, match="steps are given twice"):
        way_of(spec, name, settings, 8, None)


def test_the_library_knows_no_other_preset() -> None:
    with pytest.raises(InputError, match="no preset 'quick'"):
        way_of(KNOWN, "quick", None, None, None)


def test_a_preset_fits_the_model() -> None:
    first, second = resolved(("--preset", "fast"), UNKNOWN, FEW)
    assert first.guidance == GuidanceSettings(1.0)
    assert (first.solver.steps, second.solver.steps) == (20, 12)
    first, _ = resolved(("--preset", "fast"), ENLARGES)
    assert first.guidance == GuidanceSettings(defaults.SR_GUIDANCE)
    first, _ = resolved(("--preset", "reference"), FEW)
    assert first.solver.steps == 12
    first, _ = resolved(("--preset", "reference", "--steps", "13"), FEW)
    assert first.solver.steps == 13, "what the user gave is not cut"


def test_all_that_a_preset_names_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    base = StagePreset("euler", 6, 3.0, "linear", (10.0, 500.0))
    large = StagePreset("unipc-2", 4, 1.5, "cosine", (0.0, 400.0))
    monkeypatch.setitem(PRESETS, "fast", Preset(base, large))
    chosen = ("--preset", "fast")
    first, second = resolved(chosen, KNOWN)
    alone, _ = resolved(chosen, ENLARGES)
    assert first.solver == SolverSettings("euler", 6)
    assert first.guidance == GuidanceSettings(3.0, "linear", None, (10.0, 500.0))
    assert second.solver == alone.solver == SolverSettings("unipc-2", 4)
    expected = GuidanceSettings(1.5, "cosine", None, (0.0, 400.0))
    assert second.guidance == alone.guidance == expected
    kept, _ = resolved((*chosen, "--guidance-schedule", "constant"), KNOWN)
    assert kept.guidance == GuidanceSettings(3.0, "constant", None, (10.0, 500.0))


def test_there_is_no_other() -> None:
    with pytest.raises(InputError, match="no preset 'quick'"):
        SampleSettings(preset="quick")
    done = CliRunner().invoke(main, ["sample", "m", "--out", "x", "--preset", "quick"])
    assert done.exit_code == 2
    assert "'quick' is not one of 'fast', 'balanced', 'reference'" in done.stderr


@pytest.mark.parametrize("command", ["sample", "parity", "benchmark"])
def test_help_says_what_each_stands_for(command: str) -> None:
    text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
    for name, steps in (("fast", 20), ("balanced", 50), ("reference", 250)):
        said = f"{name}: {steps} steps of ddpm at guidance 2, 1 to enlarge"
        assert said in text
    other = Preset(PRESETS["fast"].base, StagePreset("ddim", 9, 1.5))
    assert str(other).endswith("guidance 2, 9 of ddim at 1.5 to enlarge")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """CHECKPOINTs of a base with identity, T = 12, and of what enlarges, T = 30."""
    folder = tmp_path_factory.mktemp("chain")
    small = tiny_spec(image_size=8, attention_resolutions=(4,))
    small = dataclasses.replace(small, schedule=FEW.schedule)
    large = dataclasses.replace(ENLARGES, identity=NO_IDENTITY)
    large = dataclasses.replace(large, schedule=ScheduleSpec("linear", 30))
    for name, spec in (("base", small), ("large", large)):
        save_checkpoint(folder / name, spec, tiny_network(spec).state_dict())
    return folder / "base", folder / "large"


def sampled(chain: tuple[Path, Path], out: Path, *arguments: Any) -> dict[str, Any]:
    """The run record of two stages."""
    who = out.parent / "who.npz"
    if not who.exists():
        vectors = np.ones((1, 16), np.float32)
        save_identities(who, identity_file(vectors, "test model", "0" * 64))
    words: tuple[Any, ...] = (
        "sample",
        chain[0],
        "--super-resolution",
        chain[1],
        "--identity",
        who,
    )
    words += ("--out", out, "--count", 1, "--threads", 1, "--json", *arguments)
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def test_pictures_are_those_of_the_same_options(
    chain: tuple[Path, Path], tmp_path: Path
) -> None:
    record = sampled(chain, tmp_path / "a", "--preset", "fast")
    spelled: tuple[Any, ...] = ("--solver", "ddpm", "--steps", 12, "--guidance", 2)
    spelled += ("--sr-solver", "ddpm", "--sr-steps", 20, "--sr-guidance", 1)
    plain = sampled(chain, tmp_path / "b", *spelled)
    assert (record["preset"], plain["preset"]) == ("fast", None)
    second = record["super_resolution"]
    assert (record["solver"]["steps"], second["solver"]["steps"]) == (12, 20)
    assert record["solver"] == plain["solver"]
    assert record["guidance"] == plain["guidance"]
    assert second["solver"] == plain["super_resolution"]["solver"]
    assert second["guidance"] == plain["super_resolution"]["guidance"]
    for name in ("sample-00000.png", "sheet.png"):
        one = (tmp_path / "a" / name).read_bytes()
        assert one == (tmp_path / "b" / name).read_bytes()
    assert "preset" not in second


def test_a_repeated_run_keeps_its_preset(
    chain: tuple[Path, Path], tmp_path: Path
) -> None:
    from id3pm_deploy.models import open_model

    record = sampled(chain, tmp_path / "a", "--preset", "fast", "--sr-steps", 2)
    models = (open_model(chain[0]), open_model(chain[1]))
    assert repeat(record, *models).settings.preset == "fast"
    for other in ("quick", 7, ["fast"]):
        with pytest.raises(InputError, match=r"no preset|damaged"):
            repeat({**record, "preset": other}, *models)
    del record["preset"]
    assert repeat(record, *models).settings.preset is None, "of an earlier release"
