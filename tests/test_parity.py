"""Two engines in step: it passes where it should and fails where it must."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.body_form import BodyForm, Precision
from id3pm_deploy.compare import compare
from id3pm_deploy.defaults import GUIDANCE_SCHEDULES, SOLVERS
from id3pm_deploy.errors import EngineError, InputError, ParityError
from id3pm_deploy.generate import SampleSettings
from id3pm_deploy.guidance import (
    GuidanceSettings,
    guidance_plan,
    guidance_scales,
)
from id3pm_deploy.models import open_model
from id3pm_deploy.parity import oracle, run
from id3pm_deploy.parity.conditions import random_conditions
from id3pm_deploy.parity.run import ParityRequest, Tightening, parity_to_folder
from id3pm_deploy.parity.sides import (
    SideRequest,
    check_same_function,
    open_reference,
    open_side,
    pair_tolerances,
)
from id3pm_deploy.parity.trajectory import Compared, compare_trajectory
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.reference.unet import IdentityUNet
from id3pm_deploy.report import ParityReport
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.spec import DiffusionSpec
from id3pm_deploy.tolerances import CEILINGS, Tolerances

SPEC = tiny_spec(learned_variance=True, prediction_type="v")
FORMS = {
    "interval": GuidanceSettings(3.0, interval=(100, 800)),
    "linear": GuidanceSettings(3.0, schedule="linear"),
    "cosine": GuidanceSettings(3.0, schedule="cosine", rescale=0.5),
    "listed": GuidanceSettings(scales=(1.0, 3.0, 2.0, 4.0, 1.0)),
    "rescale": GuidanceSettings(3.0, rescale=0.7),
    "variance": GuidanceSettings(3.0, guide_variance=True),
    "none": GuidanceSettings(1.0),
}


@pytest.fixture(scope="module")
def network() -> IdentityUNet:
    return tiny_network(SPEC)


def job(
    solver: str = "ddim", steps: int = 5, guidance: GuidanceSettings | None = None
) -> SampleJob:
    return SampleJob(
        random_identity(2, SPEC),
        solver_table(SPEC, SolverSettings(solver, steps)),
        guidance or GuidanceSettings(2.0),
        SeededNoise(3),
    )


def engine_of(network: IdentityUNet, precision: Precision = "float32") -> TorchEngine:
    return TorchEngine(network, step_shapes(SPEC), BodyForm(precision))


def compared(
    engine: Engine, reference: Engine, wanted: SampleJob, spec: DiffusionSpec = SPEC
) -> tuple[Compared, ParityReport]:
    """What one trajectory gives, judged by the rule of float32."""
    with engine, reference:
        found = compare_trajectory(engine, reference, spec, wanted)
    return found, ParityReport(
        title="a test",
        subject={},
        tolerances=CEILINGS["float32"],
        trajectories=(found.trajectory,),
        not_checked=found.not_checked,
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_held_against_diffusers_in_every_row(
    network: IdentityUNet, solver: str
) -> None:
    # Heun's first steps multiply rounding errors by 80 if there are 3 of them.
    steps = 6 if solver != "heun" else 10
    found, report = compared(engine_of(network), engine_of(network), job(solver, steps))
    assert report.passed, report.failures
    rows = found.trajectory.per_step
    assert len(rows) == len(job(solver, steps).table)
    assert found.not_checked == ()
    for row in rows:
        assert row.oracle is not None
        assert row.single is not None
        assert row.oracle.max_rel <= 1e-4
        assert row.single.max_rel == 0
    assert max(row.oracle.max_rel for row in rows if row.oracle) > 0
    assert found.engine.std() > 5


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_guidance_is_held_against_diffusers(
    network: IdentityUNet, form: str
) -> None:
    wanted = job("ddpm", 5, FORMS[form])
    found, report = compared(engine_of(network), engine_of(network), wanted)
    assert report.passed, report.failures
    assert all(row.oracle is not None for row in found.trajectory.per_step)


def test_the_forms_of_guidance_differ(network: IdentityUNet) -> None:
    """Otherwise the test above could not tell one from another."""
    ends = []
    for guidance in FORMS.values():
        with engine_of(network) as engine:
            wanted = job("ddpm", 5, guidance)
            ends.append(run_trajectory(engine, wanted, [0, 1]).images)
    for index, one in enumerate(ends):
        for other in ends[:index]:
            assert not compare(one, other).passes(1e-3)


@pytest.mark.parametrize("schedule", GUIDANCE_SCHEDULES)
@pytest.mark.parametrize("interval", [None, (111, 700)])
def test_the_oracle_has_a_second_form_of_every_schedule(
    schedule: str, interval: tuple[float, float] | None
) -> None:
    settings = GuidanceSettings(3.5, schedule=schedule, interval=interval)
    for times in ([999.0, 700.0, 700.0, 444.4, 111.0, 0.0], [500.0]):
        ours = oracle.oracle_scales(settings, times)
        theirs = guidance_scales(settings, np.array(times))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("wrong", ["scale", "rescale"])
def test_the_oracle_notices_wrong_guidance(
    network: IdentityUNet, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Both sides share the product's guidance; the oracle does not."""

    def bent(identity: Any, settings: GuidanceSettings, *more: Any, **also: Any) -> Any:
        if wrong == "scale":
            settings = dataclasses.replace(settings, scale=settings.scale * 1.001)
            return guidance_plan(identity, settings, *more, **also)
        made = guidance_plan(identity, settings, *more, **also)
        return dataclasses.replace(made, rescale=made.rescale * np.float32(0.99))

    monkeypatch.setattr("id3pm_deploy.sampler.guidance_plan", bent)
    wanted = job("ddim", 4, GuidanceSettings(3.0, rescale=0.7))
    _, report = compared(engine_of(network), engine_of(network), wanted)
    assert not report.passed
    assert all("diffusers" in failure for failure in report.failures)


