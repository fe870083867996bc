"""What is checked before the first picture of a run is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_config import load_spec
from ..errors import InputError, TrainingError
from ..files import output_error
from ..identity.embedders import Embedder
from ..reference.checkpoint import load_checkpoint
from ..reference.unet import IdentityUNet
from ..spec import DiffusionSpec, IdentitySpec, ModelSpec, ScheduleSpec
from .config import TrainingConfig
from .state import STATE_NAME
from .work import work_folder

SETTINGS_NAME = "settings.json"
_MAX_THREADS = 1024
# What may change when a run goes on.
_FREE = {
    *("steps", "shares", "save_every", "sheet_every", "compile", "device"),
    *("processes", "accumulation", "precision", "tensorboard", "storage", "title"),
}


def diffusion_spec(config: TrainingConfig, embedder: Embedder) -> DiffusionSpec:
    """The facts of the model that ``config`` and ``embedder`` make.

    Raises:
        CheckpointError: They contradict each other.
    """
    model = ModelSpec(
        image_size=config.image_size,
        base_channels=config.base_channels,
        channel_multipliers=config.channel_multipliers,
        residual_blocks=config.residual_blocks,
        attention_resolutions=config.attention_resolutions,
        num_head_channels=config.num_head_channels,
        norm_groups=config.norm_groups,
        learned_variance=config.learned_variance,
        dropout=config.model_dropout,
        resblock_updown=config.resblock_updown,
        low_res_size=config.low_res_size or None,
    )
    identity = IdentitySpec(
        dim=embedder.dim,
        model_name=embedder.name,
        model_sha256=embedder.sha256,
        normalisation=config.normalisation,
    )
    return DiffusionSpec(
        model=model,
        identity=identity,
        schedule=ScheduleSpec(name=config.schedule),  # type: ignore[arg-type]
        prediction_type=config.prediction_type,
        title=config.title,
        attributes=config.attribute_specs,
    )


def settings_of(config: TrainingConfig, embedder: Embedder) -> dict[str, Any]:
    """What ``settings.json`` holds: the config's fields and the FR model."""
    model = {"model_name": embedder.name, "model_sha256": embedder.sha256}
    return {**asdict(config), **model}


def check_run(
    folders: Sequence[Path],
    out: Path,
    config: TrainingConfig,
    embedder: Embedder,
    *,
    resume: bool = False,
    threads: int = 0,
) -> DiffusionSpec:
    """Check all that can be checked before the first picture is read.

    Returns:
        The facts of the model that would be trained.

    Raises:
        InputError: Settings, device or ``out`` cannot be used.
        CheckpointError: The settings contradict each other.
        TrainingError: There is nothing to resume, or its settings are damaged.
    """
    check_start(out, config, embedder, resume=resume)
    spec = diffusion_spec(config, embedder)
    check_machine(config, spec, folders, threads)
    return spec


def check_start(
    out: Path, config: TrainingConfig, embedder: Embedder, *, resume: bool
) -> None:
    """Refuse an output folder that is in use, or a run that was another one.

    Raises:
        InputError: ``out`` is a file or holds something, or the settings or the FR
            model are not those of the run to go on with.
        TrainingError: There is nothing to resume, or its settings are damaged.
    """
    work = work_folder(out)
    try:
        begun = (work / STATE_NAME).exists()
        linked = out.exists() or out.is_symlink()
        if linked and not out.is_dir():
            raise InputError(f"{out} is not a folder", fix="choose another --out")
        used = begun or (linked and any(out.iterdir()))
    except OSError as error:
        raise output_error(out, error) from error
    if resume and not begun:
        raise TrainingError(
            f"there is nothing to resume in {work}", fix="leave out --resume"
        )
    if not resume and used:
        raise InputError(
            f"{out} already holds a checkpoint, a run or other files",
            fix="use --resume to go on with a run, or choose another --out",
        )
    if resume and (work / SETTINGS_NAME).exists():
        _check_settings(work / SETTINGS_NAME, settings_of(config, embedder))


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Settings that an earlier release did not keep are not compared."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(
            f"cannot resume: {path} is damaged",
            why=str(error),
            fix="put it right, or remove it if you are sure of the settings",
        ) from error
    now = json.loads(json.dumps(settings))
    free = set(_FREE)
    if now["model_sha256"] and kept.get("model_sha256") == now["model_sha256"]:
        free.add("model_name")  # the file was renamed
    changed = sorted(k for k in kept if k not in free and kept[k] != now.get(k))
    if changed:
        raise InputError(
            f"the run in {path.parent} has other settings: {', '.join(changed)}",
            fix="give the same settings again to resume",
        )


def check_machine(
    config: TrainingConfig, spec: DiffusionSpec, folders: Sequence[Path], threads: int
) -> None:
    """Refuse a device, threads, shares or a network that this run cannot use.

    Raises:
        InputError: One of them, named.
    """
    if not 0 <= threads <= _MAX_THREADS:
        raise InputError(
            f"threads must be from 0 to {_MAX_THREADS}", why=f"it is {threads}"
        )
    if config.shares and len(config.shares) != len(folders):
        raise InputError(
            f"{len(folders)} folders of faces need {len(folders)} shares",
            why=f"given: {list(config.shares)}",
            fix="give one share of at least 0 for each folder",
        )
    try:
        torch.zeros(1, device=config.device)
        if config.device == "cuda" and config.processes > torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"the device {config.device} cannot be used",
            why=(str(error).splitlines() or ["torch does not say why"])[0],
            fix="use --device cpu, or fewer --processes",
        ) from error
    try:
        with torch.device("meta"):  # no memory is taken
            IdentityUNet(spec.model, spec.condition_dim)
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise InputError(
            "these settings do not make a network that can be built", why=str(error)
        ) from error


def initial_weights(checkpoint: Path, spec: DiffusionSpec) -> dict[str, Tensor]:
    """The weights of a CHECKPOINT that computes what ``spec`` says.

    Its pictures may be of another size if the same levels have attention: a run on
    small pictures, which take a quarter of the time, is a start for larger ones.

    Raises:
        InputError: It is of another network, FR model, prediction type or schedule.
        CheckpointError: It cannot be read.
    """
    start = load_spec(checkpoint)
    changed = spec.differences(start)
    if start.model.attended_levels == spec.model.attended_levels:
        free = {"model.image_size", "model.attention_resolutions"}
        changed = [name for name in changed if name not in free]
    if spec.identity.model_sha256 and "identity.model_sha256" not in changed:
        changed = [name for name in changed if name != "identity.model_name"]
    if changed:
        raise InputError(
            f"{checkpoint} is another kind of model than this run trains",
            why=f"these differ: {', '.join(changed)}",
            fix="give the settings it was trained with, or leave out --init",
        )
    return load_checkpoint(checkpoint).network.state_dict()
