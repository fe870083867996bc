"""Attributes beside identity: their columns, and the whole way of a model with them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import ATTRIBUTES
from click.testing import CliRunner, Result
from models import contents, tiny_network, tiny_spec
from PIL import Image

import id3pm_deploy
from id3pm_deploy.api import Sampler
from id3pm_deploy.attributes import (
    Attributes,
    described,
    encode_attributes,
    known_to,
    of_each,
    parse_attributes,
)
from id3pm_deploy.backends.base import step_shapes
from id3pm_deploy.batch import joined
from id3pm_deploy.benchmark.operations import products
from id3pm_deploy.bundle import open_bundle
from id3pm_deploy.checkpoint_config import CONFIG_NAME, load_spec
from id3pm_deploy.cli import main
from id3pm_deploy.errors import CheckpointError, InputError
from id3pm_deploy.generate import conditions
from id3pm_deploy.identity.vectors import identity_file, save_identities
from id3pm_deploy.parity.conditions import random_conditions
from id3pm_deploy.reference.checkpoint import load_checkpoint, save_checkpoint
from id3pm_deploy.spec import NO_IDENTITY, AttributeSpec, DiffusionSpec, check_chain

SPEC = tiny_spec(
    image_size=8, attention_resolutions=(), title="small", attributes=ATTRIBUTES
)
LARGE = tiny_spec(
    image_size=16,
    attention_resolutions=(),
    low_res_size=8,
    title="large",
    attributes=ATTRIBUTES[1:],
)
DIM = SPEC.identity.dim
VECTORS = np.random.default_rng(3).normal(size=(2, DIM)).astype(np.float32)
THIRTY: Attributes = {"age": 30, "glasses": "sun"}
FAST: dict[str, Any] = {"steps": 3, "solver": "ddpm"}
QUICK = ["--steps", "3", "--solver", "ddpm", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, ``base`` and ``large``, and two people in ``two.npz``."""
    made = tmp_path_factory.mktemp("attributes")
    for name, spec in (("base", SPEC), ("large", LARGE)):
        save_checkpoint(made / name, spec, tiny_network(spec).state_dict())
    own = SPEC.identity
    people = identity_file(VECTORS, own.model_name, own.model_sha256)
    save_identities(made / "two.npz", people)
    return made


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """The base's BUNDLE."""
    out = folder / "bundle"
    done = run("build-engine", folder / "base", "--target", "cpu", "--out", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="module")
def sampler(bundle: Path) -> Iterator[Sampler]:
    with id3pm_deploy.load(bundle, threads=1) as opened:
        yield opened


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def written(folder: Path) -> Any:
    names = sorted(folder.glob("sample-*.png"))
    return np.stack([np.asarray(Image.open(name).convert("RGB")) for name in names])


