"""Recorded golden data: recorded, read with suspicion, and made again."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import random_identity, tiny_network, tiny_spec

from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.compare import compare
from id3pm_deploy.errors import GoldenError, OutputError
from id3pm_deploy.generate import SampleSettings
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.noise import batch_normals
from id3pm_deploy.parity.golden import GoldenData, load_golden_data
from id3pm_deploy.parity.golden_run import (
    compare_forward,
    forward_pass,
)
from id3pm_deploy.parity.record import record_golden
from id3pm_deploy.parity.run import GoldenRequest, golden_to_folder, record_to_file
from id3pm_deploy.parity.sides import SideRequest
from id3pm_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from id3pm_deploy.reference.guided_diffusion import convert_guided_diffusion
from id3pm_deploy.solvers import SolverSettings
from id3pm_deploy.spec import NO_IDENTITY, DiffusionSpec, IdentitySpec

Arrays = dict[str, Any]
GUIDED = GuidanceSettings(2.0, guide_variance=True)


def settings(
    solver: str = "ddpm",
    steps: int = 4,
    guidance: GuidanceSettings = GUIDED,
    **changes: Any,
) -> SampleSettings:
    return SampleSettings(
        SolverSettings(solver, steps, **changes), guidance, seed=5, count=2
    )


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden data of the tiny checkpoint: forward passes and one trajectory."""
    path = tmp_path_factory.mktemp("golden") / "tiny.npz"
    record_to_file(path, SideRequest(tiny_checkpoint), settings())
    return path


@pytest.fixture
def arrays(recorded: Path) -> Arrays:
    with np.load(recorded) as file:
        return {name: file[name] for name in file.files}


def write(path: Path, arrays: Arrays) -> Path:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    path.write_bytes(buffer.getvalue())
    return path


def load(path: Path, checkpoint: Path) -> GoldenData:
    model = open_model(checkpoint)
    return load_golden_data(path, model.spec, model.weights_sha256)


def test_what_is_recorded(recorded: Path, arrays: Arrays) -> None:
    assert recorded.stat().st_size < 300_000
    name = "ancestral4_guided2"
    shapes = {key: (value.shape, value.dtype) for key, value in arrays.items()}
    text = shapes.pop(f"{name}/settings"), shapes.pop("checkpoint_sha256")
    assert all(shape == () and dtype.kind == "U" for shape, dtype in text)
    picture, float32, int64 = (2, 3, 16, 16), np.dtype("f4"), np.dtype("i8")
    assert shapes == {
        "x": (picture, float32),
        "t": ((2,), int64),
        "y": ((2, 16), float32),
        "out": ((2, 6, 16, 16), float32),
        f"{name}/x_T": (picture, float32),
        f"{name}/noise": ((4, *picture), float32),
        f"{name}/timesteps": ((4,), int64),
        f"{name}/sample": (picture, float32),
        f"{name}/states": ((4, *picture), float32),
    }
    assert arrays[f"{name}/timesteps"].tolist() == [0, 333, 666, 999]
    assert arrays["t"].tolist() == [999, 0]
    np.testing.assert_array_equal(
        arrays[f"{name}/sample"], arrays[f"{name}/states"][-1]
    )
    # noise[0] belongs to the first row that is executed, the last timestep's.
    drawn = batch_normals(5, range(2), 0, 1, (3, 16, 16))
    np.testing.assert_array_equal(arrays[f"{name}/noise"][0], drawn)
    assert not arrays[f"{name}/noise"][3].any(), "the last row of ddpm has no noise"


