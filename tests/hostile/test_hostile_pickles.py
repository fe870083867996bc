"""Pickles made to harm whoever imports them: none of them does anything."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crafted_pickle
import pytest
import torch
from crafted_pickle import archive, call, name, number, row, storage, table, text
from crafted_pickle import numbers as ones
from guided_unet import Network, RandomWeights
from safetensors.torch import save as to_safetensors
from sandbox import ForkServer, Sandbox, check_done, check_refused

PEAK = 640 << 20
"""Of the process that reads; its limit is 512 MiB and twice the file."""
CANARY = "../canary"
"""Beside the private folder in which the reading process runs."""
SING = f"open({CANARY!r}, 'w').close()"
COMMAND = f"touch {CANARY}"
FLAGS: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "",
    "num_heads": 1,
    "num_head_channels": -1,
    "use_new_attention_order": True,
    "class_cond": False,
    "learn_sigma": False,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "predict_xstart": False,
}


@pytest.fixture
def reader(build_server: ForkServer, tmp_path: Path) -> Sandbox:
    """A sandbox in which `import` forks the process that reads a pickle."""
    return Sandbox(build_server, tmp_path, before=("crafted_pickle:forked_reader",))


def run_import(sandbox: Sandbox, data: bytes, *more: str, file: str = "m.pt") -> Any:
    """Import a file of these bytes; nothing but it is there before or after."""
    (sandbox.work / file).write_bytes(data)
    (sandbox.work / "flags.json").write_text(json.dumps(FLAGS))
    arguments = (file, "--flags", "flags.json", "--out", "out")
    return sandbox.run("import", *arguments, *more)


def check_quiet(sandbox: Sandbox, found: Any, *words: str, file: str = "m.pt") -> None:
    """Fail unless the file was refused and nothing happened beside that."""
    assert sandbox.files() == sorted([f"work/{file}", "work/flags.json"])
    check_refused(found, *words, peak=PEAK, seconds=10)


def saved(value: Any, **settings: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **settings)
    return stream.getvalue()


class Reduced:
    """An object whose pickle is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def weights() -> dict[str, torch.Tensor]:
    """A state dict that the flags describe."""
    made = RandomWeights()
    Network(FLAGS, made, 0)(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    return dict(made)


# What would run when it is unpickled

CALLS: dict[str, bytes] = {
    "os.system": call(name("os", "system"), text(COMMAND)),
    "posix.system": call(name("posix", "system"), text(COMMAND)),
    "eval": call(name("builtins", "eval"), text(SING)),
    "exec": call(name("builtins", "exec"), text(SING)),
    "Python 2's eval": call(name("__builtin__", "eval"), text(SING)),
    "getattr": call(
        call(name("builtins", "getattr"), name("os", "path"), text("os.system")),
        text(COMMAND),
    ),
    "getattr of an import": call(
        call(
            name("builtins", "getattr"),
            call(name("builtins", "__import__"), text("os")),
            text("system"),
        ),
        text(COMMAND),
    ),
    "subprocess.Popen": call(
        name("subprocess", "Popen"), row(text("touch"), text(CANARY))
    ),
    "subprocess.call": call(
        name("subprocess", "call"), row(text("touch"), text(CANARY))
    ),
    "open": call(name("io", "open"), text(CANARY), text("w")),
    "pathlib": call(
        call(name("builtins", "getattr"), name("pathlib", "Path"), text("touch")),
        call(name("pathlib", "Path"), text(CANARY)),
    ),
    "runpy": call(name("runpy", "_run_code"), text(SING), b"}"),
    "timeit": call(name("timeit", "timeit"), text("pass"), text(SING)),
    "functools.partial": call(
        call(name("functools", "partial"), name("os", "system")), text(COMMAND)
    ),
    "a global inside a global": call(
        name("torch.serialization", "os.system"), text(COMMAND)
    ),
    "torch.load itself": call(name("torch.serialization", "load"), text("m.pt")),
    "torch.hub": call(name("torch.hub", "load"), text("."), text("x")),
    "torch.save": call(name("torch.serialization", "save"), b"}", text(CANARY)),
    "NumPy's load": call(name("numpy", "load"), text("m.pt")),
    "an object's state": (
        call(name("collections", "OrderedDict")) + table({"__reduce__": b"N"}) + b"b"
    )
    + name("os", "system")
    + row(text(COMMAND))
    + b"R",
}
LIVE = (
    *("os.system", "posix.system", "eval", "exec", "subprocess.Popen", "open"),
    *("subprocess.call", "timeit", "functools.partial", "getattr of an import"),
    *("pathlib", "torch.save", "an object's state", "Python 2's eval"),
)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("place", ["alone", "among tensors"])
def test_a_call_is_not_made(reader: Sandbox, case: str, place: str) -> None:
    body = CALLS[case]
    if place == "among tensors":
        good = crafted_pickle.tensor(storage("0", 4), (4,), (1,))
        body = table({"a": good, "b": body})
    found = run_import(reader, archive(body, {"0": ones(4)}))
    check_quiet(reader, found, "asks for", "not needed for weights")


@pytest.mark.parametrize("case", LIVE)
def test_full_unpickling_would_have_made_it(case: str, tmp_path: Path) -> None:
    """The same bytes are no blanks: `pickle` itself runs them."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "m.pkl").write_bytes(crafted_pickle.program(CALLS[case]))
    code = "import pickle; pickle.load(open('m.pkl', 'rb'))"
    command = [sys.executable, "-I", "-W", "ignore", "-c", code]
    subprocess.run(command, cwd=inner, capture_output=True, check=False, timeout=60)
    assert (inner / CANARY).exists()


def legacy(body: bytes, sizes: bytes = b"") -> bytes:
    """torch.save's older format: pickles in a row, then the storages."""
    rows = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    rows += [pickle.dumps(system, 2), crafted_pickle.program(body)]
    return b"".join(rows) + pickle.dumps(["0"], 2) + sizes


def legacy_storage(count: int) -> bytes:
    """A storage of the older format."""
    where = (text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"))
    return row(*where, number(count), b"N") + b"Q"


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for member in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Reduced(eval, SING))
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def tensor(*arguments: Any) -> bytes:
    """A dictionary with one tensor, in an archive with 16 numbers."""
    made = crafted_pickle.tensor(*arguments)
    return archive(table({"a": made}), {"0": ones(16), "1": ones(16)})


def overlapping_members() -> bytes:
    """Two members of the directory are the same bytes of the file."""
    data = bytearray(archive(b"}", {"0": ones(16), "1": ones(16)}))
    first = data.index(b"PK\x01\x02")
    second = data.index(b"archive/data/1", first) - 46
    place = data.index(b"archive/data/0", first) - 46
    data[second + 42 : second + 46] = data[place + 42 : place + 46]
    return bytes(data)


def lying_directory() -> bytes:
    """The directory says that a member has 4 GB."""
    data = bytearray(archive(b"}", {"0": ones(16)}))
    place = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 46
    data[place + 20 : place + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(data)


def script() -> bytes:
    more = {"archive/constants.pkl": b"\x80\x02).", "archive/code/x.py": b""}
    return archive(b"}", more=more)


def subclass() -> bytes:
    """A tensor with an attribute, as torch pickles it."""
    made = crafted_pickle.tensor(storage("0", 4), (4,), (1,))
    state = call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._utils", "_rebuild_tensor_v2"),
        name("torch", "Tensor"),
        made[len(name("torch._utils", "_rebuild_tensor_v2")) : -1],
        table({"numpy": b"K\x01"}),
    )
    return archive(table({"a": state}), {"0": ones(4)})


def quietly(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor of a kind that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def quantised() -> torch.Tensor:
    whole = torch.ones(4)
    return quietly(lambda: torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8))


def shared(**entries: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    whole = torch.arange(64, dtype=torch.float32)
    return saved({key: take(whole) for key, take in entries.items()})


OTHERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "protocol 0": (
        f"cos\nsystem\n(S'{COMMAND}'\ntR.".encode,
        "neither a safetensors file",
    ),
    "protocol 4": (
        lambda: pickle.dumps(Reduced(eval, SING), 4),
        "truncated, or no pickle of tensors",
    ),
    "a plain pickle of a call": (lambda: pickle.dumps(Reduced(eval, SING), 2), ""),
    "a call in the older format": (
        lambda: legacy(CALLS["os.system"]),
        "asks for os.system",
    ),
    "a tar of the first releases": (tar, "neither a safetensors file"),
    "a tar behind pickle's first byte": (lambda: b"\x80\x02" + tar(), "m.pt"),
    "a TorchScript archive": (script, "TorchScript"),
    "a name that leads elsewhere": (
        lambda: archive(b"}", more={f"../../{CANARY}": b"1"}),
        "holds the name",
    ),
    "a name from the root": (
        lambda: archive(b"}", more={f"/tmp/{CANARY}": b"1"}),  # noqa: S108
        "holds the name",
    ),
    "a zip bomb": (
        lambda: archive(
            table({"a": crafted_pickle.tensor(storage("0", 1 << 26), (1,), (1,))}),
            {"0": bytes(1 << 28)},
            compression=zipfile.ZIP_DEFLATED,
        ),
        "compressed",
    ),
    "members that overlap": (overlapping_members, "overlaps"),
    "a directory that promises 4 GB": (lying_directory, "m.pt"),
    "bytes before the archive": (lambda: b"PK\x03\x04" + archive(b"}"), "m.pt"),
    "no pickle": (
        lambda: archive(b"}").replace(b"data.pkl", b"data.txt"),
        "no data.pkl",
    ),
    "a storage of 4 TB": (
        lambda: tensor(storage("0", 10**12), (4,), (1,)),
        "m.pt",
    ),
    "a storage of 4 TB in the older format": (
        lambda: legacy(
            table({"a": crafted_pickle.tensor(legacy_storage(10**12), (4,), (1,))}),
            struct.pack("<q", 10**12) + ones(4),
        ),
        "m.pt",
    ),
    "a storage that reaches into the next": (
        lambda: tensor(storage("0", 24), (24,), (1,)),
        "other sizes",
    ),
    "a storage of a negative size": (
        lambda: tensor(storage("0", -4), (4,), (1,)),
        "m.pt",
    ),
    "a tensor beyond its storage": (
        lambda: tensor(storage("0", 16), (1 << 20,), (1,)),
        "m.pt",
    ),
    "a tensor of 4 TB": (lambda: tensor(storage("0", 16), (10**12,), (1,)), "m.pt"),
    "a tensor before its storage": (
        lambda: tensor(storage("0", 16), (4,), (1,), -64),
        "m.pt",
    ),
    "negative strides": (
        lambda: tensor(storage("0", 16), (4,), (-1,), 8),
        "m.pt",
    ),
    "an expanded tensor": (
        lambda: tensor(storage("0", 16), (1 << 20, 16), (0, 1)),
        "the entry a uses numbers twice",
    ),
    "strides that fold": (
        lambda: tensor(storage("0", 16), (4, 4), (1, 1)),
        "the entry a uses numbers twice",
    ),
    "tensors that overlap": (
        lambda: shared(first=lambda t: t[:40], second=lambda t: t[30:]),
        "first and second overlap",
    ),
    "a sparse tensor": (
        lambda: saved({"a": torch.eye(4).to_sparse()}),
        "the entry a is a sparse",
    ),
    "a compressed sparse tensor": (
        lambda: saved({"a": quietly(lambda: torch.eye(4).to_sparse_csr())}),
        "the entry a is a sparse",
    ),
    "a meta tensor": (
        lambda: saved({"a": torch.empty(4, device="meta")}),
        "the entry a is on the device meta",
    ),
    "a complex tensor": (
        lambda: saved({"a": torch.ones(4, dtype=torch.complex64)}),
        "the entry a is torch.complex64",
    ),
    "a quantised tensor": (lambda: saved({"a": quantised()}), "quantised"),
    "a tensor with attributes": (subclass, "the entry a has attributes: numpy"),
    "a list": (lambda: saved([torch.ones(4)]), "holds list"),
    "one tensor": (lambda: saved(torch.ones(4)), "holds Tensor"),
    "nothing": (lambda: saved({}), "holds 0 entries"),
    "a number among tensors": (
        lambda: saved({"a": torch.ones(4), "step": 3}),
        "the entry step is int, not a tensor",
    ),
    "a state dict in a state dict": (
        lambda: saved({"state_dict": {"a": torch.ones(4)}}),
        "the entry state_dict is dict, not a tensor",
    ),
    "a name that is a number": (
        lambda: saved({7: torch.ones(4)}),
        "an entry is called 7",
    ),
    "a name that steers the terminal": (
        lambda: saved({"\x1b[2J": torch.ones(4)}),
        "an entry is called",
    ),
    "200,000 open lists": (lambda: archive(b"](" * 100_000), "m.pt"),
    "200,000 lists, each in the next": (
        lambda: archive(b"]" * 200_000 + b"a" * 199_999),
        "m.pt",
    ),
    "a bytearray of 1 TB": (
        lambda: archive(call(name("builtins", "bytearray"), number(1 << 40))),
        "memory",
    ),
    "three bytearrays of 400 MB": (
        lambda: archive(
            b"](" + 3 * call(name("builtins", "bytearray"), number(400 << 20)) + b"e"
        ),
        "--memory-limit",
    ),
    "a persistent id that is no tuple": (lambda: archive(text("x") + b"Q"), "m.pt"),
    "a persistent id that is a module": (
        lambda: legacy(
            row(text("module"), name("os", "system"), text("x"), text(SING)) + b"Q"
        ),
        "m.pt",
    ),
    "a storage that is a call": (
        lambda: archive(
            row(
                *(text("storage"), name("os", "system"), text(COMMAND), text("cpu")),
                number(4),
            )
            + b"Q"
        ),
        "asks for os.system",
    ),
    "a key that leads elsewhere": (
        lambda: tensor(storage("../../../etc/passwd", 4), (4,), (1,)),
        "m.pt",
    ),
    "no bytes": (lambda: b"", "neither a safetensors file"),
    "zeros": (lambda: bytes(4096), "neither a safetensors file"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_that_lies(reader: Sandbox, case: str) -> None:
    make, words = OTHERS[case]
    check_quiet(reader, run_import(reader, make()), words)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("older", [False, True])
def test_a_truncated_file(reader: Sandbox, share: float, older: bool) -> None:
    data = saved(weights(), _use_new_zipfile_serialization=not older)
    found = run_import(reader, data[: int(share * len(data))])
    check_quiet(reader, found, "m.pt")


@pytest.mark.parametrize("file", ["m.safetensors", "m.json", "model000100.pt", "m"])
def test_a_pickle_by_another_name_stays_one(reader: Sandbox, file: str) -> None:
    found = run_import(reader, archive(CALLS["eval"]), file=file)
    check_quiet(reader, found, "asks for", file=file)


def test_a_pickle_in_a_bin(reader: Sandbox) -> None:
    folder = reader.work / "unet"
    folder.mkdir()
    config = {"_class_name": "UNet2DModel"}
    (folder / "config.json").write_text(json.dumps(config))
    data = archive(CALLS["os.system"])
    (folder / "diffusion_pytorch_model.bin").write_bytes(data)
    before = reader.files()
    found = reader.run("import", "unet", "--out", "out")
    check_refused(found, "asks for os.system", peak=PEAK, seconds=10)
    assert reader.files() == before


def test_a_pickle_as_a_projection(reader: Sandbox) -> None:
    folder = reader.work / "unet"
    folder.mkdir()
    config = {"_class_name": "UNet2DModel"}
    (folder / "config.json").write_text(json.dumps(config))
    data = to_safetensors(weights())
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    (reader.work / "p.pt").write_bytes(archive(CALLS["os.system"]))
    before = reader.files()
    found = reader.run("import", "unet", "--projection", "p.pt", "--out", "out")
    check_refused(found, "asks for os.system", peak=PEAK, seconds=10)
    assert reader.files() == before


def views() -> dict[str, torch.Tensor]:
    """All tensors are parts of one storage."""
    state = weights()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = torch.split(flat, [tensor.numel() for tensor in state.values()])
    return {
        key: part.view_as(tensor)
        for (key, tensor), part in zip(state.items(), parts, strict=True)
    }


def channels_last() -> dict[str, torch.Tensor]:
    return {
        key: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for key, t in weights().items()
    }


def with_metadata() -> OrderedDict[str, torch.Tensor]:
    """As a module's own state_dict has it."""
    made = OrderedDict(weights())
    made._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return made


def tied() -> dict[str, torch.Tensor]:
    """Two names for one tensor."""
    made = weights()
    names = [key for key in made if key.endswith("in_layers.0.bias")]
    made[names[1]] = made[names[0]]
    return made


VALID: dict[str, Callable[[], bytes]] = {
    "torch.save": lambda: saved(weights()),
    "the older format": lambda: saved(weights(), _use_new_zipfile_serialization=False),
    "with metadata": lambda: saved(with_metadata()),
    "parameters": lambda: saved(
        {key: torch.nn.Parameter(t) for key, t in weights().items()}
    ),
    "float16": lambda: saved({key: t.half() for key, t in weights().items()}),
    "bfloat16": lambda: saved({key: t.bfloat16() for key, t in weights().items()}),
    "parts of one storage": lambda: saved(views()),
    "parts of one storage, the older format": lambda: saved(
        views(), _use_new_zipfile_serialization=False
    ),
    "channels last": lambda: saved(channels_last()),
    "two names for one tensor": lambda: saved(tied()),
    "safetensors": lambda: to_safetensors(weights()),
}


@pytest.mark.parametrize("case", VALID)
def test_a_valid_file_of_the_same_making(reader: Sandbox, case: str) -> None:
    found = run_import(reader, VALID[case]())
    check_done(found)
    there = ["work/flags.json", "work/m.pt", "work/out"]
    there += ["work/out/config.json", "work/out/model.safetensors"]
    assert reader.files() == there


def test_a_crafted_archive_is_a_good_one(reader: Sandbox) -> None:
    """The archives above are refused for what is wrong in them, not for their making:
    without it, the flags are the next thing that they fail."""
    whole = crafted_pickle.tensor(storage("0", 16), (4, 4), (4, 1))
    half = crafted_pickle.tensor(storage("1", 16), (4,), (2,), 8)
    body = table({"a": whole, "b": half})
    found = run_import(reader, archive(body, {"0": ones(16), "1": ones(16)}))
    check_quiet(reader, found, "not those that the flags describe", "unexpected: a, b")


# Limits, with the process as it is


def test_nothing_of_ours_reaches_the_reader(build: Sandbox) -> None:
    """It has no standard input, no environment and no rights beyond reading."""
    build.variables["SECRET"] = "hidden-canary"
    build.before = ("crafted_pickle:record_reader",)
    found = run_import(build, saved(weights()))
    check_done(found)
    seen = json.loads((build.work / "seen.json").read_text())
    assert set(seen["environment"]) <= {
        *("OMP_NUM_THREADS", "TMPDIR", "LD_LIBRARY_PATH", "LC_CTYPE"),
    }
    assert "hidden-canary" not in json.dumps(seen)
    assert seen["input"] == "/dev/null"
    assert seen["folder_mode"] == 0o700
    assert seen["own_session"]


def test_a_file_larger_than_the_memory_limit(build: Sandbox) -> None:
    found = run_import(build, saved(weights()), "--memory-limit", "0.0001")
    check_quiet(build, found, "larger than the memory limit", "--memory-limit")


def test_a_file_that_takes_too_long(build: Sandbox) -> None:
    data = archive(b"]" + b"Na" * 16_000_000)
    found = run_import(build, data, "--time-limit", "4")
    check_quiet(build, found, "longer than the time limit", "--time-limit")


def test_no_advice_to_unpickle_in_full(reader: Sandbox) -> None:
    """torch's own message tells how to; ours does not."""
    found = run_import(reader, archive(CALLS["eval"]))
    for words in ("weights_only", "add_safe_globals", "allowlist", "trust the source"):
        assert words not in found.stderr
