"""A folder of diffusers' UNet2DModel as ours.

Its ``config.json`` states the network in full; the noise schedule and what is predicted
stand in ``scheduler_config.json`` beside it, or are given as flags. Whatever of the
config our network would compute differently is refused by its key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..errors import CheckpointError
from ..files import open_plain
from ..reference.guided_diffusion import Converted, convert_tensors
from ..spec import (
    DiffusionSpec,
    IdentitySpec,
    ModelSpec,
    PredictionType,
    ScheduleSpec,
)
from ..versioned_json import parse_json

CLASS_NAME = "UNet2DModel"
FLAGS = (
    "image_size",
    "small_size",
    "noise_schedule",
    "diffusion_steps",
    "prediction_type",
    "learn_sigma",
)
"""What can be given where the folder does not say it."""
_MAX_BYTES = 1 << 20
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None, "identity"),
    "num_class_embeds": (None,),
}
"""Keys and the values that our network computes; the first is diffusers' default."""
_READ = (
    *("sample_size", "in_channels", "out_channels", "time_embedding_dim"),
    *("down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
    *("downsample_type", "upsample_type", "dropout", "attention_head_dim"),
    *("norm_num_groups", "attn_norm_num_groups", "num_train_timesteps"),
)
_DOWN = {"DownBlock2D": "conv", "ResnetDownsampleBlock2D": "resnet"}
_UP = {"UpBlock2D": "conv", "ResnetUpsampleBlock2D": "resnet"}
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
_OLD_ATTENTION = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        CheckpointError: It is missing, too large or not JSON.
    """
    try:
        with open_plain(path, follow=True) as handle:
            data = handle.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError("it is too large")
        found = parse_json(data)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"cannot read {path}", why=why) from error
    return found


def convert_diffusers(
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    flags: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    identity: IdentitySpec,
    title: str = "",
) -> Converted:
    """Convert a UNet2DModel.

    Args:
        config: Its ``config.json``.
        scheduler: The ``scheduler_config.json`` beside it; empty where there is none.
        flags: What neither says, under the names in ``FLAGS``.
        tensors: Its weights; with ``identity_projection.weight`` and ``.bias`` where
            an identity conditions it.
        identity: Which FR model's vectors condition it, or ``NO_IDENTITY``.
        title: What the model is called.

    Raises:
        CheckpointError: A key is missing or cannot be represented, or the tensors are
            not those of the config; each is named.
    """
    _check_flags(flags)
    spec = DiffusionSpec(
        model=_model(config, scheduler, flags),
        identity=identity,
        schedule=_schedule(scheduler, flags),
        prediction_type=_prediction(scheduler, flags),
        title=title,
        origin={"converted_from": "diffusers"},
    )
    conditioned = config.get("class_embed_type") == "identity"
    if conditioned != bool(identity.dim):
        raise _refused(
            "class_embed_type",
            config,
            "its class_labels are projected identities: give --projection with the "
            "layer that makes them, and --identity-model"
            if conditioned
            else "an identity model was given, and the network takes none",
        )
    old = any(".query.weight" in name for name in tensors)
    return convert_tensors(spec, tensors, lambda ours: (_their_name(ours, old), None))


def _their_name(ours: str, old: bool) -> str:
    """diffusers' name of one of our tensors; before 0.18, attention had others."""
    name = ours.removeprefix("unet.")
    if old and ".attentions." in name:
        for new, former in _OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{former}.")
    return name


def _check_flags(flags: Mapping[str, Any]) -> None:
    unknown = sorted(set(flags) - set(FLAGS))
    if unknown:
        raise CheckpointError(
            "these flags say nothing about a diffusers folder",
            why=f"unknown: {', '.join(f'{name!r:.60}' for name in unknown)}",
            fix=f"its config.json states the network; flags may be {', '.join(FLAGS)}",
        )
    wanted = {"learn_sigma": bool, "noise_schedule": str, "prediction_type": str}
    for name, value in flags.items():
        if type(value) is not wanted.get(name, int):
            raise _refused(name, flags, "it is of another type")


def _model(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], flags: Mapping[str, Any]
) -> ModelSpec:
    _check_config(config)
    widths = _whole_numbers("block_out_channels", config)
    base = widths[0]
    if any(width % base for width in widths):
        raise _refused("block_out_channels", config, "not multiples of the first")
    if config.get("time_embedding_dim") not in (None, 4 * base):
        raise _refused("time_embedding_dim", config, f"the network has {4 * base}")
    size = _image_size(config, flags)
    attends, resampling = _blocks(config, len(widths))
    groups = _whole_numbers("norm_num_groups", config, 32)[0]
    scale_shift = config.get("resnet_time_scale_shift") == "scale_shift"
    if config.get("attn_norm_num_groups") not in (
        (groups,) if scale_shift else (None, groups)
    ):
        raise _refused("attn_norm_num_groups", config, f"it has to be {groups}")
    head = config.get("attention_head_dim", 8)
    channels, learned = _channels(config, scheduler, flags)
    return ModelSpec(
        image_size=size,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        residual_blocks=_whole_numbers("layers_per_block", config, 2)[0],
        attention_resolutions=tuple(
            size >> level for level, one in enumerate(attends) if one
        ),
        num_heads=1 if head is None else None,
        num_head_channels=None
        if head is None
        else _whole_numbers("attention_head_dim", config, 8)[0],
        learned_variance=learned,
        scale_shift_norm=scale_shift,
        resblock_updown=resampling == "resnet",
        dropout=_number("dropout", config),
        norm_groups=groups,
        image_channels=channels,
        low_res_size=flags.get("small_size"),
    )