def test_the_oracle_notices_a_wrong_table(network: IdentityUNet) -> None:
    good = job("dpmpp-2m", 5)
    rows = good.table.rows.copy()
    rows[2, 3] *= np.float32(1.001)
    bad = dataclasses.replace(good, table=dataclasses.replace(good.table, rows=rows))
    _, report = compared(engine_of(network), engine_of(network), bad)
    assert not report.passed
    assert all("diffusers" in failure for failure in report.failures)


def test_noise_is_drawn_once(network: IdentityUNet) -> None:
    drawn: list[Any] = []

    class Counting:
        def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Any:
            drawn.append("start")
            return SeededNoise(3).start(samples, shape)

        def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Any:
            drawn.append(j)
            return SeededNoise(3).row(j, samples, shape)

    wanted = dataclasses.replace(job("ddpm", 5), noise=Counting())
    _, report = compared(engine_of(network), engine_of(network), wanted)
    assert report.passed, report.failures
    assert drawn == ["start", 0, 1, 2, 3]  # the last row of ddpm has none


def test_the_end_is_what_the_sampler_makes(network: IdentityUNet) -> None:
    """Single rows in between leave the engine's own trajectory alone."""
    wanted = job("unipc-3", 6)
    with engine_of(network) as engine, engine_of(tiny_network(SPEC, 1)) as other:
        compare_trajectory(engine, other, SPEC, wanted)
        end = engine.state()
        run_trajectory(engine, wanted, [0, 1])
        np.testing.assert_array_equal(engine.state(), end)


def test_another_network_fails_row_by_row(network: IdentityUNet) -> None:
    other = engine_of(tiny_network(SPEC, seed=5))
    found, report = compared(other, engine_of(network), job())
    assert not report.passed
    singles = [row.single for row in found.trajectory.per_step]
    assert all(one is not None and not one.passes(1e-5) for one in singles)


def test_a_slightly_wrong_weight_is_noticed(network: IdentityUNet) -> None:
    other = tiny_network(SPEC)
    with torch.no_grad():
        other.identity_projection.weight *= 1.001
    _, report = compared(engine_of(other), engine_of(network), job())
    assert any("one step" in failure for failure in report.failures)


