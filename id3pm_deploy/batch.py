"""What the library hands out: batches of pictures and single ones, with their marks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .attributes import Attributes
from .control.shots import Shot
from .errors import InputError, NonFiniteError
from .files import make_folder
from .generate import Pictures, sample_entries, save_pictures
from .images import PictureMark, save_png, to_uint8
from .places import Finished
from .solvers import SolverTable

Float32 = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that were made together.

    Arrays are NumPy's, on the host. The batch itself hands its images on by DLPack
    without a copy, from the GPU where that has made them: ``torch.from_dlpack(batch)``
    gives ``on_device`` where there is one, else ``images``.

    Attributes:
        samples: Numbers of the samples, counted over all identities.
        identities: Whose each is: an id of the identity file, ``array-N`` for the N-th
            vector of an array, or ``unconditional``.
        pixels: [B, H, W, 3] uint8; failed samples are black.
        images: [B, C, H, W] float32 in [-1, 1] where the solver clips; failed ones -1.
        failed: [B] bool, True where the network produced NaN or infinity.
        marks: What each picture says about itself, for whoever writes files.
        seconds: Wall time.
        record: How the batch was made, as in a run's ``record.json``, but ``samples``.
        on_device: [B, C, H, W] float32 in the GPU's memory, failed ones 0; stays good
            when the sampler is closed. None where no GPU made it, and where a second
            stage made it in several parts.
        attributes: What is stated of each; empty for a model without attributes.
        shots: What else each is made of, if that was asked for.
    """

    samples: tuple[int, ...]
    identities: tuple[str, ...]
    pixels: Pixels
    images: Float32
    failed: npt.NDArray[np.bool_]
    marks: tuple[PictureMark, ...]
    seconds: float
    record: dict[str, Any] = field(repr=False)
    table: SolverTable = field(repr=False)
    on_device: Any = field(default=None, repr=False)
    attributes: tuple[Attributes, ...] = ()
    shots: tuple[Shot, ...] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def _shared(self) -> Any:
        return self.images if self.on_device is None else self.on_device

    def __dlpack__(self, **options: Any) -> Any:
        """The images as a DLPack capsule, without a copy."""
        return self._shared.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where they lie: (1, 0) is the host, (2, 0) the first GPU."""
        kind, index = self._shared.__dlpack_device__()
        return int(kind), int(index)

    def save(self, folder: str | Path, *, force: bool = False) -> dict[str, Any]:
        """Write what ``id3pm-deploy sample`` would: PNGs that are marked as generated,
        a contact sheet and a ``record.json``.

        Args:
            folder: New or empty.
            force: Replace an earlier run in it.

        Returns the run's record.

        Raises:
            InputError: It is not empty, or no earlier run's.
            NonFiniteError: A sample failed; the others were written.
            OutputError: Something cannot be written.
        """
        made = Pictures(self.pixels, self.marks, self.failed, self.seconds, self.table)
        samples = sample_entries(
            self.samples, self.identities, self.failed, self.attributes, self.shots
        )
        record = {**self.record, "seconds": round(self.seconds, 4), "samples": samples}
        columns = int(record["count"])
        save_pictures(Path(folder), made, record, columns=columns, force=force)
        return record


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one run as one.

    Raises:
        InputError: There are none.
    """
    if not batches:
        raise InputError("there are no batches to join")
    first = batches[0]
    return dataclasses.replace(
        first,
        samples=sum((one.samples for one in batches), ()),
        identities=sum((one.identities for one in batches), ()),
        attributes=sum((one.attributes for one in batches), ()),
        shots=None
        if first.shots is None
        else sum((one.shots or () for one in batches), ()),
        pixels=np.concatenate([one.pixels for one in batches]),
        images=np.concatenate([one.images for one in batches]),
        failed=np.concatenate([one.failed for one in batches]),
        marks=sum((one.marks for one in batches), ()),
        on_device=first.on_device if len(batches) == 1 else None,
        seconds=sum(one.seconds for one in batches),
    )


def check_finite(batch: Batch) -> None:
    """Raise :class:`NonFiniteError` if a sample failed."""
    if batch.failed.any():
        bad = [
            n for n, is_bad in zip(batch.samples, batch.failed, strict=True) if is_bad
        ]
        raise NonFiniteError(
            f"samples {', '.join(map(str, bad))} are not finite",
            why="the network produced NaN or infinity",
            fix="try a float32 engine, less guidance or more steps",
        )


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        pixels: [H, W, 3] uint8.
        image: [C, H, W] float32.
        mark: What it says about itself.
    """

    pixels: Pixels
    image: Float32
    mark: PictureMark

    def save(self, path: str | Path) -> None:
        """Write a PNG that is marked as generated.

        Raises:
            OutputError: It cannot be written.
        """
        path = Path(path)
        make_folder(path.absolute().parent)
        save_png(path, self.pixels, self.mark)


def finished_picture(done: Finished, mark: PictureMark) -> Picture:
    """A finished trajectory as a picture.

    Raises:
        NonFiniteError: It is not finite.
    """
    if done.failed:
        raise NonFiniteError(
            "the picture is not finite",
            why="the network produced NaN or infinity",
            fix="try a float32 engine, less guidance or more steps",
        )
    return Picture(to_uint8(done.image[None])[0], done.image, mark)
