"""From a run's ``record.json`` back to what has to be done to repeat it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import __version__
from .attributes import Attributes
from .backends.base import EngineInfo
from .control.annealing import Annealing
from .control.shots import Grid, shot_from_json
from .errors import InputError
from .generate import CONTROL_VERSION, RECORD_FORMAT, RECORD_VERSION, SampleSettings
from .guidance import GuidanceSettings
from .models import Model
from .solvers import SolverSettings, solver_table

_LOG = logging.getLogger("id3pm_deploy")
_MOST_BYTES = 64 * 2**20

T = TypeVar("T")


@dataclass(frozen=True)
class Repeat:
    """What a record asks for.

    Attributes:
        settings: Of the first stage, or the only one.
        second: Of the second; None where there was none.
        identities: Ids of whom each sample shows.
        first_sample: Number of the first sample; the others follow it.
        given: Whether the pictures were made of small ones that were given.
        attributes: What is stated of each sample.
        grid: What else each is made of; None where nothing else was asked for.
    """

    settings: SampleSettings
    second: SampleSettings | None
    identities: tuple[str, ...]
    first_sample: int
    given: bool
    attributes: tuple[Attributes, ...]
    grid: Grid | None = None


def read_record(record: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """A run record, from its file or the folder of the run if need be.

    Raises:
        InputError: It cannot be read, or is none that this release can repeat.
    """
    if not isinstance(record, Mapping):
        path = Path(record)
        path = path / "record.json" if path.is_dir() else path
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError("it is too large")
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"the run record {path} cannot be read",
                why=str(error),
                fix="give the record.json that `sample` wrote",
            ) from error
    if not isinstance(record, Mapping) or record.get("format") != RECORD_FORMAT:
        raise InputError(
            "this is no run record", fix="give the record.json that `sample` wrote"
        )
    if record.get("format_version") not in (RECORD_VERSION, CONTROL_VERSION):
        raise InputError(
            f"the run record's format is version {record.get('format_version')!r}",
            why=f"this release, {__version__}, repeats versions {RECORD_VERSION} and "
            f"{CONTROL_VERSION}",
            fix=f"use release {record.get('tool_version')!r} of id3pm-deploy",
        )
    return record


def repeat(record: Mapping[str, Any], model: Model, second: Model | None) -> Repeat:
    """What has to be done, if these models are the record's.

    Raises:
        InputError: They are not, or a part of the record is missing or not understood.
    """
    _check_weights(record, model, "the model")
    enlarged = record.get("super_resolution")
    if enlarged is not None and second is None:
        raise InputError(
            "the record is of two stages, and there is no second one here",
            fix="load the model with super_resolution=MODEL",
        )
    try:
        samples = [(int(s["sample"]), str(s["identity"])) for s in record["samples"]]
        stated = tuple(dict(s.get("attributes", {})) for s in record["samples"])
        shared = {name: record[name] for name in ("seed", "count")}
        shared["preset"] = record.get("preset")
        own = _settings(record, model, shared)
        grid = _grid(record)
        if (annealing := record.get("annealing")) is not None:
            moved = _dataclass_of(Annealing, annealing)
            own = dataclasses.replace(own, annealing=moved)
        other = None
        if enlarged is not None and second is not None:
            _check_weights(enlarged, second, "the second stage")
            other = _settings(enlarged, second, shared)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "the run record is damaged", why=f"{type(error).__name__}: {error}"
        ) from error
    numbers = [number for number, _ in samples]
    if not samples or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise InputError(
            "the run record is damaged", why="its samples do not follow each other"
        )
    whose = tuple(who for _, who in samples)
    given = record.get("low_res") is not None
    return Repeat(own, other, whose, numbers[0], given, stated, grid)


def _grid(record: Mapping[str, Any]) -> Grid | None:
    """The shots of a record; None where it has none.

    Raises:
        InputError, KeyError, TypeError: Something is missing or not understood.
    """
    if "grid" not in record:
        return None
    shots = [
        shot_from_json(str(one["identity"]), one.get("attributes", {}), one["shot"])
        for one in record["samples"]
    ]
    own = record["grid"]
    labels = [tuple(map(str, own[name])) for name in ("rows", "columns")]
    return Grid(tuple(shots), str(own["title"]), *labels)


def note_engine(record: Mapping[str, Any], info: EngineInfo) -> None:
    """Log what of the engine differs from the record's: the same pictures can then be
    expected within the tolerances of the engines only."""
    recorded = record.get("engine")
    if not isinstance(recorded, Mapping):
        return
    here = dataclasses.asdict(info)
    other = [
        f"{name} {recorded.get(name)!r} then, {value!r} now"
        for name, value in here.items()
        if recorded.get(name) != value
    ]
    if other:
        _LOG.warning(
            "the record was made by another engine (%s); pictures may differ slightly",
            "; ".join(other),
        )


def _check_weights(record: Mapping[str, Any], model: Model, which: str) -> None:
    wanted = str(record.get("checkpoint_sha256"))
    if wanted != model.weights_sha256:
        raise InputError(
            f"{which} is not the one that the run record names",
            why=f"its weights have the SHA-256 {model.weights_sha256[:16]}…, the "
            f"record's {wanted[:16]}…",
            fix=f"load the model {record.get('checkpoint')!r}",
        )


def _settings(
    record: Mapping[str, Any], model: Model, shared: Mapping[str, Any]
) -> SampleSettings:
    solver = _dataclass_of(SolverSettings, record["solver"])
    table = solver_table(model.spec, solver)
    if table.settings != solver or len(table) != record["table_rows"]:
        raise InputError(
            "this release makes another solver table of the record's settings",
            why=f"{len(table)} rows, the record has {record['table_rows']}",
            fix=f"use release {record.get('tool_version')!r} of id3pm-deploy",
        )
    return SampleSettings(
        solver=solver,
        guidance=_dataclass_of(GuidanceSettings, record["guidance"]),
        batch_size=record["batch_size"],
        **shared,
    )


def _dataclass_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """A settings class from its JSON; what it does not know is not ignored."""
    known = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise InputError(
            f"the run record has settings that this release does not know: "
            f"{', '.join(unknown)}",
            fix="use the release of id3pm-deploy that wrote it",
        )
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**lists)