def test_one_bad_row_is_seen_in_that_row_alone(network: IdentityUNet) -> None:
    class Stumbling(TorchEngine):
        rows = 0

        def _run(self, step: Any, noise: Any) -> Any:
            finite = super()._run(step, noise)
            if step[0, 0] == np.float32(wanted.table.timesteps[2]):
                self._state = self._state.clone()
                self._state[0, 0, 0, 0, 0] += 0.01
            return finite

    wanted = job("ddim", 5)
    stumbling = Stumbling(network, step_shapes(SPEC))
    found, report = compared(stumbling, engine_of(network), wanted)
    limit = CEILINGS["float32"].step
    singles = [row.single for row in found.trajectory.per_step]
    passes = [one is not None and one.passes(limit) for one in singles]
    assert passes == [True, True, False, True, True]
    assert not report.passed


def test_nan_on_both_sides_never_passes() -> None:
    """The step graph zeroes a broken row before it is mixed, on both sides alike."""
    broken = tiny_network(SPEC)
    with torch.no_grad():
        broken.identity_projection.bias.fill_(math.nan)
    found, report = compared(engine_of(broken), engine_of(broken), job("ddim", 3))
    assert found.trajectory.final.max_rel == 0
    assert (found.trajectory.failed_engine, found.trajectory.failed_reference) == (2, 2)
    assert not report.passed
    assert any("made NaN or infinity" in failure for failure in report.failures)


def test_pictures_that_are_not_finite_are_reported_not_raised() -> None:
    class Broken(TorchEngine):
        def state(self) -> Any:
            state = super().state()
            state[0, 0] = np.inf
            return state

    network = tiny_network(SPEC)
    broken = Broken(network, step_shapes(SPEC))
    found, report = compared(broken, engine_of(network), job("ddim", 2))
    assert not report.passed
    assert (found.engine[0] == 0).all()
    assert found.trajectory.final.nonfinite_actual == 3 * 16 * 16


def test_torch_in_half_is_near_float32_and_not_equal(network: IdentityUNet) -> None:
    half = engine_of(network, "float16")
    found, _ = compared(half, engine_of(network), job("dpmpp-2m", 3))
    assert 1e-6 < found.trajectory.final.max_rel < 0.5
    oracle_rows = [row.oracle for row in found.trajectory.per_step]
    assert all(row is not None and row.passes(1e-4) for row in oracle_rows)


def test_the_float32_side_has_the_oracle(network: IdentityUNet) -> None:
    full, half = engine_of(network), engine_of(network, "float16")
    found, _ = compared(full, half, job("ddim", 2))
    assert found.trajectory.oracle_of == "engine"
    both = engine_of(network, "float16"), engine_of(network, "float16")
    found, report = compared(*both, job("ddim", 2))
    assert report.passed
    assert "neither side is PyTorch in float32" in found.not_checked[0]
    assert all(row.oracle is None for row in found.trajectory.per_step)


def test_engines_of_different_shapes_are_refused(network: IdentityUNet) -> None:
    other = tiny_spec(image_size=32, learned_variance=True)
    wide = TorchEngine(tiny_network(other), step_shapes(other))
    with engine_of(network) as engine, wide, pytest.raises(EngineError, match="shapes"):
        compare_trajectory(engine, wide, SPEC, job())


def test_random_conditions_are_nobodys() -> None:
    found = random_conditions(SPEC, 3, seed=1)
    norms = np.linalg.norm(found.identity, axis=1)
    np.testing.assert_allclose(norms, np.sqrt(SPEC.identity.dim), rtol=1e-6)
    assert found.ids == ("random",) * 3
    with pytest.raises(InputError, match="at least 1"):
        random_conditions(SPEC, 0, seed=1)