def test_recording_twice_gives_the_same_numbers(
    tiny_checkpoint: Path, recorded: Path, tmp_path: Path
) -> None:
    record_to_file(tmp_path / "b.npz", SideRequest(tiny_checkpoint), settings())
    assert (tmp_path / "b.npz").read_bytes() == recorded.read_bytes()


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (settings("ddim", 3, GuidanceSettings(1.0)), "ddim3"),
        (settings("ddim", 3, GUIDED), "ddim3_guided2"),
        (settings("ddim", 3, GuidanceSettings(2.0)), "ddim.3"),
        (settings("ddim", 3, GUIDED, eta=0.5), "ddim.3"),
        (settings("ddpm", 3, GUIDED, variance="fixed_small"), "ddpm.3"),
        (settings("ddpm", 3, GUIDED, clip=2.0), "ddpm.3"),
        (settings("heun", 3, GuidanceSettings(3.0, interval=(0, 600))), "heun.3"),
        (settings("unipc-2", 3, GuidanceSettings(scales=(1.0, 2.0, 3.0))), "unipc-2.3"),
    ],
)
def test_only_guided_diffusions_own_runs_have_its_names(
    tiny_checkpoint: Path, tmp_path: Path, wanted: SampleSettings, name: str
) -> None:
    path = tmp_path / "a.npz"
    record_to_file(path, SideRequest(tiny_checkpoint), wanted)
    data = load(path, tiny_checkpoint)
    (one,) = data.trajectories
    assert one.name == name
    assert one.job.guidance == wanted.guidance
    made = one.job.table.settings
    assert (made.solver, made.steps) == (wanted.solver.solver, wanted.solver.steps)
    assert (made.eta, made.clip) == (wanted.solver.eta, wanted.solver.clip)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_an_engine_makes_it_again(
    request: pytest.FixtureRequest, recorded: Path, tmp_path: Path, backend: str
) -> None:
    kind = "tiny_checkpoint" if backend == "torch" else "tiny_bundle"
    side = SideRequest(request.getfixturevalue(kind), threads=1)
    report = golden_to_folder(tmp_path / "r", GoldenRequest(side, recorded))
    assert report.passed, report.failures
    assert [part.part for part in report.checks].count("forward") == 2
    (one,) = report.trajectories
    assert len(one.per_step) == 4
    assert one.final_unsaturated is not None
    for row in one.per_step:
        assert row.state is not None
        assert row.single is not None
        assert (row.oracle is not None) == (backend == "torch")
    assert 0 < one.final.max_rel <= 1e-4
    found = json.loads((tmp_path / "r" / "parity.json").read_text())
    assert 0 < found["forward_max_rel"] <= 1e-5
    assert found["subject"]["Recorded data"].startswith("SHA-256 ")
    for path in (tmp_path / "r").iterdir():
        assert b"tiny.npz" not in path.read_bytes()


@pytest.mark.parametrize("solver", ["dpmpp-2m-sde", "euler"])
def test_a_solver_with_memory_or_fractional_timesteps(
    tiny_checkpoint: Path, tmp_path: Path, solver: str
) -> None:
    path = tmp_path / "a.npz"
    side = SideRequest(tiny_checkpoint)
    record_to_file(path, side, settings(solver, 5, GuidanceSettings(2.0)))
    report = golden_to_folder(tmp_path / "r", GoldenRequest(side, path))
    assert report.passed, report.failures
    steps = report.trajectories[0].per_step
    assert all(row.state is not None for row in steps)
    remembers = solver == "dpmpp-2m-sde"  # it cannot be started from x alone
    assert all((row.single is None) == remembers for row in steps)


def test_rows_can_be_held_against_a_checkpoint(
    tiny_checkpoint: Path, tiny_bundle: Path, arrays: Arrays, tmp_path: Path
) -> None:
    """A file without states, a bundle, and the reference beside it."""
    del arrays["ancestral4_guided2/states"]
    path = write(tmp_path / "bare.npz", arrays)
    alone = GoldenRequest(SideRequest(tiny_bundle), path)
    report = golden_to_folder(tmp_path / "a", alone)
    assert report.passed
    assert report.trajectories[0].per_step == ()
    assert "give --against CHECKPOINT" in report.not_checked[0]
    beside = dataclasses.replace(alone, reference=SideRequest(tiny_checkpoint))
    report = golden_to_folder(tmp_path / "b", beside)
    assert report.passed
    (one,) = report.trajectories
    assert "reference" in one.steps_against
    assert all(row.single and row.state and row.oracle for row in one.per_step)
    assert report.not_checked == ()


