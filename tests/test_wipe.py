"""``id3pm-deploy wipe``: nothing of a person stays, and nothing else goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from id3pm_deploy.commands.wipe import command
from id3pm_deploy.errors import InputError
from id3pm_deploy.training.work import wipe_run

PERSONAL = (
    "faces/0123.npz",
    "faces/.0123.npz.0123456789ab.tmp",
    "faces.npz",
    "sheet-0000100.png",
    "sheet-0000200.png",
    ".sheet-0000300.png.0123456789ab.tmp",
)
OTHERS = ("state.safetensors", "log.jsonl", "settings.json", "ema/model.safetensors")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder, beside its CHECKPOINT and the pictures it was trained on."""
    work = tmp_path / "mine.training"
    beside = ("faces/anna.png", "mine/config.json", "other.training/faces/1.npz")
    names = [f"mine.training/{name}" for name in (*PERSONAL, *OTHERS)]
    for name in (*names, *beside):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1234")
    return work


def files(folder: Path) -> set[str]:
    found = (p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())
    return {str(path.relative_to(folder)) for path in found}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_faces_vectors_and_sheets_go(run_folder: Path) -> None:
    others = files(run_folder.parent) - {f"mine.training/{name}" for name in PERSONAL}
    result = invoke(run_folder.parent / "mine", "--json")
    assert result.exception is None, result.output
    assert json.loads(result.stdout) == {"files": 6, "bytes": 24}
    assert files(run_folder.parent) == others
    assert files(run_folder) == set(OTHERS)
    again = invoke(run_folder.parent / "mine")
    assert "0 files removed" in again.stdout


def test_everything_of_the_run_goes_if_asked_for(run_folder: Path) -> None:
    result = invoke(run_folder.parent / "mine", "--all")
    assert "10 files removed" in result.stdout
    assert not run_folder.exists()
    assert (run_folder.parent / "mine" / "config.json").is_file()


def test_links_are_not_followed(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "sheet-0.png").symlink_to(tmp_path / "faces" / "anna.png")
    (run_folder / "faces" / "more").symlink_to(tmp_path / "faces")
    wipe_run(tmp_path / "mine")
    assert files(run_folder) == set(OTHERS)
    assert files(tmp_path / "faces") == {"anna.png"}
    (tmp_path / "linked.training").symlink_to(run_folder)
    with pytest.raises(InputError, match="there is no folder"):
        wipe_run(tmp_path / "linked", everything=True)
    assert files(run_folder) == set(OTHERS)


def test_there_has_to_be_a_run(tmp_path: Path) -> None:
    result = invoke(tmp_path / "absent")
    assert isinstance(result.exception, InputError)