class TestColumns:
    def test_each_attribute_has_its_own_null(self) -> None:
        rows: list[Any] = [
            THIRTY,
            {},
            {"glasses": "no"},
            {"age": np.float32(100)},
            {"age": 0},
        ]
        expected = [
            [-0.4, 1, 0, 0, 1],
            [0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [1, 1, 0, 0, 0],
            [-1, 1, 0, 0, 0],
        ]
        made = encode_attributes(ATTRIBUTES, rows)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, np.array(expected, np.float32))
        assert encode_attributes(ATTRIBUTES, []).shape == (0, 5)
        assert encode_attributes((), [{}, {}]).shape == (2, 0)
        assert (SPEC.condition_dim, step_shapes(SPEC).identity_dim) == (21, 21)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"age": 101}, "must be from 0 to 100"),
            ({"age": -0.5}, "must be from 0 to 100"),
            ({"age": math.nan}, "it is NaN"),
            ({"age": math.inf}, "must be from 0 to 100"),
            ({"age": "30"}, "must be a number"),
            ({"age": True}, "must be a number"),
            ({"age": None}, "must be a number"),
            ({"glasses": "maybe"}, "cannot be 'maybe'"),
            ({"glasses": 1}, "cannot be 1"),
            ({"hat": "yes"}, "has no attribute 'hat'"),
        ],
    )
    def test_what_an_attribute_cannot_be(self, row: Any, message: str) -> None:
        with pytest.raises(InputError) as caught:
            encode_attributes(ATTRIBUTES, [{}, row])
        assert message in str(caught.value)

    def test_a_model_without_attributes_says_so(self) -> None:
        with pytest.raises(InputError, match="trained without attributes"):
            encode_attributes((), [THIRTY])

    def test_texts(self) -> None:
        texts = ["age=30", " glasses = sun "]
        assert parse_attributes(ATTRIBUTES, texts) == THIRTY
        assert list(map(described, ATTRIBUTES)) == [
            "age=0..100",
            "glasses=no|reading|sun",
        ]

    @pytest.mark.parametrize(
        "texts",
        [
            ["age"],
            ["=30"],
            ["age="],
            ["age=thirty"],
            ["age=nan"],
            ["age=101"],
            ["age=1", "age=2"],
            ["glasses=Sun"],
            ["hat=yes"],
        ],
    )
    def test_texts_that_state_nothing(self, texts: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            parse_attributes(ATTRIBUTES, texts)
        assert caught.value.fix or caught.value.why or "twice" in caught.value.what

    def test_those_of_each(self) -> None:
        assert of_each((), 2) == ({}, {})
        assert of_each(THIRTY, 2) == (THIRTY, THIRTY)
        assert of_each([{}, THIRTY], 2) == ({}, THIRTY)
        with pytest.raises(InputError, match="all 3 identities"):
            of_each([{}, THIRTY], 3)
        assert known_to(LARGE.attributes, [THIRTY, {}]) == ({"glasses": "sun"}, {})

    def test_names_that_are_there_twice(self) -> None:
        with pytest.raises(CheckpointError, match="the same name"):
            dataclasses.replace(SPEC, attributes=(ATTRIBUTES[0], ATTRIBUTES[0]))
        with pytest.raises(CheckpointError, match="low before high"):
            AttributeSpec("age", "numeric", 0.0, math.inf)

    def test_random_ones_state_everything(self) -> None:
        some = random_conditions(SPEC, 50, 1)
        plain = dataclasses.replace(SPEC, attributes=())
        expected = random_conditions(plain, 50, 1)
        np.testing.assert_array_equal(some.identity[:, :DIM], expected.identity)
        assert expected.attributes == ({},) * 50
        assert {row["glasses"] for row in some.attributes} == {"no", "reading", "sun"}
        assert len({row["age"] for row in some.attributes}) == 50
        encoded = encode_attributes(ATTRIBUTES, some.attributes)
        np.testing.assert_array_equal(some.identity[:, DIM:], encoded)


class TestCheckpoint:
    def test_attributes_are_read_again(self, folder: Path) -> None:
        config = json.loads((folder / "base" / CONFIG_NAME).read_text())
        assert config["format_version"] == 2
        loaded = load_checkpoint(folder / "base")
        assert loaded.spec == SPEC
        assert loaded.network.identity_projection.in_features == 21

    def test_one_without_is_written_as_it_always_was(self, tmp_path: Path) -> None:
        plain = dataclasses.replace(SPEC, attributes=())
        save_checkpoint(tmp_path, plain, tiny_network(plain).state_dict())
        config = json.loads(contents(tmp_path)[CONFIG_NAME])
        names = ["format", "format_version", "model", "identity", "schedule"]
        assert list(config) == [*names, "prediction_type", "title", "origin"]
        assert config["format_version"] == 1
        assert load_spec(tmp_path).attributes == ()

    def test_functions_differ_in_their_attributes(self) -> None:
        other = dataclasses.replace(SPEC, attributes=ATTRIBUTES[:1])
        assert SPEC.differences(other) == other.differences(SPEC) == ["attributes"]

    def test_an_attribute_alone_moves_the_prediction(self) -> None:
        network = tiny_network(SPEC)
        x, t = torch.ones(4, 3, 8, 8), torch.full((4,), 500)
        rows: list[Attributes] = [{}, {"age": 50}, {"glasses": "no"}, THIRTY]
        wanted = conditions(SPEC, None, 4, rows)
        with torch.inference_mode():
            made = network(x, t, torch.from_numpy(wanted.identity))
            null = network(x, t, torch.zeros(4, 21))
        assert torch.equal(made[0], null[0])
        assert all(
            (made[i] - made[j]).abs().max() > 1e-3 for i in range(4) for j in range(i)
        )

    def test_chains_share_attributes(self) -> None:
        check_chain(SPEC, LARGE)
        other = dataclasses.replace(ATTRIBUTES[0], high=99.0)
        large = dataclasses.replace(LARGE, attributes=(other,))
        with pytest.raises(InputError, match="attributes that the base does not"):
            check_chain(SPEC, large)

    def test_operations_count_their_columns(self) -> None:
        plain = dataclasses.replace(SPEC, attributes=())
        with_them, without = (
            sum(one.macs for one in products(spec)) for spec in (SPEC, plain)
        )
        assert with_them - without == 5 * SPEC.model.embedding_dim


class TestEngine:
    def test_the_graph_takes_them_and_is_pytorchs(
        self, folder: Path, bundle: Path, tmp_path: Path
    ) -> None:
        assert open_bundle(bundle).manifest.format_version == 5
        assert open_bundle(bundle).manifest.diffusion == SPEC
        few = ["--solver", "ddim", "--steps", "3", "--count", "2"]
        sides = [bundle, "--against", folder / "base", "--out", tmp_path / "r"]
        done = run("parity", *sides, *few)
        assert done.exit_code == 0, done.output
        golden = tmp_path / "golden.npz"
        assert run("parity", folder / "base", "--record", golden, *few).exit_code == 0
        with np.load(golden) as arrays:
            assert arrays["y"].shape == (2, 21)
            assert arrays["y"][:, DIM + 1].tolist() == [1, 1]
        held = ["--golden", golden, "--out", tmp_path / "g"]
        done = run("parity", bundle, *held)
        assert done.exit_code == 0, done.output
        facts = json.loads(run("inspect", bundle, "--json", "--self-test").stdout)
        assert facts["diffusion"]["attributes"][0]["name"] == "age"
        assert facts["self_test"]["cpu"] <= 1e-5

    def test_pictures_of_the_command_and_their_replay(
        self, folder: Path, bundle: Path, tmp_path: Path, sampler: Sampler
    ) -> None:
        who = ["--identity", folder / "two.npz"]
        stated = ["--attribute", "age=30", "--attribute", "glasses=sun"]
        for out, words in (("a", stated), ("b", []), ("c", stated[:2])):
            done = run("sample", bundle, *who, *words, "--out", tmp_path / out, *QUICK)
            assert done.exit_code == 0, done.output
        made, bare, age = (written(tmp_path / out) for out in "abc")
        assert (made != bare).mean() > 0.1
        assert (made != age).mean() > 0.1
        record = json.loads((tmp_path / "a" / "record.json").read_text())
        assert [one["attributes"] for one in record["samples"]] == [THIRTY] * 8
        plain = json.loads((tmp_path / "b" / "record.json").read_text())
        assert all("attributes" not in one for one in plain["samples"])
        again = ["--replay", tmp_path / "a", "--out", tmp_path / "d", "--threads", "1"]
        done = run("sample", bundle, *who, *again)
        assert done.exit_code == 0, done.output
        np.testing.assert_array_equal(written(tmp_path / "d"), made)
        given = sampler.sample_all(VECTORS, attributes=THIRTY, batch_size=3, **FAST)
        np.testing.assert_array_equal(given, made)

    def test_each_identity_may_have_its_own(
        self, sampler: Sampler, tmp_path: Path
    ) -> None:
        given = dict(FAST, count=2, batch_size=3)
        rows: list[Attributes] = [{"age": 80}, {}]
        batch = joined(list(sampler.sample(VECTORS, attributes=rows, **given)))
        assert list(batch.attributes) == [rows[0], rows[0], {}, {}]
        old = sampler.sample_all(VECTORS, attributes={"age": 80}, **given)
        bare = sampler.sample_all(VECTORS, **given)
        expected = np.concatenate([old[:2], bare[2:]])
        np.testing.assert_array_equal(batch.pixels, expected)
        batch.save(tmp_path / "saved")
        again = joined(list(sampler.replay(tmp_path / "saved", VECTORS)))
        np.testing.assert_array_equal(again.images, batch.images)
        assert again.attributes == batch.attributes
        asked = sampler.submit(VECTORS[:1], attributes={"age": 80}, sample=1, **FAST)
        np.testing.assert_array_equal(asyncio.run(asked).pixels, old[1])

    def test_of_nobody_in_particular(self, sampler: Sampler, tmp_path: Path) -> None:
        given = dict(FAST, count=2)
        rows: list[Attributes] = [THIRTY, {"glasses": "no"}]
        (batch,) = sampler.sample(None, attributes=rows, **given)
        bare = sampler.sample_all(None, **given)
        assert all((batch.pixels[i] != bare[i]).any() for i in range(2))
        guided = sampler.sample_all(None, attributes=rows, guidance=4.0, **given)
        assert (guided != batch.pixels).any()
        batch.save(tmp_path / "nobody")
        (again,) = sampler.replay(tmp_path / "nobody")
        np.testing.assert_array_equal(again.images, batch.images)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["age=101"], "must be from 0 to 100"),
            (["glasses=none"], "use one of no, reading, sun"),
            (["hat=yes"], "it has age=0..100, glasses=no|reading|sun"),
            (["age=3", "age=4"], "stated twice"),
        ],
    )
    def test_bad_ones_are_refused(
        self, bundle: Path, tmp_path: Path, words: list[str], message: str
    ) -> None:
        options = [part for word in words for part in ("--attribute", word)]
        out = tmp_path / "out"
        done = run("sample", bundle, "--unconditional", *options, "--out", out)
        assert done.exit_code == 2
        assert message in done.output
        assert not out.exists()

    @pytest.mark.parametrize("value", [{"age": 1000}, {"hat": 1}, ["age"], 3])
    def test_a_record_that_was_changed(
        self, sampler: Sampler, tmp_path: Path, value: Any
    ) -> None:
        (batch,) = sampler.sample(None, count=1, attributes=THIRTY, **FAST)
        batch.save(tmp_path / "a")
        record = json.loads((tmp_path / "a" / "record.json").read_text())
        record["samples"][0]["attributes"] = value
        with pytest.raises(InputError):
            sampler.replay(record)

    def test_a_second_stage_takes_those_it_has(
        self, folder: Path, tmp_path: Path
    ) -> None:
        more = ["--super-resolution", folder / "large", "--sr-steps", "2"]
        who = ["--identity", folder / "two.npz", "--count", "1", *QUICK]
        stated = ["--attribute", "age=30", "--attribute", "glasses=sun"]
        out = ["--out", tmp_path / "a"]
        done = run("sample", folder / "base", *who, *stated, *more, *out)
        assert done.exit_code == 0, done.output
        opened = id3pm_deploy.load(
            folder / "base", super_resolution=folder / "large", threads=1
        )
        with opened as sampler:
            replayed = joined(list(sampler.replay(tmp_path / "a", folder / "two.npz")))
            np.testing.assert_array_equal(replayed.pixels, written(tmp_path / "a"))
            given = dict(FAST, count=1, sr_steps=2)
            same = sampler.sample_all(VECTORS, attributes=THIRTY, **given)
            np.testing.assert_array_equal(same, replayed.pixels)
            asked = sampler.submit(VECTORS[:1], attributes=THIRTY, sr_steps=2, **FAST)
            np.testing.assert_array_equal(asyncio.run(asked).pixels, same[0])


def test_attributes_without_identity(tmp_path: Path) -> None:
    """Such a model is guided, needs no --unconditional, and knows no people."""
    spec: DiffusionSpec = dataclasses.replace(SPEC, identity=NO_IDENTITY)
    save_checkpoint(tmp_path / "c", spec, tiny_network(spec).state_dict())
    made = {}
    for scale in ("1", "3"):
        out = tmp_path / scale
        words = ["--attribute", "age=70", "--guidance", scale, "--out", out]
        done = run("sample", tmp_path / "c", *words, "--count", "2", *QUICK)
        assert done.exit_code == 0, done.output
        made[scale] = written(out)
    assert (made["1"] != made["3"]).any()