class TestSides:
    def test_the_same_model_is_compared(
        self, tiny_bundle: Path, tiny_checkpoint: Path
    ) -> None:
        bundle, checkpoint = open_model(tiny_bundle), open_model(tiny_checkpoint)
        check_same_function(bundle, checkpoint)
        titled = dataclasses.replace(checkpoint.spec, title="x", origin={"steps": 1})
        check_same_function(bundle, dataclasses.replace(checkpoint, spec=titled))

    def test_another_model_is_refused_by_what_differs(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        model = open_model(tiny_checkpoint)
        changed = dataclasses.replace(
            model.spec,
            model=dataclasses.replace(
                model.spec.model, num_heads=2, num_head_channels=None
            ),
            prediction_type="epsilon",
        )
        save_checkpoint(tmp_path / "o", changed, tiny_network(changed, 9).state_dict())
        with pytest.raises(ParityError, match="not the same model") as caught:
            check_same_function(model, open_model(tmp_path / "o"))
        for name in ("model.num_heads", "model.num_head_channels", "prediction_type"):
            assert name in caught.value.why
        assert "SHA-256" in caught.value.why
        assert "schedule" not in caught.value.why

    def test_a_reference_takes_the_engines_precision(
        self, tiny_bundle: Path, tiny_checkpoint: Path
    ) -> None:
        bundle = open_side(SideRequest(tiny_bundle))
        request = SideRequest(tiny_checkpoint)
        assert open_reference(request, bundle).info.precision == "float32"
        half_graph = dataclasses.replace(
            bundle.engine.info, precision="float16 weights"
        )
        bundle.engine.info = half_graph
        assert open_reference(request, bundle).info.precision == "float16"
        asked = dataclasses.replace(request, precision="float32")
        assert open_reference(asked, bundle).info.precision == "float32"
        # The bundle has no float16 graph; its own is taken.
        other = open_reference(SideRequest(tiny_bundle), bundle)
        assert other.info.precision == "float32"

    def test_torch_in_half_is_held_against_float32(self, tiny_checkpoint: Path) -> None:
        half = open_side(SideRequest(tiny_checkpoint, precision="float16"))
        against = open_reference(SideRequest(tiny_checkpoint), half)
        assert against.info.precision == "float32"
        assert pair_tolerances(half, against) == CEILINGS["float16"]
        assert pair_tolerances(against, half) == CEILINGS["float16"]
        assert pair_tolerances(against, against) == CEILINGS["float32"]
        assert pair_tolerances(half, None) == CEILINGS["float16"]

    def test_a_graphs_own_tolerance_is_kept_and_capped(self, tiny_bundle: Path) -> None:
        side = open_side(SideRequest(tiny_bundle))
        bundle = side.model.bundle
        assert bundle is not None
        for stated, kept in ((1e-6, 1e-6), (0.5, CEILINGS["float32"].step)):
            graphs = tuple(
                dataclasses.replace(g, tolerance_step=stated)
                for g in bundle.manifest.graphs
            )
            manifest = dataclasses.replace(bundle.manifest, graphs=graphs)
            edited = dataclasses.replace(
                side.model, bundle=dataclasses.replace(bundle, manifest=manifest)
            )
            assert dataclasses.replace(side, model=edited).tolerances.step == kept

    def test_a_bundle_without_a_plan_says_so(self, tiny_bundle: Path) -> None:
        with pytest.raises(EngineError, match="holds no TensorRT plan"):
            open_side(SideRequest(tiny_bundle, backend="tensorrt"))


class TestFolder:
    """From paths to a report."""

    @staticmethod
    def settings(**changes: Any) -> SampleSettings:
        return SampleSettings(SolverSettings("ddim", 3), count=2, **changes)

    def test_a_bundle_against_its_checkpoint(
        self, tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        request = ParityRequest(
            SideRequest(tiny_bundle, threads=1),
            SideRequest(tiny_checkpoint),
            self.settings(),
        )
        report = parity_to_folder(tmp_path / "r", request)
        assert report.passed, report.failures
        assert 0 < report.trajectories[0].final.max_rel <= 1e-4
        names = sorted(path.name for path in (tmp_path / "r").iterdir())
        assert names == ["index.html", "parity.json", "parity.md", "parity.png"]
        found = json.loads((tmp_path / "r" / "parity.json").read_text())
        subject = found["subject"]
        assert subject["Engine"].startswith("onnxruntime ")
        assert "float32, CPU, 1 thread" in subject["Engine"]
        assert subject["Reference"].startswith("torch ")
        for key in ("Model", "Solver", "Guidance", "Noise", "Processor", "Python"):
            assert subject[key]
        assert found["oracle_max_rel"] <= 1e-4
        for path in (tmp_path / "r").iterdir():
            data = path.read_bytes()
            assert str(tiny_bundle).encode() not in data
            assert str(tmp_path).encode() not in data

    def test_a_bundle_against_itself_says_what_was_not_compared(
        self, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        side = SideRequest(tiny_bundle)
        request = ParityRequest(side, side, self.settings())
        report = parity_to_folder(tmp_path / "r", request)
        assert report.passed
        assert report.trajectories[0].final.max_rel == 0
        assert "neither side is PyTorch" in report.not_checked[0]
        assert "Oracle" not in report.subject

    def test_identities_are_judged_and_never_written(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from id3pm_deploy.identity.vectors import identity_file, save_identities

        spec = open_model(tiny_checkpoint).spec.identity
        vectors = random_identity(1, SPEC)
        save_identities(
            tmp_path / "who.npz",
            identity_file(vectors, spec.model_name, spec.model_sha256),
        )
        monkeypatch.setattr(
            run, "_judge", lambda *_: lambda pictures: (0.25,) * len(pictures)
        )
        side = SideRequest(tiny_checkpoint)
        request = ParityRequest(
            side, side, self.settings(), tmp_path / "who.npz", judge="a judge"
        )
        report = parity_to_folder(tmp_path / "r", request)
        identity = report.trajectories[0].identity
        assert identity is not None
        assert identity.engine == (0.25, 0.25)
        text = (tmp_path / "r" / "parity.json").read_text()
        assert "who.npz" not in text
        assert f"{vectors[0, 0]:.6f}"[:8] not in text

    def test_random_vectors_have_no_judge(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        side = SideRequest(tiny_checkpoint)
        request = ParityRequest(side, side, self.settings(), judge="sface")
        with pytest.raises(InputError, match="no face"):
            parity_to_folder(tmp_path / "r", request)

    def test_tolerances_can_only_be_tightened(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        side = SideRequest(tiny_checkpoint)
        tight = ParityRequest(
            side, side, self.settings(), tolerances=Tightening(1e-7, 1e-6)
        )
        report = parity_to_folder(tmp_path / "r", tight)
        assert report.tolerances == Tolerances(1e-7, 1e-6)
        for loose in (Tightening(2e-5), Tightening(None, 2e-4)):
            request = dataclasses.replace(tight, tolerances=loose)
            with pytest.raises(InputError, match="can only tighten"):
                parity_to_folder(tmp_path / "loose", request)
        assert not (tmp_path / "loose").exists()

    def test_too_many_pictures_are_refused(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        side = SideRequest(tiny_checkpoint)
        many = dataclasses.replace(self.settings(), count=65)
        with pytest.raises(InputError, match="1 to 64 pictures"):
            parity_to_folder(tmp_path / "r", ParityRequest(side, side, many))

    def test_a_report_does_not_go_into_a_folder_of_yours(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        side = SideRequest(tiny_checkpoint)
        with pytest.raises(InputError, match="something else than an earlier report"):
            parity_to_folder(tmp_path, ParityRequest(side, side, self.settings()))
        assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt"}

    def test_a_bundle_of_another_checkpoint_is_refused(
        self, tiny_bundle: Path, tmp_path: Path
    ) -> None:
        spec = open_model(tiny_bundle).spec
        other = tmp_path / "other"
        save_checkpoint(other, spec, tiny_network(spec, seed=9).state_dict())
        request = ParityRequest(
            SideRequest(tiny_bundle), SideRequest(other), self.settings()
        )
        with pytest.raises(ParityError, match="not the same model"):
            parity_to_folder(tmp_path / "out", request)
        assert not (tmp_path / "out").exists()
