"""Step graph to TensorRT plan, in a process of its own.

A native library that crashes or runs out of memory takes only that process with it,
and stopping a build is ending it. The plan goes from file to file and is never held in
this process. What was built before comes from the cache.

TensorRT-RTX builds without a GPU. Plain TensorRT goes through the same code and has
never been run by it: it needs its vendor's package index and a GPU to build.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .. import errors
from ..errors import BuildError, Id3pmError, RecipeError
from ..files import hold, output_error, remove
from ..progress import Tick, progress
from ..recipes import dataclass_from_mapping
from .cache import PlanCache, Served
from .plan_key import Builder, builder_here, depends_on_gpu, plan_key
from .recipe import EngineRecipe, is_portable

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from id3pm_deploy.builders.tensorrt_child import main; main()"
)
_TAIL_BYTES = 2000
_PREFIX = "id3pm-plan-"
_ATTEMPTS = 5
_OF_NOW = ("from_cache", "sha256")
"""Fields of a BuiltPlan that are not kept with it."""
_BOUND_TO = ("gpu_name", "compute_capability", "multiprocessors", "cuda")


@dataclass(frozen=True)
class BuiltPlan:
    """What is known of a plan.

    Attributes:
        flavour: ``tensorrt`` or ``tensorrt_rtx``.
        version: Full version of that library; a plan may run on no other.
        precision: The recipe's, checked in the parsed network.
        compute_capabilities: The recipe's: GPUs that the plan is for; empty where the
            library decided.
        profiles: ``samples`` and ``rows``, each [min, opt, max], in the plan's order.
        layer_types: What ``precision.count_network`` found, with its source.
        warnings: What the library warned of.
        build_seconds: From after the library's import to the finished plan.
        peak_memory_bytes: Most memory of the process that built it.
        plan_types: The same as ``layer_types`` of the finished plan, or why it was
            ``not_counted``.
        peak_device_memory_bytes: Most memory that the build took on the GPU; None
            where that is unknown.
        gpu_name: The GPU that a plan is bound to; None for portable ones.
        compute_capability: The one that a plan is bound to; None for portable ones.
        multiprocessors: As ``gpu_name``.
        cuda: CUDA version of the driver it was built under; None where it does not
            matter.
        plan_key: What it is called in the cache; empty where that is unknown.
        from_cache: Whether it was taken from there; all else is as it was built.
        sha256: Of the bytes that were written, if it was taken from there.
    """

    flavour: str
    version: str
    precision: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[dict[str, Any], ...]
    layer_types: dict[str, Any]
    warnings: tuple[str, ...]
    build_seconds: float
    peak_memory_bytes: int
    plan_types: dict[str, Any] = field(default_factory=dict)
    peak_device_memory_bytes: int | None = None
    gpu_name: str | None = None
    compute_capability: str | None = None
    multiprocessors: int | None = None
    cuda: str | None = None
    plan_key: str = ""
    from_cache: bool = False
    sha256: str = ""


@dataclass(frozen=True)
class PlanIdentity:
    """What decides whether a plan that was built before is the one that is wanted.

    Attributes:
        builder: What of this machine determines it; None where that cannot be known.
        key: What it is called in the cache; empty without a builder.
    """

    builder: Builder | None
    key: str


def plan_identity(
    graph: Path, recipe: EngineRecipe, graph_sha256: str = ""
) -> PlanIdentity:
    """The identity of the plan that :func:`build_plan` would make here.

    Args:
        graph: As there.
        recipe: As there.
        graph_sha256: Of the file ``graph``, where the caller has checked it; empty to
            hash it.

    Raises:
        BuildError: The graph cannot be read.
    """
    builder = builder_here(recipe)
    if builder is None:
        return PlanIdentity(None, "")
    return PlanIdentity(builder, plan_key(graph, recipe, builder, graph_sha256))


def build_plan(
    graph: Path,
    recipe: EngineRecipe,
    cache: PlanCache | None,
    file: Path,
    identity: PlanIdentity | None = None,
) -> BuiltPlan:
    """Build a TensorRT plan, or take it from the cache; a bar shows how far it is.

    Args:
        graph: An ONNX step graph whose dynamic dimensions are called B and R. Weights
            may lie in files beside it.
        recipe: Of the ``tensorrt`` backend.
        cache: Where plans are kept; None to build whatever is there.
        file: Where the plan is written: a path whose folder exists, or the path of a
            ``ScratchFile``, as for ``graph``. After an error nothing is there.
        identity: The plan's; None to find it out.

    Raises:
        RecipeError: The recipe is of another backend.
        MissingPackageError: The recipe's TensorRT is not installed.
        BuildError: The graph cannot be read or parsed, is not of the recipe's
            precision, or TensorRT fails; a signal that ended it is named.
        OutputError: There is no room for the plan or temporary files.
    """
    if recipe.backend != "tensorrt":
        raise RecipeError(
            f"a recipe of the {recipe.backend} backend makes no plan",
            fix="use a recipe whose backend is tensorrt",
        )
    if not graph.is_file():
        raise BuildError(f"there is no graph {graph}", fix="export it first")
    if _descriptor(graph) is None:
        graph = graph.resolve()  # weights lie beside the file, not beside a link to it
    _remove_dead_folders(Path(tempfile.gettempdir()))
    identity = identity or plan_identity(graph, recipe)
    builder, key = identity.builder, identity.key

    def build() -> dict[str, Any]:
        built = _built(graph, recipe, file, key)
        # The file is hashed now, whatever the key was made from.
        if builder is not None and plan_key(graph, recipe, builder) != key:
            raise BuildError(
                f"{graph} has changed while its plan was built", fix="build it again"
            )
        facts = dataclasses.asdict(built)
        for name in _OF_NOW:
            del facts[name]
        return facts

    with _removed_after_failure(file):
        if cache is None or not key:
            served = Served(build())
        else:
            served = cache.get_or_build(key, build, file, _plan_from)
    return dataclasses.replace(
        _plan_from(served.facts), from_cache=served.from_cache, sha256=served.sha256
    )


def _plan_from(facts: dict[str, Any]) -> BuiltPlan:
    """Raises RecipeError for what is none, or one of another release."""
    return dataclass_from_mapping(BuiltPlan, facts, "what is known of the plan")


def _built(graph: Path, recipe: EngineRecipe, file: Path, key: str) -> BuiltPlan:
    """Write a plan to ``file``."""
    with _work_folder() as work:
        request = {
            "work": str(work),
            "graph": os.path.abspath(graph),
            "plan": os.path.abspath(file),
            "recipe": dataclasses.asdict(recipe),
        }
        found = map(_descriptor, (graph, file))
        files = tuple(descriptor for descriptor in found if descriptor is not None)
        with progress(len(recipe.profiles), "build plan") as tick:
            built = _run_child(request, work, tick, files)
    return BuiltPlan(
        flavour=recipe.flavour,
        version=built["version"],
        precision=recipe.precision,
        compute_capabilities=recipe.compute_capabilities,
        profiles=tuple(profile.to_json() for profile in recipe.profiles),
        layer_types=built["layer_types"],
        warnings=tuple(built["warnings"]),
        build_seconds=built["build_seconds"],
        peak_memory_bytes=built["peak_memory_bytes"],
        plan_types=built["plan_types"],
        peak_device_memory_bytes=built.get("peak_device_memory_bytes"),
        plan_key=key,
        **bound_to(recipe, built.get("gpu")),
    )


def bound_to(recipe: EngineRecipe, gpu: dict[str, Any] | None) -> dict[str, Any]:
    """What of the GPU that built it a plan is bound to; None for what it is not."""
    bound: dict[str, Any] = dict.fromkeys(_BOUND_TO)
    if gpu is None or not (recipe.flavour == "tensorrt" or depends_on_gpu(recipe)):
        return bound
    bound["cuda"] = gpu["cuda"]
    if depends_on_gpu(recipe):
        bound["compute_capability"] = gpu["compute_capability"]
    if not is_portable(recipe):
        bound["gpu_name"] = gpu["name"]
        bound["multiprocessors"] = gpu["multiprocessors"]
    return bound


_DESCRIPTOR = re.compile(r"/dev/fd/(\d+)")


def _descriptor(path: Path) -> int | None:
    """The open file that a path stands for, which a child has to inherit."""
    found = _DESCRIPTOR.fullmatch(str(path))
    return int(found[1]) if found else None


@contextlib.contextmanager
def _removed_after_failure(file: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if _descriptor(file) is None:
            with contextlib.suppress(OSError):
                file.unlink()
        raise


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    """A private temporary folder; the child may remove it before we do."""
    place = Path(tempfile.gettempdir())
    folder, descriptor = _held_folder(place)
    with folder as name:
        try:
            yield Path(name)
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _held_folder(place: Path) -> tuple[tempfile.TemporaryDirectory[str], int | None]:
    """A new folder and its lock; None where the file system has no locks.

    Between the two, another build may take the folder for a dead one.
    """
    for attempt in range(_ATTEMPTS):
        try:
            folder = tempfile.TemporaryDirectory(
                prefix=_PREFIX, ignore_cleanup_errors=True
            )
        except OSError as error:
            raise output_error(place, error) from error
        descriptor = hold(Path(folder.name))
        there = os.path.isdir(folder.name)
        if there and (descriptor is not None or attempt + 1 == _ATTEMPTS):
            return folder, descriptor
        if descriptor is not None:
            os.close(descriptor)
        folder.cleanup()
    raise BuildError(
        f"temporary folders in {place} vanish", fix="set TMPDIR to another"
    )


def _remove_dead_folders(place: Path) -> None:
    """Remove those of builds that were killed."""
    with contextlib.suppress(OSError):
        for path in place.glob(f"{_PREFIX}*"):
            descriptor = hold(path) if path.lstat().st_uid == os.geteuid() else None
            if descriptor is not None:
                remove(path)
                os.close(descriptor)


def _run_child(
    request: dict[str, Any], work: Path, tick: Tick, files: tuple[int, ...]
) -> dict[str, Any]:
    """Have a child process serve ``request``; returns its event ``built``.

    It inherits the open ``files``, to which paths in the request may lead.

    It has a session of its own, so that Ctrl-C reaches this process alone, which then
    ends it.
    """
    paths = [os.path.abspath(path) for path in sys.path]
    child = _Child(tick)
    with (
        open(work / "stderr", "w+b") as log,
        subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=work,
            start_new_session=True,
            pass_fds=files,
        ) as process,
    ):
        try:
            child.follow(process, request)
        finally:
            process.kill()
        status = process.wait()
        if child.built is not None:
            return child.built
        raise child.failure(status, _tail(log))


class _Child:
    """What the child has said so far."""

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self._phase = ""
        self._texts: list[str] = []
        self._error: Id3pmError | None = None
        self.built: dict[str, Any] | None = None

    def follow(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> None:
        """Send the request and take events until the child closes its output."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(process.stdin.fileno(), json.dumps(request).encode() + b"\n")
        for line in process.stdout:
            with contextlib.suppress(ValueError, KeyError):  # a line cut short
                self._take(json.loads(line))
        process.wait()

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "phase":
            steps = event["steps"]
            self._phase = event["name"]
            counted = f" {event['done']}/{steps}" if steps > 1 else ""
            self._tick(0, self._phase + counted)
        elif kind == "profiles":
            self._tick(event["done"])
        elif kind == "message":
            self._texts.append(event["text"])
        elif kind == "error":
            make = getattr(errors, event["kind"])
            self._error = make(event["what"], why=event["why"], fix=event["fix"])
        elif kind == "built":
            self.built = event

    def failure(self, status: int, tail: str) -> Id3pmError:
        """Why there is no plan, for a child that ended with ``status``."""
        if self._error is not None:
            return self._error
        where = f"during {self._phase!r}" if self._phase else "before it began to build"
        why = "; ".join([where, *self._texts[-3:], *filter(None, [tail])])
        if status < 0:
            name = _signal_name(-status)
            return BuildError(
                f"the process that builds the plan was ended by {name}",
                why=why,
                fix=_SIGNAL_FIXES.get(name, "report it with the graph that causes it"),
            )
        return BuildError(
            f"the process that builds the plan ended with status {status}",
            why=why,
            fix="report it with the graph that causes it",
        )


_SIGNAL_FIXES = {
    "SIGKILL": "the machine most likely ran out of memory: close other programs, or "
    "build for fewer samples",
    "SIGTERM": "somebody stopped it; start the build again",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(log: BinaryIO) -> str:
    """The last of what the child printed, on one line."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - _TAIL_BYTES))
    return " ".join(log.read().decode("utf-8", "replace").split())
