"""Machines, packages and probes that the doctor's tests make up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from id3pm_deploy import __version__
from id3pm_deploy.doctor.host import Host
from id3pm_deploy.doctor.probe import Outcome, Probe, Prober

ABSENT = Outcome(problem="there is none", absent=True)
WORKING = Outcome(facts={"version": "1.0"})

REQUIRES = (
    "click>=8.1.7",
    "numpy>=1.26",
    "pillow>=10.3",
    "tomli>=2.0.1; python_version < '3.11'",
    "onnxruntime>=1.20; extra == 'cpu'",
    "onnxruntime-gpu>=1.20; extra == 'cuda'",
    "tensorrt>=10.3; extra == 'tensorrt'",
    "cuda-bindings>=12.6.1; extra == 'tensorrt'",
    "tensorrt-rtx-cu13>=1.7; extra == 'rtx'",
    "cuda-bindings>=13; extra == 'rtx'",
    "cuda-bindings>=12.6.1,<13; extra == 'jetson'",
    "torch>=2.7; extra == 'export'",
    "diffusers>=0.34; extra == 'export'",
    "onnx>=1.17; extra == 'export'",
    "onnxruntime>=1.20; extra == 'export'",
    "onnxscript>=0.3; extra == 'export'",
    "safetensors>=0.4.3; extra == 'export'",
    "accelerate>=1; extra == 'train'",
    "id3pm-deploy[export]; extra == 'train'",
)
EXTRAS = ("cpu", "cuda", "tensorrt", "rtx", "jetson", "export", "train")
CORE = {"click": "8.3", "numpy": "2.2", "pillow": "12.0"}
CPU = {**CORE, "onnxruntime": "1.23.2"}
EXPORT = {
    **CPU,
    "torch": "2.9.0",
    "diffusers": "0.40",
    "onnx": "1.20",
    "onnxscript": "0.5",
    "safetensors": "0.6",
}


def put(root: Path, files: Mapping[str, str]) -> Path:
    """Write text files below ``root``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def site(
    folder: Path,
    packages: Mapping[str, str],
    *,
    requires: Sequence[str] | None = REQUIRES,
    extras: Iterable[str] = EXTRAS,
    direct_url: str = "",
) -> Path:
    """A folder of installed packages' metadata, this package's among them."""
    for name, version in packages.items():
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        put(folder, {f"{info}/METADATA": head})
    if requires is not None:
        lines = ["Metadata-Version: 2.1", "Name: id3pm-deploy"]
        lines += [f"Version: {__version__}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {line}" for line in requires]
        info = f"id3pm_deploy-{__version__}.dist-info"
        put(folder, {f"{info}/METADATA": "\n".join(lines) + "\n"})
        if direct_url:
            put(folder, {f"{info}/direct_url.json": direct_url})
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def host(tmp_path: Path, **changes: Any) -> Host:
    """A Linux machine of four cores with nothing on it but ``tmp_path / "site"``."""
    (tmp_path / "root").mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "root": tmp_path / "root",
        "system": "Linux",
        "kernel": "6.1.0",
        "machine": "x86_64",
        "python": "3.11.7",
        "search": (str(tmp_path / "site"),),
        "logical": 4,
        "affinity": 4,
        "home": tmp_path / "home",
        "environment": {},
    }
    return Host(**{**values, **changes})


def prober(**outcomes: Outcome) -> Prober:
    """A prober that answers from ``outcomes``; what is not named is absent."""

    def answer(probe: Probe, host: Host, limit: float) -> Outcome:
        name = probe.name
        if name == "import":
            name = "core" if "numpy" in probe.arguments else probe.arguments[0]
        return outcomes.get(name, ABSENT)

    return answer


def cuda(*capabilities: str) -> Outcome:
    """The driver of a machine with GPUs of these capabilities."""
    devices = [
        {
            "name": "NVIDIA Test",
            "compute_capability": capability,
            "multiprocessors": 16,
            "memory": 8 << 30,
            "integrated": False,
        }
        for capability in capabilities
    ]
    return Outcome(facts={"cuda": "13.0", "devices": devices})


def runtime(threads: int | None = 4, version: str = "1.23.2") -> Outcome:
    """ONNX Runtime that works."""
    providers = ["CPUExecutionProvider"]
    facts = {"version": version, "providers": providers, "threads": threads}
    return Outcome(facts=facts)
