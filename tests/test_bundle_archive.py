"""Bundles as tars: the same bundle is the same bytes, and nothing else is unpacked."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import GOLDEN, files_in, new_writer
from click.testing import CliRunner

from id3pm_deploy.bundle import MANIFEST_NAME, SIGNATURE_NAME, open_bundle
from id3pm_deploy.bundle.archive import (
    BLOCK,
    pack_bundle,
    tar_header,
    unpack_bundle,
)
from id3pm_deploy.bundle.verification import verify_path
from id3pm_deploy.cli import main
from id3pm_deploy.errors import BundleError, InputError, OutputError

FOLDER, TAR = GOLDEN / "bundle-v4", GOLDEN / "bundle-v4.tar"


@dataclasses.dataclass
class Part:
    """A header and the bytes behind it, padding included."""

    header: bytes
    body: bytes

    @property
    def name(self) -> str:
        return self.header[:100].rstrip(b"\0").decode()


def parts() -> list[Part]:
    """The golden tar taken apart."""
    found, data, at = [], TAR.read_bytes(), 0
    while any(data[at : at + BLOCK]):
        size = -(-int(data[at + 124 : at + 135], 8) // BLOCK) * BLOCK
        body = data[at + BLOCK : at + BLOCK + size]
        found.append(Part(data[at : at + BLOCK], body))
        at += BLOCK + size
    return found


def joined(found: list[Part], end: bytes = bytes(2 * BLOCK)) -> bytes:
    return b"".join(part.header + part.body for part in found) + end


def header(name: str, size: int, **changes: Any) -> bytes:
    """A header by Python's tarfile, with some fields changed.

    Python leaves the device numbers of plain files empty, where we and GNU tar put 0.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in changes.items():
        setattr(info, field, value)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[329:345] = b"0000000\0" * 2
    return summed(block)


