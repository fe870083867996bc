"""Training recipes, --dry-run, and TensorBoard's files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_training import SMALL, MeanColour, _faces

from id3pm_deploy.commands.train import command
from id3pm_deploy.errors import InputError, MissingPackageError, RecipeError
from id3pm_deploy.recipes import recipe_names
from id3pm_deploy.training import run
from id3pm_deploy.training.config import TrainingConfig
from id3pm_deploy.training.journal import Journal
from id3pm_deploy.training.recipe import KIND, config_from_recipe, config_text
from id3pm_deploy.training.run import train
from id3pm_deploy.training.start import diffusion_spec
from id3pm_deploy.training.work import work_folder

CALLABLE = "def colour(faces): return faces.mean(axis=(1, 2)) + 1.0"


@pytest.mark.parametrize("name", recipe_names(KIND))
def test_recipes_make_models(name: str) -> None:
    config = config_from_recipe(name, {})
    spec = diffusion_spec(config, MeanColour())
    assert spec.model.image_size == config.image_size
    assert "parameters" in config_text(config, spec)


def test_there_are_recipes_for_both_stages() -> None:
    names = recipe_names(KIND)
    small, second = (config_from_recipe(n, {}) for n in ("small64", "enlarge128"))
    assert "paper64" in names
    assert small.learned_variance
    assert second.low_res_size == small.image_size
    paper = config_from_recipe("paper64", {})
    size = config_text(paper, diffusion_spec(paper, MeanColour())).split()[1]
    assert 290e6 < int(size.replace(",", "")) < 300e6


def test_a_printed_recipe_is_read_back(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, ema_decays=(0.5, 0.25), title='A "title"')
    path = tmp_path / "mine.toml"
    path.write_text(config_text(config, diffusion_spec(config, MeanColour())))
    assert config_from_recipe(str(path), {}) == config
    changed = config_from_recipe(str(path), {"steps": 9})
    assert changed == dataclasses.replace(config, steps=9)


def test_recipes_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("stepps = 3")
    with pytest.raises(RecipeError, match="unknown keys: stepps"):
        config_from_recipe(str(path), {})
    path.write_text("steps = 0")
    with pytest.raises(InputError, match="steps must be"):
        config_from_recipe(str(path), {})
    with pytest.raises(RecipeError, match="no recipe 'none'"):
        config_from_recipe("none", {})


# The command


def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    (tmp_path / "recipe_fr.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [str(tmp_path), "--out", str(tmp_path / "run")]
    arguments += ["--model", "recipe_fr:colour", *options]
    return CliRunner().invoke(command, arguments)


def test_a_dry_run_prints_what_would_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--recipe", "small64", "--steps", "7", "--dry-run", "--batch-size", "16"]
    result = invoke(tmp_path, monkeypatch, *options)
    assert result.exception is None, result.exception
    assert "# each process takes 1 x 8 samples a step" in result.stdout
    printed = tmp_path / "printed.toml"
    printed.write_text(result.stdout)
    # Options win over the recipe, and the recipe over the options' own defaults.
    wanted = config_from_recipe("small64", {"steps": 7, "batch_size": 16})
    assert config_from_recipe(str(printed), {}) == wanted
    assert not (tmp_path / "run").exists()
    assert not work_folder(tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    result = invoke(tmp_path, monkeypatch, "--dry-run")
    assert isinstance(result.exception, InputError)


def test_the_command_has_an_option_for_every_setting() -> None:
    options = {parameter.name: parameter for parameter in command.params}
    for field in dataclasses.fields(TrainingConfig):
        assert field.name in options, field.name
        default: Any = options[field.name].default
        if isinstance(default, str) and isinstance(field.default, tuple):
            default = tuple(float(part) for part in default.split(",") if part)
        assert default == field.default, field.name


# TensorBoard


def test_tensorboard_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(MissingPackageError, match="tensorboard"):
        Journal(tmp_path, 0, tensorboard=True)


def test_tensorboard_gets_what_the_log_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="needs TensorBoard (the extra `train`)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    config = dataclasses.replace(SMALL, tensorboard=True)
    out = tmp_path / "run"
    train([tmp_path], out, config, MeanColour())
    events: Any = EventAccumulator(str(work_folder(out) / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("loss")] == [3, 6]
    assert {"simple", "gradient_norm", "learning_rate"} <= set(events.Tags()["scalars"])
