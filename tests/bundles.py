"""Bundles of a few bytes: the format does not care what is in the files.

No torch is imported here, so that these tests are quick.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from id3pm_deploy.builders.tensorrt import BuiltPlan
from id3pm_deploy.bundle import (
    BASE,
    MANIFEST_NAME,
    SUPER_RESOLUTION,
    Bundle,
    EngineEntry,
    GraphEntry,
    SecondStage,
    open_bundle,
)
from id3pm_deploy.bundle.writer import BundleWriter, bundle_writer
from id3pm_deploy.spec import (
    NO_IDENTITY,
    AttributeSpec,
    DiffusionSpec,
    IdentitySpec,
    ModelSpec,
    ScheduleSpec,
)

SHA = "0" * 64
SPEC = DiffusionSpec(
    ModelSpec(
        image_size=16,
        base_channels=32,
        channel_multipliers=(1, 2),
        residual_blocks=1,
        attention_resolutions=(8,),
        num_head_channels=16,
    ),
    IdentitySpec(16, "test model", SHA),
)
GRAPH = GraphEntry("", "step", "float32", 20, 4, 32, 1e-6, 1e-5, 1e-4, "")
GOLDEN = Path(__file__).parent / "golden"
SEED = bytes(range(32))
"""Of the Ed25519 key that signed the golden bundle; a secret of nobody."""


def new_writer(folder: Path, graph: bytes = b"graph") -> BundleWriter:
    """A writer with a step graph of these bytes, of a checkpoint of zeros."""
    writer = bundle_writer(folder, SPEC, SHA, "0")
    file = writer.add_file("step-float32", ".onnx", graph)
    golden = writer.add_file("golden", ".npz", b"golden")
    writer.add_graph(dataclasses.replace(GRAPH, file=file, golden=golden))
    return writer


def new_engine(target: str, graph: str, file: str | None = None) -> EngineEntry:
    """An engine of ONNX Runtime, or of TensorRT where ``file`` is its plan."""
    backend, flavour = "onnxruntime", "cpu"
    if file is not None:
        backend, flavour = "tensorrt", "tensorrt_rtx"
    return EngineEntry(
        target, backend, flavour, "1", "float32", graph=graph, file=file or graph
    )


def with_plan(folder: Path, plan: bytes = b"plan", target: str = "rtx") -> EngineEntry:
    """Commit a bundle that holds a plan; returns its entry."""
    writer = new_writer(folder)
    graph = writer.commit().manifest.graphs[0].file
    entry = new_engine(target, graph, writer.add_file(target, ".plan", plan))
    writer.add_engine(entry)
    writer.commit()
    return entry


def plan_builder(plan: bytes = b"plan", **facts: Any) -> Callable[..., BuiltPlan]:
    """What can stand in for ``build_plan``: it writes ``plan``.

    Args:
        plan: The bytes.
        facts: Fields of the BuiltPlan that are to be others.
    """
    built = BuiltPlan(
        "tensorrt_rtx",
        "1",
        "float32",
        (),
        (),
        {},
        (),
        build_seconds=1.0,
        peak_memory_bytes=5,
    )

    def build(
        graph: Path, recipe: object, cache: object, file: Path, identity: object
    ) -> BuiltPlan:
        assert graph.read_bytes()
        file.write_bytes(plan)
        return dataclasses.replace(built, **facts)

    return build


def files_in(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the files in a folder, without the lock."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


def targets(folder: Path) -> list[str]:
    """Targets of the engines of a bundle."""
    return [entry.target for entry in open_bundle(folder).manifest.engines]


def edit_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the parsed manifest of a bundle in place."""
    path = folder / MANIFEST_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def chain_specs(**second: Any) -> tuple[DiffusionSpec, DiffusionSpec]:
    """A base of 16x16 pictures without identity, and what enlarges them to 32x32.

    Args:
        second: Fields of the second one's ModelSpec to change.
    """
    base = dataclasses.replace(SPEC, identity=NO_IDENTITY)
    model = dataclasses.replace(SPEC.model, image_size=32, low_res_size=16)
    large = dataclasses.replace(model, **second)
    return base, dataclasses.replace(base, model=large, schedule=ScheduleSpec("linear"))


