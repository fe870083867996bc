"""What every engine keeps, whatever runs under it.

A backend's tests take a subclass with a fixture ``make``, which returns a function that
makes engines, not yet entered, over the model of ``tiny_checkpoint`` or
``tiny_bundle``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from models import random_identity

from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.checkpoint_config import load_spec
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import EngineError
from id3pm_deploy.guidance import GuidanceSettings, guidance_table
from id3pm_deploy.reference.checkpoint import load_checkpoint
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory, walk
from id3pm_deploy.solvers import STATE_SLOTS, SolverSettings, solver_table
from id3pm_deploy.spec import DiffusionSpec

Float32 = npt.NDArray[np.float32]
Make = Callable[[], Engine]

PLAIN, GUIDED = GuidanceSettings(1.0), GuidanceSettings(2.5)
MOVED = GuidanceSettings(4.0, "cosine", interval=(150, 900), rescale=0.7)


def rows_of(job: SampleJob, samples: int) -> Float32:
    """[N, B, S], the table's rows for each sample."""
    return np.repeat(job.table.rows[:, None], samples, axis=1)


class EngineContract:
    """The one suite."""

    tolerance = 1e-4
    """Of a trajectory, against the reference."""
    company = 2e-5
    """By how much a picture may follow the batch that it is made in."""
    exact = True
    """Whether the same work gives the same bits."""

    @pytest.fixture
    def spec(self, tiny_checkpoint: Path) -> DiffusionSpec:
        return load_spec(tiny_checkpoint)

    @pytest.fixture
    def engine(self, make: Make) -> Iterator[Engine]:
        with make() as engine:
            yield engine

    @pytest.fixture
    def reference(self, tiny_checkpoint: Path, spec: DiffusionSpec) -> Iterator[Engine]:
        network = load_checkpoint(tiny_checkpoint).network
        with TorchEngine(network, step_shapes(spec)) as engine:
            yield engine

    @staticmethod
    def job(
        spec: DiffusionSpec,
        solver: str = "ddpm",
        steps: int = 6,
        guidance: GuidanceSettings = GUIDED,
        seed: int = 5,
    ) -> SampleJob:
        table = solver_table(spec, SolverSettings(solver, steps))
        return SampleJob(random_identity(4, spec), table, guidance, SeededNoise(seed))

    @staticmethod
    def addresses(engine: Engine) -> dict[object, int] | None:
        """Where its buffers lie; None where that cannot be told."""
        return None

    def same(self, a: Float32, b: Float32) -> bool:
        """Bit for bit, where the backend works so."""
        if self.exact:
            return a.tobytes() == b.tobytes()
        return bool(np.abs(a - b).max() <= self.company)

    @pytest.mark.parametrize(
        "guidance", [PLAIN, GUIDED, MOVED], ids=["1", "s", "moved"]
    )
    @pytest.mark.parametrize("solver", ["ddpm", "dpmpp-2m", "heun", "unipc-3"])
    def test_the_pictures_are_the_references(
        self,
        engine: Engine,
        reference: Engine,
        spec: DiffusionSpec,
        solver: str,
        guidance: GuidanceSettings,
    ) -> None:
        job = self.job(spec, solver, guidance=guidance)
        wanted, found = (run_trajectory(e, job, range(3)) for e in (reference, engine))
        assert compare(found.images, wanted.images).passes(self.tolerance)
        assert found.images.std() > 0.05
        assert not found.failed.any()

    @pytest.mark.parametrize("most", [1, None])
    def test_the_getters_midway(
        self, engine: Engine, reference: Engine, spec: DiffusionSpec, most: int | None
    ) -> None:
        job = self.job(spec, "dpmpp-2m", guidance=MOVED)
        wanted = {}
        for j in walk(reference, job, [0, 1], most=1):
            wanted[j] = reference.state(), reference.preview()
        for j in walk(engine, job, [0, 1], most=most):
            state, preview = engine.state(), engine.preview()
            assert compare(state, wanted[j][0]).passes(self.tolerance), j
            assert compare(preview, wanted[j][1]).passes(self.tolerance), j
            assert engine.failed_samples().tolist() == [False, False]
            assert engine.state().tobytes() == state.tobytes()
            state[...] = preview[...] = np.nan  # they are copies

    def test_the_batch_does_not_change_a_picture(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec, guidance=MOVED)
        whole = run_trajectory(engine, job, range(4)).images
        for some in ([2], [3, 1], [1, 0, 2]):
            found = run_trajectory(engine, job, some).images
            assert np.abs(found - whole[some]).max() <= self.company

    def test_nothing_of_an_earlier_trajectory_is_left(
        self, make: Make, spec: DiffusionSpec
    ) -> None:
        """Scale, identities, seed, coefficients, and back again."""
        first = self.job(spec)
        other = random_identity(4, spec, seed=9)
        jobs = [
            first,
            self.job(spec, seed=6),
            self.job(spec, guidance=GuidanceSettings(5.0)),
            dataclasses.replace(first, identity=other),
            self.job(spec, "ddim"),
            self.job(spec, "dpmpp-2m", 5, MOVED),
            self.job(spec, steps=9),
            first,
        ]
        with make() as engine:
            found = [run_trajectory(engine, job, range(2)).images for job in jobs]
        for job, images in zip(jobs, found, strict=True):
            with make() as fresh:
                assert self.same(run_trajectory(fresh, job, range(2)).images, images)
        assert len({images.tobytes() for images in found[:-1]}) == len(jobs) - 1

    def test_buffers_stay_where_they_are(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec, guidance=MOVED)
        run_trajectory(engine, job, range(2))
        before = self.addresses(engine)
        if before is None:
            pytest.skip("this backend does not tell its addresses")
        assert before
        run_trajectory(engine, self.job(spec, "ddim", seed=8), range(2))
        run_trajectory(engine, job, range(2))
        after = self.addresses(engine)
        assert after is not None
        assert before.items() <= after.items()

    def test_a_trajectory_is_taken_up_from_a_state(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec, "dpmpp-2m", 5, PLAIN)
        states = [engine.state() for _ in walk(engine, job, [0, 1], most=1)]
        for _ in walk(engine, self.job(spec, seed=6), [2, 3]):
            pass
        engine.load_state(states[2])
        assert engine.state().tobytes() == states[2].tobytes()
        engine.guide(guidance_table(job.identity[:2], 1.0))
        for step in rows_of(job, 2)[3:]:
            engine.run_row(step, None)
        assert self.same(engine.state(), states[4])

    def test_guidance_changes_and_the_rest_stays(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec, "ddim", 4)
        rows, x_t = rows_of(job, 2), job.noise.start([0, 1], engine.shapes.picture)
        plain = guidance_table(job.identity[:2], 1.0)
        engine.begin(x_t, guidance_table(job.identity[:2], 2.5))
        engine.run_row(rows[0], None)
        state, preview = engine.state(), engine.preview()
        engine.guide(plain)
        assert engine.state().tobytes() == state.tobytes()
        assert engine.preview().tobytes() == preview.tobytes()
        engine.run_row(rows[1], None)
        found = engine.state()
        engine.begin(x_t, plain)
        engine.load_state(state)
        engine.run_row(rows[1], None)
        assert self.same(found, engine.state())

    def test_a_sample_takes_the_place_of_another(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        """Of one that failed, too: the other one goes on as if nothing had been."""
        job = self.job(spec, "dpmpp-2m", 5, PLAIN)
        rows, shape = rows_of(job, 2), engine.shapes.picture
        alone = [run_trajectory(engine, job, [i]).images[0] for i in (0, 2)]
        bad = job.identity[:2].copy()
        bad[1, 0] = np.inf
        scale = np.float32(job.table.x_scale)
        engine.begin(job.noise.start([0, 1], shape) * scale, guidance_table(bad, 1.0))
        for step in rows[:2]:
            engine.run_row(step, None)
        assert engine.failed_samples().tolist() == [False, True]
        engine.replace([1], job.noise.start([2], shape) * scale)
        engine.guide(guidance_table(job.identity[[0, 2]], 1.0))
        assert not engine.state()[1:, 1].any()
        assert not engine.failed_samples().any()
        for k in range(5):
            step = np.stack([rows[min(k + 2, 4), 0], rows[k, 1]])
            engine.run_row(step, None)
            if k == 2:
                first = engine.state()[0, 0]
        assert np.abs(first - alone[0]).max() <= self.company
        assert np.abs(engine.state()[0, 1] - alone[1]).max() <= self.company
        assert not engine.failed_samples().any()

    @pytest.mark.parametrize("guidance", [GUIDED, MOVED], ids=["s", "moved"])
    def test_a_bad_identity_fails_its_own_sample_alone(
        self, engine: Engine, spec: DiffusionSpec, guidance: GuidanceSettings
    ) -> None:
        job = self.job(spec, guidance=guidance)
        bad = job.identity.copy()
        bad[2, 0] = np.inf
        good = run_trajectory(engine, job, range(4))
        found = run_trajectory(engine, dataclasses.replace(job, identity=bad), range(4))
        assert found.failed.tolist() == [False, False, True, False]
        assert np.isfinite(found.images).all()
        others = [0, 1, 3]
        assert self.same(found.images[others], good.images[others])
        assert not run_trajectory(engine, job, range(4)).failed.any()

    def test_several_rows_at_once_are_those_rows(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec, guidance=PLAIN)
        shape = engine.shapes.picture
        rows, noise = rows_of(job, 2), [job.noise.row(j, [0, 1], shape) for j in (0, 1)]
        guidance = guidance_table(job.identity[:2], 1.0)
        x_t = job.noise.start([0, 1], shape)
        engine.begin(x_t, guidance)
        for k in (0, 1):
            engine.run_row(rows[k], noise[k])
        wanted = engine.state()
        most = engine.rows_at_once
        engine.begin(x_t, guidance)
        given, arrays = rows[:2].copy(), [one.copy() for one in noise]
        if most >= 2:
            engine.run_rows(given, arrays)
        else:
            for k in (0, 1):
                engine.run_rows(given[k : k + 1], arrays[k : k + 1])
        for array in (given, *arrays):
            array[...] = np.nan  # they are the caller's again
        engine.drain()
        assert self.same(engine.state(), wanted)

    def test_no_use_before_the_beginning_and_after_the_end(
        self, make: Make, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec)
        step = rows_of(job, 2)[0]
        guidance = guidance_table(job.identity[:2], 1.0)
        engine = make()
        x_t = np.zeros((2, *engine.shapes.picture), np.float32)
        uses: list[Callable[[], object]] = [
            engine.state,
            engine.preview,
            engine.failed_samples,
            lambda: engine.run_row(step, None),
            lambda: engine.guide(guidance),
            lambda: engine.replace([0], x_t[:1]),
        ]
        with engine:
            for use in uses:
                with pytest.raises(EngineError):
                    use()
            engine.begin(x_t, guidance)
            engine.run_row(step, None)
        for use in (*uses, lambda: engine.begin(x_t, guidance)):
            with pytest.raises(EngineError):
                use()
        engine.close()

    def test_what_does_not_fit_is_refused_and_changes_nothing(
        self, engine: Engine, spec: DiffusionSpec
    ) -> None:
        job = self.job(spec)
        shape = engine.shapes.picture
        step, guidance = rows_of(job, 2)[-1], guidance_table(job.identity[:2], 2.0)
        x_t = job.noise.start([0, 1], shape)
        three = guidance_table(job.identity[:3], 1.0)
        engine.begin(x_t, guidance)
        engine.run_row(step, None)
        before = engine.state()
        picture = np.zeros((2, *shape), np.float32)
        many = np.repeat(step[None], engine.rows_at_once + 1, axis=0)
        uses: tuple[Callable[[], object], ...] = (
            lambda: engine.run_row(step[:1], None),
            lambda: engine.run_row(step[:, :5], None),
            lambda: engine.run_row(step.astype(np.float64), None),
            lambda: engine.run_row(step, picture[:1]),
            lambda: engine.run_rows(step[None], []),
            lambda: engine.run_rows(many, [None] * len(many)),
            lambda: engine.run_rows(many[:0], []),
            lambda: engine.guide(three),
            lambda: engine.replace([0, 0], picture),
            lambda: engine.replace([2], picture[:1]),
            lambda: engine.replace([0], picture),
            lambda: engine.replace([0], picture[:1], picture[:1]),
            lambda: engine.load_state(before[:, :1]),
            lambda: engine.load_state(before.astype(np.float64)),
        )
        for use in uses:
            with pytest.raises(EngineError):
                use()
            assert engine.state().tobytes() == before.tobytes()
        assert before.shape == (STATE_SLOTS, 2, *shape)
        with pytest.raises(EngineError):
            engine.begin(x_t[:1], guidance)
        with pytest.raises(EngineError):
            engine.begin(x_t, guidance, picture)
