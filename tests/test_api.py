"""The library: arrays out, the command's own pictures, replay, threads, errors."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from models import tiny_network, tiny_spec
from PIL import Image

import id3pm_deploy
from id3pm_deploy.api import Sampler
from id3pm_deploy.batch import joined
from id3pm_deploy.cli import main
from id3pm_deploy.errors import (
    CancelledError,
    DeadlineError,
    EngineError,
    Id3pmError,
    IdentityError,
    InputError,
    NonFiniteError,
)
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.identity.vectors import (
    IdentityFile,
    identity_file,
    load_identities,
    save_identities,
)
from id3pm_deploy.images import read_mark
from id3pm_deploy.reference.checkpoint import save_checkpoint
from id3pm_deploy.sampler import Limits
from id3pm_deploy.solvers import SolverSettings

DIM = tiny_spec().identity.dim
VECTORS = np.random.default_rng(3).normal(size=(2, DIM)).astype(np.float32)
FAST: dict[str, Any] = {"steps": 3, "solver": "ddpm"}


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("identities") / "two.npz"
    spec = tiny_spec().identity
    save_identities(path, identity_file(VECTORS, spec.model_name, spec.model_sha256))
    return path


@pytest.fixture(scope="module")
def sampler(tiny_bundle: Path) -> Iterator[Sampler]:
    with id3pm_deploy.load(tiny_bundle, threads=1) as opened:
        yield opened


def run(*arguments: object) -> None:
    done = CliRunner().invoke(main, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output


def written(folder: Path) -> list[npt.NDArray[np.uint8]]:
    names = sorted(folder.glob("sample-*.png"))
    return [np.asarray(Image.open(name).convert("RGB")) for name in names]


def test_pictures_are_those_of_the_command(
    sampler: Sampler, tiny_bundle: Path, identities: Path, tmp_path: Path
) -> None:
    options = ["--steps", 3, "--count", 2, "--seed", 5, "--solver", "ddpm"]
    out = tmp_path / "out"
    where = ["--identity", identities, "--out", out, "--batch-size", 3]
    run("sample", tiny_bundle, *where, *options, "--threads", 1)
    expected = written(out)
    given = dict(FAST, count=2, seed=5, batch_size=3)
    batches = list(sampler.sample(identities, **given))
    assert [len(one) for one in batches] == [3, 1]
    assert [one.samples for one in batches] == [(0, 1, 2), (3,)]
    pixels = np.concatenate([one.pixels for one in batches])
    assert (pixels == np.stack(expected)).all()
    assert len(np.unique(pixels)) > 50
    for whose in (str(identities), load_identities(identities), VECTORS):
        assert (sampler.sample_all(whose, **given) == pixels).all()
    double = VECTORS.astype(np.float64)
    assert (sampler.sample_all(double, **given) == pixels).all()


def test_a_batch_has_arrays_marks_and_dlpack(sampler: Sampler) -> None:
    (batch,) = sampler.sample(None, count=3, **FAST)
    assert batch.pixels.shape == (3, 16, 16, 3)
    assert batch.pixels.dtype == np.uint8
    assert batch.images.dtype == np.float32
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.identities == ("unconditional",) * 3
    assert not batch.failed.any()
    assert [mark.sample for mark in batch.marks] == [0, 1, 2]
    tensor = torch.utils.dlpack.from_dlpack(batch)
    assert tensor.shape == batch.images.shape
    assert tensor.data_ptr() == batch.images.ctypes.data
    assert batch.__dlpack_device__() == (1, 0)


def test_saved_pictures_are_marked_and_can_be_replayed(
    sampler: Sampler, identities: Path, tmp_path: Path
) -> None:
    given = dict(FAST, count=3, seed=7, batch_size=4, guidance=3.0)
    batches = list(sampler.sample(identities, **given))
    batches[1].save(tmp_path / "second")
    names = sorted(one.name for one in (tmp_path / "second").iterdir())
    pngs = ["sample-00004.png", "sample-00005.png"]
    assert names == ["record.json", *pngs, "sheet.png"]
    assert read_mark(tmp_path / "second" / pngs[0]) == batches[1].marks[0]
    record = (tmp_path / "second" / "record.json").read_text()
    assert str(identities) not in record
    (again,) = sampler.replay(tmp_path / "second", identities)
    assert again.samples == (4, 5)
    assert (again.images == batches[1].images).all()
    whole = joined(batches)
    whole.save(tmp_path / "all")
    replayed = joined(
        list(sampler.replay(tmp_path / "all" / "record.json", identities))
    )
    assert (replayed.images == whole.images).all()
    assert replayed.record["solver"] == whole.record["solver"]
    with pytest.raises(InputError, match="not empty"):
        whole.save(tmp_path / "all")


@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc-3", "dpmpp-2m-sde"])
def test_a_record_of_the_command_is_replayed(
    sampler: Sampler,
    tiny_bundle: Path,
    identities: Path,
    tmp_path: Path,
    solver: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    more = ["--guidance-schedule", "linear", "--guidance-interval", 100, 900]
    where = ["--identity", identities, "--out", out, "--threads", 1, "--count", 2]
    run("sample", tiny_bundle, *where, "--solver", solver, "--steps", 4, *more)
    record = json.loads((out / "record.json").read_text())
    # The file may hold more people, in another order.
    file = load_identities(identities)
    others = np.concatenate([VECTORS[::-1], VECTORS[:1] + 1])
    ids = (*file.ids[::-1], "ab" * 8)
    shuffled = IdentityFile(others, ids, file.model_name, file.model_sha256)
    batches = list(sampler.replay(record, shuffled))
    assert (joined(batches).pixels == np.stack(written(out))).all()
    assert not caplog.records
    record["engine"]["version"] = "0.0.1"
    list(sampler.replay(record, shuffled))
    (logged,) = caplog.records
    assert "0.0.1" in logged.getMessage()


def _changed(record: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(record))
    *parents, last = key.split(".")
    inner = copy
    for name in parents:
        inner = inner[name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("format", "other", "no run record"),
        ("format_version", 3, "version 3"),
        ("checkpoint_sha256", "0" * 64, "not the one"),
        ("solver.order", 3, "does not know: order"),
        ("solver.steps", 5, "another solver table"),
        ("solver.steps", "many", "damaged"),
        ("solver.spacing", None, "another solver table"),
        ("guidance.scale", 1e9, "from 0 to 100"),
        ("seed", None, "damaged"),
        ("samples", [], "damaged"),
        ("samples", [{"sample": 1}], "damaged"),
        ("super_resolution", {}, "two stages"),
    ],
)
def test_what_does_not_fit_a_record_is_said(
    sampler: Sampler, key: str, value: Any, found: str
) -> None:
    (batch,) = sampler.sample(VECTORS, count=1, **FAST)
    samples = [
        {"sample": i, "identity": who, "failed": False}
        for i, who in enumerate(batch.identities)
    ]
    record = {**batch.record, "samples": samples}
    (again,) = sampler.replay(record, VECTORS)
    assert (again.images == batch.images).all()
    with pytest.raises(InputError, match=found):
        sampler.replay(_changed(record, key, value), VECTORS)


def test_a_record_wants_its_own_identities(
    sampler: Sampler, identities: Path, tmp_path: Path
) -> None:
    joined(list(sampler.sample(identities, count=1, **FAST))).save(tmp_path / "run")
    for wrong in (VECTORS, None):
        with pytest.raises(IdentityError, match="run record"):
            sampler.replay(tmp_path / "run", wrong)
    (batch,) = sampler.sample(None, count=1, **FAST)
    batch.save(tmp_path / "nobody")
    with pytest.raises(InputError, match="unconditional"):
        sampler.replay(tmp_path / "nobody", identities)
    with pytest.raises(InputError, match="cannot be read"):
        sampler.replay(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("identities", "error"),
    [
        (VECTORS[0], IdentityError),
        (VECTORS[:, :4], IdentityError),
        (VECTORS * np.inf, IdentityError),
        (VECTORS * 0, IdentityError),
        (VECTORS.astype(np.int32), IdentityError),
        (np.array([["a"]]), IdentityError),
        ("absent.npz", IdentityError),
    ],
    ids=["one row", "width", "infinite", "zero", "whole", "text", "absent"],
)
def test_wrong_identities_are_refused(
    sampler: Sampler, identities: Any, error: type[Id3pmError]
) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(error):
        sampler.sample(identities)


def test_wrong_arguments_are_refused_before_the_first_batch(sampler: Sampler) -> None:
    for wrong in (
        {"count": 0},
        {"batch_size": 65},
        {"seed": -1},
        {"solver": "none"},
        {"guidance": 101.0},
        {"solver": SolverSettings("ddim", 4), "steps": 5},
        {"low_res": np.zeros((1, 8, 8, 3), np.uint8)},
    ):
        with pytest.raises(InputError):
            sampler.sample(None, **wrong)
    settings = SolverSettings("ddim", 4, eta=0.5)
    given: dict[str, Any] = {"solver": settings, "guidance": GuidanceSettings(2.0)}
    (batch,) = sampler.sample(VECTORS, count=1, **given)
    assert batch.record["solver"]["eta"] == 0.5


def test_limits_are_kept_and_the_sampler_goes_on(sampler: Sampler) -> None:
    expected = sampler.sample_all(None, count=1, **FAST)
    with pytest.raises(DeadlineError):
        list(sampler.sample(None, limits=Limits(deadline=time.monotonic()), **FAST))
    stop = threading.Event()
    batches = sampler.sample(
        None, count=4, batch_size=2, limits=Limits(None, stop), **FAST
    )
    next(batches)
    stop.set()
    with pytest.raises(CancelledError):
        next(batches)
    assert (sampler.sample_all(None, count=1, **FAST) == expected).all()


def test_threads_may_share_a_sampler(sampler: Sampler) -> None:
    def one(seed: int) -> npt.NDArray[np.uint8]:
        return sampler.sample_all(VECTORS, count=2, batch_size=3, seed=seed, **FAST)

    alone = [one(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(one, range(6)))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))


def test_a_sampler_is_used_once_and_says_so(tiny_bundle: Path) -> None:
    opened = id3pm_deploy.load(tiny_bundle)
    with pytest.raises(EngineError, match="not entered"):
        opened.sample(None)
    with opened:
        batches = opened.sample(None, count=4, batch_size=2, **FAST)
        next(batches)
        with pytest.raises(EngineError, match="in use"):
            opened.__enter__()
    with pytest.raises(EngineError, match="was closed"):
        next(batches)
    for use in (
        lambda: opened.sample(None),
        lambda: opened.replay({}),
        opened.__enter__,
        lambda: asyncio.run(opened.submit(None)),
    ):
        with pytest.raises(EngineError, match="was closed"):
            use()
    opened.close()


def test_closing_ends_what_another_thread_samples(tiny_bundle: Path) -> None:
    opened = id3pm_deploy.load(tiny_bundle, threads=1)
    begun = threading.Event()
    ended: list[BaseException] = []

    def use() -> None:
        try:
            for _ in opened.sample(None, count=1000, batch_size=1, steps=200):
                begun.set()
        except Id3pmError as error:
            ended.append(error)

    with opened:
        thread = threading.Thread(target=use)
        thread.start()
        assert begun.wait(60)
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(ended[0], (CancelledError, EngineError))
    assert "closed" in ended[0].what


def test_load_says_what_it_cannot_open(tmp_path: Path, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="neither"):
        id3pm_deploy.load(tmp_path)
    opened = id3pm_deploy.load(tiny_bundle, "torch")
    with pytest.raises(EngineError, match="no PyTorch weights"), opened:
        pass
    names = [one.name for one in threading.enumerate()]
    assert names.count("id3pm-engine_0") <= 1  # of the module's own sampler


def test_a_checkpoint_is_sampled_by_torch(
    tiny_checkpoint: Path, identities: Path
) -> None:
    with id3pm_deploy.load(tiny_checkpoint) as opened:
        pixels = opened.sample_all(identities, count=1, **FAST)
    assert pixels.shape == (2, 16, 16, 3)


def test_a_failed_sample_is_not_handed_out_unseen(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from id3pm_deploy.backends.base import Engine

    (batch,) = sampler.sample(None, count=2, **FAST)
    monkeypatch.setattr(
        Engine, "failed_samples", lambda self: np.arange(len(self._bad)) == 1
    )
    (bad,) = sampler.sample(None, count=2, **FAST)
    assert bad.failed.tolist() == [False, True]
    assert (bad.images[0] == batch.images[0]).all()
    assert not bad.pixels[1].any()
    with pytest.raises(NonFiniteError, match="samples 1 are"):
        sampler.sample_all(None, count=2, **FAST)


def test_logs_stay_quiet(
    sampler: Sampler, identities: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "id3pm_deploy")
    list(sampler.sample(identities, count=1, **FAST))
    assert str(identities) not in caplog.text


def test_a_second_stage_enlarges_as_the_command_does(
    tmp_path: Path, identities: Path
) -> None:
    base = tiny_spec(image_size=8, title="small")
    large = tiny_spec(image_size=16, low_res_size=8, title="large")
    for name, spec in (("base", base), ("large", large)):
        save_checkpoint(tmp_path / name, spec, tiny_network(spec).state_dict())
    out, large_path = tmp_path / "out", tmp_path / "large"
    where = ["--identity", identities, "--out", out, "--super-resolution", large_path]
    options = ["--count", 2, "--steps", 3, "--sr-steps", 2, "--batch-size", 3]
    run("sample", tmp_path / "base", *where, *options)
    expected = np.stack(written(out))
    given = dict(FAST, count=2, sr_steps=2)
    whole = id3pm_deploy.load(tmp_path / "base", super_resolution=large_path)
    with whole as opened:
        batches = list(opened.sample(identities, batch_size=3, **given))
        both = joined(batches)
        assert (both.pixels == expected).all()
        assert [mark.sr_checkpoint for mark in both.marks] == ["large"] * 4
        again = joined(list(opened.replay(out, identities)))
        assert (again.pixels == expected).all()
        both.save(tmp_path / "saved")
        assert (np.stack(written(tmp_path / "saved")) == expected).all()
        record = json.loads((tmp_path / "saved" / "record.json").read_text())
        assert record["super_resolution"]["solver"]["steps"] == 2
        small = opened.sample_all(identities, enlarge=False, **given)
        assert small.shape == (4, 8, 8, 3)
        one = asyncio.run(opened.submit(VECTORS[1:], steps=3, sample=2, sr_steps=2))
        assert (one.pixels == expected[2]).all()
        assert one.mark == both.marks[2]
    with id3pm_deploy.load(large_path) as opened:
        enlarged = opened.sample_all(
            VECTORS, low_res=small[[0, 2]], steps=2, batch_size=1
        )
        assert enlarged.shape == (2, 16, 16, 3)
        with pytest.raises(InputError, match="cannot do without"):
            opened.sample(VECTORS)
        (first,) = opened.sample(VECTORS[:1], low_res=small[:1], steps=2)
        assert first.marks[0].composite
        first.save(tmp_path / "enlarged")
        (same,) = opened.replay(tmp_path / "enlarged", VECTORS[:1], low_res=small[:1])
        assert (same.images == first.images).all()
        with pytest.raises(InputError, match="to enlarge"):
            opened.replay(tmp_path / "enlarged", VECTORS[:1], low_res=small)