def summed(block: bytearray) -> bytes:
    """A header with its checksum put right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_headers_are_those_of_a_plain_tar() -> None:
    for name, size in (("a", 0), ("x" * 100, (8 << 30) - 1), ("a.b-c_d", 512)):
        assert tar_header(name, size) == header(name, size)


@pytest.mark.skipif(not shutil.which("tar"), reason="needs GNU tar")
def test_gnu_tar_makes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """With the command that BUNDLE_FORMAT.md gives."""
    if b"GNU tar" not in subprocess.check_output(["tar", "--version"]):
        pytest.skip("needs GNU tar")
    _, _, text = (root / "BUNDLE_FORMAT.md").read_text("utf-8").partition("    tar --")
    options = f"--{text[: text.index('FILE.tar')]}".replace("\\\n", "").split()
    names = [part.name for part in parts()]
    command = ["tar", *options, str(tmp_path / "x.tar"), "-C", str(FOLDER), *names]
    subprocess.run(command, check=True)
    assert (tmp_path / "x.tar").read_bytes() == TAR.read_bytes()


def test_other_programs_read_it() -> None:
    with tarfile.open(TAR) as tar:
        names = tar.getnames()
        assert names == [MANIFEST_NAME, SIGNATURE_NAME, *names[2:]]
        assert names[2:] == sorted(set(files_in(FOLDER)) - set(names[:2]))
        for info in tar.getmembers():
            stream = tar.extractfile(info)
            assert stream is not None
            assert stream.read() == (FOLDER / info.name).read_bytes()


def test_the_same_bundle_is_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(FOLDER, tmp_path / name, copy_function=shutil.copyfile)
    for path in (tmp_path / "two").iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    (tmp_path / "two" / ".lock").touch()
    (tmp_path / "two" / "unlisted.txt").touch()
    for name in ("one", "two"):
        pack_bundle(tmp_path / name, tmp_path / f"{name}.tar")
        assert (tmp_path / f"{name}.tar").read_bytes() == TAR.read_bytes()


def test_round_trip_without_a_signature(tmp_path: Path) -> None:
    new_writer(tmp_path / "b").commit()
    pack_bundle(tmp_path / "b", tmp_path / "b.tar")
    bundle = unpack_bundle(tmp_path / "b.tar", tmp_path / "c")
    assert files_in(tmp_path / "c") == files_in(tmp_path / "b")
    assert bundle.data == open_bundle(tmp_path / "b").data
    new_writer(tmp_path / "c", b"another").commit().verify()


def test_packing_refuses_damage_and_keeps_what_is_there(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "b"))
    out = tmp_path / "b.tar"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        pack_bundle(folder, out)
    plan = next(folder.glob("*.plan"))
    plan.write_bytes(plan.read_bytes()[::-1])
    with pytest.raises(BundleError, match="not the file that the manifest describes"):
        pack_bundle(folder, out, force=True)
    assert out.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["b", "b.tar"]
    with pytest.raises(BundleError, match="is not a bundle"):
        pack_bundle(tmp_path, out, force=True)


def _renamed(name: str) -> Callable[[list[Part]], bytes]:
    def change(found: list[Part]) -> bytes:
        size = int(found[3].header[124:135], 8)
        found[3].header = header(name, size)
        return joined(found)

    return change


def _changed(**changes: Any) -> Callable[[list[Part]], bytes]:
    def change(found: list[Part]) -> bytes:
        size = int(found[3].header[124:135], 8)
        found[3].header = header(found[3].name, changes.pop("size", size), **changes)
        return joined(found)

    return change


def _kind(kind: bytes, link: str = "") -> Callable[[list[Part]], bytes]:
    return _changed(type=kind, linkname=link)


def _extra(name: str, at: int = 8, **changes: Any) -> Callable[[list[Part]], bytes]:
    def change(found: list[Part]) -> bytes:
        found.insert(at, Part(header(name, 4, **changes), b"data".ljust(BLOCK, b"\0")))
        return joined(found)

    return change


def _swapped(one: int, other: int) -> Callable[[list[Part]], bytes]:
    def change(found: list[Part]) -> bytes:
        found[one], found[other] = found[other], found[one]
        return joined(found)

    return change


def _without(index: int) -> Callable[[list[Part]], bytes]:
    return lambda found: joined(found[:index] + found[index + 1 :])


def _flipped(index: int, at: int) -> Callable[[list[Part]], bytes]:
    def change(found: list[Part]) -> bytes:
        body = bytearray(found[index].body)
        body[at] ^= 1
        found[index].body = bytes(body)
        return joined(found)

    return change


def _manifest(change: Callable[[Any], None]) -> Callable[[list[Part]], bytes]:
    def changed(found: list[Part]) -> bytes:
        values = json.loads(found[0].body.rstrip(b"\0"))
        change(values)
        data = json.dumps(values).encode()
        body = data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")
        found[0] = Part(tar_header(MANIFEST_NAME, len(data)), body)
        return joined(found)

    return changed


def _base_256(found: list[Part]) -> bytes:
    """A size as GNU tar writes those past 8 GiB: here, enormous."""
    block = bytearray(found[3].header)
    block[124:136] = b"\x80" + b"\xff" * 11
    found[3].header = summed(block)
    return joined(found)


def _unsummed(found: list[Part]) -> bytes:
    found[3].header = found[3].header.replace(b"0000644", b"0000444")
    return joined(found)


def _pax(found: list[Part]) -> bytes:
    info = tarfile.TarInfo(found[3].name)
    info.size, info.pax_headers = 517, {"GNU.sparse.realsize": "9999999"}
    found[3].header = info.tobuf(tarfile.PAX_FORMAT)
    return joined(found)


def _escape(values: Any) -> None:
    values["files"]["../evil"] = values["files"].pop("golden-e3b0c44298fc.npz")


HOSTILE: dict[str, tuple[Callable[[list[Part]], bytes], str]] = {
    "symbolic link": (_kind(tarfile.SYMTYPE, "/etc/passwd"), "is a symbolic link"),
    "hard link": (_kind(tarfile.LNKTYPE, MANIFEST_NAME), "is a hard link"),
    "character device": (_kind(tarfile.CHRTYPE), "is a device"),
    "block device": (_kind(tarfile.BLKTYPE), "is a device"),
    "pipe": (_kind(tarfile.FIFOTYPE), "is a pipe"),
    "folder": (_kind(tarfile.DIRTYPE), "is a folder"),
    "sparse": (_kind(b"S"), "is a sparse file"),
    "long name": (_kind(b"L"), "an extension of the tar format"),
    "pax sparse": (_pax, "an extension of the tar format"),
    "parent path": (_renamed("../evil.plan"), "'../evil.plan' is not listed"),
    "absolute path": (_renamed("/etc/evil.plan"), "'/etc/evil.plan' is not listed"),
    "dotted path": (_renamed("./rtx-f884649e5724.plan"), "is not listed"),
    "path in the manifest": (_manifest(_escape), "plain names"),
    "not listed": (_extra("evil.plan"), "does not end after the files"),
    "not listed, between": (_extra("a.plan", 2), "'a.plan' is not listed"),
    "twice": (_extra("rtx-f884649e5724.plan", 5), "out of order or twice"),
    "manifest twice": (_extra(MANIFEST_NAME, 1), "'manifest.json' is not listed"),
    "out of order": (_swapped(3, 4), "out of order or twice"),
    "manifest not first": (_swapped(0, 2), "manifest.json is not where it belongs"),
    "missing": (_without(3), "out of order or twice"),
    "last one missing": (_without(7), "it ends before unet-float32"),
    "size too small": (_changed(size=516), "another size than the manifest says"),
    "size too large": (_changed(size=1 << 30), "another size than the manifest says"),
    "size past 8 GiB": (_base_256, "another size than the manifest says"),
    "time": (_changed(mtime=1), "not as `bundle pack` writes it"),
    "owner": (_changed(uid=1000, uname="x"), "not as `bundle pack` writes it"),
    "mode": (_changed(mode=0o4755), "not as `bundle pack` writes it"),
    "checksum": (_unsummed, "not as `bundle pack` writes it"),
    "other bytes": (_flipped(3, 0), "not the file that the manifest describes"),
    "bytes in padding": (_flipped(4, 520), "not the file that the manifest describes"),
    "bytes after the manifest": (_flipped(0, -1), "manifest.json ends early"),
    "cut": (lambda found: joined(found)[:-2000], "does not end|it ends before"),
    "no end": (lambda found: joined(found, b""), "does not end after the files"),
    "more at the end": (lambda f: joined(f) + bytes(512), "does not end after"),
    "nothing": (lambda _: b"", "manifest.json is not where it belongs"),
    "zeros": (lambda _: bytes(10240), "manifest.json is not where it belongs"),
    "packed": (lambda found: gzip.compress(joined(found)), "not where it belongs"),
    "huge manifest": (
        lambda f: tar_header(MANIFEST_NAME, (8 << 30) - 1) + joined(f)[BLOCK:],
        "manifest.json is not where it belongs",
    ),
}


def test_the_builder_of_hostile_tars_makes_a_good_one(tmp_path: Path) -> None:
    assert joined(parts()) == TAR.read_bytes()
    for number, change in enumerate((_manifest(lambda _: None), _changed())):
        (tmp_path / f"{number}.tar").write_bytes(change(parts()))
        unpack_bundle(tmp_path / f"{number}.tar", tmp_path / str(number)).verify()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tar_writes_nothing(tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(change(parts()))
    out = tmp_path / "out" / "b"
    out.parent.mkdir()
    with pytest.raises(BundleError, match=message):
        unpack_bundle(path, out)
    with pytest.raises(BundleError, match=message):
        verify_path(path)
    assert os.listdir(out.parent) == []
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_headers_are_all_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lie in the last header is found before the first byte is written."""
    found = parts()
    found[5].header = header(found[5].name, 551)
    (tmp_path / "x.tar").write_bytes(joined(found))
    monkeypatch.setattr(Path, "mkdir", lambda *_: pytest.fail("a folder was made"))
    with pytest.raises(BundleError, match="another size"):
        unpack_bundle(tmp_path / "x.tar", tmp_path / "b")


