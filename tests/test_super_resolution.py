"""Super-resolution and models without identity, from the step to the command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from models import random_identity, tiny_network, tiny_spec
from PIL import Image
from torch.nn.functional import interpolate

from id3pm_deploy.backends.base import StepShapes, step_shapes
from id3pm_deploy.backends.onnxruntime import OnnxRuntimeEngine
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.body_form import BodyForm
from id3pm_deploy.builders.build import build_engine, export_bundle
from id3pm_deploy.builders.export_recipe import ExportRecipe
from id3pm_deploy.builders.graph_inputs import (
    dynamic_shapes,
    example_inputs,
    module_and_names,
)
from id3pm_deploy.bundle import BASE, SUPER_RESOLUTION, open_bundle
from id3pm_deploy.cli import main
from id3pm_deploy.enlarging import low_res_from_pixels, read_pictures
from id3pm_deploy.errors import BundleError, EngineError, IdentityError, InputError
from id3pm_deploy.generate import Conditions, SampleSettings, make_pictures
from id3pm_deploy.guidance import GuidanceSettings, guidance_plan, guidance_table
from id3pm_deploy.identity.vectors import identity_file, save_identities
from id3pm_deploy.inspection import inspect_path, self_tests
from id3pm_deploy.marks import read_mark
from id3pm_deploy.models import open_engine, open_model, open_second_stage
from id3pm_deploy.noise import batch_normals
from id3pm_deploy.parity.golden_run import forward_pass
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.reference.step import step_module, with_enlarged
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.spec import NO_IDENTITY, DiffusionSpec, check_chain

Float32 = npt.NDArray[np.float32]

BASE_SPEC = tiny_spec(
    image_size=8, identity=NO_IDENTITY, title="small", learned_variance=True
)
LARGE = tiny_spec(
    image_size=16,
    low_res_size=8,
    identity=NO_IDENTITY,
    title="large",
    learned_variance=True,
    schedule="linear",
)
LARGE_KNOWN = tiny_spec(image_size=16, low_res_size=4, learned_variance=True)
SMALL = batch_normals(5, range(2), 9, 0, (3, 8, 8)).clip(-1, 1)
NOBODY = guidance_table(np.zeros((2, 0), np.float32), 1.0)


def engine_of(spec: DiffusionSpec, seed: int = 0) -> TorchEngine:
    return TorchEngine(tiny_network(spec, seed), step_shapes(spec))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two CHECKPOINTs of random weights: 8x8, and from 8x8 to 16x16."""
    folder = tmp_path_factory.mktemp("chain")
    for name, spec in (("base", BASE_SPEC), ("large", LARGE)):
        state = tiny_network(spec, len(name)).state_dict()
        save_checkpoint(folder / name, spec, state)
    return folder / "base", folder / "large"


