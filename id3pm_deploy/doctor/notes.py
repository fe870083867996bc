"""What is worth knowing though nothing fails because of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from .packages import PACKAGE, SAME_MODULE, UNKNOWN
from .verdicts import Facts


def notes(
    facts: Facts, cpu: Mapping[str, Any], gpu: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Warnings and notes, each with ``level``, ``what`` and ``fix``."""
    found = [*_rivals(facts), *_metadata(facts), *_torch(facts), *_threads(facts, cpu)]
    if gpu["problem"] and gpu["fix"]:
        found.append(_note("warning", gpu["problem"], gpu["fix"]))
    return found


def _note(level: str, what: str, fix: str) -> dict[str, str]:
    return {"level": level, "what": what, "fix": fix}


def _rivals(facts: Facts) -> list[dict[str, str]]:
    found = []
    for group in SAME_MODULE:
        there = [name for name in group if facts.packages.version(name) is not None]
        if len(there) > 1:
            keep = there[1] if "onnxruntime-gpu" in there and facts.gpus else there[0]
            version = facts.packages.version(keep)
            what = (
                f"{' and '.join(there)} are the same module, installed over each other"
            )
            fix = f"pip uninstall -y {' '.join(there)} && pip install {keep}=={version}"
            found.append(_note("warning", what, fix))
    return found


def _metadata(facts: Facts) -> list[dict[str, str]]:
    packages = facts.packages
    version = packages.version(PACKAGE)
    if version not in (None, __version__):
        what = f"the package says it is {__version__}, its metadata {version}"
        again = packages.install_command("core")
        return [_note("warning", what, again)]
    if packages.origin == UNKNOWN:
        what = "the package is not installed: which packages it asks for is not known"
        return [_note("warning", what, "pip install -e . in the checkout")]
    return []


def _torch(facts: Facts) -> list[dict[str, str]]:
    cuda = facts.packages.torch_cuda()
    if cuda is None or facts.gpus:
        return []
    what = f"torch is built for CUDA {cuda} and there is no GPU: it works, and is large"
    return [_note("note", what, "none is needed; a CPU build takes far less space")]


def _threads(facts: Facts, cpu: Mapping[str, Any]) -> list[dict[str, str]]:
    outcome = facts.outcomes.get("onnxruntime")
    threads = outcome.facts.get("threads") if outcome else None
    usable = int(cpu["usable"])
    if not threads or threads <= usable:
        return []
    what = (
        f"ONNX Runtime takes {threads} threads, and {usable} cores are for this process"
    )
    return [_note("warning", what, f"set threads = {usable} in a recipe of your own")]