def test_unpacking_never_touches_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="exists"):
        unpack_bundle(TAR, tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="exists"):
        unpack_bundle(TAR, tmp_path / "link")
    with pytest.raises(InputError, match="cannot read"):
        unpack_bundle(tmp_path / "absent.tar", tmp_path / "c")
    with pytest.raises(OutputError, match="cannot write"):
        unpack_bundle(TAR, tmp_path / "absent" / "c")
    assert sorted(os.listdir(tmp_path)) == ["b", "link"]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(11))
def test_a_stopped_unpacking_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    fsync, calls = os.fsync, iter(range(100))

    def stop(descriptor: int) -> None:
        if next(calls) == at:
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", stop)
    if at == 10:
        unpack_bundle(TAR, tmp_path / "b").verify()
        return
    with pytest.raises((OutputError, KeyboardInterrupt)):
        unpack_bundle(TAR, tmp_path / "b")
    # The last one flushes the folder above, after the rename: all of it is there.
    assert os.listdir(tmp_path) == (["b"] if at == 9 else [])
    if at == 9:
        open_bundle(tmp_path / "b").verify()


_KILLED = """
import os, signal, sys
from pathlib import Path
from id3pm_deploy.bundle.archive import pack_bundle, unpack_bundle
from id3pm_deploy.bundle.verification import verify_path

folder, tar, work = map(Path, sys.argv[1:])
for phase in ("pack", "unpack"):
    outcomes = []
    for number in range(40):
        out = work / f"{phase}{number}"
        child = os.fork()
        if not child:
            calls = iter(range(1000))
            def hook(event, _):
                if event in ("open", "os.rename", "os.mkdir", "os.chmod") and \\
                        next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            if phase == "pack":
                pack_bundle(folder, out)
            else:
                unpack_bundle(tar, out)
            os._exit(0)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        there = os.path.lexists(out)
        if there:
            verify_path(out)
        assert killed or there
        outcomes.append((killed, there))
        if not killed:
            break
    print(phase, sum(k for k, _ in outcomes), outcomes[-1][0])
"""


