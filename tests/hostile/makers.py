"""What a child of the fork server does before its command; see ``Sandbox.before``.

This runs where torch is imported already, so that the tests' own process needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crafted import config


def write_checkpoint() -> None:
    """Write the CHECKPOINT that ``crafted.config`` describes to ``model``."""
    import torch

    from id3pm_deploy.recipes import dataclass_from_mapping
    from id3pm_deploy.reference.checkpoint import save_checkpoint
    from id3pm_deploy.reference.unet import IdentityUNet
    from id3pm_deploy.spec import DiffusionSpec

    values = {k: v for k, v in config().items() if not k.startswith("format")}
    spec = dataclass_from_mapping(DiffusionSpec, values, "config")
    torch.manual_seed(0)
    network = IdentityUNet(spec.model, spec.identity.dim)
    save_checkpoint(Path("model"), spec, network.state_dict())


def little_memory() -> None:
    """Let the product believe that 512 MiB of memory are available."""
    from id3pm_deploy.backends import memory_limit

    memory_limit.available_memory = lambda: 512 << 20


def write_canned(folder: Path) -> None:
    """Write what :func:`canned_export` takes."""
    from crafted_onnx import golden_npz, step_model
    from onnx import helper

    folder.mkdir()
    (folder / "golden.npz").write_bytes(golden_npz())
    for name in ("step", "unet"):
        node = helper.make_node("Neg", ["first"], [f"{name}_more"])
        (folder / f"{name}.onnx").write_bytes(step_model(node).SerializeToString())


def canned_export() -> None:
    """Let `export` take what it writes from ``../canned`` instead of making it."""
    import io

    import numpy as np

    from id3pm_deploy.builders import onnx

    def export_graph(*given: Any) -> onnx.ExportedGraph:
        recipe = given[2]
        folder = Path("..") / "canned"
        data = (folder / f"{recipe.graph}.onnx").read_bytes()
        golden = dict(np.load(io.BytesIO((folder / "golden.npz").read_bytes())))
        return onnx.ExportedGraph(data, golden, 1, 1e-7, ())

    onnx.export_graph = export_graph  # type: ignore[assignment]


def colour(faces: Any) -> Any:
    """An FR model that sees nothing but the mean colour."""
    return faces.mean(axis=(1, 2)) / 255 + 1.0


def canary_fr(faces: Any) -> Any:
    """An FR model that sees the same recognisable person in every face."""
    import numpy as np
    from canary import vector

    return np.repeat(vector()[None], len(faces), axis=0)


def verbose_logs() -> None:
    """Print everything that any library logs."""
    import logging

    logging.basicConfig(level=1)


def broken_engine() -> None:
    """Let a bug strike while the engine holds the identity."""
    from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine

    def run(self: Any, step: Any, noise: Any) -> Any:
        identity = self._now.arrays["identity"]
        raise RuntimeError(f"a bug with {identity.shape}")

    OnnxRuntimeEngine._run = run  # type: ignore[method-assign]