class TestFailures:
    """What is wrong has to be noticed."""

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("out", lambda a: a + np.float32(1e-3)),
            ("y", lambda a: a[::-1]),
            ("t", lambda a: a[::-1]),
            ("ancestral4_guided2/noise", lambda a: np.roll(a, 1, axis=0)),
            ("ancestral4_guided2/x_T", lambda a: a * np.float32(1.001)),
            ("ancestral4_guided2/sample", lambda a: a + np.float32(1e-3)),
            ("ancestral4_guided2/states", lambda a: a[[1, 0, 2, 3]]),
        ],
    )
    def test_other_numbers_fail(
        self,
        tiny_checkpoint: Path,
        arrays: Arrays,
        tmp_path: Path,
        name: str,
        change: Callable[[Any], Any],
    ) -> None:
        arrays[name] = change(arrays[name])
        path = write(tmp_path / "a.npz", arrays)
        request = GoldenRequest(SideRequest(tiny_checkpoint), path)
        report = golden_to_folder(tmp_path / "r", request)
        assert not report.passed

    def test_another_network_fails(
        self, tiny_checkpoint: Path, arrays: Arrays, recorded: Path, tmp_path: Path
    ) -> None:
        spec = open_model(tiny_checkpoint).spec
        other = SideRequest(tmp_path / "other")
        save_checkpoint(other.path, spec, tiny_network(spec, seed=4).state_dict())
        with pytest.raises(GoldenError, match="recorded from another model"):
            golden_to_folder(tmp_path / "r", GoldenRequest(other, recorded))
        del arrays["checkpoint_sha256"]
        path = write(tmp_path / "a.npz", arrays)
        report = golden_to_folder(tmp_path / "r", GoldenRequest(other, path))
        failed = {check.part for check in report.checks if not check.passed}
        assert {"forward", "final", "single", "state"} <= failed

    def test_nan_in_the_network_is_nan_in_the_forward_pass(self) -> None:
        spec = tiny_spec(learned_variance=True)
        broken = tiny_network(spec)
        with torch.no_grad():
            broken.identity_projection.bias.fill_(math.nan)
        x = batch_normals(1, range(2), 0, 0, (3, 16, 16))
        t = np.array([5, 900], np.float32)
        with TorchEngine(broken, step_shapes(spec)) as engine:
            made = forward_pass(engine, spec, x, t, random_identity(2, spec))
        assert np.isnan(made).all()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_a_table_row_shows_the_whole_output(learned: bool, prediction: str) -> None:
    """Whatever the prediction type: all channels, for each sample at its own t."""
    spec = tiny_spec(learned_variance=learned, prediction_type=prediction)
    network = tiny_network(spec)
    x = 3 * batch_normals(1, range(3), 0, 0, (3, 16, 16))
    t = np.array([999, 500, 3], np.float32)
    identity = random_identity(3, spec)
    with torch.inference_mode():
        expected = network(*map(torch.from_numpy, (x, t, identity))).numpy()
    with TorchEngine(network, step_shapes(spec)) as engine:
        made = forward_pass(engine, spec, x, t, identity)
    assert made.dtype == np.float32
    assert made.shape == (3, 6 if learned else 3, 16, 16)
    assert np.abs(expected).max() > 1
    assert compare(made, expected).passes(1e-6)
    np.testing.assert_array_equal(made[:, :3], expected[:, :3])