def write_chain(folder: Path) -> Bundle:
    """A bundle of two stages, with a graph and an engine each."""
    base, large = chain_specs()
    second = SecondStage(large, "1" * 64)
    writer = bundle_writer(folder, base, SHA, "0", second)
    for stage in (BASE, SUPER_RESOLUTION):
        file = writer.add_file("step-float32", ".onnx", stage.encode())
        golden = writer.add_file("golden", ".npz", b"golden")
        entry = dataclasses.replace(GRAPH, file=file, golden=golden, stage=stage)
        writer.add_graph(entry)
        engine = new_engine("cpu", file)
        writer.add_engine(dataclasses.replace(engine, stage=stage))
    return writer.commit()


ATTRIBUTES = (
    AttributeSpec("age", "numeric", 0.0, 100.0),
    AttributeSpec("glasses", "categorical", categories=("no", "reading", "sun")),
)


def write_golden(folder: Path, attributes: tuple[AttributeSpec, ...] = ()) -> Bundle:
    """The golden bundle of format version 4, from fixed inputs; not signed. That of
    version 5 where there are ``attributes``: all are the base's, one the second
    stage's."""
    origin = {"steps": 3, "σ": [0.5, 1e-9]}
    spec = dataclasses.replace(
        SPEC, title="golden", origin=origin, attributes=attributes
    )
    large = dataclasses.replace(
        chain_specs()[1], title="golden, enlarged", attributes=attributes[:1]
    )
    second = SecondStage(large, "cd" * 32)
    writer = bundle_writer(folder, spec, "ab" * 32, "0.1.0", second)
    made_with = {"id3pm-deploy": "0.1.0", "torch": "2.13.0"}
    step = writer.add_file("step-float16", ".onnx", bytes(range(256)) * 3)
    unet = writer.add_file("unet-float32", ".onnx", b"a bare UNet" * 50)
    large_step = writer.add_file("sr-step-bfloat16", ".onnx", b"a larger one" * 40)
    golden = writer.add_file("golden", ".npz", b"")
    plan = writer.add_file("rtx", ".plan", b"native code" * 47)
    large_plan = writer.add_file("rtx", ".plan", b"more of it" * 40)
    entry = GraphEntry(step, "step", "float16", 20, 4, 32, 1 / 3e4, 0.01, 0.05, golden)
    body = {"islands": ["embedding", "norm", "head"]}
    entry = dataclasses.replace(entry, recipe="float16", made_with=made_with, body=body)
    writer.add_graph(entry)
    writer.add_graph(
        dataclasses.replace(
            entry,
            file=large_step,
            precision="bfloat16",
            recipe="mine",
            stage=SUPER_RESOLUTION,
            body={},
        )
    )
    entry = GraphEntry(unet, "unet", "float32", 20, 0, 0, 2e-7, 1e-5, 1e-4, golden)
    writer.add_graph(dataclasses.replace(entry, recipe="float32"))
    writer.add_engine(
        EngineEntry("cpu", "onnxruntime", "cpu", "1.32.0", "float16", step, step)
    )
    rtx = EngineEntry(
        target="rtx",
        backend="tensorrt",
        flavour="tensorrt_rtx",
        version="1.7.1.116",
        precision="float16",
        graph=step,
        file=plan,
        compute_capabilities=("8.6", "8.9"),
        gpu_name="a GPU",
        compute_capability="8.6",
        multiprocessors=82,
        cuda="13.0",
        profiles=({"samples": [1, 4, 8], "rows": [1, 8, 16]},),
        layer_types={"CONVOLUTION": {"HALF": 12, "FLOAT": 1}},
        build_seconds=12.345,
        peak_memory_bytes=4 << 30,
        threads=0,
        warnings=("slow here",),
        made_with={"id3pm-deploy": "0.1.0"},
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        plan_types={"source": "plan", "layers": {"HALF": 40, "FLOAT": 2}},
        peak_device_memory_bytes=3 << 30,
        settings={"precision": "float16", "workspace_share": 0.5, "threads": 0},
        plan_key="ef" * 32,
    )
    writer.add_engine(rtx)
    writer.add_engine(
        dataclasses.replace(
            rtx,
            precision="bfloat16",
            graph=large_step,
            file=large_plan,
            stage=SUPER_RESOLUTION,
            hardware_compatibility="none",
            version_compatible=False,
            plan_types={},
            peak_device_memory_bytes=None,
            settings={},
            plan_key="",
        )
    )
    return writer.commit()
