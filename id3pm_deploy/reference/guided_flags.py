"""guided-diffusion's flags as the facts of a model.

The flags of its image models and of its super-resolution models (Dhariwal & Nichol
2021), with the embedding of an identity vector that Kansy et al. (ID3PM) put in the
place of the class embedding. What cannot be seen in the weights, such as the head mode
and the order of rows in the joint projection of attention, is stated here or nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..spec import DiffusionSpec, IdentitySpec, ModelSpec, ScheduleSpec

_NEEDED: dict[str, tuple[type, Any]] = {
    "num_channels": (int, 128),
    "num_res_blocks": (int, 2),
    "attention_resolutions": (str, "16,8"),
    "num_heads": (int, 4),
    "num_head_channels": (int, -1),
    "class_cond": (bool, False),
    "learn_sigma": (bool, False),
    "use_scale_shift_norm": (bool, True),
    "resblock_updown": (bool, False),
    "noise_schedule": (str, "linear"),
    "diffusion_steps": (int, 1000),
    "predict_xstart": (bool, False),
}
"""Type and guided-diffusion's own default."""
_NEEDED_IMAGE: dict[str, tuple[type, Any]] = {
    "image_size": (int, 64),
    "use_new_attention_order": (bool, False),
}
_NEEDED_SUPER: dict[str, tuple[type, Any]] = {
    "large_size": (int, 256),
    "small_size": (int, 64),
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "channel_mult": str,
    "dropout": (int, float),
    "embedding_size": int,
    "identity_scale": type(None),
    "num_heads_upsample": int,
    "rescale_timesteps": bool,
    # guided-diffusion's super-resolution has no such flag and uses the legacy order.
    "use_new_attention_order": bool,
}
IGNORED: dict[str, type | tuple[type, ...]] = {
    # These change training, memory or sampling, not the network's function.
    **dict.fromkeys(
        ("rescale_learned_sigmas", "sigma_small", "use_checkpoint", "use_fp16"), bool
    ),
    **dict.fromkeys(("use_kl", "clip_denoised", "use_ddim"), bool),
    **dict.fromkeys(
        ("batch_size", "microbatch", "lr_anneal_steps", "log_interval"), int
    ),
    **dict.fromkeys(("save_interval", "num_samples", "eval_interval"), int),
    **dict.fromkeys(("lr", "weight_decay", "fp16_scale_growth"), (int, float)),
    **dict.fromkeys(("data_dir", "schedule_sampler", "resume_checkpoint"), str),
    **dict.fromkeys(("model_path", "base_samples", "timestep_respacing"), str),
    "ema_rate": (str, int, float),
}
_MULTIPLIERS = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
}
"""What an empty channel_mult means in image models of a size."""
_MULTIPLIERS_SUPER = {512: "1,1,2,2,4,4", 256: "1,1,2,2,4,4", 64: "1,2,3,4"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **{name: kind for name, (kind, _) in _NEEDED.items()},
    **{name: kind for name, (kind, _) in _NEEDED_IMAGE.items()},
    **{name: kind for name, (kind, _) in _NEEDED_SUPER.items()},
    **_OPTIONAL,
    **IGNORED,
}
_FIX = (
    "state every flag the model was trained with, under guided-diffusion's name; head "
    "mode and query-key-value order cannot be seen in the weights. --defaults says "
    "that the others were left at guided-diffusion's defaults"
)


def flag_type(name: str) -> type | tuple[type, ...] | None:
    """The type of a flag's value; None for a flag that nobody knows."""
    return _TYPES.get(name)


def is_super_resolution(flags: Mapping[str, Any]) -> bool:
    """Whether these are the flags of guided-diffusion's super-resolution."""
    return "large_size" in flags or "small_size" in flags


def _needed(flags: Mapping[str, Any]) -> dict[str, tuple[type, Any]]:
    own = _NEEDED_SUPER if is_super_resolution(flags) else _NEEDED_IMAGE
    return {**_NEEDED, **own}


