"""Where the pictures to train on lie: in folders, or in tar shards.

A shard is what WebDataset calls one: an uncompressed tar with KEY.jpg (or .png, .webp,
.bmp) and, where there is something to say of it, KEY.json; KEY is what stands before
the first dot of the name. A folder may hold such pairs as well. Nothing is unpacked: a
member's name is never used as a path.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError, first_line
from ..files import open_plain

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHARD = ".tar"
LABEL = ".json"
MAX_BYTES = 256 * 2**20
"""Of one picture as it lies on the disk."""
_BLOCK = 512


@dataclass(frozen=True)
class Place:
    """Where some bytes lie: a file, or a member of a shard.

    Attributes:
        path: The file.
        member: The member's name; empty for a file of its own.
        start: Where the bytes begin in the file.
        size: How many they are; None: all of the file.
    """

    path: Path
    member: str = ""
    start: int = 0
    size: int | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def read(self, most: int = MAX_BYTES) -> bytes:
        """The bytes.

        Raises:
            InputError: They cannot be read, are cut short or more than ``most``.
        """
        try:
            with open_plain(self.path, follow=True) as handle:
                handle.seek(self.start)
                wanted = most + 1 if self.size is None else min(self.size, most + 1)
                data = handle.read(wanted)
        except OSError as error:
            raise _unreadable(self.name, error.strerror or str(error)) from error
        if len(data) > most:
            raise _unreadable(self.name, f"it has more than {most} bytes")
        if self.size is not None and len(data) != self.size:
            raise _unreadable(self.name, "the shard is cut short")
        return data


@dataclass(frozen=True)
class Picture:
    """A picture that has been found and not read.

    Attributes:
        source: Which of the given folders and shards it came from.
        place: Where it lies.
        label: Where the JSON file of the same key lies, if there is one.
    """

    source: int
    place: Place
    label: Place | None = None


def list_pictures(sources: Sequence[Path]) -> list[Picture]:
    """The pictures in some folders and shards, in an order that stays the same.

    Raises:
        InputError: A source is neither, holds no picture, or is a damaged shard.
    """
    found = []
    for index, source in enumerate(sources):
        if source.is_file() and source.suffix.lower() == SHARD:
            places = shard_places(source)
        else:
            files = folder_files(source, (*SUFFIXES, SHARD, LABEL))
            shards = [path for path in files if path.suffix.lower() == SHARD]
            places = [Place(path) for path in files if path not in set(shards)]
            places += [place for path in shards for place in shard_places(path)]
        pictures = _paired(index, places)
        if not pictures:
            raise _no_pictures(source)
        found += pictures
    return found


def picture_paths(folder: Path) -> list[Path]:
    """Picture files in ``folder`` and below, sorted; broken links do not count.

    Raises:
        InputError: No such folder, or no picture in it.
    """
    found = folder_files(folder, SUFFIXES)
    if not found:
        raise _no_pictures(folder)
    return found


def folder_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of these suffixes in ``folder`` and below, sorted.

    Raises:
        InputError: There is no such folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}",
            fix=f"give a folder of faces, or a shard that ends in {SHARD}",
        )
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and path.is_file()
    )


def shard_places(path: Path) -> list[Place]:
    """The members of a shard, of which only the headers are read.

    Raises:
        InputError: It is no uncompressed tar, or is damaged or cut short.
    """
    places, end = [], 0
    try:
        with (
            open_plain(path, follow=True) as handle,
            tarfile.open(fileobj=handle, mode="r:") as archive,
        ):
            for member in archive:
                if member.size < 0 or member.issparse():
                    raise tarfile.ReadError("a member is sparse or of no size")
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.isreg():
                    data = (member.offset_data, member.size)
                    places.append(Place(path, member.name, *data))
            handle.seek(end)
            if handle.read(_BLOCK) != bytes(_BLOCK):  # tarfile stops at rubbish too
                raise tarfile.ReadError("it does not end as a tar does")
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path} cannot be read as a tar shard",
            why=first_line(error),
            fix="give an uncompressed tar that is complete",
        ) from error
    return places


def _paired(source: int, places: Iterable[Place]) -> list[Picture]:
    """The pictures among some files, each with the label of its key."""
    labels, pictures = {}, []
    for place in places:
        suffix = PurePosixPath(place.member or place.path.name).suffix.lower()
        if suffix == LABEL:
            labels[_key(place)] = place
        elif suffix in SUFFIXES:
            pictures.append(place)
    return [Picture(source, place, labels.get(_key(place))) for place in pictures]


def _key(place: Place) -> tuple[Path, str]:
    """What a picture and its label have in common."""
    if not place.member:
        return place.path.parent, place.path.stem
    folder, slash, name = place.member.rpartition("/")
    return place.path, folder + slash + name.partition(".")[0]


def _no_pictures(source: Path) -> InputError:
    return InputError(
        f"{source} holds no pictures", fix=f"put {', '.join(SUFFIXES)} files in it"
    )


def _unreadable(name: str, why: str) -> InputError:
    return InputError(
        f"{name} cannot be read", why=why, fix="put a complete file in its place"
    )
