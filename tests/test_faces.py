"""Pictures to train on: found in folders and shards, embedded once, kept privately."""

from __future__ import annotations

import io
import json
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from test_training import MeanColour

from id3pm_deploy.errors import FaceError, IdentityError, InputError
from id3pm_deploy.identity import embed as embed_module
from id3pm_deploy.identity.alignment import ARCFACE_112
from id3pm_deploy.training import cache as cache_module
from id3pm_deploy.training import faces as faces_module
from id3pm_deploy.training.faces import TrainingFaces, load_faces
from id3pm_deploy.training.labels import declared_attribute
from id3pm_deploy.training.pictures import list_pictures, picture_paths, shard_places

pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")

AGE, GLASSES = declared_attribute("age=0..100"), declared_attribute("glasses=yes|no")


class Detector:
    """Sees no face where the first pixel is black, two where it is white."""

    def find_face(self, rgb: npt.NDArray[np.uint8]) -> Any:
        if rgb[0, 0].max() == 0:
            raise FaceError("no face was found in the picture")
        if rgb[0, 0].min() == 255:
            raise FaceError("2 faces were found in the picture")
        return SimpleNamespace(points=ARCFACE_112 * len(rgb) / 112)


class Counting(MeanColour):
    """Counts the crops it is shown, and fails when there were enough."""

    def __init__(self, most: int = 10**6) -> None:
        self.seen, self.most = 0, most

    def _forward(self, aligned: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        if self.seen + len(aligned) > self.most:
            raise IdentityError("the FR model gave up")
        self.seen += len(aligned)
        return super()._forward(aligned)


@pytest.fixture(autouse=True)
def _detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces_module, "FaceDetector", Detector)
    monkeypatch.setattr(faces_module, "_CROPS", 4)  # two faces at once


def pixels(number: int, first: int = 128) -> npt.NDArray[np.uint8]:
    made = np.random.default_rng(number).integers(9, 246, (64, 64, 3), dtype=np.uint8)
    made[0, 0] = first
    return made


def encoded(number: int, first: int = 128, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number, first)).save(buffer, form)
    return buffer.getvalue()


