"""Folders of diffusers' UNet2DModel: the same function, or a refusal by key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from id3pm_deploy.cli import main
from id3pm_deploy.reference.checkpoint import load_checkpoint

BASE: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_head_dim": 16,
}
RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
}
SCHEDULER: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}


def write_folder(
    folder: Path, scheduler: dict[str, Any] | None = None, **config: Any
) -> UNet2DModel:
    """Save a pipeline's folder with random weights."""
    torch.manual_seed(1)
    unet: UNet2DModel = UNet2DModel(**{**BASE, **config}).eval()
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(torch.randn(weight.shape) * 0.05)
    unet.save_pretrained(folder / "unet")
    if scheduler is not None:
        made: Any = DDPMScheduler
        made(**{**SCHEDULER, **scheduler}).save_pretrained(folder / "scheduler")
    return unet


def run_import(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["import", *map(str, arguments)])


def inputs(channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, channels, 16, 16, generator=generator), torch.tensor(
        [3.0, 801.0]
    )


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    "config",
    [
        {},
        RESNET,
        {"attention_head_dim": None},
        {"attn_norm_num_groups": 32},
        {
            "block_out_channels": (32, 32, 64),
            "norm_num_groups": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        {"in_channels": 1, "out_channels": 1},
    ],
)
def test_the_same_function(config: dict[str, Any], tmp_path: Path) -> None:
    unet = write_folder(tmp_path / "src", {}, **config)
    out = tmp_path / "out"
    done = run_import(tmp_path / "src", "--out", out)
    assert done.exit_code == 0, done.output
    made = load_checkpoint(out)
    assert made.spec.prediction_type == "v"
    assert (made.spec.schedule.name, made.spec.schedule.timesteps) == ("cosine", 1000)
    assert made.spec.origin["converted_from"] == "diffusers"
    x, t = inputs(unet.config["in_channels"])
    with torch.inference_mode():
        assert error(made.network(x, t), unet(x, t).sample) <= 1e-5


def test_learned_variance_and_a_small_picture(tmp_path: Path) -> None:
    change = {"in_channels": 6, "out_channels": 6, **RESNET}
    learned = {"variance_type": "learned_range", "beta_schedule": "linear"}
    unet = write_folder(tmp_path / "src", learned, **change)
    out = tmp_path / "out"
    flags = json.dumps({"small_size": 4})
    done = run_import(tmp_path / "src" / "unet", "--flags", flags, "--out", out)
    assert done.exit_code == 0, done.output
    made = load_checkpoint(out)
    assert made.spec.model.low_res_size == 4
    assert made.spec.model.learned_variance
    assert made.spec.schedule.name == "linear"
    x, t = inputs(6)
    with torch.inference_mode():
        assert error(made.network(x, t), unet(x, t).sample) <= 1e-5