def test_kill_9_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Killed before every file that is opened or renamed, one after the other."""
    command = [sys.executable, "-c", _KILLED, str(FOLDER), str(TAR), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (pack, kills, last), (unpack, more_kills, at_last) = map(
        str.split, done.stdout.splitlines()
    )
    assert (pack, last, unpack, at_last) == ("pack", "False", "unpack", "False")
    assert int(kills) >= 10
    assert int(more_kills) >= 10


def test_the_commands(tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["bundle", *map(str, arguments)])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "0.0 MB" in run("pack", FOLDER, tmp_path / "b.tar")
    assert run("unpack", tmp_path / "b.tar", tmp_path / "b").endswith("(6 files)\n")
    for path, kind in ((tmp_path / "b", "folder"), (tmp_path / "b.tar", "tar")):
        found = json.loads(run("verify", path, "--json"))
        assert (found["kind"], found["files"], found["bytes"]) == (kind, 6, 2715)
        assert found["signature"]["state"] == "good"
        assert found["plans"]["rtx"]["trusted"] is False
        text = run("verify", path)
        assert "6, 0.0 MB" in text
        assert "rtx: NOT TRUSTED" in text
    (tmp_path / "b" / "\x1b[2Jx").touch()
    text = run("verify", tmp_path / "b")
    assert "\\x1b[2Jx" in text
    assert "\x1b" not in text
    (tmp_path / "b" / "rtx-f884649e5724.plan").unlink()
    result = CliRunner().invoke(main, ["bundle", "verify", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "rtx-f884649e5724.plan is missing" in result.stderr
    result = CliRunner().invoke(main, ["bundle", "pack", str(FOLDER), str(TAR)])
    assert result.exit_code == 2


_REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "PIL", "onnxruntime", "cryptography"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from id3pm_deploy.cli import main
main(sys.argv[1:])
"""


def test_bundles_need_nothing_but_click(tmp_path: Path) -> None:
    old, tar = tmp_path / "old", tmp_path / "b.tar"
    shutil.copytree(GOLDEN / "bundle-v1", old)
    for arguments in (
        ["migrate", old],
        ["pack", old, tar],
        ["unpack", tar, tmp_path / "new"],
        ["verify", tar],
        ["verify", tmp_path / "new"],
        ["trust", "--list"],
    ):
        command = [sys.executable, "-c", _REFUSE, "bundle", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_tar_given_as_a_model_says_what_to_do() -> None:
    result = CliRunner().invoke(
        main, ["sample", str(TAR), "--unconditional", "--out", "nowhere"]
    )
    assert result.exit_code == 2
    assert f"bundle unpack {TAR} FOLDER" in result.stderr


def test_a_large_bundle_needs_little_memory(tmp_path: Path) -> None:
    """48 MB through pack, verify and unpack within 24 MB more than the start."""
    data = os.urandom(1 << 20) * 48
    writer = new_writer(tmp_path / "b", data)
    writer.commit()
    code = """
import resource, sys
from pathlib import Path
from id3pm_deploy.bundle.archive import pack_bundle, unpack_bundle
from id3pm_deploy.bundle.verification import verify_path
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
work, start = Path(sys.argv[1]), peak()
pack_bundle(work / "b", work / "b.tar")
verify_path(work / "b.tar")
unpack_bundle(work / "b.tar", work / "c")
verify_path(work / "c")
print(peak() - start)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 << 10
    (graph,) = (tmp_path / "c").glob("*.onnx")
    assert hashlib.sha256(graph.read_bytes()).hexdigest()[:12] in graph.name