class TestHostile:
    """Nothing in the file is believed."""

    @staticmethod
    def refused(path: Path, checkpoint: Path, message: str) -> None:
        with pytest.raises(GoldenError) as caught:
            load(path, checkpoint)
        assert message in f"{caught.value.what} {caught.value.why}", caught.value
        assert caught.value.fix

    def test_the_good_file_is_read(
        self, tiny_checkpoint: Path, arrays: Arrays, tmp_path: Path
    ) -> None:
        data = load(write(tmp_path / "good.npz", arrays), tiny_checkpoint)
        assert len(data.trajectories) == 1
        assert data.trajectories[0].job.table.timesteps.tolist() == [999, 666, 333, 0]

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("x", lambda a: a[0], "t: it is int64 of shape [2]"),
            ("x", lambda a: a[:, :2], "x: it is"),
            ("x", lambda a: a.astype(np.float64), "x: it is float64"),
            ("x", lambda a: np.full_like(a, np.nan), "x: it holds NaN"),
            ("x", lambda a: np.zeros((65, 3, 16, 16), np.float32), "1 to 64 samples"),
            ("x", lambda a: a[:0], "1 to 64 samples"),
            ("t", lambda a: a + 1, "t: timesteps run from 0 to 999"),
            ("t", lambda a: a[:1], "t: it is"),
            ("t", lambda a: a.astype(np.complex64), "unexpected type complex64"),
            ("y", lambda a: a[:, :-1], "y: it is"),
            ("out", lambda a: a[:, :3], "out: it is"),
            ("out", lambda a: a.astype(object), "unexpected type object"),
            ("T/x_T", lambda a: a[:1], "x_T: it is"),
            ("T/noise", lambda a: a[:-1], "noise: it is"),
            ("T/timesteps", lambda a: a[::-1], "not ascending"),
            ("T/timesteps", lambda a: a + 1, "run from 0 to 999"),
            ("T/timesteps", lambda a: np.array([0, 5, 6, 7]), "of any spacing"),
            ("T/timesteps", lambda a: a[:0], "1 to 10000"),
            ("T/timesteps", lambda a: a[None], "1 to 10000"),
            ("T/sample", lambda a: a[..., :1], "sample: it is"),
            ("T/states", lambda a: a[:-1], "states: it is"),
            ("T/settings", lambda a: np.array("{"), "not JSON"),
            ("T/settings", lambda a: np.array("[" * 4000), "not JSON"),
            ("T/settings", lambda a: np.array("x" * 5000), "no text"),
            ("T/settings", lambda a: np.array(["{}"]), "no text"),
            ("T/settings", lambda a: np.array(3), "no text"),
            ("T/settings", lambda a: np.array("{}"), "solver and guidance"),
            ("T/settings", lambda a: changed(a, "steps", 10**9), "of any spacing"),
            ("T/settings", lambda a: changed(a, "steps", "4"), "steps must be int"),
            ("T/settings", lambda a: changed(a, "colour", 1), "unknown keys: colour"),
            ("T/settings", lambda a: changed(a, "eta", 7.0), "eta must be"),
            ("T/settings", lambda a: changed(a, "solver", "magic"), "no solver"),
            ("checkpoint_sha256", lambda a: np.array("0" * 64), "another model"),
            ("checkpoint_sha256", lambda a: np.array(1.0), "no text"),
            ("low_res", lambda a: np.zeros(3), "takes no such input"),
            ("colour", lambda a: np.zeros(3), "no array of that name"),
            ("../T/x_T", lambda a: np.zeros(3), "no array of that name"),
            ("/x_T", lambda a: np.zeros(3), "no array of that name"),
            ("T/x_T/x_T", lambda a: np.zeros(3), "no array of that name"),
        ],
    )
    def test_what_does_not_fit_is_named(
        self,
        tiny_checkpoint: Path,
        arrays: Arrays,
        tmp_path: Path,
        name: str,
        value: Callable[[Any], Any],
        message: str,
    ) -> None:
        where = name.replace("T/", "ancestral4_guided2/", 1)
        arrays[where] = value(arrays.get(where))
        path = write(tmp_path / "bad.npz", arrays)
        self.refused(path, tiny_checkpoint, message)

    @pytest.mark.parametrize("name", ["x", "t", "y", "out", "noise", "timesteps"])
    def test_what_is_missing_is_named(
        self, tiny_checkpoint: Path, arrays: Arrays, tmp_path: Path, name: str
    ) -> None:
        where = name if name in arrays else f"ancestral4_guided2/{name}"
        del arrays[where]
        path = write(tmp_path / "bad.npz", arrays)
        self.refused(path, tiny_checkpoint, f"it has no {where}")

    def test_without_settings_the_name_has_to_say_it(
        self, tiny_checkpoint: Path, arrays: Arrays, tmp_path: Path
    ) -> None:
        del arrays["ancestral4_guided2/settings"]
        load(write(tmp_path / "ok.npz", arrays), tiny_checkpoint)
        for bad in ("ancestral5", "magic4", "ancestral4_guided", "ddim4"):
            renamed = {
                key.replace("ancestral4_guided2", bad): value
                for key, value in arrays.items()
            }
            path = write(tmp_path / "bad.npz", renamed)
            if bad == "ddim4":  # the same timesteps are DDIM's, too
                assert load(path, tiny_checkpoint).trajectories[0].name == bad
            else:
                self.refused(path, tiny_checkpoint, "is called")

    def test_a_guided_trajectory_may_borrow(
        self, tiny_checkpoint: Path, arrays: Arrays, tmp_path: Path
    ) -> None:
        """As in guided-diffusion's files: only its end is its own."""
        old, new = "ancestral4_guided2", "ancestral4"
        moved = {key.replace(old, new): value for key, value in arrays.items()}
        del moved[f"{new}/settings"]
        moved[f"{old}/sample"] = arrays[f"{old}/sample"]
        data = load(write(tmp_path / "a.npz", moved), tiny_checkpoint)
        plain, guided = data.trajectories
        assert (plain.name, guided.name) == (new, old)
        assert (plain.job.guidance.scale, guided.job.guidance.scale) == (1.0, 2.0)
        assert guided.job.guidance.guide_variance
        assert guided.states is None

    def test_a_header_that_asks_for_terabytes(
        self, tiny_checkpoint: Path, arrays: Arrays, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "bad.npz", arrays)
        stream = io.BytesIO()
        shape = (1 << 20, 1 << 20)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("extra/x_T.npy", stream.getvalue())
            archive.writestr("extra/timesteps.npy", stream.getvalue())
        self.refused(path, tiny_checkpoint, "not what its header says")

    def test_files_that_are_none(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "text.npz").write_text("hello")
        self.refused(tmp_path / "text.npz", tiny_checkpoint, "not a readable .npz")
        self.refused(tmp_path / "none.npz", tiny_checkpoint, "does not exist")
        self.refused(tmp_path, tiny_checkpoint, "regular file")


