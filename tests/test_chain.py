"""Two stages on one device: the same pictures as by way of the host, without it."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.rig import FakeRig, Step, short_of_memory, torch_step
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.backends.rig import Rig
from id3pm_deploy.chain import Large, both_stages
from id3pm_deploy.enlarging import Enlarging
from id3pm_deploy.errors import DeadlineError, EngineError
from id3pm_deploy.generate import (
    Conditions,
    Pictures,
    SampleSettings,
    sample_to_folder,
)
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.models import Model
from id3pm_deploy.sampler import NO_LIMITS, Limits
from id3pm_deploy.solvers import SolverSettings
from id3pm_deploy.spec import DiffusionSpec

SMALL = tiny_spec(image_size=8, attention_resolutions=(), base_channels=32)
LARGE = tiny_spec(
    image_size=16, low_res_size=8, attention_resolutions=(), base_channels=32
)
COUNT = 6
SETTINGS = SampleSettings(
    solver=SolverSettings("ddpm", 4), guidance=GuidanceSettings(2.0), batch_size=3
)
WANTED = Conditions(random_identity(COUNT, SMALL), ("somebody",) * COUNT)


@pytest.fixture(scope="module")
def steps() -> tuple[Step, Step]:
    return torch_step(tiny_network(SMALL)), torch_step(tiny_network(LARGE))


def model_of(spec: DiffusionSpec) -> Model:
    return Model(Path("nowhere"), spec, None)


class Run:
    """Both stages over two rigs, and what was asked of them."""

    def __init__(
        self,
        steps: tuple[Step, Step],
        *,
        batch_size: int = 3,
        no_way: bool = False,
        limits: Limits = NO_LIMITS,
        before: Callable[[FakeRig, FakeRig], None] | None = None,
    ) -> None:
        self.base = FakeRig(step_shapes(SMALL), steps[0])
        self.large = FakeRig(step_shapes(LARGE), steps[1])
        self.opened: list[FakeRig] = []
        self.rows: list[int] = []
        if no_way:
            self.large.low_res_from = lambda other, first: False  # type: ignore[method-assign]
        if before is not None:
            before(self.base, self.large)
        self._next = iter([self.large, FakeRig(step_shapes(LARGE), steps[1])])
        chosen = dataclasses.replace(
            SETTINGS, guidance=GuidanceSettings(1.0), batch_size=batch_size
        )
        self.second = Enlarging(model_of(LARGE), self._open, chosen, WANTED)
        self.limits = limits

    def _open(self) -> ReplayEngine:
        self.opened.append(next(self._next))
        return ReplayEngine(self.opened[-1])

    def make(self) -> tuple[Pictures, Large]:
        made, large = both_stages(
            ReplayEngine(self.base),
            model_of(SMALL),
            SETTINGS,
            WANTED,
            self.second,
            None,
            self.limits,
            self.rows.append,
        )
        assert large is not None
        self.check_released()
        return made, large

    def check_released(self) -> None:
        for rig in (self.base, *self.opened):
            assert rig.live_graphs == rig.buffers == 0


@pytest.fixture(scope="module")
def by_host(steps: tuple[Step, Step]) -> tuple[Pictures, Large]:
    return Run(steps, no_way=True).make()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pictures_are_those_of_the_way_through_the_host(
    steps: tuple[Step, Step], batch_size: int
) -> None:
    """To the bit, where both ways put the same samples into a batch."""
    by_host = Run(steps, batch_size=batch_size, no_way=True).make()
    run = Run(steps, batch_size=batch_size)
    made, large = run.make()
    assert run.opened == [run.large]
    assert large.pictures.pixels.tobytes() == by_host[1].pictures.pixels.tobytes()
    assert large.pictures.pixels.std() > 10
    assert made.pixels.tobytes() == by_host[0].pixels.tobytes()
    assert large.pictures.marks == by_host[1].pictures.marks
    puts = [call for call in run.large.calls if call[:2] == ("put", "low_res")]
    batches = COUNT // batch_size
    assert run.large.kinds["low_res_from"] == len(puts) == batches
    assert len(run.rows) == 4 * (2 + batches), "rows of both stages are told"


@pytest.mark.parametrize("batch", [1, 2])
def test_what_cannot_be_handed_over_goes_through_the_host(
    steps: tuple[Step, Step],
    by_host: tuple[Pictures, Large],
    batch: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From the first batch on, or from a later one."""

    def refuse(base: FakeRig, large: FakeRig) -> None:
        able = large.low_res_from

        def low_res_from(other: Rig, first: int) -> bool:
            return large.kinds["low_res_from"] + 1 < batch and able(other, first)

        large.low_res_from = low_res_from  # type: ignore[method-assign]

    run = Run(steps, before=refuse)
    with caplog.at_level(logging.WARNING, "id3pm_deploy"):
        _, large = run.make()
    assert len(run.opened) == 2
    assert large.pictures.pixels.tobytes() == by_host[1].pictures.pixels.tobytes()
    assert len(large.pictures.marks) == COUNT
    assert caplog.messages == [
        "pictures are enlarged by way of the host: the two engines share no device"
    ]


def test_a_device_that_has_no_room_for_both_holds_one_after_the_other(
    steps: tuple[Step, Step],
    by_host: tuple[Pictures, Large],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Run(steps, before=lambda base, large: short_of_memory(large))
    with caplog.at_level(logging.WARNING, "id3pm_deploy"):
        _, large = run.make()
    assert len(run.opened) == 2
    assert large.pictures.pixels.tobytes() == by_host[1].pictures.pixels.tobytes()
    assert "no memory left" in caplog.text


def test_both_engines_are_released_after_an_error(steps: tuple[Step, Step]) -> None:
    def fail(base: FakeRig, large: FakeRig) -> None:
        large.fail_at = ("stage", 2)

    run = Run(steps, before=fail)
    with pytest.raises(EngineError, match="fails in stage"):
        run.make()
    run.check_released()
    late = Run(steps, limits=Limits(deadline=time.monotonic() - 1))
    with pytest.raises(DeadlineError):
        late.make()
    late.check_released()


def test_a_folder_of_large_pictures(
    steps: tuple[Step, Step], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "weights_sha256", "0" * 64)
    run = Run(steps)
    out: dict[str, Any] = {}
    for name, no_way in (("device", False), ("host", True)):
        run = Run(steps, no_way=no_way)
        sample_to_folder(
            tmp_path / name,
            model_of(SMALL),
            ReplayEngine(run.base),
            SETTINGS,
            WANTED,
            second=run.second,
        )
        record = json.loads((tmp_path / name / "record.json").read_text())
        assert record["super_resolution"].pop("seconds") >= 0
        assert record.pop("seconds") >= 0
        out[name] = record
    assert out["device"] == out["host"]
    for path in (tmp_path / "device").glob("*.png"):
        assert path.read_bytes() == (tmp_path / "host" / path.name).read_bytes()
    assert np.all(np.array([s["failed"] for s in record["samples"]]) == 0)
