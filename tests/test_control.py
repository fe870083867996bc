"""Control: shots, their tables, their pictures, and the records that repeat them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from models import random_identity, tiny_network, tiny_spec
from PIL import Image

import id3pm_deploy
from id3pm_deploy.api import Sampler
from id3pm_deploy.backends.base import Engine, step_shapes
from id3pm_deploy.backends.torch import TorchEngine
from id3pm_deploy.batch import joined
from id3pm_deploy.cli import main
from id3pm_deploy.control import grids
from id3pm_deploy.control.annealing import Annealer, Annealing
from id3pm_deploy.control.resolve import conditions_of, interpolated, together
from id3pm_deploy.control.shots import Grid, Shot, alike, shot_from_json
from id3pm_deploy.errors import Id3pmError, IdentityError, InputError
from id3pm_deploy.guidance import GuidanceSettings, Others, guidance_table
from id3pm_deploy.identity.directions import principal_directions, save_directions
from id3pm_deploy.identity.vectors import identity_file, save_identities
from id3pm_deploy.noise import NoiseAddress, normals, varied_normals
from id3pm_deploy.sampler import SampleJob, SeededNoise, run_trajectory
from id3pm_deploy.solvers import SolverSettings, solver_table

Float32 = npt.NDArray[np.float32]
SPEC = tiny_spec()
VECTORS = np.random.default_rng(3).normal(size=(5, 16)).astype(np.float32)
PEOPLE = identity_file(VECTORS, SPEC.identity.model_name, SPEC.identity.model_sha256)
A, B, C = PEOPLE.ids[:3]
FAST: dict[str, Any] = {"steps": 3, "solver": "ddpm"}
FOUND, _ = principal_directions(PEOPLE, 2)


@pytest.fixture(scope="module")
def sampler(tiny_bundle: Path) -> Iterator[Sampler]:
    with id3pm_deploy.load(tiny_bundle, threads=1) as opened:
        yield opened


def made(sampler: Sampler, *shots: Shot, **rest: Any) -> npt.NDArray[np.uint8]:
    given = {**FAST, "directions": FOUND, **rest}
    return sampler.sample_all(PEOPLE, shots=shots, **given)


class TestTables:
    IDENTITY = random_identity(2, SPEC)
    OTHER = random_identity(2, SPEC, seed=1)[:, None]

    def table(self, blend: float, negative: float, scale: float) -> Any:
        share = np.array([[blend], [0.0]]), np.array([[negative], [0.0]])
        return guidance_table(self.IDENTITY, scale, others=Others(self.OTHER, *share))

    def weights(self, table: Any) -> dict[bytes, list[float]]:
        """Of the first sample: by its rows' vectors."""
        own = np.flatnonzero(table.row == 0)
        mix = table.mix[:, 0, own].T.tolist()
        return {table.identity[r].tobytes(): m for r, m in zip(own, mix, strict=True)}

    def test_a_blend_shares_the_scale(self) -> None:
        found = self.weights(self.table(0.25, 0.0, 3.0))
        null = np.zeros(16, np.float32).tobytes()
        assert found[self.IDENTITY[0].tobytes()] == [2.25, 0.75]
        assert found[self.OTHER[0, 0].tobytes()] == [0.75, 0.25]
        assert found[null] == [-2.0, 0.0]
        plain = self.weights(self.table(0.25, 0.0, 1.0))
        assert null not in plain
        assert plain[self.OTHER[0, 0].tobytes()] == [0.25, 0.25]

    def test_a_negative_takes_the_place_of_null(self) -> None:
        found = self.weights(self.table(0.0, 1.0, 3.0))
        assert found[self.OTHER[0, 0].tobytes()] == [-2.0, 0.0]
        assert len(found) == 2
        half = self.weights(self.table(0.0, 0.5, 3.0))
        assert [m[0] for m in half.values()] == [3.0, -1.0, -1.0]
        assert len(self.weights(self.table(0.0, 1.0, 1.0))) == 1

    def test_neighbours_are_untouched(self) -> None:
        table = self.table(0.25, 0.5, 3.0)
        assert (table.row == 1).sum() == 2
        assert table.mix[:, 0, table.row == 1].tolist() == [[0, 0], [0, 0]]
        assert table.mix[0].sum(axis=1) == pytest.approx([1, 1])