def test_an_identity_needs_its_projection(tmp_path: Path) -> None:
    unet = write_folder(tmp_path / "src", {}, class_embed_type="identity")
    out = tmp_path / "out"
    done = run_import(tmp_path / "src", "--out", out)
    assert done.exit_code == 1
    assert "class_embed_type" in done.output
    assert "--projection" in done.output
    layer = torch.nn.Linear(24, 128)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    more = ["--identity-model", "sface", "--normalisation", "unit"]
    given = ("--projection", tmp_path / "layer.pt", "--out", out)
    done = run_import(tmp_path / "src", *given)
    assert done.exit_code == 2
    assert "--identity-model and --normalisation must be given" in done.output
    done = run_import(tmp_path / "src", *given, *more)
    assert done.exit_code == 0, done.output
    made = load_checkpoint(out)
    assert made.spec.identity.dim == 24
    assert made.spec.identity.model_sha256 is not None
    x, t = inputs()
    y = torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = unet(x, t, class_labels=layer(y)).sample
        assert error(made.network(x, t, y), expected) <= 1e-5


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; Ellipsis removes one."""
    values = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusers") / "src"
    write_folder(folder, {})
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "src"))


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_eps": 1e-6},
        {"downsample_padding": 0},
        {"freq_shift": 1},
        {"flip_sin_to_cos": False},
        {"center_input_sample": True},
        {"time_embedding_type": "fourier"},
        {"time_embedding_dim": 64},
        {"mid_block_type": None},
        {"mid_block_scale_factor": 1.5},
        {"act_fn": "gelu"},
        {"add_attention": False},
        {"resnet_time_scale_shift": "ada_group"},
        {"attn_norm_num_groups": 8},
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 10},
        {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]},
        {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
        {"block_out_channels": [32, 48]},
        {"block_out_channels": "32"},
        {"layers_per_block": 0},
        {"in_channels": 4},
        {"sample_size": [16, 8]},
        {"attention_head_dim": 7.5},
        {"new_key": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_key_that_cannot_be_represented_is_named(
    copied: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    rewrite(copied / "unet" / "config.json", **changes)
    done = run_import(copied, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert next(iter(changes)) in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_ways_of_resampling_are_not_mixed(copied: Path, tmp_path: Path) -> None:
    mixed = ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]
    rewrite(copied / "unet" / "config.json", down_block_types=mixed)
    done = run_import(copied, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "down_block_types" in done.output
    assert "resample in one way" in done.output


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prediction_type": ...}, "prediction_type is missing"),
        ({"beta_schedule": ...}, "beta_schedule is missing"),
        ({"num_train_timesteps": ...}, "num_train_timesteps is missing"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule"),
        ({"beta_schedule": "linear", "beta_end": 0.012}, "beta_end"),
        ({"beta_schedule": "linear", "num_train_timesteps": 4000}, "beta_start"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"variance_type": "learned_range"}, "learned_range"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps"),
    ],
)
def test_the_schedule_is_stated_or_refused(
    copied: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    rewrite(copied / "scheduler" / "scheduler_config.json", **changes)
    done = run_import(copied, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert named in done.output


def test_without_a_scheduler_flags_say_it(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "scheduler")
    done = run_import(copied, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "beta_schedule is missing in scheduler_config.json" in done.output
    text = "--noise_schedule linear --diffusion_steps 4000 --prediction_type epsilon"
    done = run_import(copied, "--flags", text, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    spec = load_checkpoint(tmp_path / "out").spec
    assert (spec.schedule.name, spec.schedule.timesteps) == ("linear", 4000)
    assert spec.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"noise_schedule": "linear"}, "noise_schedule"),
        ({"prediction_type": "epsilon"}, "prediction_type"),
        ({"diffusion_steps": 100}, "diffusion_steps"),
        ({"num_heads": 4}, "num_heads"),
        ({"diffusion_steps": "1000"}, "diffusion_steps"),
        ({"image_size": 32}, "sample_size"),
    ],
)
def test_flags_that_contradict_the_folder(
    copied: Path, tmp_path: Path, flags: dict[str, Any], named: str
) -> None:
    done = run_import(copied, "--flags", json.dumps(flags), "--out", tmp_path / "out")
    assert done.exit_code in (1, 2), done.output
    assert named in done.output


def test_safetensors_come_before_a_bin(copied: Path, tmp_path: Path) -> None:
    """A file that nobody reads can hold anything."""
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    done = run_import(copied, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_a_bin_alone_and_attention_under_its_former_names(tmp_path: Path) -> None:
    unet = write_folder(tmp_path / "src", {})
    folder = tmp_path / "src" / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    state = {}
    for name, tensor in unet.state_dict().items():
        old = name
        if ".attentions." in name:
            for new, former in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ):
                old = old.replace(f".{new}.", f".{former}.")
        state[old] = tensor
    assert set(state) != set(unet.state_dict())
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    done = run_import(folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    x, t = inputs()
    with torch.inference_mode():
        found = load_checkpoint(tmp_path / "out").network(x, t)
        assert error(found, unet(x, t).sample) <= 1e-5


def test_averaged_weights_beside_raw_ones(copied: Path, tmp_path: Path) -> None:
    shutil.copytree(copied / "unet", copied / "unet_ema")
    done = run_import(copied / "unet", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "warning: unet holds the raw weights; unet_ema" in done.output


def test_shards_are_refused(copied: Path, tmp_path: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-2.safetensors"))
    done = run_import(copied, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "max_shard_size" in done.output
