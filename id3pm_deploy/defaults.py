"""Names and defaults that commands show and the library uses; imports nothing.

The defaults are those that did best with the shipped checkpoint; README.md has the
figures.
"""

from __future__ import annotations

SOLVERS = (
    "ddpm",
    "ddim",
    "euler",
    "heun",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "unipc-2",
    "unipc-3",
)
SPACINGS = ("linspace", "linspace_open", "leading", "trailing")
VARIANCES = ("learned", "fixed_small", "fixed_large")
FINAL_ORDERS = ("lower", "full")
GUIDANCE_SCHEDULES = ("constant", "linear", "cosine")
GUIDANCE_ROWS = ("parallel", "sequential")
PRECISIONS = ("float32", "float16", "bfloat16")
ORT_GPU_BACKENDS = ("onnxruntime-cuda", "onnxruntime-tensorrt")
BACKENDS = ("auto", "onnxruntime", *ORT_GPU_BACKENDS, "tensorrt", "torch")

SOLVER = "ddpm"
STEPS = 50
GUIDANCE = 2.0
COUNT = 4
BATCH_SIZE = 8
MAX_BATCH_SIZE = 64

SR_SOLVER = "ddpm"
SR_STEPS = 50
SR_GUIDANCE = 1.0
SR_BATCH_SIZE = 1
"""Of a second stage. guided-diffusion's own setting is 250 steps of this solver."""