def with_defaults(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``flags``, and guided-diffusion's defaults of those that it needs beside them."""
    return {name: value for name, (_, value) in _needed(flags).items()} | dict(flags)


def legacy_order(flags: Mapping[str, Any]) -> bool:
    """Whether the joint projection holds (query, key, value) head by head."""
    return not flags.get("use_new_attention_order", False)


def spec_from_flags(
    flags: Mapping[str, Any], identity: IdentitySpec, title: str = ""
) -> DiffusionSpec:
    """The facts in guided-diffusion's flags.

    Args:
        flags: The options the model was trained with, under guided-diffusion's names.
        identity: Which FR model's vectors condition it; ``NO_IDENTITY`` for none.
        title: What the model is called.

    Raises:
        CheckpointError: A flag is missing, unknown or cannot be represented; each is
            named.
    """
    _check_names(flags)
    for name in flags:
        _check_type(name, flags)
    _check_values(flags, identity)
    name = "large_size" if is_super_resolution(flags) else "image_size"
    size = flags[name]
    levels = _multipliers(flags, size)
    # guided-diffusion compares downsampling factors, rounded down, not resolutions.
    factors = {
        size // r for r in _numbers("attention_resolutions", flags) if 0 < r <= size
    }
    per_head = flags["num_head_channels"]
    model = ModelSpec(
        image_size=size,
        base_channels=flags["num_channels"],
        channel_multipliers=levels,
        residual_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(
            size >> level for level in range(len(levels)) if 1 << level in factors
        ),
        num_heads=flags["num_heads"] if per_head == -1 else None,
        num_head_channels=None if per_head == -1 else per_head,
        learned_variance=flags["learn_sigma"],
        scale_shift_norm=flags["use_scale_shift_norm"],
        resblock_updown=flags["resblock_updown"],
        dropout=float(flags.get("dropout", 0.0)),
        low_res_size=flags.get("small_size"),
    )
    return DiffusionSpec(
        model=model,
        identity=identity,
        schedule=ScheduleSpec(flags["noise_schedule"], flags["diffusion_steps"]),
        prediction_type="x0" if flags["predict_xstart"] else "epsilon",
        title=title,
        origin={"converted_from": "guided-diffusion"},
    )


def _check_names(flags: Mapping[str, Any]) -> None:
    needed = _needed(flags)
    unknown = sorted(set(flags) - set(needed) - set(_OPTIONAL) - set(IGNORED))
    missing = sorted(set(needed) - set(flags))
    # guided-diffusion takes no notice of num_heads beside channels a head.
    if "num_heads" in missing and flags.get("num_head_channels", -1) != -1:
        missing.remove("num_heads")
    if unknown or missing:
        named = [f"{name} (default {needed[name][1]})" for name in missing]
        raise CheckpointError(
            "these are not the flags of a guided-diffusion model",
            why=f"missing: {', '.join(named) or 'none'}; unknown: "
            f"{', '.join(f'{name!r:.60}' for name in unknown) or 'none'}",
            fix=_FIX,
        )


def _check_type(name: str, flags: Mapping[str, Any]) -> None:
    wanted = _TYPES[name]
    value = flags[name]
    # A bool is an int to Python.
    if not isinstance(value, wanted) or (
        isinstance(value, bool) and wanted is not bool
    ):
        raise _refused(name, flags, "that value cannot be represented")


def _check_values(flags: Mapping[str, Any], identity: IdentitySpec) -> None:
    heads, steps = flags.get("num_heads"), flags["diffusion_steps"]
    by_number = flags["num_head_channels"] == -1
    dim = flags.get("embedding_size", identity.dim)
    for bad, name, why in (
        (
            flags["class_cond"] and not identity.dim,
            "class_cond",
            "no identity goes with it; say which FR model's vectors it takes",
        ),
        (
            identity.dim and not flags["class_cond"],
            "class_cond",
            f"an identity of {identity.dim} numbers goes with it",
        ),
        (flags["noise_schedule"] not in ("linear", "cosine"), "noise_schedule", ""),
        (
            by_number and flags.get("num_heads_upsample", -1) not in (-1, heads),
            "num_heads_upsample",
            f"num_heads is {heads}",
        ),
        (
            flags.get("rescale_timesteps", False) and steps != 1000,
            "rescale_timesteps",
            f"of {steps} timesteps; timesteps are not rescaled here",
        ),
        (
            identity.dim and dim != identity.dim,
            "embedding_size",
            f"the FR model {identity.model_name!r} has {identity.dim} numbers",
        ),
    ):
        if bad:
            raise _refused(name, flags, why)


def _multipliers(flags: Mapping[str, Any], size: int) -> tuple[int, ...]:
    known = _MULTIPLIERS_SUPER if is_super_resolution(flags) else _MULTIPLIERS
    given = flags.get("channel_mult", "")
    text = given or known.get(size, "")
    if not text:
        why = f"it has to be stated at an image size of {size}"
        raise _refused("channel_mult", {"channel_mult": given}, why)
    return _numbers("channel_mult", {"channel_mult": text})


def _numbers(name: str, flags: Mapping[str, Any]) -> tuple[int, ...]:
    text = flags[name]
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise _refused(name, flags, "it is no list of whole numbers") from None


def _refused(name: str, flags: Mapping[str, Any], why: str) -> CheckpointError:
    return CheckpointError(
        f"the flag {name} = {flags[name]!r:.60} cannot be represented", why=why
    )
