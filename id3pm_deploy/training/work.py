"""The folder beside a CHECKPOINT where a run keeps what it needs, and its removal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, OutputError
from ..files import beside, remove

CACHE_NAME = "faces"
_OLD_CACHE = "faces.npz"  # of earlier releases
_SHEETS = "sheet-*.png"  # they show photos beside what the model makes


@dataclass(frozen=True)
class Wiped:
    """What was removed: how many files, and their size in bytes."""

    files: int
    bytes: int


def work_folder(checkpoint: Path) -> Path:
    """Where a run keeps its state, log, sheets and face cache: beside the output."""
    return beside(checkpoint, ".training")


def wipe_run(checkpoint: Path, *, everything: bool = False) -> Wiped:
    """Remove the faces, identity vectors and contact sheets that a run has kept.

    The run can go on afterwards where the pictures are still there: they are embedded
    again. What a device keeps of a removed file is beyond us.

    Args:
        checkpoint: The CHECKPOINT folder that was or is to be trained; untouched.
        everything: Remove state, log and settings as well, so that the run is over.

    Raises:
        InputError: There is no folder of a run.
        OutputError: Something is still there.
    """
    work = work_folder(checkpoint)
    if work.is_symlink() or not work.is_dir():
        raise InputError(
            f"there is no folder {work}",
            why="a run keeps faces and vectors beside its CHECKPOINT",
            fix="name the CHECKPOINT as it was named to `train`",
        )
    targets = [work] if everything else _personal(work)
    files = [one for target in targets for one in _files(target)]
    wiped = Wiped(len(files), sum(path.lstat().st_size for path in files))
    for target in targets:
        remove(target)
        if target.exists() or target.is_symlink():
            raise OutputError(
                f"cannot remove all of {target}", fix="check whose it is, and its mode"
            )
    return wiped


def _personal(work: Path) -> list[Path]:
    """What shows people or describes them, with what killed writers left of it."""
    names = (CACHE_NAME, _OLD_CACHE, f".{_OLD_CACHE}.*.tmp", _SHEETS, f".{_SHEETS}.*")
    return sorted({path for name in names for path in work.glob(name)})


def _files(path: Path) -> list[Path]:
    """``path``, or all files below it; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return [path]
    return [one for one in path.rglob("*") if one.is_symlink() or not one.is_dir()]