def folder_of(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(count):
        (path / f"{number:03d}.png").write_bytes(encoded(number))
    return path


def shard_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def load(*sources: Path, fr: Any = None, **rest: Any) -> TrainingFaces:
    settings = {"size": 16, "margin": 1.0, "jitter": 1, **rest}
    return load_faces(sources, fr or MeanColour(), **settings)


# Folders and shards


def test_folders_without_faces(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        picture_paths(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match="no pictures"):
        picture_paths(tmp_path)
    (tmp_path / "black.png").write_bytes(encoded(0, first=0))
    with pytest.raises(InputError, match="no picture has exactly one usable face"):
        load(tmp_path)


def test_what_is_no_file_is_no_picture(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(encoded(0))
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").mkdir()
    assert picture_paths(tmp_path) == [good]


def test_a_shard_holds_what_a_folder_holds(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder", 3)
    members = {"a/./x.txt": b"left alone"}
    members |= {f"a/{p.name}": p.read_bytes() for p in sorted(folder.iterdir())}
    shard = shard_of(tmp_path / "faces-000.tar", members)
    from_folder, from_shard = load(folder), load(shard)
    assert np.array_equal(from_folder.pictures, from_shard.pictures)
    assert np.array_equal(from_folder.vectors, from_shard.vectors)
    both = load(folder, shard)
    assert (len(both), both.skipped) == (3, 3)  # they are the same pictures
    within = tmp_path / "within"
    within.mkdir()
    shard.rename(within / "faces-000.tar")
    assert len(load(within)) == 3


def test_members_are_files_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "faces.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        up = tarfile.TarInfo("../../up.png")
        up.size = len(encoded(1))
        archive.addfile(up, io.BytesIO(encoded(1)))
    assert [one.member for one in shard_places(path)] == ["../../up.png"]
    assert len(load(path)) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"no tar at all",
        lambda data: b"",
        lambda data: data[:1800],  # within the first picture
        lambda data: data[: len(encoded(0)) // 512 * 512 + 1024],  # before the second
        lambda data: data.replace(b"b.png", b"\xff" * 5, 1),
    ],
)
def test_damaged_shards_are_named(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = shard_of(tmp_path / "x.tar", {"a.png": encoded(0), "b.png": encoded(1)})
    assert len(list_pictures([path])) == 2
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"x\.tar cannot be read as a tar shard"):
        list_pictures([path])


# Embedding once


def test_the_cache_is_private_grows_and_is_used(tmp_path: Path) -> None:
    folder, cache, fr = folder_of(tmp_path / "faces", 3), tmp_path / "cache", Counting()
    first = load(folder, fr=fr, cache=cache)
    assert fr.seen == 6  # each with its mirror image
    assert not np.array_equal(first.vectors[:, 0], first.pictures[:, 1])
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (folder / "003.png").write_bytes(encoded(3))
    (folder / "000.png").rename(folder / "004.png")
    more = load(folder, fr=fr, cache=cache)
    assert (len(more), fr.seen) == (4, 8)
    assert {stat.S_IMODE(p.stat().st_mode) for p in cache.iterdir()} == {0o600}
    assert np.array_equal(more.vectors[3], first.vectors[0])
    for path in cache.iterdir():
        assert b"faces" not in path.read_bytes().replace(b"faces/", b"")
    again = load(folder, fr=Counting(0), cache=cache)
    assert np.array_equal(again.pictures, more.pictures)
    assert np.array_equal(again.vectors, more.vectors)


def test_an_interrupted_embedding_goes_on(tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "faces", 6), tmp_path / "cache"
    whole = load(folder, jitter=1)
    with pytest.raises(IdentityError, match="gave up"):
        load(folder, fr=Counting(9), cache=cache)
    rest = Counting()
    found = load(folder, fr=rest, cache=cache)
    assert rest.seen == 4  # of six faces four were there already
    assert np.array_equal(found.vectors, whole.vectors)


def test_what_is_damaged_or_of_other_settings_is_embedded_again(tmp_path: Path) -> None:
    folder, cache = folder_of(tmp_path / "faces", 2), tmp_path / "cache"
    load(folder, cache=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-900], whole.replace(b"|u1", b"|i1")):
        file.write_bytes(damaged)
        fr = Counting()
        load(folder, fr=fr, cache=cache)
        assert fr.seen == 4
        assert file.read_bytes() == whole
    other = Counting()
    load(folder, fr=other, cache=cache, size=24)
    assert (other.seen, len(list(cache.iterdir()))) == (4, 1)


def test_the_cache_is_written_while_faces_are_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_FLUSH_SECONDS", -1.0)
    folder, cache = folder_of(tmp_path / "faces", 3), tmp_path / "cache"
    load(folder, cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_shifted_crops_do_not_depend_on_other_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "faces", 3)
    all_three = load(folder, jitter=3, seed=7).vectors
    (folder / "000.png").unlink()
    assert np.array_equal(load(folder, jitter=3, seed=7).vectors, all_three[1:])
    assert not np.array_equal(load(folder, jitter=3, seed=8).vectors, all_three[1:])
    assert not np.array_equal(all_three[:, 0, 0], all_three[:, 0, 1])


# Pictures that cannot be used


def test_duplicates_and_faces_that_are_not_one_are_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "faces", 2)
    (folder / "002.png").write_bytes(encoded(0))  # the same bytes
    (folder / "003.bmp").write_bytes(encoded(1, form="BMP"))  # the same pixels
    (folder / "004.png").write_bytes(encoded(4, first=0))
    (folder / "005.png").write_bytes(encoded(5, first=255))
    told: list[str] = []
    cache = tmp_path / "cache"
    for _ in range(2):
        told.clear()
        faces = load(folder, cache=cache, tell=told.append)
        assert (len(faces), faces.skipped) == (2, 4)
        assert told == [
            f"2 not used: it is the same picture as another one: {folder}/002.png, "
            f"{folder}/003.bmp",
            f"1 not used: no face was found in the picture: {folder}/004.png",
            f"1 not used: 2 faces were found in the picture: {folder}/005.png",
        ]


def damage_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def damage_pixels(path: Path) -> None:
    path.write_bytes(encoded(3, form="JPEG")[:2000])


@pytest.mark.parametrize(
    ("damage", "embedded"), [(damage_header, 0), (damage_pixels, 90 * 2)]
)
def test_ten_damaged_pictures_among_many(
    tmp_path: Path, damage: Callable[[Path], None], embedded: int
) -> None:
    folder, cache = folder_of(tmp_path / "faces", 100), tmp_path / "cache"
    names = [f"{number:03d}.png" for number in range(5, 100, 10)]
    for name in names:
        damage(folder / name)
    fr = Counting()
    with pytest.raises(InputError, match="10 of 100 pictures cannot be used") as error:
        load(folder, fr=fr, cache=cache)
    assert all(name in error.value.why for name in names)
    assert "0x" not in error.value.why
    assert fr.seen == embedded  # where the header tells, before anything is embedded
    told: list[str] = []
    faces = load(folder, fr=fr, cache=cache, skip_bad=True, tell=told.append)
    assert (len(faces), faces.skipped, fr.seen) == (90, 10, 180)
    assert all(name in " ".join(told) for name in names)


def test_too_large_and_no_picture_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "faces", 1)
    (folder / "b.jpg").write_text("no picture")
    with pytest.raises(InputError, match="1 of 2 pictures") as error:
        load(folder)
    assert "b.jpg" in error.value.why
    (folder / "b.jpg").unlink()
    monkeypatch.setattr(embed_module, "MAX_PIXELS", 64 * 64 - 1)
    with pytest.raises(InputError) as error:
        load(folder)
    assert "64x64 pixels" in error.value.why


