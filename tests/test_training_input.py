"""Training: what is refused, and that it is before a single face is embedded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from test_training import SMALL, MeanColour, _faces

from id3pm_deploy.commands.train import command
from id3pm_deploy.errors import Id3pmError, InputError, OutputError, TrainingError
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.training import run
from id3pm_deploy.training.batches import Batches
from id3pm_deploy.training.config import TrainingConfig
from id3pm_deploy.training.run import train
from id3pm_deploy.training.start import diffusion_spec, initial_weights, settings_of
from id3pm_deploy.training.trainer import Trainer
from id3pm_deploy.training.work import work_folder

CALLABLE = "def colour(faces): return faces.mean(axis=(1, 2)) + 1.0"


class ReachedError(Exception):
    """The faces would be embedded now."""


@pytest.fixture(autouse=True)
def _no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(run, "load_faces", reached)


def changed(**changes: Any) -> TrainingConfig:
    return dataclasses.replace(SMALL, **changes)


def begun(out: Path, settings: object) -> Path:
    """The work folder of a run that was interrupted."""
    work = work_folder(out)
    work.mkdir()
    (work / "state.safetensors").touch()
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (work / "settings.json").write_text(text)
    return work


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"condition_dropout": 1.0},
        {"identity_noise": -1.0},
        {"processes": 3},
        {"processes": 0},
        {"accumulation": 3},
        {"processes": 2, "accumulation": 4},
        {"ema_decays": (0.99, 1.0)},
        {"ema_decays": (0.9,)},
        {"precision": "float64"},
        {"precision": "float16"},
        {"device": "cuda:1", "processes": 2},
        {"learning_rate": 0.0},
        {"learning_rate": NAN},
        {"final_learning_rate": -1.0},
        {"seed": -1},
        {"seed": 2**63},
        {"weight_decay": -0.1},
        {"weight_decay": INFINITY},
        {"min_snr_gamma": -1.0},
        {"vlb_weight": NAN},
        {"ema_decay": NAN},
        {"image_size": 4},
        {"base_channels": 0},
        {"num_head_channels": -1},
        {"channel_multipliers": (1, 0)},
        {"attention_resolutions": (-8,)},
        {"identity_jitter": 10**6},
        {"batch_size": 10**9},
        {"shares": (NAN, 1.0)},
        {"shares": (-1.0, 2.0)},
        {"shares": (0.0, 0.0)},
        {"shares": (INFINITY,)},
        {"prediction_type": "y"},
        {"schedule": "square"},
        {"normalisation": "whitened"},
        {"storage": "int8"},
        {"device": "meta"},
        {"title": "two\nlines"},
        {"title": "x" * 201},
    ],
)
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        changed(**change)


def test_the_largest_seed_works() -> None:
    config = changed(seed=2**63 - 1, steps=1)
    torch.manual_seed(config.seed)
    assert Batches(_faces(), config).at(0)[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "threads", "says"),
    [
        ({"shares": (0.5, 0.5)}, 0, "need 1 shares"),
        ({}, -1, "threads"),
        ({}, 10**6, "threads"),
        ({"base_channels": 33}, 0, "groups"),
        ({"channel_multipliers": (1, 1, 1, 1, 1, 1)}, 0, "halved"),
    ],
)
def test_what_is_refused_before_embedding(
    tmp_path: Path, change: dict[str, Any], threads: int, says: str
) -> None:
    config = changed(**change)
    with pytest.raises(Id3pmError, match=says):
        train([tmp_path], tmp_path / "run", config, MeanColour(), threads=threads)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cuda cannot be used"):
        train([tmp_path], tmp_path / "run", changed(device="cuda"), MeanColour())


def test_an_output_that_is_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.write_text("a file")
    with pytest.raises(InputError, match="not a folder"):
        train([tmp_path], out, SMALL, MeanColour())
    broken = tmp_path / "link"
    broken.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a folder"):
        train([tmp_path], broken, SMALL, MeanColour())
    with pytest.raises(OutputError):
        train([tmp_path], out / "below", SMALL, MeanColour())


def test_the_current_folder_as_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert work_folder(Path()) == tmp_path / "here.training"
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    train([tmp_path], Path(), changed(steps=1), MeanColour())
    assert {p.name for p in here.iterdir()} == {"config.json", "model.safetensors"}


# Going on with a run


def test_another_fr_model_cannot_go_on(tmp_path: Path) -> None:
    out, other, renamed = tmp_path / "run", MeanColour(), MeanColour()
    begun(out, settings_of(SMALL, MeanColour()))
    other.sha256, renamed.name = "cd" * 32, "another name"
    with pytest.raises(InputError, match="model_sha256"):
        train([tmp_path], out, SMALL, other, resume=True)
    with pytest.raises(ReachedError):  # the same file under another name
        train([tmp_path], out, SMALL, renamed, resume=True)
    other.sha256, other.name = "ef" * 32, "another model"
    with pytest.raises(InputError, match="model_name, model_sha256"):
        train([tmp_path], out, SMALL, other, resume=True)


def test_settings_of_an_earlier_release_are_accepted(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = dataclasses.asdict(SMALL)
    del settings["title"], settings["storage"], settings["resblock_updown"]
    begun(out, settings)
    free = changed(steps=9, title="Later", storage="float16")
    with pytest.raises(ReachedError):
        train([tmp_path], out, free, MeanColour(), resume=True)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\udcff", "[" * 100_000])
def test_damaged_settings(tmp_path: Path, text: str) -> None:
    work = begun(tmp_path / "run", "")
    (work / "settings.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TrainingError, match="damaged"):
        train([tmp_path], tmp_path / "run", SMALL, MeanColour(), resume=True)


def test_states_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    out, fr = tmp_path / "run", MeanColour()
    train([tmp_path], out, changed(steps=1), fr)
    path = work_folder(out) / "state.safetensors"
    good, step = load_file(path), {"step": "1"}
    ema = next(name for name in good if name.startswith("ema."))
    moment = next(name for name in good if name.endswith(".exp_avg"))
    missing = {k: v for k, v in good.items() if k != ema}
    cases: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = [
        (good, {"step": "one"}),
        (good, {"step": "{}"}),
        (good, {"step": "-1"}),
        (good, {}),
        (missing, step),
        ({**good, ema: torch.zeros(())}, step),
        ({**good, moment: torch.zeros(1, 2, 3)}, step),
        ({k: v for k, v in good.items() if k != moment}, step),
        ({**good, "optimizer.x.exp_avg": torch.zeros(1)}, step),
        ({**good, "optimizer.9999.exp_avg": torch.zeros(1)}, step),
    ]
    for tensors, metadata in cases:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(TrainingError, match="cannot resume"):
            train([tmp_path], out, changed(steps=2), fr, resume=True)
    save_file(good, path, metadata=step)
    assert train([tmp_path], out, changed(steps=2), fr, resume=True).steps == 2


# Starting from a checkpoint


def initial(folder: Path, config: TrainingConfig, fr: MeanColour) -> Path:
    spec = diffusion_spec(config, fr)
    network = IdentityUNet(spec.model, spec.identity.dim)
    save_checkpoint(folder, spec, network.state_dict())
    return folder


def test_a_checkpoint_of_the_same_kind_is_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fr = MeanColour()
    first = initial(tmp_path / "first", changed(title="Other", seed=3), fr)
    fr.name = "renamed"
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces())
    seen: list[Trainer] = []
    monkeypatch.setattr(run, "run_steps", lambda trainer, _: seen.append(trainer))
    train([tmp_path], tmp_path / "run", SMALL, fr, initial=first)
    wanted = load_file(first / "model.safetensors")
    for name, tensor in seen[0].network.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_smaller_pictures_are_a_start_where_the_same_levels_attend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = {"channel_multipliers": (1, 1), "norm_groups": 1}
    small = changed(**levels, image_size=8, attention_resolutions=(4,))
    large = changed(**levels, image_size=16, attention_resolutions=(8,))
    first = initial(tmp_path / "first", small, MeanColour())
    spec = diffusion_spec(large, MeanColour())
    network = IdentityUNet(spec.model, spec.identity.dim)
    network.load_state_dict(initial_weights(first, spec))
    other = diffusion_spec(changed(**levels, image_size=16), MeanColour())
    with pytest.raises(InputError, match="another kind of model"):
        initial_weights(first, other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channel_multipliers": (1, 2)}, "model.channel_multipliers"),
        ({"norm_groups": 1}, "model.norm_groups"),
        ({"resblock_updown": True}, "model.resblock_updown"),
        ({"learned_variance": True}, "model.learned_variance"),
        ({"normalisation": "unit"}, "identity.normalisation"),
        ({"prediction_type": "epsilon"}, "differ: prediction_type"),
        ({"schedule": "linear"}, "schedule.name"),
    ],
)
def test_a_checkpoint_of_another_kind_is_no_start(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    first = initial(tmp_path / "first", changed(**change), MeanColour())
    with pytest.raises(InputError) as error:
        train([tmp_path], tmp_path / "run", SMALL, MeanColour(), initial=first)
    assert says in error.value.why


def test_a_checkpoint_of_another_fr_model_is_no_start(tmp_path: Path) -> None:
    other = MeanColour()
    other.sha256 = "cd" * 32
    first = initial(tmp_path / "first", SMALL, other)
    with pytest.raises(InputError) as error:
        train([tmp_path], tmp_path / "run", SMALL, MeanColour(), initial=first)
    assert "identity.model_sha256" in error.value.why


# Shares


def test_shares_and_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="need 2 shares"):
        Batches(_faces(4, folders=2), changed(shares=(1.0,)))
    # The only folder with a share turns out to have no usable face.
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: _faces(4))
    config = changed(shares=(0.0, 1.0))
    with pytest.raises(InputError, match="no folder with a share"):
        train([tmp_path, tmp_path], tmp_path / "run", config, MeanColour())


# The command


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_the_command_warns_of_a_callable_and_prints_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")
    (tmp_path / "train_fr.py").write_text(CALLABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run, "load_faces", lambda *_, **__: three_wide())
    options = "--image-size 16 --channel-multipliers 1,1 --attention-resolutions 16"
    shared = [tmp_path, "--out", tmp_path / "run", "--model", "train_fr:colour"]
    shared += [*options.split(), "--steps", 1, "--batch-size", 2, "--json"]
    first = invoke(*shared)
    assert first.exception is None, first.exception
    assert first.stderr.startswith("warning: train_fr:colour is a Python callable")
    assert json.loads(first.stdout)["loss"] > 0
    again = invoke(*shared, "--resume")
    assert again.exception is None, again.exception
    assert json.loads(again.stdout)["loss"] is None


def three_wide() -> Any:
    faces = _faces()
    return dataclasses.replace(faces, vectors=faces.vectors[..., :3])


@pytest.mark.parametrize("shares", ["nan", "1e400", "-1"])
def test_the_command_refuses_shares(tmp_path: Path, shares: str) -> None:
    result = invoke(tmp_path, "--out", tmp_path / "run", "--shares", shares)
    assert isinstance(result.exception, InputError)
