"""JSON, TOML and safetensors files that lie, through the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted import config, safetensors
from sandbox import Sandbox, check_done, check_refused

GIGABYTE = 1 << 30


def text(**changes: Any) -> str:
    """A valid ``config.json`` with some values replaced."""
    return json.dumps(config(**changes))


def origin(value: str) -> str:
    """A config with any text as the value of a key that takes any value."""
    return text(origin={"x": 0}).replace('{"x": 0}', f'{{"x": {value}}}')


def multipliers(count: int) -> str:
    """A config with ``count`` channel multipliers."""
    model = {**config()["model"], "channel_multipliers": [1] * count}
    return text(model=model)


CONFIGS: dict[str, Callable[[], str | bytes]] = {
    "a key twice": lambda: text().replace('"dim": 16', '"dim": 16, "dim": 17'),
    "NaN": lambda: origin("NaN"),
    "minus infinity": lambda: origin("-Infinity"),
    "1e400": lambda: origin("1e400"),
    "10**400": lambda: origin("1" + "0" * 400),
    "10**100000": lambda: origin("1" + "0" * 100_000),
    "10**400 as a size": lambda: text().replace("16,", f"{10**400},"),
    "half a surrogate pair": lambda: text(title="\ud800"),
    "half a surrogate pair as a key": lambda: origin('{"\\udfff": 1}'),
    "a byte order mark": lambda: "\ufeff" + text(),
    "UTF-16": lambda: text().encode("utf-16"),
    "Latin-1": lambda: text(title="é").replace("\\u00e9", "é").encode("latin-1"),
    "5,000 levels in a value": lambda: origin("[" * 5_000 + "]" * 5_000),
    "100 objects in a value": lambda: origin('{"x": ' * 100 + "1" + "}" * 100),
    "a comma too many": lambda: text()[:-1] + ",}",
    "two values": lambda: text() + text(),
    "a comment": lambda: text() + " // fine",
    "250,000 multipliers": lambda: multipliers(250_000),
    "a number with an underscore": lambda: text().replace(": 16", ": 1_6"),
    "NUL bytes": lambda: text() + "\0" * 100,
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_lies(device: Sandbox, case: str) -> None:
    folder = device.work / "model"
    folder.mkdir()
    data = CONFIGS[case]()
    path = folder / "config.json"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    found = device.run("sample", folder, "--unconditional", "--out", "out")
    check_refused(found, peak=GIGABYTE // 4, seconds=5)
    assert device.files() == ["work/model", "work/model/config.json"]


@pytest.mark.parametrize(
    "data",
    [
        text(),
        origin('[[[{"x": 1e300, "y": -9007199254740991}]]]'),
        text(title="\u00e9"),
    ],
)
def test_a_valid_config_of_the_same_making(device: Sandbox, data: str) -> None:
    """It is read, and what follows is another matter."""
    folder = device.work / "model"
    folder.mkdir()
    (folder / "config.json").write_text(data)
    found = device.run(
        *("sample", folder, "--unconditional", "--out", "out"),
        *("--backend", "onnxruntime"),
    )
    check_refused(found, "a CHECKPOINT has no engine for the onnxruntime backend")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "closed"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file(build: Sandbox, name: str, kind: str) -> None:
    folder = build.work / "model"
    folder.mkdir()
    (folder / "config.json").write_text(text())
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        places = {"device": "/dev/zero", "loop": str(path), "closed": "/dev/full"}
        path.symlink_to(places[kind])
    check_refused(build.run("inspect", folder), seconds=5, peak=GIGABYTE // 4)
    # Where there is a bundle already, the weights are hashed first.
    (build.work / "model.bundle").mkdir()
    (build.work / "model.bundle" / "manifest.json").write_text("{}")
    check_refused(build.run("build-engine", folder), seconds=5, peak=GIGABYTE // 4)


TERMINAL = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202eback\u2066"


def test_text_cannot_reach_the_terminal_s_controls(device: Sandbox) -> None:
    folder = device.work / "model"
    folder.mkdir()
    for values in (config(title=TERMINAL), config(**{TERMINAL: 1})):
        (folder / "config.json").write_text(json.dumps(values))
        found = device.run(
            *("sample", folder, "--unconditional", "--out", "out"),
            *("--backend", "onnxruntime"),
        )
        check_refused(found)


# Weights


def tensor(shape: list[int], begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    """An entry of a safetensors header."""
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


WEIGHTS: dict[str, Callable[[], bytes]] = {
    "a header of 2**63 bytes": lambda: safetensors({}, length=(1 << 63) - 1),
    "a header of 2**64 - 1 bytes": lambda: safetensors({}, length=(1 << 64) - 1),
    "a header of 100 MB": lambda: safetensors({}, length=100_000_000),
    "a shape of 2**64": lambda: safetensors(
        {"a": tensor([1 << 32, 1 << 32], 0, 0)}, b""
    ),
    "a shape of terabytes": lambda: safetensors(
        {"a": tensor([1 << 40], 0, 1 << 42)}, b"1234"
    ),
    "data past the end": lambda: safetensors({"a": tensor([2], 0, 8)}, b"1234"),
    "data that ends before it begins": lambda: safetensors(
        {"a": tensor([1], 4, 0)}, b"1234"
    ),
    "data that overlaps": lambda: safetensors(
        {"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, b"1234"
    ),
    "a hole": lambda: safetensors({"a": tensor([1], 4, 8)}, b"12345678"),
    "a negative size": lambda: safetensors({"a": tensor([-1], 0, 4)}, b"1234"),
    "an unknown type": lambda: safetensors({"a": tensor([1], 0, 4, "O")}, b"1234"),
    "a header of 100,000 brackets": lambda: safetensors("[" * 100_000),
    "a header that is not UTF-8": lambda: safetensors(b'{"\xff\xfe": 1}'),
    "metadata that is a number": lambda: safetensors({"__metadata__": 1}),
    "30,000 empty tensors": lambda: safetensors(
        {str(i): tensor([0], 0, 0) for i in range(30_000)}
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_lie(build: Sandbox, case: str) -> None:
    folder = build.work / "model"
    folder.mkdir()
    (folder / "config.json").write_text(text())
    (folder / "model.safetensors").write_bytes(WEIGHTS[case]())
    found = build.run("inspect", folder)
    check_refused(found, "model.safetensors", peak=GIGABYTE // 4, seconds=5)


def test_valid_weights_of_the_same_making(build: Sandbox, tiny_weights: Path) -> None:
    folder = build.work / "model"
    folder.mkdir()
    (folder / "config.json").write_text(text())
    data = tiny_weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (folder / "model.safetensors").write_bytes(safetensors(header, data[8 + length :]))
    found = build.run("inspect", folder)
    check_done(found)
    assert "checkpoint" in found.stdout


# Recipes

CPU = """
summary = "a recipe"
backend = "onnxruntime"
flavour = "cpu"
export = "float32"
precision = "float32"
"""
PLAN = """
summary = "a recipe"
backend = "tensorrt"
flavour = "tensorrt"
export = "float16"
precision = "float16"
static_samples = [1]
"""
RECIPES: dict[str, str | bytes] = {
    "10**400 threads": CPU + f"threads = {10**400}",
    "10**9 threads": CPU + "threads = 1_000_000_000",
    "no number of threads": CPU + "threads = nan",
    "threads by date": CPU + "threads = 1979-05-27",
    "threads as a table": CPU + "[threads]\nx = 1",
    "a key twice": CPU + "threads = 1\nthreads = 2",
    "an unknown key": CPU + "colour = 'red'",
    "10**15 samples": PLAN + "static_guided_samples = [1_000_000_000_000_000]",
    "100,000 profiles": PLAN.replace("[1]", str(list(range(1, 100_001)))),
    "samples from -1": PLAN + "dynamic_samples = [-1, 1, 2]",
    "petabytes": PLAN + f"workspace_bytes = {1 << 60}",
    "an absurd GPU": PLAN + "compute_capabilities = ['9.9; rm -rf /']",
    "50,000 brackets": CPU + "threads = " + "[" * 50_000,
    "50,000 dots": CPU + "a" + ".a" * 50_000 + " = 1",
    "half a surrogate pair": CPU + 'colour = "\\ud800"',
    "no UTF-8": CPU.encode() + b'colour = "\xff"',
    "a byte order mark": "\ufeff" + CPU,
    "NUL": CPU + "\0",
    "200 MB": b"# " + bytes([35]) * 200_000_000,
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_lies(device: Sandbox, case: str) -> None:
    data = RECIPES[case]
    path = device.work / "mine.toml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    found = device.run("build-engine", "x", "--target", path, "--dry-run")
    check_refused(found, peak=GIGABYTE // 4, seconds=5)


@pytest.mark.parametrize("data", [CPU, PLAN, CPU + "threads = 2"])
def test_a_valid_recipe_of_the_same_making(device: Sandbox, data: str) -> None:
    (device.work / "mine.toml").write_text(data)
    target = device.work / "mine.toml"
    check_done(device.run("build-engine", "x", "--target", target, "--dry-run"))


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.toml", "folder.toml"])
def test_a_recipe_that_is_no_file(device: Sandbox, path: str) -> None:
    os.mkfifo(device.work / "pipe.toml")
    (device.work / "folder.toml").mkdir()
    (device.work / "zero.toml").symlink_to("/dev/zero")
    target = Path("zero.toml" if path == "/dev/zero" else path)
    found = device.run("build-engine", "x", "--target", target, "--dry-run")
    check_refused(found, seconds=5, peak=GIGABYTE // 4)