def changed(text: Any, name: str, value: Any) -> Any:
    stated = json.loads(str(text))
    stated["solver"][name] = value
    return np.array(json.dumps(stated))


def test_only_pytorch_in_float32_records(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    half = SideRequest(tiny_checkpoint, precision="float16")
    for side in (half, SideRequest(tiny_bundle)):
        with pytest.raises(GoldenError, match="from PyTorch in float32"):
            record_to_file(tmp_path / "a.npz", side, settings())
    assert list(tmp_path.iterdir()) == []
    good = SideRequest(tiny_checkpoint)
    with pytest.raises(OutputError):
        record_to_file(tmp_path / "no" / "a.npz", good, settings("ddim", 1))


def test_no_model_without_an_oracle_is_recorded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "id3pm_deploy.parity.record.oracle_gap", lambda *_: "it is too new"
    )
    model = open_model(tiny_checkpoint)
    with (
        open_engine(model, "torch") as engine,
        pytest.raises(GoldenError, match="diffusers cannot") as caught,
    ):
        record_golden(
            tmp_path / "a.npz", engine, model.spec, model.weights_sha256, settings()
        )
    assert caught.value.why == "it is too new"


@pytest.fixture(scope="module")
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The recorded identity model as a CHECKPOINT, and its golden data."""
    folder = request.getfixturevalue("shared") / "golden"
    flags = json.loads((folder / "id32.json").read_text())
    tensors = torch.load(folder / "id32.pt", weights_only=True)
    identity = IdentitySpec(512, "golden", None, "raw")
    made = convert_guided_diffusion(flags, tensors, identity, "id32")
    out: Path = tmp_path_factory.mktemp("converted") / "id32"
    save_checkpoint(out, made.spec, made.tensors)
    return out, folder / "id32.npz"


class TestGuidedDiffusion:
    """What guided-diffusion itself made of the same weights."""

    @staticmethod
    def check(report: Any) -> None:
        assert report.passed, report.failures
        worst = report.worst("forward")
        assert worst is not None
        assert 0 < worst.found.max_rel <= 1e-5
        names = ["ancestral10", "ddim10", "ancestral10_guided2"]
        assert [one.name for one in report.trajectories] == names
        for one in report.trajectories:
            assert 0 < one.final.max_rel <= 1e-4
            assert one.final_unsaturated is not None
            assert one.final_unsaturated.max_rel <= 1e-4

    def test_the_reference_follows_it(
        self, converted: tuple[Path, Path], tmp_path: Path
    ) -> None:
        checkpoint, golden = converted
        request = GoldenRequest(SideRequest(checkpoint), golden)
        report = golden_to_folder(tmp_path / "r", request)
        self.check(report)
        for one in report.trajectories:
            assert len(one.per_step) == 10
            rows = [row.oracle for row in one.per_step]
            # On the cosine schedule, t = 999 enlarges rounding: see rounding.py.
            first = 0 if one.name == "ddim10" else 1
            assert rows[:first] == [None] * first
            assert all(row is not None and row.max_rel <= 1e-4 for row in rows[first:])

    @pytest.mark.slow
    def test_an_exported_bundle_follows_it(
        self, converted: tuple[Path, Path], tmp_path: Path
    ) -> None:
        from id3pm_deploy.builders.build import build_engine

        checkpoint, golden = converted
        build_engine(checkpoint, "cpu", tmp_path / "bundle")
        request = GoldenRequest(SideRequest(tmp_path / "bundle"), golden)
        report = golden_to_folder(tmp_path / "r", request)
        self.check(report)
        assert len(report.not_checked) == 3

    def test_the_traps_are_traps(self, converted: tuple[Path, Path]) -> None:
        """Noise in the order of the timesteps, or guidance of the first three channels
        alone, would be something else."""
        checkpoint, golden = converted
        loaded = load_checkpoint(checkpoint)
        spec = loaded.spec
        data = load_golden_data(golden, spec, loaded.weights_sha256)
        guided = data.trajectories[2]
        assert guided.job.guidance == GUIDED
        job = guided.job
        less = dataclasses.replace(job, guidance=GuidanceSettings(2.0))
        noise: Any = job.noise
        turned = dataclasses.replace(
            job, noise=dataclasses.replace(noise, noise=noise.noise[::-1])
        )
        with TorchEngine(loaded.network, step_shapes(spec)) as engine:
            assert all(c.passes(1e-5) for _, c in compare_forward(engine, spec, data))
            for bent in (less, turned):
                wrong = dataclasses.replace(guided, job=bent)
                found = _end_only(engine, spec, wrong)
                assert not found.passes(1e-2)

    def test_small_pictures_are_refused_by_a_model_without(
        self, shared: Path, tiny_checkpoint: Path
    ) -> None:
        with pytest.raises(GoldenError, match="cannot be used") as caught:
            load(shared / "golden" / "sr16to64.npz", tiny_checkpoint)
        assert "it has no y" in caught.value.why

    @pytest.mark.slow
    def test_the_super_resolution_model_follows_it(
        self, shared: Path, tmp_path: Path
    ) -> None:
        """Some numbers of ddim10 are left out: the recording itself is 1.09e-4 off what
        float64 makes of them."""
        made, golden = _enlarger(shared)
        assert made.spec.model.low_res_size == 16
        save_checkpoint(tmp_path / "sr", made.spec, made.tensors)
        request = GoldenRequest(SideRequest(tmp_path / "sr"), golden)
        report = golden_to_folder(tmp_path / "r", request)
        assert report.passed, report.failures
        worst = report.worst("forward")
        assert worst is not None
        assert 0 < worst.found.max_rel <= 1e-5
        assert [one.name for one in report.trajectories] == ["ancestral10", "ddim10"]
        for one in report.trajectories:
            assert one.final_unsaturated is not None
            assert one.final.max_rel <= 1e-4
            assert one.final.count >= 0.95 * 3 * 3 * 64 * 64

    @pytest.mark.slow
    def test_leaving_numbers_out_hides_no_error(
        self, shared: Path, tmp_path: Path
    ) -> None:
        """One convolution's weights off by a ten-thousandth: forward passes are inside
        their tolerance, trajectories are not."""
        made, golden = _enlarger(shared)
        path = tmp_path / "sr"
        tensors = dict(made.tensors)
        name = "unet.up_blocks.0.resnets.1.conv1.weight"
        tensors[name] = tensors[name] * 1.0001
        save_checkpoint(path, made.spec, tensors)
        report = golden_to_folder(
            tmp_path / "r", GoldenRequest(SideRequest(path), golden)
        )
        worst = report.worst("forward")
        assert worst is not None
        assert worst.found.max_rel <= 1e-5
        assert not report.passed
        for one in report.trajectories:
            assert one.final.max_rel > 1e-4


def _enlarger(shared: Path) -> tuple[Any, Path]:
    """The recorded super-resolution model, converted, and its golden data."""
    folder = shared / "golden"
    flags = json.loads((folder / "sr16to64.json").read_text())
    tensors = torch.load(folder / "sr16to64.pt", weights_only=True)
    made = convert_guided_diffusion(flags, tensors, NO_IDENTITY, "sr")
    return made, folder / "sr16to64.npz"


class TestSuperResolution:
    """Golden data of a model without identity that enlarges."""

    SPEC = tiny_spec(low_res_size=4, identity=NO_IDENTITY, learned_variance=True)

    def test_it_is_recorded_and_made_again(self, tmp_path: Path) -> None:
        enlarger = tmp_path / "checkpoint"
        save_checkpoint(enlarger, self.SPEC, tiny_network(self.SPEC).state_dict())
        side = SideRequest(enlarger)
        plain = settings(guidance=GuidanceSettings(1.0), steps=3)
        record_to_file(tmp_path / "g.npz", side, plain)
        with np.load(tmp_path / "g.npz") as file:
            arrays = {name: file[name] for name in file.files}
        assert "y" not in arrays
        assert arrays["low_res"].shape == (2, 3, 4, 4)
        assert 0.5 < np.abs(arrays["low_res"]).max() <= 1
        report = golden_to_folder(
            tmp_path / "r", GoldenRequest(side, tmp_path / "g.npz")
        )
        assert report.passed, report.failures
        assert report.subject["Stage"] == "super-resolution stage"
        # Other small pictures make something else.
        changed = arrays | {"low_res": -arrays["low_res"]}
        request = GoldenRequest(side, write(tmp_path / "c.npz", changed))
        assert not golden_to_folder(tmp_path / "c", request).passed
        for wrong, message in (
            ({"low_res": arrays["low_res"][:, :, :2]}, "low_res: it is float32"),
            ({"low_res": arrays["low_res"].astype("f8")}, "it is float64"),
            ({"low_res": np.full((2, 3, 4, 4), np.nan, np.float32)}, "NaN"),
            ({"y": np.zeros((2, 16), np.float32)}, "y: the model takes no such input"),
        ):
            path = write(tmp_path / "w.npz", arrays | wrong)
            with pytest.raises(GoldenError) as caught:
                load(path, enlarger)
            assert message in caught.value.why
        del arrays["low_res"]
        with pytest.raises(GoldenError) as caught:
            load(write(tmp_path / "w.npz", arrays), enlarger)
        assert "it has no low_res" in caught.value.why


def _end_only(engine: Engine, spec: DiffusionSpec, one: Any) -> Any:
    from id3pm_deploy.sampler import run_trajectory

    made = run_trajectory(engine, one.job, range(len(one.sample)))
    return compare(made.images, one.sample)
