"""Photos that ``embed`` cannot use: all named, refused, or left out if asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_faces import Detector, encoded
from test_training import MeanColour

from id3pm_deploy.commands.embed import command
from id3pm_deploy.errors import FaceError, InputError
from id3pm_deploy.identity import alignment, embed, embedders
from id3pm_deploy.identity.embed import average_identity, embed_photos
from id3pm_deploy.identity.vectors import IdentityFile, load_identities

pytest.importorskip("cv2", reason="needs OpenCV (the extra `faces`)")


class Named(Detector):
    """As the detector names pictures, and with its other arguments."""

    def find_face(self, rgb: Any, *, name: str = "", **_: Any) -> Any:
        try:
            return super().find_face(rgb)
        except FaceError as error:
            raise FaceError(error.what.replace("the picture", name)) from error


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Good, nobody, good, damaged, two people, and the first one's pixels again."""
    data = {
        "a.png": encoded(0),
        "nobody.png": encoded(1, first=0),
        "b.png": encoded(2),
        "damaged.jpg": encoded(3, form="JPEG")[:2000],
        "two.png": encoded(4, first=255),
        "again.bmp": encoded(0, form="BMP"),
    }
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in data]


def embedded(photos: list[Path], **options: Any) -> IdentityFile:
    return embed_photos(photos, MeanColour(), Named(), **options)  # type: ignore[arg-type]


def test_all_that_is_wrong_is_named_at_once(photos: list[Path]) -> None:
    with pytest.raises(InputError, match="3 of 6 photos cannot be used") as error:
        embedded(photos)
    for part in ("no face was found in", "nobody.png", "damaged.jpg", "two.png"):
        assert part in error.value.why
    assert "b.png" not in error.value.why
    with pytest.raises(FaceError, match=r"nobody\.png"):
        embedded(photos[:3])
    with pytest.raises(InputError, match="2 of 2"):
        embedded(photos[3:5], skip_bad=True)
    with pytest.raises(FaceError, match="2 faces"):
        embedded(photos[4:5], skip_bad=True)


def test_the_fr_model_gets_batches_once_all_photos_are_known(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    class Batches(MeanColour):
        def _forward(self, aligned: Any) -> Any:
            sizes.append(len(aligned))
            return super()._forward(aligned)

    good = [photos[0], photos[2], photos[5]]
    found = embed_photos(good, Batches(), Named())  # type: ignore[arg-type]
    assert sizes == [3]
    assert np.array_equal(found.vectors, embedded(good).vectors)
    with pytest.raises(InputError, match="3 of 6"):
        embed_photos(photos, Batches(), Named())  # type: ignore[arg-type]
    assert sizes == [3]
    monkeypatch.setattr(embed, "_BATCH", 2)
    embed_photos(good, Batches(), Named())  # type: ignore[arg-type]
    assert sizes == [3, 2, 1]


def test_bad_photos_are_left_out_and_told(photos: list[Path]) -> None:
    told: list[str] = []
    done: list[int] = []
    file = embedded(
        photos, skip_bad=True, tell=told.append, on_done=lambda: done.append(1)
    )
    assert len(done) == len(photos)
    good = embedded([photos[0], photos[2], photos[5]]).vectors
    assert np.array_equal(file.vectors, good)
    assert np.array_equal(good[0], good[2])
    assert [line.startswith("not used: ") for line in told] == [False, *[True] * 3]
    assert told[0] == f"{photos[5]} is the same picture as {photos[0]}"


def test_an_average_takes_one_of_the_same_pictures(photos: list[Path]) -> None:
    a, b, again = photos[0], photos[2], photos[5]
    wanted = average_identity(embedded([a, b]).vectors)
    assert np.array_equal(embedded([a, b, again], average=True).vectors, wanted)


def test_the_command_skips_if_asked_to(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "FaceDetector", lambda _: Named())
    monkeypatch.setattr(embedders, "load_embedder", lambda _: MeanColour())
    out = tmp_path / "who.npz"

    def run(*options: str) -> Result:
        arguments = [*map(str, photos), "--out", str(out), *options]
        return CliRunner().invoke(command, arguments)

    refused = run()
    assert isinstance(refused.exception, InputError)
    assert not out.exists()
    result = run("--skip-bad")
    assert result.exception is None, result.output
    assert "3 identity vectors" in result.stdout
    assert result.stderr.count("not used: ") == 3
    assert len(load_identities(out)) == 3
