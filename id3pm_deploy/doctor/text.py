"""What the doctor found, as lines for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_LABEL = 10
_NAME = 14
_WIDTH = 88
_FEW = 3

Row = tuple[str, str]
"""A name, empty for text of its own, and what is said of it."""


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The findings of ``examine`` as text, the verdict last.

    Commands that put something right stand on a line of their own, unbroken.
    """
    package, system = found["package"], found["system"]
    yield (
        f"id3pm-deploy {package['version']} ({package['origin']}), "
        f"Python {system['python']}, {system['name']}, {system['kernel']} on "
        f"{system['machine']}"
    )
    yield ""
    yield from _labelled("CPU", _cpu(found["cpu"]))
    yield from _labelled("memory", [_memory(found["memory"])])
    yield from _labelled("GPU", _gpu(found["gpu"]))
    yield from _labelled("modules", _modules(found["modules"]))
    yield from _labelled("extras", _extras(found["extras"]))
    yield from _labelled("files", _files(found))
    yield ""
    yield from _recipes(found["recipes"])
    yield from _notes(found["notes"])
    yield ""
    yield from _tiers(found["tiers"])
    yield from _asked(found["asked"])


def size_text(size: int | None) -> str:
    """Bytes in GiB, for people."""
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _labelled(label: str, rows: Iterable[Row]) -> Iterator[str]:
    head = label
    for name, text in rows:
        first = f"{head:<{_LABEL}}" + (f"{name:<{_NAME}}" if name else "")
        yield from _wrapped(text, first, " " * len(first))
        head = ""