@pytest.fixture(scope="module")
def chain_bundle(
    chain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The BUNDLE of both, with an engine each for this CPU; do not change it."""
    out = tmp_path_factory.mktemp("chain-bundle") / "bundle"
    build_engine(chain[0], "cpu", out, chain[1])
    return out


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, list(map(str, arguments)))


def pixels(folder: Path) -> npt.NDArray[np.uint8]:
    found = sorted(folder.glob("sample-*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in found])


class TestStep:
    def test_the_small_pictures_are_enlarged_as_guided_diffusion_does(self) -> None:
        x = torch.randn(2, 3, 16, 16)
        small = torch.from_numpy(SMALL)
        wanted = interpolate(small, (16, 16), mode="bilinear")
        found = with_enlarged(x, small)
        assert found.shape == (2, 6, 16, 16)
        torch.testing.assert_close(found, torch.cat([x, wanted], dim=1))
        # Half-pixel centres: the first column is the first small one, the second a
        # quarter of the way to the next.
        row = found[0, 3, 0]
        torch.testing.assert_close(row[0], small[0, 0, 0, 0])
        quarter = 0.75 * small[0, 0, 0, 0] + 0.25 * small[0, 0, 0, 1]
        torch.testing.assert_close(row[1], quarter)

    def test_a_forward_pass_is_the_networks(self) -> None:
        x, t = (
            batch_normals(1, range(2), 0, 0, (3, 16, 16)),
            np.array([900, 3], np.float32),
        )
        engine = engine_of(LARGE)
        with engine:
            nobody = np.zeros((2, 0), np.float32)
            found = forward_pass(engine, LARGE, x, t, nobody, SMALL)
            with torch.inference_mode():
                both = with_enlarged(torch.from_numpy(x), torch.from_numpy(SMALL))
                wanted = engine.network(both, torch.from_numpy(t)).numpy()
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()

    def test_only_the_noisy_picture_is_scaled(self) -> None:
        network = tiny_network(LARGE)
        row = solver_table(LARGE, SolverSettings("ddim", 4)).rows[2].copy()
        row[1], row[2], row[3], row[4] = 0.25, 0.0, 1.0, 1e30
        x = batch_normals(1, range(2), 0, 0, (3, 16, 16))
        with engine_of(LARGE) as engine, torch.inference_mode():
            engine.begin(x, NOBODY, SMALL)
            engine.run_row(np.stack([row, row]), None)
            both = with_enlarged(torch.from_numpy(0.25 * x), torch.from_numpy(SMALL))
            t = torch.full((2,), float(row[0]))
            wanted = network(both, t)[:, :3].numpy()
            np.testing.assert_allclose(engine.preview(), wanted, atol=1e-5)

    def test_unet_rows_see_their_own_samples_picture(self) -> None:
        """Under guidance sample b has UNet rows b and B + b, in any batch."""
        spec = LARGE_KNOWN
        small = batch_normals(6, range(3), 9, 0, (3, 4, 4)).clip(-1, 1)
        table = solver_table(spec, SolverSettings("ddpm", 50))
        rows = dataclasses.replace(
            table,
            rows=table.rows[45:46],
            timesteps=table.timesteps[45:46],
            stochastic=table.stochastic[45:46],
        )
        identity = random_identity(3, spec)
        job = SampleJob(
            identity, rows, GuidanceSettings(2.0), SeededNoise(1, 1), low_res=small
        )
        with engine_of(spec) as engine:
            whole = run_trajectory(engine, job, [0, 1, 2]).images
            alone = run_trajectory(engine, job, [2]).images
            other = dataclasses.replace(job, low_res=small[::-1])
            turned = run_trajectory(engine, other, [0, 1, 2]).images
        np.testing.assert_allclose(whole[2], alone[0], atol=2e-5)
        np.testing.assert_allclose(whole[1], turned[1], atol=2e-5)
        assert np.abs(whole[2] - turned[2]).max() > 1e-3

    @pytest.mark.parametrize("precision", ["float16", "bfloat16"])
    def test_a_half_body_takes_them_too(self, precision: Any) -> None:
        shapes = step_shapes(LARGE)
        network = tiny_network(LARGE)
        x = batch_normals(1, range(2), 0, 0, (3, 16, 16))
        row = solver_table(LARGE, SolverSettings("ddim", 4)).rows[2]
        found = []
        for form in (BodyForm(), BodyForm(precision)):
            with TorchEngine(network, shapes, form) as engine:
                engine.begin(x, NOBODY, SMALL)
                engine.run_row(np.stack([row, row]), None)
                found.append(engine.preview())
        assert 0 < np.abs(found[0] - found[1]).max() < 0.2

    def test_pictures_are_neither_forgotten_nor_forced_upon_a_model(self) -> None:
        x = batch_normals(1, range(2), 0, 0, (3, 16, 16))
        with engine_of(LARGE) as engine:
            with pytest.raises(EngineError, match="needs the small pictures"):
                engine.begin(x, NOBODY)
            with pytest.raises(EngineError, match="low_res must be"):
                engine.begin(x, NOBODY, SMALL[:1])
            with pytest.raises(EngineError, match="low_res must be"):
                engine.begin(x, NOBODY, SMALL.astype(np.float64))
            with pytest.raises(EngineError, match="identity must be"):
                engine.begin(x, guidance_table(np.ones((2, 4), np.float32), 1.0), SMALL)
        little = x[:, :, :8, :8].copy()
        refused = pytest.raises(EngineError, match="takes no small pictures")
        with engine_of(BASE_SPEC) as engine, refused:
            engine.begin(little, NOBODY, SMALL)

    def test_a_model_without_identity_cannot_be_guided(self) -> None:
        nobody, times = np.zeros((2, 0), np.float32), np.arange(3.0)[::-1]
        assert len(guidance_plan(nobody, GuidanceSettings(1.0), times).tables) == 1
        for settings in (GuidanceSettings(2.0), GuidanceSettings(scales=(1, 1, 3))):
            with pytest.raises(InputError, match="cannot be guided"):
                guidance_plan(nobody, settings, times)


class TestGraph:
    @pytest.mark.parametrize(
        ("spec", "step", "unet"),
        [
            (tiny_spec(), "state noise identity row mix step", "x timestep identity"),
            (BASE_SPEC, "state noise row mix step", "x timestep"),
            (LARGE, "state noise row mix step low_res", "x timestep low_res"),
            (
                LARGE_KNOWN,
                "state noise identity row mix step low_res",
                "x timestep identity low_res",
            ),
        ],
    )
    def test_inputs_and_their_order(
        self, spec: DiffusionSpec, step: str, unet: str
    ) -> None:
        network = tiny_network(spec)
        assert step_shapes(spec).inputs == tuple(step.split())
        for graph, names in (("step", step), ("unet", unet)):
            recipe = ExportRecipe("", graph=graph)  # type: ignore[arg-type]
            module, inputs, outputs = module_and_names(network, recipe)
            assert inputs == tuple(names.split())
            example = example_inputs(spec, recipe, (2, 3))
            assert tuple(example) == inputs
            assert len(dynamic_shapes(recipe, inputs)) == len(inputs)
            tensors = [torch.from_numpy(value) for value in example.values()]
            with torch.inference_mode():
                made = module(*tensors)
            assert len(made) == len(outputs) if graph == "step" else len(made) == 3

    def test_the_module_without_identity_is_the_step(self) -> None:
        network = tiny_network(LARGE)
        recipe = ExportRecipe("")
        module, _, _ = module_and_names(network, recipe)
        example = example_inputs(LARGE, recipe, (2, 2))
        given = {name: torch.from_numpy(value) for name, value in example.items()}
        with torch.inference_mode():
            found = module(*given.values())
            wanted = step_module(network, BodyForm())(**given, identity=None)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


class TestChain:
    """The command on checkpoints; the stages by hand make the same pictures."""

    def test_a_chain_is_its_stages_by_hand(
        self, chain: tuple[Path, Path], tmp_path: Path
    ) -> None:
        base, large = chain
        common = ("--count", 3, "--seed", 4, "--steps", 3)
        done = run(
            *("sample", base, "--super-resolution", large, "--out", tmp_path / "both"),
            *(*common, "--sr-steps", 4, "--sr-batch-size", 3, "--json"),
        )
        assert done.exit_code == 0, done.stderr
        small = run("sample", base, "--out", tmp_path / "small", *common)
        assert small.exit_code == 0, small.stderr
        again = run(
            *("sample", large, "--low-res", tmp_path / "small"),
            *("--out", tmp_path / "again", "--seed", 4, "--steps", 4),
        )
        assert again.exit_code == 0, again.stderr
        found = pixels(tmp_path / "both")
        assert found.shape == (3, 16, 16, 3)
        assert found.std() > 10
        np.testing.assert_array_equal(found, pixels(tmp_path / "again"))
        record = json.loads(done.stdout)
        second = record["super_resolution"]
        assert (record["solver"]["steps"], second["solver"]["steps"]) == (3, 4)
        assert (record["checkpoint"], second["checkpoint"]) == ("small", "large")
        assert (record["batch_size"], second["batch_size"]) == (8, 3)
        assert (record["low_res"], record["guidance"]["scale"]) == (None, 1.0)
        assert [one["failed"] for one in record["samples"]] == [False] * 3
        mark = read_mark(tmp_path / "both" / "sample-00001.png")
        assert (mark.sample, mark.steps, mark.checkpoint) == (1, 3, "small")
        assert (mark.sr_solver, mark.sr_steps) == ("ddpm", 4)
        assert (mark.sr_checkpoint, mark.sr_precision) == ("large", "float32")
        alone = read_mark(tmp_path / "again" / "sample-00001.png")
        assert (alone.sr_steps, alone.checkpoint, alone.composite) == (
            0,
            "large",
            False,
        )

    def test_the_stages_see_different_noise(self) -> None:
        """A chain of one seed would otherwise start both stages from one picture."""
        model = open_model_like(LARGE)
        settings = SampleSettings(
            SolverSettings("ddim", 2), GuidanceSettings(1.0), seed=3, count=2
        )
        wanted = Conditions(np.zeros((2, 0), np.float32), ("a", "b"))
        table = solver_table(LARGE, settings.solver)
        with engine_of(LARGE) as engine:
            made = make_pictures(engine, model, settings, wanted, low_res=SMALL)
            images = {}
            for stage in (0, 1):
                noise = SeededNoise(3, stage)
                job = SampleJob(
                    wanted.identity, table, settings.guidance, noise, low_res=SMALL
                )
                images[stage] = run_trajectory(engine, job, [0, 1]).images
        levels = np.rint((images[1].clip(-1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
        assert np.abs(made.pixels.astype(int) - levels).max() <= 1
        assert np.abs(images[0] - images[1]).max() > 0.1

    def test_the_first_stage_alone(
        self, chain: tuple[Path, Path], tmp_path: Path
    ) -> None:
        base, large = chain
        both = ("sample", base, "--super-resolution", large, "--out", tmp_path / "x")
        refused = run(*both, "--stages", "base")
        assert refused.exit_code == 2
        assert "exclude each other" in refused.stderr
        for name in ("--sr-steps", "--sr-batch-size", "--sr-guidance"):
            refused = run("sample", base, "--out", tmp_path / "x", name, 2)
            assert refused.exit_code == 2
            assert f"{name} cannot be used" in refused.stderr

    @pytest.mark.parametrize(
        ("which", "arguments", "message"),
        [
            ("base", ("--guidance", 2), "cannot be guided"),
            ("base", ("--low-res", "."), "MODEL is not"),
            ("large", (), "needs pictures to enlarge"),
            ("large", ("--low-res", "absent.png"), "does not exist"),
            ("large", ("--low-res", "empty"), "holds no PNG file"),
            ("large", ("--low-res", "one.png", "--count", 3), "enlarged once"),
            ("large", ("--low-res", "wide.png"), "it is 9x8 pixels"),
            ("large", ("--low-res", "text.png"), "cannot be read"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self,
        chain: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        which: str,
        arguments: tuple[Any, ...],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        Image.new("RGB", (8, 8)).save("one.png")
        Image.new("RGB", (9, 8)).save("wide.png")
        Path("text.png").write_text("no picture")
        model = dict(zip(("base", "large"), chain, strict=True))[which]
        done = run("sample", model, "--out", "x", "--steps", 2, *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert not Path("x").exists()

    def test_identities_are_refused_by_a_model_without(
        self, chain: tuple[Path, Path], tmp_path: Path
    ) -> None:
        vectors = np.ones((1, 16), np.float32)
        save_identities(tmp_path / "who.npz", identity_file(vectors, "a model", None))
        done = run(
            *("sample", chain[0], "--identity", tmp_path / "who.npz"),
            *("--out", tmp_path / "x"),
        )
        assert done.exit_code == IdentityError.exit_status
        assert "trained without identities" in done.stderr

    def test_a_second_stage_that_does_not_fit_is_refused(
        self, chain: tuple[Path, Path], tmp_path: Path
    ) -> None:
        base, large = chain
        for first, second, message in (
            (base, base, "no super-resolution model"),
            (large, large, "the base is itself"),
        ):
            with pytest.raises(InputError, match=message):
                open_second_stage(open_model(first), second)
            with pytest.raises(InputError, match=message):
                export_bundle(first, "float32", tmp_path / "b", second)
        assert list(tmp_path.iterdir()) == []
        other = dataclasses.replace(LARGE.model, low_res_size=4)
        wrong = dataclasses.replace(LARGE, model=other)
        with pytest.raises(InputError, match="pictures of another size"):
            check_chain(BASE_SPEC, wrong)
        grey = dataclasses.replace(LARGE.model, image_channels=1)
        with pytest.raises(InputError, match="numbers of image channels"):
            check_chain(BASE_SPEC, dataclasses.replace(LARGE, model=grey))
        known = dataclasses.replace(LARGE, identity=LARGE_KNOWN.identity)
        with pytest.raises(InputError, match="different FR models"):
            check_chain(BASE_SPEC, known)
        check_chain(dataclasses.replace(BASE_SPEC, identity=known.identity), known)

    def test_an_unmarked_picture_makes_a_composite(
        self, chain: tuple[Path, Path], tmp_path: Path
    ) -> None:
        Image.new("RGB", (8, 8), (9, 60, 200)).save(tmp_path / "photo.png")
        done = run(
            *("sample", chain[1], "--low-res", tmp_path / "photo.png"),
            *("--out", tmp_path / "x", "--steps", 2, "--json"),
        )
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["low_res"] == "given"
        assert "photo" not in done.stdout
        assert read_mark(tmp_path / "x" / "sample-00000.png").composite


def open_model_like(spec: DiffusionSpec) -> Any:
    """A model that nothing is read from."""
    from id3pm_deploy.models import Model

    return Model(Path("absent"), spec, None)


def test_grey_levels_become_what_guided_diffusion_feeds(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint8)
    one = np.stack([levels.reshape(16, 16)] * 3, axis=-1)[None]
    found = low_res_from_pixels(one)
    assert found.dtype == np.float32
    assert found.shape == (1, 3, 16, 16)
    wanted = torch.arange(256).float() / 127.5 - 1.0
    np.testing.assert_array_equal(found[0, 1].ravel(), wanted.numpy())
    assert (found.min(), found.max()) == (-1, 1)
    spec = tiny_spec(image_size=32, low_res_size=16)
    Image.fromarray(one[0]).save(tmp_path / "b.png")
    Image.fromarray(255 - one[0]).save(tmp_path / "a.png")
    Image.new("RGB", (400, 80)).save(tmp_path / "sheet.png")
    read = read_pictures(tmp_path, spec, "sheet.png")
    np.testing.assert_array_equal(read.low_res[1], found[0])
    np.testing.assert_allclose(read.low_res[0], -found[0], atol=1e-6)
    assert not read.generated
    with pytest.raises(InputError, match=r"sheet\.png is not of the size"):
        read_pictures(tmp_path, spec)


@pytest.mark.slow
class TestBundle:
    def test_both_stages_are_there(self, chain_bundle: Path) -> None:
        manifest = open_bundle(chain_bundle).manifest
        assert list(manifest.stages) == [BASE, SUPER_RESOLUTION]
        for entries in (manifest.graphs, manifest.engines):
            assert [entry.stage for entry in entries] == [BASE, SUPER_RESOLUTION]
        assert all(set(g.body) >= {"islands"} for g in manifest.graphs)
        assert all(e.self_test_error is not None for e in manifest.engines)
        tested = self_tests(chain_bundle)
        assert set(tested.errors) == {"cpu", "cpu (super_resolution)"}
        assert all(error is not None for error in tested.errors.values())
        facts = inspect_path(chain_bundle)
        assert facts["stages"] == [BASE, SUPER_RESOLUTION]

    def test_one_command_makes_large_pictures_in_any_batch(
        self, chain_bundle: Path, tmp_path: Path
    ) -> None:
        common = ("--count", 3, "--steps", 3, "--seed", 6, "--threads", 1)
        sizes = {"a": (1, 1), "b": (3, 2), "c": (2, 3)}
        for name, (first, second) in sizes.items():
            done = run(
                *("sample", chain_bundle, "--out", tmp_path / name, *common),
                *("--sr-steps", 3, "--batch-size", first, "--sr-batch-size", second),
            )
            assert done.exit_code == 0, done.stderr
        wanted = pixels(tmp_path / "a")
        assert wanted.shape == (3, 16, 16, 3)
        for name in ("b", "c"):
            np.testing.assert_array_equal(pixels(tmp_path / name), wanted)
        small = ("--stages", "base", "--out", tmp_path / "s")
        done = run("sample", chain_bundle, *small, *common)
        assert done.exit_code == 0, done.stderr
        assert pixels(tmp_path / "s").shape == (3, 8, 8, 3)
        # By hand, on the engines themselves.
        model = open_model(chain_bundle).second_stage
        assert model is not None
        settings = SampleSettings(
            SolverSettings("ddpm", 3), GuidanceSettings(1.0), seed=6, count=3
        )
        nobody = Conditions(np.zeros((3, 0), np.float32), ("",) * 3)
        with open_engine(model, threads=1) as engine:
            low = low_res_from_pixels(pixels(tmp_path / "s"))
            made = make_pictures(engine, model, settings, nobody, low_res=low)
        np.testing.assert_array_equal(made.pixels, wanted)

    @pytest.mark.parametrize("stage", ["base", "super-resolution"])
    def test_parity_names_its_stage(
        self,
        chain: tuple[Path, Path],
        chain_bundle: Path,
        tmp_path: Path,
        stage: str,
    ) -> None:
        against = dict(zip(("base", "super-resolution"), chain, strict=True))[stage]
        done = run(
            *("parity", chain_bundle, "--stage", stage, "--against", against),
            *("--steps", 4, "--count", 2, "--out", tmp_path / "r", "--json"),
        )
        assert done.exit_code == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["subject"]["Stage"] == f"{stage} stage"
        assert f"{stage} stage" in report["title"]
        missed = report["not_checked"]
        assert any("the bundle's other stage" in one for one in missed)
        assert report["oracle_max_rel"] <= 1e-4
        wrong = chain[1] if stage == "base" else chain[0]
        done = run(
            *("parity", chain_bundle, "--stage", stage, "--against", wrong),
            *("--steps", 4, "--out", tmp_path / "w"),
        )
        assert done.exit_code != 0
        assert "model" in done.stderr or "stage" in done.stderr

    def test_a_graph_of_another_model_is_refused(self, chain_bundle: Path) -> None:
        bundle = open_bundle(chain_bundle)
        base, large = (
            bundle.read(g.file)
            for g in sorted(bundle.manifest.graphs, key=lambda g: g.stage)
        )
        for data, shapes, message in (
            (base, StepShapes(3, 16, 0, 8), "no input for small pictures"),
            (large, StepShapes(3, 16, 0), "has input for small pictures"),
            (base, StepShapes(3, 8, 16), "no input for identity"),
        ):
            with pytest.raises(EngineError, match="not the model's") as caught:
                OnnxRuntimeEngine(data, shapes, "float32")
            assert message in caught.value.why

    def test_a_second_stage_joins_and_is_not_replaced_by_another(
        self, chain: tuple[Path, Path], chain_bundle: Path
    ) -> None:
        """Graphs that are there are taken as they are; other weights are refused."""
        before = open_bundle(chain_bundle).data
        built = build_engine(chain[0], "cpu", chain_bundle)
        assert built.super_resolution is None
        graphs = open_bundle(chain_bundle).manifest.graphs
        assert {g.file for g in graphs} == {
            g.file for g in open_bundle(chain_bundle).manifest.graphs
        }
        again = build_engine(chain_bundle, "cpu", None)
        assert again.super_resolution is not None
        assert len(again.bundle.manifest.engines) == 2
        assert before != b""
        with pytest.raises(InputError, match="knows its own second stage"):
            build_engine(chain_bundle, "cpu", None, chain[1])
        done = run(
            *("sample", chain_bundle, "--super-resolution", chain[1]),
            *("--out", chain_bundle.parent / "x"),
        )
        assert "a second stage of its own" in done.stderr

    def test_another_second_stage_is_refused(
        self, chain: tuple[Path, Path], chain_bundle: Path, tmp_path: Path
    ) -> None:
        save_checkpoint(tmp_path / "l", LARGE, tiny_network(LARGE, 77).state_dict())
        with pytest.raises(BundleError, match="another checkpoint") as caught:
            export_bundle(chain[0], "float32", chain_bundle, tmp_path / "l")
        assert caught.value.why == "these differ: super_resolution.weights"

    @pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx"
    )
    def test_plans_of_both_stages_are_built(
        self, chain: tuple[Path, Path], tmp_path: Path
    ) -> None:
        out = tmp_path / "b"
        built = build_engine(chain[0], "rtx", out, chain[1])
        assert built.super_resolution is not None
        for entry in (built.entry, built.super_resolution):
            assert entry.flavour == "tensorrt_rtx"
            assert len(built.bundle.read(entry.file)) > 100_000
        plans = inspect_path(out)["plans"]
        assert set(plans) == {"rtx", "rtx (super_resolution)"}
        assert all(plan["trusted"] for plan in plans.values())
