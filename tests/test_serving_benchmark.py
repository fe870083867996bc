"""The benchmark of continuous batching: what it runs, and what it counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import tiny_spec

from id3pm_deploy.backends.base import Engine, Float32

DIM = tiny_spec().identity.dim
VECTORS = np.random.default_rng(3).normal(size=(5, DIM)).astype(np.float32)


@pytest.fixture
def computed_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """UNet rows of every table row that an engine runs."""
    rows: list[int] = []
    run = Engine.run_rows

    def counted(
        engine: Engine, steps: Float32, noise: Sequence[Float32 | None]
    ) -> None:
        assert engine._row is not None
        rows.append(len(engine._row))
        run(engine, steps, noise)

    monkeypatch.setattr(Engine, "run_rows", counted)
    return rows


def test_the_benchmark_makes_the_same_pictures_in_every_way(
    tiny_bundle: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    computed_rows: list[int],
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import continuous_batching as script
    import request_trace

    from id3pm_deploy.identity.vectors import normalise_identities
    from id3pm_deploy.models import open_engine, open_model

    monkeypatch.setattr(request_trace, "SHARES", {2: 0.5, 3: 0.25, 8: 0.25})
    model = open_model(tiny_bundle)
    vectors = normalise_identities(VECTORS, model.spec.identity.normalisation)
    subject = script.Subject(model, vectors)
    with (
        open_engine(model, threads=1) as engine,
        contextlib.closing(script.Continuous(subject, engine, 2)) as front,
    ):
        ways = script.make_ways(subject, engine, front, 2, 0.05)
        script.check(subject, engine, ways)
        trace = request_trace.make_trace(8, float("inf"), len(vectors), 1)
        steps, computed = [one.steps for one in trace], {}
        for name, way in ways.items():
            computed_rows.clear()
            assert way.saturated(trace) > 0
            computed[name] = sum(computed_rows)
        longest = sum(max(pair) for pair in zip(steps[::2], steps[1::2], strict=True))
        assert computed[script.PLAIN] == 2 * 2 * longest
        assert computed[script.BETTER] == 2 * sum(steps)
        # Ended when the last one had a place, with at most a table row or two more.
        assert computed[script.CONTINUOUS] <= 2 * sum(steps)
        found = script.throughput(ways, len(vectors), 4, 2, 0)
        assert [len(values) for values in found.values()] == [2, 2, 2]
        late = script.latencies(ways, request_trace.make_trace(4, 50.0, 5, 0))
        assert all(one["p50_seconds"] > 0 for one in late.values())


def test_the_benchmark_counts_what_the_batch_did(
    tiny_bundle: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    computed_rows: list[int],
) -> None:
    """Rows that count are those that the engine ran until the last one has a place."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import continuous_batching as script
    import request_trace

    from id3pm_deploy.models import open_engine, open_model

    monkeypatch.setattr(request_trace, "SHARES", {3: 1.0})
    model = open_model(tiny_bundle)
    subject = script.Subject(model, VECTORS)
    with (
        open_engine(model, threads=1) as engine,
        contextlib.closing(script.Continuous(subject, engine, 2)) as front,
    ):
        trace = request_trace.make_trace(6, float("inf"), len(VECTORS), 0)
        rows, seconds = asyncio.run(front._until_all_have_places(trace))
        front._worker.call(lambda _: None)
    # Four are done, and the two others may have begun.
    assert 4 * 3 <= rows < 6 * 3
    assert 0 <= sum(computed_rows) // 2 - rows <= 4
    assert seconds > 0


def test_the_benchmarks_trace_has_its_shares(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import continuous_batching as script
    import request_trace

    trace = request_trace.make_trace(1000, 4.0, 5, 0)
    assert 200 < trace[-1].at < 300
    steps = [one.steps for one in trace]
    assert {n: steps.count(n) for n in (10, 20, 50)} == {10: 500, 20: 300, 50: 200}
    assert steps[:10] != sorted(steps[:10])
    assert request_trace.mean_steps(trace) == 21.0
    assert all(
        one.at == 0.0 for one in request_trace.make_trace(16, float("inf"), 5, 0)
    )
    ways: Any = {"a": 0, "b": 1}
    names = [[name for name, _ in script.rotated(ways, i)] for i in (0, 1)]
    assert names == [["a", "b"], ["b", "a"]]
