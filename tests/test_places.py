"""Places over an engine that replays several table rows in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.rig import FakeRig, Step
from models import random_identity, tiny_spec

from id3pm_deploy.backends.base import Float32, step_shapes
from id3pm_deploy.backends.onnxruntime import make_session
from id3pm_deploy.backends.replay import ReplayEngine
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.guidance import GuidanceSettings, guidance_plan
from id3pm_deploy.places import Finished, Places, Trajectory
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table

SPEC = tiny_spec(prediction_type="v", learned_variance=True)
SHAPES = step_shapes(SPEC)
IDENTITY = random_identity(6, SPEC)
WANTED = [
    ("ddim", 4, GuidanceSettings(1.0)),
    ("ddpm", 7, GuidanceSettings(2.0)),
    ("heun", 3, GuidanceSettings(3.0, "linear")),
    ("dpmpp-2m-sde", 5, GuidanceSettings(2.0, interval=(200, 800))),
    ("ddpm", 3, GuidanceSettings(1.0)),
    ("unipc-3", 6, GuidanceSettings(2.0, rescale=0.5)),
]


def trajectory(i: int) -> Trajectory:
    solver, steps, guidance = WANTED[i]
    table = solver_table(SPEC, SolverSettings(solver, steps))
    plan = guidance_plan(IDENTITY[i : i + 1], guidance, table.timesteps)
    return Trajectory(table, plan, SeededNoise(i))


def step_of(bundle: Path) -> Step:
    """The bundle's graph, whose pictures do not depend on the batch."""
    opened = open_bundle(bundle)
    graph = opened.graph("step", "float32", "base")
    assert graph is not None
    session = make_session(opened.read(graph.file), 1)

    def run(inputs: dict[str, Float32]) -> tuple[Float32, Float32, Float32]:
        state, x0, finite = session.run(None, inputs)
        return state, x0, finite

    return run


@pytest.mark.parametrize("rows", [-1, 1, 3])
def test_pictures_are_those_made_alone_and_sizes_are_few(
    tiny_bundle: Path, rows: int
) -> None:
    step = step_of(tiny_bundle)
    expected: list[Float32] = []
    with ReplayEngine(FakeRig(SHAPES, step), -1) as engine:
        for i, (_, _, guidance) in enumerate(WANTED):
            who, table = IDENTITY[i : i + 1], trajectory(i).table
            job = SampleJob(who, table, guidance, SeededNoise(i))
            expected.append(run_trajectory(engine, job, [0]).images[0])
    order = [trajectory(i) for i in range(len(WANTED))]
    waiting = list(order)
    done: list[Finished] = []
    sizes: set[int] = set()
    with ReplayEngine(FakeRig(SHAPES, step), rows) as engine:
        places = Places(engine, 4)
        while waiting or places.held:
            new, waiting = waiting[: places.free], waiting[places.free :]
            places.admit(new)
            done += places.run()
            assert engine._row is not None
            sizes.add(len(engine._row))
    assert sizes <= {1, 2, 3, 4, 6, 8}
    assert len(done) == len(WANTED)
    for one in done:
        assert not one.failed
        assert (one.image == expected[order.index(one.trajectory)]).all()
