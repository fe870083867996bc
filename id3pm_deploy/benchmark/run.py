"""The benchmark: open the columns, hold them against each other, time them in turns."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Id3pmError, InputError
from ..progress import progress
from .case import Case, CaseSettings, check_batch_sizes, open_case
from .checks import checked
from .cold_start import MEMORY_METHOD, cold_start, reason_of
from .column import Runner
from .columns import check_gpu, chosen_columns
from .live import Live
from .machine import Watch, facts, versions
from .operations import step_cost
from .rates import Rates, cpu_rates, gpu_rates
from .result import ABSENT, FAILED, FORMAT, TIMED, measured
from .rounds import Plan, Variant, turns

MAX_ROUNDS = 10_000
PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "diffusers",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
)
_LIMIT_METHOD = (
    "the larger of operations and bytes over the measured rates; operations: two a "
    "multiply-add of convolutions, linear layers and attention's products; bytes: "
    "weights once, and what each of these reads and writes, in the body's precision"
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchmarkSettings:
    """How a benchmark is done.

    Attributes:
        columns: Names; None takes all.
        batch_sizes: B, one after the other.
        rounds: Turns of every column at every batch size.
        row_repeats: Table rows timed one by one in a turn, or as many replayed at once.
        cold_starts: New processes for each column; 0 leaves this and memory out.

    Raises:
        InputError: A number is out of range.
    """

    columns: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 20
    row_repeats: int = 5
    cold_starts: int = 1

    def __post_init__(self) -> None:
        check_batch_sizes(self.batch_sizes)
        for name, low, high in (
            ("rounds", 1, MAX_ROUNDS),
            ("row_repeats", 1, MAX_ROUNDS),
            ("cold_starts", 0, 100),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(
                    f"{name.replace('_', ' ')} must be from {low} to {high}",
                    why=f"it is {value}",
                )


def run_benchmark(
    bundle: Path,
    checkpoint: Path | None = None,
    of: CaseSettings | None = None,
    how: BenchmarkSettings | None = None,
    say: Say = lambda _: None,
    command: str = "",
) -> dict[str, Any]:
    """Measure a bundle on this machine.

    Args:
        bundle: A BUNDLE.
        checkpoint: What it was made from, for the columns that need PyTorch's weights.
        of: What is computed.
        how: How it is measured.
        say: Called with what is done, a line at a time.
        command: What the result gives as its command.

    Returns:
        What ``benchmark.json`` holds. A column that computes something else has the
        status ``wrong`` and no figures.

    Raises:
        InputError: A setting is out of range or does not fit the model.
        BundleError, CheckpointError, EngineError: See :func:`open_case`.
    """
    of, how = of or CaseSettings(), how or BenchmarkSettings()
    chosen = chosen_columns(how.columns)
    case = open_case(bundle, checkpoint, of)
    live = [Live(column) for column in chosen]
    watch = Watch()
    try:
        _cold_starts(case, live, how, say)
        _open(case, live, say)
        rates = _rates(case, live, say)
        references: dict[str, str] = {}
        for samples in how.batch_sizes:
            say(f"checking the outputs at batch size {samples}")
            ready, reference = checked(case, live, samples, first=not references)
            references[str(samples)] = reference
            _timed(case, ready, samples, how, rates)
    finally:
        for one in live:
            one.close()
    for one in live:
        _settle_status(one)
    return {
        "format": FORMAT.name,
        "format_version": FORMAT.version,
        "tool_version": __version__,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {**facts(), "gpus": _gpus()},
        "versions": versions(PACKAGES),
        "load": watch.stop().to_json(),
        "model": _model_facts(case),
        "settings": {**of.to_json(), **dataclasses.asdict(how)},
        "reference": references,
        "rates": {key: one.to_json() for key, one in rates.items()},
        "methods": {"limit": _LIMIT_METHOD, "memory": MEMORY_METHOD},
        "columns": {one.column.name: one.to_json() for one in live},
    }


def _settle_status(one: Live) -> None:
    """A column that no batch size was timed of has failed, whatever the reason."""
    if one.status == TIMED and not any("row_ms" in b for b in one.batches.values()):
        reasons = [b["reason"] for b in one.batches.values() if "reason" in b]
        one.status, one.reason = FAILED, "; ".join(dict.fromkeys(reasons))


def _model_facts(case: Case) -> dict[str, Any]:
    model = case.model.spec.model
    return {
        "title": case.model.title,
        "weights_sha256": case.model.weights_sha256,
        "picture": [model.image_channels, model.image_size, model.image_size],
        "precision": case.graph.precision,
        "graph": case.graph.file,
        "table_rows": len(case.table),
        "operations_a_unet_row": step_cost(case.model.spec, 1, "float32").operations,
    }


def _gpus() -> list[str]:
    from ..doctor.cuda_driver import DriverError, cuda_facts, load_library

    try:
        found = cuda_facts(load_library("cuda"))
    except (OSError, DriverError):
        return []
    return [str(device["name"]) for device in found["devices"]]


def _cold_starts(
    case: Case, live: Sequence[Live], how: BenchmarkSettings, say: Say
) -> None:
    """Cold starts, one after the other; a column that dies in its own process is not
    tried in this one."""
    for one in live:
        try:
            if one.column.gpu:
                check_gpu()
            if not how.cold_starts:
                continue
            say(f"cold start: {one.column.name}")
            found = [cold_start(case, one.column.name) for _ in range(how.cold_starts)]
        except Id3pmError as error:
            one.ends(ABSENT, error)
            continue
        one.facts["cold_starts"] = [start.to_json() for start in found]


def _open(case: Case, live: Sequence[Live], say: Say) -> None:
    for one in live:
        if one.status != TIMED:
            continue
        say(f"opening: {one.column.name}")
        try:
            one.runner = one.column.open(case)
        except Exception as error:  # one column's trouble is not the others'
            one.ends(ABSENT, error)
            continue
        one.facts["engine"] = one.runner.label


def _rates(case: Case, live: Sequence[Live], say: Say) -> dict[str, Rates]:
    """What the devices of the columns can do, by ``cpu`` and ``cuda PRECISION``."""
    found: dict[str, Rates] = {}
    for one in live:
        if one.runner is None or (key := _rate_key(one.runner)) in found:
            continue
        say(f"measuring rates: {key}")
        try:
            if one.runner.device == "cpu":
                found[key] = cpu_rates(case.settings.threads)
            else:
                found[key] = gpu_rates("cuda", one.runner.precision)
        except Exception as error:  # without rates there is no limit, and no harm
            found[key] = Rates(key, None, None, reason_of(error), {})
    return found


def _rate_key(runner: Runner) -> str:
    """A CPU computes in float32 whatever the weights are."""
    return "cpu" if runner.device == "cpu" else f"cuda {runner.precision}"


def _timed(
    case: Case,
    ready: Sequence[Live],
    samples: int,
    how: BenchmarkSettings,
    rates: dict[str, Rates],
) -> None:
    """Time the columns in turns at one batch size, and keep the figures."""
    insides: dict[str, list[list[float]]] = {}
    failed: dict[str, Exception] = {}
    owners: dict[str, Live] = {}
    variants = []
    for one in ready:
        for variant in _variants(one, how, insides):
            owners[variant.name] = one
            variants.append(variant)

    def on_error(variant: Variant, error: Exception) -> None:
        failed.setdefault(owners[variant.name].column.name, error)

    plan = Plan(rounds=how.rounds, repeats=1, settle=0, warmup=0, seed=samples)
    with progress(how.rounds * len(variants), f"batch size {samples}") as tick:
        seconds = turns(variants, plan, tick, on_error=on_error)
    rows = case.timed_row(samples).guidance.unet_rows
    for one in ready:
        name = one.column.name
        if name in failed:
            one.batches[str(samples)] = {"reason": reason_of(failed[name])}
            continue
        at_once = one.inside.rows_in_one
        per_row = [[v / at_once for v in of] for of in seconds[f"{name} row"]]
        found = measured(
            per_row,
            seconds[f"{name} trajectory"],
            insides.get(name),
            samples,
            _limit(case, one.inside, rows, rates),
        )
        one.batches[str(samples)] = {**found, "unet_rows": rows, "at_once": at_once}


def _variants(
    one: Live, how: BenchmarkSettings, insides: dict[str, list[list[float]]]
) -> list[Variant]:
    """A turn of single table rows, and one of a trajectory."""
    runner, name = one.inside, one.column.name

    def trajectory() -> None:
        runner.run_trajectory()
        if runner.inside is not None:
            insides.setdefault(name, []).append([runner.inside])

    return [
        Variant(
            f"{name} row", runner.run_row, runner.prepare_row, how.row_repeats, settle=1
        ),
        Variant(f"{name} trajectory", trajectory),
    ]


def _limit(
    case: Case, runner: Runner, unet_rows: int, rates: dict[str, Rates]
) -> float | None:
    """Seconds that a table row takes at least on the column's device."""
    found = rates.get(_rate_key(runner))
    if found is None or not found.operations or not found.bytes:
        return None
    kind = "float32" if runner.device == "cpu" else runner.precision
    cost = step_cost(case.model.spec, unet_rows, kind)
    return max(cost.operations / found.operations, cost.bytes / found.bytes)