STEADY = tiny_spec(prediction_type="v", learned_variance=True)
"""Its trajectories do not enlarge rounding, as those of ε-prediction do."""


def job_of(others: Others, **guidance: Any) -> SampleJob:
    table = solver_table(STEADY, SolverSettings("ddpm", 3))
    settings = GuidanceSettings(2.5, **guidance)
    vectors = random_identity(2, SPEC)
    return SampleJob(vectors, table, settings, SeededNoise(3), others=others)


def images(job: SampleJob, engine: Engine) -> Float32:
    return run_trajectory(engine, job, range(2)).images


def test_negatives_run_with_sequential_rows_and_blends_are_refused() -> None:
    other = random_identity(2, SPEC, seed=1)[:, None]
    half, none = np.array([[0.5], [0.5]]), np.zeros((2, 1))
    negative = Others(other, none, half)
    with TorchEngine(tiny_network(STEADY), step_shapes(STEADY)) as engine:
        parallel = images(job_of(negative), engine)
        one_by_one = images(job_of(negative, rows="sequential"), engine)
        without = images(job_of(Others(other, none, none)), engine)
        with pytest.raises(InputError, match="blends cannot be made"):
            images(job_of(Others(other, half, none), rows="sequential"), engine)
    assert one_by_one == pytest.approx(parallel, abs=1e-4)
    assert np.abs(without - parallel).max() > 0.01


class TestAnnealing:
    TIMES = np.array([999.0, 850.0, 700.0, 500.0, 0.0])

    def seen(self, settings: Annealing, clear: Float32) -> Float32:
        noise = SeededNoise(1).condition
        return Annealer(settings, noise, 16, 999)(clear, self.TIMES, [0, 1])

    def test_it_is_noise_at_first_and_the_identity_at_the_end(self) -> None:
        clear = np.stack([VECTORS[0], np.zeros(16, np.float32)])
        seen = self.seen(Annealing(), clear)
        assert (seen[3:] == clear).all()
        assert not seen[:, 1].any()
        likeness = [float(np.corrcoef(s, clear[0])[0, 1]) for s in seen[:, 0]]
        assert likeness == sorted(likeness)
        assert abs(likeness[0]) < 0.7 < likeness[2] < 1
        assert seen[:, 0].std(axis=1) == pytest.approx(clear[0].std(), rel=1e-5)
        assert seen[:, 0].mean(axis=1) == pytest.approx(clear[0].mean(), abs=1e-5)

    def test_the_formula_and_what_stays(self) -> None:
        """By hand at u = 0.7/0.999: γ = (0.9 - u)/0.3, no rescale; attributes stay."""
        clear = np.concatenate([VECTORS[:1], np.ones((1, 2), np.float32)], axis=1)
        seen = self.seen(Annealing(0.5, rescale=0.0), clear)[2, 0]
        share = (0.9 - 700 / 999) / (0.9 - 0.6)
        size = math.sqrt(float((VECTORS[0].astype(float) ** 2).mean()))
        drawn = normals(1, 0, 2, 2, (16,))
        expected = math.sqrt(share) * VECTORS[0]
        expected = expected + 0.5 * size * math.sqrt(1 - share) * drawn
        assert seen[:16] == pytest.approx(expected, rel=1e-5)
        assert seen[16:].tolist() == [1, 1]
        assert (self.seen(Annealing(0.0), clear) == clear).all()

    @pytest.mark.parametrize(
        "wrong", [(-1,), (math.nan,), (1, 0.9, 0.6), (1, 0.1, 1.1), (1, 0.1, 0.2, 2)]
    )
    def test_settings_out_of_range(self, wrong: tuple[float, ...]) -> None:
        with pytest.raises(InputError, match="annealing"):
            Annealing(*wrong)


