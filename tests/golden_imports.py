"""Golden files of imports: outputs of ``guided_unet`` on random weights.

``python tests/golden_imports.py`` writes them anew to ``tests/golden/import``: for each
case the flags as JSON, and x, t, y or low_res, and out. The weights are not kept; they
follow from the seed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guided_unet import Network, RandomWeights
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "golden" / "import"
IDENTITY_DIM = 24
BASE: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_heads": 4,
    "num_head_channels": -1,
    "use_new_attention_order": True,
    "class_cond": True,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "noise_schedule": "cosine",
    "diffusion_steps": 1000,
    "predict_xstart": False,
}
_SUPER = {
    "image_size": None,
    "use_new_attention_order": None,
    "class_cond": False,
    "noise_schedule": "linear",
    "large_size": 16,
    "small_size": 4,
}
CASES: dict[str, dict[str, Any]] = {
    "identity": {},
    "head-channels": {"num_head_channels": 16},
    "legacy-order": {"use_new_attention_order": False},
    "legacy-order-head-channels": {
        "use_new_attention_order": False,
        "num_head_channels": 16,
    },
    "unconditional": {"class_cond": False},
    "fixed-variance": {"learn_sigma": False, "predict_xstart": True},
    "conv-resampling": {"resblock_updown": False, "attention_resolutions": "16,8"},
    "no-scale-shift": {"use_scale_shift_norm": False},
    "plain": {
        "use_scale_shift_norm": False,
        "resblock_updown": False,
        "attention_resolutions": "",
        "learn_sigma": False,
        "noise_schedule": "linear",
    },
    "wide-first-level": {"channel_mult": "2,3,4", "attention_resolutions": "16,4"},
    "narrower-in-the-middle": {"channel_mult": "2,1,3", "num_res_blocks": 2},
    "one-level": {"channel_mult": "2", "attention_resolutions": "16"},
    "width-96": {"num_channels": 96, "num_heads": 3, "channel_mult": "1,1"},
    "super-resolution": _SUPER,
    "super-resolution-head-channels": {**_SUPER, "num_head_channels": 16},
    "super-resolution-identity": {**_SUPER, "class_cond": True, "learn_sigma": False},
}


def flags_of(case: str) -> dict[str, Any]:
    """The flags of a case."""
    flags = {**BASE, **CASES[case]}
    return {name: value for name, value in flags.items() if value is not None}


def seed_of(case: str) -> int:
    """The seed of its weights and inputs."""
    return list(CASES).index(case)


def inputs_of(case: str) -> dict[str, Tensor]:
    """x, t, and y or low_res where the network takes them: two pictures."""
    flags = flags_of(case)
    numbers = RandomWeights(1000 + seed_of(case))
    size = flags.get("large_size") or flags["image_size"]
    made = {"x": numbers.of("x", 2, 3, size, size) * 40, "t": torch.tensor([17, 803])}
    if flags["class_cond"]:
        made["y"] = numbers.of("y", 2, IDENTITY_DIM) * 6
    if "small_size" in flags:
        small = flags["small_size"]
        made["low_res"] = numbers.of("low_res", 2, 3, small, small) * 10
    return made


def network_of(case: str) -> tuple[Network, dict[str, Tensor], Tensor]:
    """The network of a case, its inputs and its output, which fills its weights."""
    network = Network(flags_of(case), RandomWeights(seed_of(case)), IDENTITY_DIM)
    inputs = inputs_of(case)
    with torch.inference_mode():
        out = network(**inputs)
    return network, inputs, out


def main() -> None:
    """Write all golden files."""
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        _, inputs, out = network_of(case)
        arrays: dict[str, Any] = {key: value.numpy() for key, value in inputs.items()}
        np.savez_compressed(FOLDER / f"{case}.npz", **arrays, out=out.numpy())
        text = json.dumps(flags_of(case), indent=1, sort_keys=True)
        (FOLDER / f"{case}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