# Attributes


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    folder = folder_of(tmp_path / "faces", 3)
    (folder / "000.json").write_text('{"age": 50, "glasses": "yes", "other": [1]}')
    (folder / "001.json").write_text('{"age": null}')
    return folder


def test_attributes_from_json_and_tables(labelled: Path, tmp_path: Path) -> None:
    specs = [AGE, GLASSES]
    faces = load(labelled, attributes=specs)
    wanted = [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert faces.attributes is not None
    assert faces.attributes.tolist() == wanted
    table = tmp_path / "table.csv"
    table.write_text("file,glasses,sheet,age\nfaces/000.png,no,x,\nfaces/002.png,,,100")
    faces = load(labelled, attributes=specs, tables=[table])
    assert faces.attributes is not None
    # The table is silent about the age of 000, so the JSON file has its say.
    assert faces.attributes.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]
    members = {p.name: p.read_bytes() for p in labelled.iterdir()}
    shard = load(shard_of(tmp_path / "x.tar", members), attributes=specs)
    assert shard.attributes is not None
    assert shard.attributes.tolist() == wanted


def test_attributes_that_cannot_be_used(labelled: Path, tmp_path: Path) -> None:
    (labelled / "001.json").write_text('{"age": 130}')
    (labelled / "002.json").write_text("[" * 100)
    with pytest.raises(InputError, match="2 of 3 pictures") as error:
        load(labelled, attributes=[AGE])
    assert "'age' must be from 0 to 100, it is 130" in error.value.why
    assert "not JSON" in error.value.why
    assert len(load(labelled, attributes=[AGE], skip_bad=True)) == 1
    assert len(load(labelled)) == 3  # nobody asked for them
    with pytest.raises(InputError, match="no picture states the attribute 'beard'"):
        load(labelled, attributes=[declared_attribute("beard=0..1")], skip_bad=True)
    table = tmp_path / "table.csv"
    for text in ("name,age\n", "file,size\n", 'file,age\n"x', "file,age\na,1\na,2\n"):
        table.write_text(text)
        with pytest.raises(InputError):
            load(labelled, attributes=[AGE], tables=[table], skip_bad=True)
    with pytest.raises(InputError, match="no attribute declared"):
        load(labelled, tables=[table])


def test_declared_attributes() -> None:
    assert (AGE.kind, AGE.low, AGE.high) == ("numeric", 0.0, 100.0)
    assert GLASSES.categories == ("yes", "no")
    for text in ("age", "age=", "age=1", "age=5..1", "age=a..b", "=1..2", "a=x|x"):
        with pytest.raises(InputError, match="declares no attribute"):
            declared_attribute(text)
    assert json.dumps(AGE.categories) == "[]"