def test_varied_noise_stays_on_the_sphere() -> None:
    shape = (3, 32, 32)
    own, fresh = (
        varied_normals(5, NoiseAddress(2, share, 7), 0, 1, shape) for share in (0, 1)
    )
    half = varied_normals(5, NoiseAddress(2, 0.5, 7), 0, 1, shape)
    assert (own == normals(5, 2, 0, 1, shape)).all()
    assert half == pytest.approx((own + fresh) / math.sqrt(2), abs=1e-6)
    assert abs(float(np.corrcoef(own.ravel(), fresh.ravel())[0, 1])) < 0.06
    other = varied_normals(5, NoiseAddress(2, 1.0, 8), 0, 1, shape)
    assert not (other == fresh).any()


class TestInterpolation:
    def test_it_goes_evenly_along_the_great_circle(self) -> None:
        a, b = np.array([2.0, 0, 0]), np.array([0, 4.0, 0])
        third = interpolated(a, b, 1 / 3)
        expected = 8 / 3 * np.array([math.cos(math.pi / 6), 0.5, 0])
        assert third == pytest.approx(expected)
        assert interpolated(a, b, 0.0) is a
        assert interpolated(a, b, 1.0) is b
        assert interpolated(a, a, 0.3) == pytest.approx(a)

    def test_opposite_people_have_no_way(self) -> None:
        with pytest.raises(IdentityError, match="opposite"):
            interpolated(VECTORS[0], -VECTORS[0], 0.5)