def _wrapped(text: str, first: str, others: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _few(words: Sequence[str]) -> str:
    """The first few of a list and the number of the others."""
    more = len(words) - _FEW
    if more < 2:
        return ", ".join(words)
    return f"{', '.join(words[:_FEW])} and {more} more"


def _cpu(cpu: Mapping[str, Any]) -> Iterator[Row]:
    yield "", cpu["model"]
    cores = f"{cpu['usable']} cores for this process; the machine has "
    cores += f"{cpu['physical'] or 'an unknown number of'} cores, "
    cores += f"{cpu['logical']} threads"
    if cpu["affinity"] != cpu["logical"]:
        cores += f"; affinity {cpu['affinity']}"
    if cpu["quota"] is not None:
        cores += f"; quota {cpu['quota']:g}"
    yield "", cores
    if cpu["features"]:
        has = [name for name, there in cpu["features"].items() if there]
        lacks = [name for name, there in cpu["features"].items() if not there]
        text = (
            f"has {' '.join(has) or 'nothing'}; has not {' '.join(lacks) or 'nothing'}"
        )
        yield "", text
    if cpu["onnxruntime_threads"]:
        yield "", f"ONNX Runtime takes {cpu['onnxruntime_threads']} threads"
    if cpu["omp_num_threads"] is not None:
        yield "", f"OMP_NUM_THREADS={cpu['omp_num_threads']} (torch heeds it)"


def _memory(memory: Mapping[str, Any]) -> Row:
    text = f"{size_text(memory['total'])}, {size_text(memory['available'])} available"
    if memory["limit"] is None:
        return "", f"{text}, no limit by a control group"
    return "", f"{text}, limited to {size_text(memory['limit'])} by a control group"


def _gpu(gpu: Mapping[str, Any]) -> Iterator[Row]:
    for one in gpu["devices"]:
        shared = " shared with the CPU" if one["integrated"] else ""
        yield (
            "",
            f"{one['name']}: compute capability {one['compute_capability']}, "
            f"{one['multiprocessors']} multiprocessors, {size_text(one['memory'])}"
            f"{shared}",
        )
    if gpu["cuda"]:
        driver = f"driver {gpu['driver']}, " if gpu["driver"] else ""
        yield "", f"{driver}CUDA up to {gpu['cuda']}"
    if gpu["jetson"]:
        jetson = gpu["jetson"]
        yield (
            "",
            f"{jetson['model']}, Jetson Linux {jetson['l4t'] or 'unknown'}, "
            f"JetPack {jetson['jetpack'] or 'unknown'}",
        )
    if gpu["problem"]:
        yield "", f"none to use: {gpu['problem']}"


def _modules(modules: Mapping[str, Any]) -> Iterator[Row]:
    for name, one in modules.items():
        if name == "core":
            if not one["ok"]:
                yield "", one["problem"]
            continue
        state = one["version"] or "installed"
        if not one["ok"]:
            state = "not installed" if one["absent"] else one["problem"]
        providers = ", ".join(one.get("providers", []))
        yield name, f"{state} ({providers})" if providers else state


def _extras(extras: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """What each extra lacks and has; a package is named where it is first met."""
    met: set[str] = set()
    for extra in extras:
        bad: list[str] = []
        good: list[str] = []
        again: list[str] = []
        for one in extra["requirements"]:
            have = f" (have {one['found']})" if one["found"] else ""
            text = f"{one['by']} {one['found']}" if one["ok"] else one["requirement"]
            if text in met:
                again += [] if one["ok"] else [text]
                continue
            met.add(text)
            (good if one["ok"] else bad).append(text if one["ok"] else text + have)
        bad += again if len(again) < _FEW else [f"{len(again)} named above"]
        state = f"lacks {', '.join(bad)}" if bad else "complete"
        there = f"; has {', '.join(good)}" if good else ""
        yield extra["name"], state + there


def _files(found: Mapping[str, Any]) -> Iterator[Row]:
    checkpoint = found["checkpoint"]
    yield "checkpoint", "whole" if checkpoint["ok"] else checkpoint["problem"]
    for folder in found["folders"]:
        state = folder["problem"] or f"writable, {size_text(folder['free'])} free"
        yield folder["name"], f"{folder['place']}: {state}"


def _recipes(recipes: Mapping[str, Any]) -> Iterator[str]:
    exports, engines = (
        {f"{kind}/{one['name']}": one for one in recipes[kind]}
        for kind in ("export", "engines")
    )
    width = max(18, *(len(name) + 2 for name in ("", *exports, *engines)))
    yield f"{'recipe':<{width}}{'from a CHECKPOINT':<20}{'from a BUNDLE':<16}run"
    for name, one in exports.items():
        yield f"{name:<{width}}{_word(one['build']):<20}{'-':<16}-"
    if recipes["export"]:  # all exports need the same
        yield from _missing("export", recipes["export"][0]["build"])
    for name, one in engines.items():
        whole, build, run = one["build_from_checkpoint"], one["build"], one["run"]
        yield f"{name:<{width}}{_word(whole):<20}{_word(build):<16}{_word(run)}"
        yield from _missing("build", build)
        yield from _missing("run", run)
    if recipes["problem"]:
        yield from _wrapped(recipes["problem"], "  ", "    ")


def _word(verdict: Mapping[str, Any]) -> str:
    return "yes" if verdict["ok"] else "no"


def _missing(what: str, verdict: Mapping[str, Any]) -> Iterator[str]:
    if not verdict["ok"]:
        text = f"to {what} it needs {'; '.join(verdict['missing'])}"
        yield from _wrapped(text, "  ", "    ")
        yield f"    fix: {verdict['fix']}"


def _notes(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if found:
        yield ""
    for one in found:
        yield from _wrapped(f"{one['level']}: {one['what']}", "", "  ")
        yield f"  fix: {one['fix']}"


def _tiers(tiers: Mapping[str, Any]) -> Iterator[str]:
    device = tiers["device"]
    good = f"works, with {', '.join(device['engines'])}"
    for name, tier in tiers.items():
        state = good if name == "device" else "complete"
        if not tier["ok"]:
            state = f"lacks {_few(tier['missing'])}"
        yield from _wrapped(state, f"{name + ' tier':<{_NAME}}", " " * _NAME)
        if not tier["ok"]:
            yield f"{'':<{_NAME}}fix: {tier['fix']}"


def _asked(asked: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for one in asked:
        can = "can" if one["ok"] else "cannot"
        need = "" if one["ok"] else f": it needs {'; '.join(one['missing'])}"
        text = f"{one['kind']} {one['name']} {can} be built here{need}"
        yield from _wrapped(text, "", "  ")
        if not one["ok"]:
            yield f"  fix: {one['fix']}"