def _check_config(config: Mapping[str, Any]) -> None:
    for key, allowed in _FIXED.items():
        value = config.get(key, allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(
            allowed[0], bool
        ):
            raise _refused(key, config, f"ours is {allowed[0]!r}")
    known = {*_FIXED, *_READ}
    unknown = sorted(key for key in config if key not in known and key[:1] != "_")
    if unknown:
        raise CheckpointError(
            "the config has keys that are not known",
            why=", ".join(f"{key!r:.60}" for key in unknown[:8]),
            fix="check what they change; remove them if it is nothing",
        )


def _image_size(config: Mapping[str, Any], flags: Mapping[str, Any]) -> int:
    size = config.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is None:
        size = flags.get("image_size")
    if size is None:
        raise _missing("sample_size", "config.json", "image_size")
    if type(size) is not int or flags.get("image_size", size) != size:
        raise _refused("sample_size", config, "it is not one number, or the flag's")
    return size


def _blocks(config: Mapping[str, Any], levels: int) -> tuple[list[bool], str]:
    """Which levels attend, finest first, and how the network resamples."""
    down = config.get("down_block_types")
    up = config.get("up_block_types")
    kinds: dict[str, str] = {}
    found: list[list[bool]] = []
    for key, types, plain, attention, how in (
        ("down_block_types", down, _DOWN, "AttnDownBlock2D", "downsample_type"),
        ("up_block_types", up, _UP, "AttnUpBlock2D", "upsample_type"),
    ):
        if not isinstance(types, list) or len(types) != levels:
            raise _refused(key, config, f"a list of {levels} blocks is needed")
        fine_first = types if key.startswith("down") else types[::-1]
        for level, kind in enumerate(fine_first):
            if kind not in (attention, *plain):
                raise _refused(key, config, f"{kind!r:.40} is not known here")
            if level < levels - 1:
                sort = plain.get(kind, config.get(how, "conv"))
                kinds[sort] = how if kind == attention else key
        found.append([kind == attention for kind in fine_first])
    if found[0] != found[1]:
        raise _refused("up_block_types", config, "they do not mirror down_block_types")
    if len(kinds) > 1 or set(kinds) - {"conv", "resnet"}:
        key = kinds.get("resnet") or list(kinds.values())[-1]
        raise _refused(key, config, "all levels have to resample in one way here")
    return found[0], next(iter(kinds), "conv")


def _channels(
    config: Mapping[str, Any], scheduler: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[int, bool]:
    """Channels of a picture, and whether the variance is learned."""
    inside = _whole_numbers("in_channels", config, 3)[0]
    out = _whole_numbers("out_channels", config, 3)[0]
    channels = inside // 2 if "small_size" in flags else inside
    if channels * 2 == inside and out in (channels, 2 * channels):
        pass
    elif out not in (inside, 2 * inside) or channels != inside:
        raise _refused(
            "in_channels",
            config,
            f"out_channels is {out}; a super-resolution model needs the flag "
            "small_size",
        )
    learned = out == 2 * channels
    kind = scheduler.get("variance_type")
    said = flags.get("learn_sigma")
    if said is None and kind is not None:
        said = kind == "learned_range"
    if learned and said is None:
        raise _missing("variance_type", "scheduler_config.json", "learn_sigma")
    if kind == "learned" or (said is not None and said != learned):
        raise CheckpointError(
            f"{out} output channels for {channels} of a picture cannot be represented",
            why=f"variance_type is {kind!r:.40}, the flag learn_sigma "
            f"{flags.get('learn_sigma')}; a learned variance is a learned_range here",
        )
    return channels, learned


def _schedule(scheduler: Mapping[str, Any], flags: Mapping[str, Any]) -> ScheduleSpec:
    for key, none in (("trained_betas", None), ("rescale_betas_zero_snr", False)):
        if scheduler.get(key, none) != none:
            raise _refused(key, scheduler, "there is no such noise schedule here")
    own = scheduler.get("beta_schedule")
    if own is not None and own not in tuple(_SCHEDULES):
        raise _refused("beta_schedule", scheduler, "ours are linear and cosine")
    name = _one(
        ("noise_schedule", flags), ("beta_schedule", scheduler), own and _SCHEDULES[own]
    )
    steps = _one(
        ("diffusion_steps", flags),
        ("num_train_timesteps", scheduler),
        scheduler.get("num_train_timesteps"),
    )
    if name not in ("linear", "cosine"):
        raise _refused("noise_schedule", flags, "ours are linear and cosine")
    if type(steps) is not int or steps < 2:
        raise _refused("num_train_timesteps", scheduler, "it is no number of steps")
    if own == "linear":
        for key, value in (("beta_start", 1e-4), ("beta_end", 0.02)):
            wanted = value * 1000 / steps
            if key not in scheduler:
                raise _missing(key, "scheduler_config.json", "noise_schedule")
            if not math.isclose(_number(key, scheduler), wanted, rel_tol=1e-6):
                raise _refused(key, scheduler, f"it is {wanted:g} in our schedule")
    return ScheduleSpec(cast(Any, name), steps)


def _prediction(
    scheduler: Mapping[str, Any], flags: Mapping[str, Any]
) -> PredictionType:
    own = scheduler.get("prediction_type")
    if own is not None and own not in tuple(_PREDICTIONS):
        raise _refused(
            "prediction_type", scheduler, f"known: {', '.join(_PREDICTIONS)}"
        )
    given = dict(flags)
    if "prediction_type" in given:
        text = given["prediction_type"]
        given["prediction_type"] = _PREDICTIONS.get(text, text)
    found = _one(
        ("prediction_type", given),
        ("prediction_type", scheduler),
        own and _PREDICTIONS[own],
    )
    if found not in _PREDICTIONS.values():
        raise _refused("prediction_type", flags, "known: epsilon, x0, v")
    return cast(PredictionType, found)


def _one(
    flag: tuple[str, Mapping[str, Any]], key: tuple[str, Mapping[str, Any]], own: Any
) -> Any:
    """What a flag and the scheduler's config say, if one does and they agree."""
    said = flag[1].get(flag[0])
    if own is None and said is None:
        raise _missing(key[0], "scheduler_config.json", flag[0])
    if own is not None and said is not None and own != said:
        raise _refused(flag[0], flag[1], f"{key[0]} in scheduler_config.json is {own}")
    return said if own is None else own


def _whole_numbers(
    key: str, values: Mapping[str, Any], default: int | None = None
) -> list[int]:
    found = values.get(key, default)
    numbers = found if isinstance(found, list) else [found]
    if not numbers or any(type(one) is not int or one < 1 for one in numbers):
        raise _refused(key, values, "it has to be stated in whole numbers")
    return numbers


def _number(key: str, values: Mapping[str, Any]) -> float:
    found = values.get(key, 0.0)
    if type(found) not in (int, float):
        raise _refused(key, values, "it is no number")
    return float(found)


def _missing(key: str, where: str, flag: str) -> CheckpointError:
    return CheckpointError(
        f"nothing says what {flag} is",
        why=f"{key} is missing in {where}",
        fix=f"state {flag} in --flags, or put {where} there, as diffusers saves it",
    )


def _refused(key: str, values: Mapping[str, Any], why: str) -> CheckpointError:
    return CheckpointError(
        f"{key} = {values.get(key)!r:.80} cannot be represented", why=why
    )