class TestShots:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"identity": A, "at": 0.5}, "from 0 to 1 on the way"),
            ({"identity": A, "towards": B, "at": 1.5}, "from 0 to 1 on the way"),
            ({"identity": A, "blend": {B: 0.7, C: 0.7}}, "shares of a blend"),
            ({"identity": A, "negative": {B: math.nan}}, "shares of a negative"),
            ({"negative": {"unconditional": 1.0}}, "shares of a negative"),
            ({"blend": {B: 0.5}}, "no identity to be moved"),
            ({"identity": A, "blend": {B: 0.5}, "annealing": 0.2}, "be annealed"),
            ({"identity": A, "directions": {"pc1": math.inf}}, "strength of direction"),
            ({"variation": 2.0}, "variation's strength"),
            ({"noise": -1}, "must not be negative"),
        ],
    )
    def test_contradictions(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Shot(**values)

    def test_they_go_through_json_without_a_vector(self) -> None:
        shot = Shot(
            A, B, 0.25, {"pc1": 2.0}, {"age": 30}, {}, {C: 0.5}, 3.0, 0.1, 4, 0.5, 6
        )
        text = json.dumps(shot.to_json())
        assert A not in text
        assert shot_from_json(A, {"age": 30}, json.loads(text)) == shot
        assert Shot(A).to_json() == {}
        with pytest.raises(InputError, match="unknown keys: blur"):
            shot_from_json(A, {}, {"blur": 1})

    def test_neighbours_of_one_scale_share_batches(self) -> None:
        shots = [Shot(noise=i, scale=s) for i, s in enumerate([None, None, 2.0, None])]
        assert [(n, len(some)) for n, some in alike(shots)] == [(0, 2), (2, 1), (3, 1)]

    def test_who_is_missing_is_said(self) -> None:
        with pytest.raises(IdentityError, match="somebody who is to be shown"):
            conditions_of(SPEC, [Shot(A, negative={"ff": 1.0})], PEOPLE)
        with pytest.raises(InputError, match="none are given"):
            conditions_of(SPEC, [Shot(A, directions={"pc1": 1.0})], PEOPLE)
        with pytest.raises(InputError, match="without attributes"):
            conditions_of(SPEC, [Shot(A, attributes={"age": 1})], PEOPLE)
        others = identity_file(VECTORS, "another", None)
        with pytest.raises(IdentityError, match="another FR model"):
            conditions_of(SPEC, [Shot(A)], others)
        with pytest.raises(IdentityError, match="another FR model"):
            together(PEOPLE, others)


def test_plain_shots_are_plain_pictures(sampler: Sampler) -> None:
    plain = sampler.sample_all(PEOPLE, **FAST, count=1)
    shots = [Shot(one, noise=i) for i, one in enumerate(PEOPLE.ids)]
    assert (made(sampler, *shots) == plain).all()
    assert (made(sampler, *reversed(shots), batch_size=2)[::-1] == plain).all()
    nobody = sampler.sample_all(None, **FAST, count=2)
    assert (made(sampler, Shot(), Shot(noise=1)) == nobody).all()


CHANGES: dict[str, dict[str, Any]] = {
    "towards": {"towards": B, "at": 0.5},
    "directions": {"directions": {"pc2": 3.0}},
    "blend": {"blend": {B: 0.5}},
    "negative": {"negative": {B: 1.0}},
    "scale": {"scale": 4.0},
    "annealing": {"annealing": 1.0},
    "noise": {"noise": 5},
    "variation": {"variation": 0.5},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_control_changes_its_picture_alone(sampler: Sampler, name: str) -> None:
    """In company as alone, whatever the batch; the neighbours stay what they were."""
    changed = Shot(A, **CHANGES[name])
    plain = made(sampler, Shot(A), Shot(B))
    beside = made(sampler, Shot(A), changed, Shot(B), batch_size=3)
    assert (beside[[0, 2]] == plain).all()
    assert (beside[1] != plain[0]).mean() > 0.2
    assert (made(sampler, changed)[0] == beside[1]).all()


def test_ends_of_the_ways_are_the_people(sampler: Sampler) -> None:
    a, b = made(sampler, Shot(A), Shot(B))
    ends = made(sampler, Shot(A, B, 1.0), Shot(A, blend={B: 1.0}), Shot(A, B, 0.0))
    assert (ends[0] == b).all()
    assert np.abs(ends[1].astype(int) - b).max() <= 1
    assert (ends[2] == a).all()
    assert (made(sampler, Shot(A, variation=1.0, variant=1)) != a).any()


def test_runs_of_shots_are_replayed(sampler: Sampler, tmp_path: Path) -> None:
    shots = [Shot(A, **change) for change in CHANGES.values()]
    grid = Grid(tuple(shots), "all", ("one", "two"), tuple("abcd"))
    given = {**FAST, "seed": 9, "batch_size": 2, "guidance": 1.5}
    batches = list(sampler.sample(PEOPLE, shots=grid, directions=FOUND, **given))
    assert [len(one) for one in batches] == [2, 2, 1, 1, 2]
    whole = joined(batches)
    record = whole.save(tmp_path / "run")
    assert record["format_version"] == 2
    again = sampler.replay(tmp_path / "run", PEOPLE, directions=FOUND)
    repeated = joined(list(again))
    assert (repeated.pixels == whole.pixels).all()
    assert repeated.save(tmp_path / "again")["samples"] == record["samples"]
    sheets = [(tmp_path / one / "sheet.png").read_bytes() for one in ("run", "again")]
    assert sheets[0] == sheets[1]
    other, _ = principal_directions(PEOPLE, 3)
    for wrong in (None, other):
        with pytest.raises(IdentityError, match="not the directions of the run"):
            sampler.replay(record, PEOPLE, directions=wrong)
    damaged = {**record, "grid": {**record["grid"], "rows": ["one"]}}
    with pytest.raises(InputError, match="do not hold 8 pictures"):
        sampler.replay(damaged, PEOPLE, directions=FOUND)


def test_continuous_batching_makes_the_same_pictures(sampler: Sampler) -> None:
    shots = [Shot(A, **change) for change in CHANGES.values()]
    expected = made(sampler, *shots)

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(
                sampler.submit(PEOPLE, shot=one, directions=FOUND, **FAST)
                for one in shots
            )
        )

    found = asyncio.run(ask())
    for one, picture in zip(expected, found, strict=True):
        assert (picture.pixels == one).all()


def test_scales_cannot_be_listed_twice(sampler: Sampler) -> None:
    listed = GuidanceSettings(scales=(1.0, 2.0, 3.0))
    with pytest.raises(InputError, match="cannot follow a list"):
        made(sampler, Shot(A, scale=2.0), guidance=listed)


GRIDS: dict[str, list[Any]] = {
    "guidance": ["--scales", "1,3"],
    "interpolate": ["--between", 3],
    "blend": ["--between", 3],
    "direction": ["--strengths", "-2,0,2"],
    "negative": ["--shares", "0,1"],
    "anneal": ["--scales", "0,0.5"],
    "noise": ["--count", 2],
    "vary": ["--strengths", "0.2,1", "--variants", 2],
    "unconditional": ["--count", 2],
}
SHAPES = {
    "guidance": (2, 2),
    "interpolate": (1, 3),
    "blend": (1, 3),
    "direction": (4, 3),
    "negative": (4, 2),
    "anneal": (2, 2),
    "noise": (2, 2),
    "vary": (4, 2),
    "unconditional": (0, 0),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.mark.parametrize("kind", GRIDS)
def test_the_command_writes_a_sheet_of_each(
    kind: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    people, found = tmp_path / "people.npz", tmp_path / "d.npz"
    save_identities(people, PEOPLE)
    save_directions(found, FOUND)
    where: list[Any] = [
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--threads",
        1,
        "--people",
        2,
    ]
    if kind != "unconditional":
        where += ["--identity", people]
    where += ["--directions", found] if kind == "direction" else []
    where += ["--negative", people] if kind == "negative" else []
    done = run("control", kind, tiny_bundle, *where, *GRIDS[kind], "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    rows, columns = SHAPES[kind]
    grid = record["grid"]
    assert (len(grid["rows"]), len(grid["columns"])) == (rows, columns)
    count = max(rows * columns, 2)
    names = sorted(one.name for one in (tmp_path / "out").glob("sample-*.png"))
    assert len(names) == len(record["samples"]) == count
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 128 * max(columns, 2)
    assert str(people) not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["interpolate", "--people", "1"], "takes two people"),
        (["guidance", "--scales", "1,x"], "not a list of numbers"),
        (["guidance", "--scales", "1,200"], "guidance scale must be from 0 to 100"),
        (["attribute", "--set", "age=30"], "without attributes"),
        (["unconditional"], "have no --identity"),
        (["vary", "--strengths", "2"], "variation's strength"),
        (["noise", "--count", "0"], "--count must be at least 1"),
    ],
)
def test_what_cannot_be_shown_is_said(
    arguments: list[str], message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    people = tmp_path / "people.npz"
    save_identities(people, PEOPLE)
    kind, *rest = arguments
    where = ["--identity", people, "--out", tmp_path / "out"]
    done = run("control", kind, tiny_bundle, *where, *rest)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_grids_have_a_place_for_every_shot() -> None:
    with pytest.raises(Id3pmError, match="nothing to show"):
        grids.guidance_sweep([A], [])
    with pytest.raises(InputError, match="do not hold 1 pictures"):
        Grid((Shot(),), "", ("a",), ("b", "c"))
    with pytest.raises(InputError, match="must be a picture"):
        Grid(())
    stated = grids.attribute_values([A, B], [{}, {"age": 30}], (0, 1))
    assert stated.columns == ("none", "age=30")
    assert len(stated.shots) == 8


def test_the_command_repeats_a_grid_of_several_files(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    halves = [
        dataclasses.replace(PEOPLE, vectors=PEOPLE.vectors[s], ids=PEOPLE.ids[s])
        for s in (slice(2), slice(2, 5))
    ]
    people, others = tmp_path / "people.npz", tmp_path / "others.npz"
    save_identities(people, halves[0])
    save_identities(others, halves[1])
    whose = ["--identity", people, "--threads", 1]
    out, again = tmp_path / "out", tmp_path / "again"
    asked = ["--negative", others, "--steps", 2, "--people", 1]
    done = run("control", "negative", tiny_bundle, *whose, *asked, "--out", out)
    assert done.exit_code == 0, done.output
    replay = ["sample", tiny_bundle, *whose, "--replay", out, "--out", again]
    assert run(*replay).exit_code == 1
    done = run(*replay, "--others", others)
    assert done.exit_code == 0, done.output
    for png in out.glob("*.png"):
        assert (again / png.name).read_bytes() == png.read_bytes()
    done = run("sample", tiny_bundle, *whose, "--others", others, "--out", tmp_path)
    assert "--others cannot go without --replay" in done.output


def test_sample_anneals_and_repeats_it(tiny_bundle: Path, tmp_path: Path) -> None:
    people = tmp_path / "people.npz"
    save_identities(people, PEOPLE)
    whose = ["sample", tiny_bundle, "--identity", people, "--threads", 1, "--out"]
    asked = ["--steps", 3, "--count", 1]
    plain, moved, again = (tmp_path / name for name in ("plain", "moved", "again"))
    for done in (
        run(*whose, plain, *asked),
        run(*whose, moved, *asked, "--annealing", 1),
        run(*whose, again, "--replay", moved),
    ):
        assert done.exit_code == 0, done.output
    png = "sample-00000.png"
    assert (moved / png).read_bytes() == (again / png).read_bytes()
    pixels = [np.asarray(Image.open(one / png)) for one in (plain, moved)]
    assert (pixels[0] != pixels[1]).mean() > 0.2
    record = json.loads((moved / "record.json").read_text())
    assert (record["format_version"], record["annealing"]["scale"]) == (2, 1)


def test_attributes_and_both_stages(tmp_path: Path) -> None:
    """A second stage knows fewer attributes, and takes the shot's noise number."""
    from id3pm_deploy.reference.checkpoint import save_checkpoint
    from id3pm_deploy.spec import AttributeSpec

    age = AttributeSpec("age", "numeric", 0.0, 100.0)
    hat = AttributeSpec("hat", "categorical", categories=("no", "yes"))
    specs = {
        "base": tiny_spec(attributes=(age, hat)),
        "large": tiny_spec(attributes=(hat,), image_size=32, low_res_size=16),
    }
    for name, spec in specs.items():
        save_checkpoint(tmp_path / name, spec, tiny_network(spec).state_dict())
    stated: list[dict[str, Any]] = [{}, {"age": 20}, {"age": 20, "hat": "yes"}]
    grid = grids.attribute_values([A], stated)
    large = tmp_path / "large"
    with id3pm_deploy.load(tmp_path / "base", super_resolution=large) as sampler:
        given: dict[str, Any] = {"steps": 2, "sr_steps": 2}
        (batch,) = sampler.sample(PEOPLE, shots=grid, **given)
        assert batch.pixels.shape == (3, 32, 32, 3)
        plain = sampler.sample_all(
            PEOPLE, attributes=stated[2], count=1, **given, batch_size=1
        )
        assert (batch.pixels[2] == plain[0]).all()
        assert len({one.tobytes() for one in batch.pixels}) == 3
        batch.save(tmp_path / "out")
        (again,) = sampler.replay(tmp_path / "out", PEOPLE)
        assert (again.pixels == batch.pixels).all()
        with pytest.raises(InputError, match="must be from 0 to 100"):
            made(sampler, Shot(A, attributes={"age": 200}), steps=2)
