"""Write a model's random weights as guided-diffusion would have: ``full_size.py`` runs
this with MODEL STATE_DICT.pt FLAGS.json."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import random_model
import torch
from torch import Tensor

from id3pm_deploy.files import write_json
from id3pm_deploy.reference import guided_diffusion
from id3pm_deploy.spec import DiffusionSpec


def flags_of(spec: DiffusionSpec) -> dict[str, Any]:
    """guided-diffusion's flags of a model."""
    model, schedule = spec.model, spec.schedule
    flags: dict[str, Any] = {
        "num_channels": model.base_channels,
        "channel_mult": ",".join(map(str, model.channel_multipliers)),
        "num_res_blocks": model.residual_blocks,
        "attention_resolutions": ",".join(map(str, model.attention_resolutions)),
        "num_heads": model.num_heads or 4,
        "num_head_channels": model.num_head_channels or -1,
        "class_cond": bool(spec.identity.dim),
        "learn_sigma": model.learned_variance,
        "use_scale_shift_norm": model.scale_shift_norm,
        "resblock_updown": model.resblock_updown,
        "noise_schedule": schedule.name,
        "diffusion_steps": schedule.timesteps,
        "predict_xstart": spec.prediction_type == "x0",
        "use_new_attention_order": True,
    }
    if model.low_res_size is not None:
        return flags | {
            "large_size": model.image_size,
            "small_size": model.low_res_size,
        }
    flags["image_size"] = model.image_size
    if spec.identity.dim:
        flags["embedding_size"] = spec.identity.dim
    return flags


def their_tensors(spec: DiffusionSpec, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under guided-diffusion's names and in its shapes."""
    ours = random_model.random_network(spec, seed).state_dict()
    places = dict(guided_diffusion._block_names(spec.model))
    thirds: dict[str, list[Tensor]] = {}
    for name in list(ours):
        theirs, _ = guided_diffusion._their_name(name, places)
        thirds.setdefault(theirs, []).append(ours.pop(name))
    made = {}
    for name, parts in thirds.items():  # query, key and value come in this order
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        flat = name.rsplit(".", 2)[-2] in ("qkv", "proj_out")
        made[name] = whole[..., None] if flat and whole.ndim == 2 else whole
    return made


def main() -> None:
    """Write both files."""
    name, weights, flags = sys.argv[1:]
    spec = random_model.load_model(name)
    write_json(Path(flags), flags_of(spec))
    torch.save(their_tensors(spec), weights)


if __name__ == "__main__":
    main()
