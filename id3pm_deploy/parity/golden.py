"""Recorded golden data: what another implementation made of given numbers.

An ``.npz`` of plain arrays, in the form that runs of guided-diffusion are recorded in:

===================== ============ ==============================================
``x``                 [B,C,H,W]    noisy images of the forward passes
``t``                 [B]          their timesteps
``y``                 [B,D]        identity vectors, normalised; zeros are null. Only
                                   for models with identity
``low_res``           [B,C,h,w]    small pictures in [-1, 1]. Only for super-resolution
                                   models
``out``               [B,C|2C,H,W] what the network made of them
``NAME/x_T``          [B,C,H,W]    starting point of a trajectory, unit variance
``NAME/noise``        [N,B,C,H,W]  noise in the order of execution
``NAME/timesteps``    [N]          ascending, so ``noise[0]`` belongs to the last
``NAME/sample``       [B,C,H,W]    its end, clipped to [-1, 1] in every step
``NAME/states``       [N,B,C,H,W]  optional: x after every table row, as executed
``NAME/settings``     text         optional: solver and guidance, as JSON
``checkpoint_sha256`` text         optional: of the weights it was recorded from
===================== ============ ==============================================

``y`` and ``low_res`` condition the trajectories, too. Without settings, NAME says what
it is: ``ancestral10`` is guided-diffusion's sampler in 10 steps with the variance that
the model has (learned, else fixed_large), ``ddim10`` is DDIM with η = 0, and
``_guided2`` behind either guides all output channels at scale 2 on the x_T, noise and
timesteps of the trajectory without it. All is float32 but for ``t`` and ``timesteps``.

The file is not trusted: nothing is unpickled, and names, types and sizes are checked
against the model before an array is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.base import Float32, StepShapes, step_shapes
from ..defaults import MAX_BATCH_SIZE
from ..errors import GoldenError, InputError, RecipeError
from ..guidance import GuidanceSettings
from ..npz import NpzError, NpzReader, open_npz
from ..recipes import dataclass_from_mapping
from ..sampler import SampleJob
from ..solvers import SPACINGS, SolverSettings, SolverTable, solver_table
from ..spec import DiffusionSpec

MAX_BYTES = 1 << 30
MAX_MEMBERS = 256
MAX_ROWS = 10_000
_MAX_TEXT = 4096
_FORWARD = ("x", "t", "y", "low_res", "out")
_PARTS = ("x_T", "noise", "timesteps", "sample", "states", "settings")
_HASH = "checkpoint_sha256"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KNOWN = re.compile(r"(ancestral|ddim)([0-9]{1,4})(?:_guided([0-9]+(?:\.[0-9]+)?))?")
_FIX = "record it again with `id3pm-deploy parity CHECKPOINT --record FILE.npz`"


@dataclass(frozen=True)
class GoldenNoise:
    """Recorded noise as the sampler's noise source; sample i is the i-th recorded."""

    x_t: Float32
    noise: Float32

    def start(self, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """x_T of the samples."""
        return np.ascontiguousarray(self.x_t[list(samples)])

    def row(self, j: int, samples: Sequence[int], shape: tuple[int, ...]) -> Float32:
        """Noise of table row j."""
        return np.ascontiguousarray(self.noise[j][list(samples)])


@dataclass(frozen=True)
class GoldenTrajectory:
    """One recorded trajectory.

    Attributes:
        name: Its name in the file.
        job: What has to be sampled to make it again, noise included.
        sample: [B, C, H, W] float32, its end.
        states: [N, B, C, H, W] float32, x after every table row; None if not recorded.
    """

    name: str
    job: SampleJob
    sample: Float32
    states: Float32 | None


@dataclass(frozen=True)
class GoldenData:
    """Recorded data that fits a model.

    Attributes:
        x: [B, C, H, W] float32.
        t: [B] float32.
        identity: [B, D] float32, normalised, attributes' columns behind; [B, 0] of a
            model without either.
        out: [B, C or 2C, H, W] float32.
        trajectories: In the file's order; may be empty.
        low_res: [B, C, h, w] float32 of a super-resolution model.
    """

    x: Float32
    t: Float32
    identity: Float32
    out: Float32
    trajectories: tuple[GoldenTrajectory, ...]
    low_res: Float32 | None = None


def load_golden_data(
    path: Path, spec: DiffusionSpec, weights_sha256: str
) -> GoldenData:
    """Read a file of golden data for the model that ``spec`` describes.

    Raises:
        GoldenError: The file is missing, damaged, too large or not of this form, or it
            does not fit the model; the array is named.
    """
    try:
        with open_npz(path, MAX_BYTES, MAX_MEMBERS) as reader:
            return _Reader(path, spec, reader).load(weights_sha256)
    except FileNotFoundError as error:
        raise GoldenError(f"{path} does not exist", fix="check the path") from error
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error
    except NpzError as error:
        raise _refused(path, str(error)) from error


def _refused(path: Path, why: str) -> GoldenError:
    return GoldenError(f"golden data {path} cannot be used", why=why, fix=_FIX)


class _Reader:
    """Reads one file for one model; every size comes from the model."""

    def __init__(self, path: Path, spec: DiffusionSpec, reader: NpzReader) -> None:
        self._path, self._spec, self._reader = path, spec, reader
        self._shapes: StepShapes = step_shapes(spec)

    def load(self, weights_sha256: str) -> GoldenData:
        names = self._trajectory_names()
        self._check_hash(weights_sha256)
        count = self._reader.header("x").shape[:1]
        if len(count) != 1 or not 1 <= count[0] <= MAX_BATCH_SIZE:
            raise self._wrong("x", f"it must hold 1 to {MAX_BATCH_SIZE} samples")
        batch, picture = count[0], self._shapes.picture
        channels = picture[0] * (2 if self._spec.model.learned_variance else 1)
        times = self._numbers("t", (batch,))
        self._check_times("t", times)
        identity = np.zeros((batch, 0), np.float32)
        if self._shapes.identity_dim:
            identity = self._float32("y", (batch, self._shapes.identity_dim))
        small = None
        if self._shapes.low_res is not None:
            small = self._float32("low_res", (batch, *self._shapes.low_res))
        return GoldenData(
            x=self._float32("x", (batch, *picture)),
            t=times.astype(np.float32),
            identity=identity,
            out=self._float32("out", (batch, channels, *picture[1:])),
            trajectories=tuple(
                self._trajectory(name, identity, small) for name in names
            ),
            low_res=small,
        )

    def _trajectory_names(self) -> list[str]:
        """Names of the trajectories, after every name in the file was recognised."""
        there = self._reader.names
        shapes = self._shapes
        without = {"y": not shapes.identity_dim, "low_res": shapes.low_res is None}
        wanted = [name for name in _FORWARD if not without.get(name)]
        if missing := [name for name in wanted if name not in there]:
            raise NpzError(f"it has no {', '.join(missing)}")
        names: dict[str, None] = {}
        for member in there:
            name, _, part = member.rpartition("/")
            if name and part in _PARTS and _NAME.fullmatch(name):
                names[name] = None
            elif without.get(member):
                raise self._wrong(member, "the model takes no such input")
            elif member not in (*wanted, _HASH):
                raise self._wrong(f"{member!r:.80}", "no array of that name is known")
        return list(names)

    def _check_hash(self, weights_sha256: str) -> None:
        if _HASH not in self._reader.names:
            return
        if self._text(_HASH) != weights_sha256:
            raise GoldenError(
                f"golden data {self._path} was recorded from another model",
                why="the weights' SHA-256 differ",
                fix="give the CHECKPOINT or BUNDLE that it was recorded from",
            )

    def _trajectory(
        self, name: str, identity: Float32, low_res: Float32 | None
    ) -> GoldenTrajectory:
        batch = (len(identity), *self._shapes.picture)
        # A guided trajectory may use the numbers of the one without guidance.
        source = name
        if f"{name}/x_T" not in self._reader.names:
            source = name.split("_guided")[0]
        header = self._reader.header(f"{source}/timesteps")
        if len(header.shape) != 1 or not 1 <= header.shape[0] <= MAX_ROWS:
            raise self._wrong(f"{source}/timesteps", f"it must hold 1 to {MAX_ROWS}")
        rows = header.shape[0]
        times = self._numbers(f"{source}/timesteps", (rows,))
        self._check_times(f"{source}/timesteps", times)
        if (np.diff(times) < 0).any():
            raise self._wrong(f"{source}/timesteps", "they are not ascending")
        table, guidance = self._settings(name, times[::-1])
        noise = GoldenNoise(
            self._float32(f"{source}/x_T", batch),
            self._float32(f"{source}/noise", (rows, *batch)),
        )
        states = None
        if f"{name}/states" in self._reader.names:
            states = self._float32(f"{name}/states", (rows, *batch))
        job = SampleJob(identity, table, guidance, noise, low_res=low_res)
        return GoldenTrajectory(
            name, job, self._float32(f"{name}/sample", batch), states
        )

    def _settings(
        self, name: str, times: npt.NDArray[np.float64]
    ) -> tuple[SolverTable, GuidanceSettings]:
        """The table and the guidance of a trajectory, at the recorded timesteps."""
        if f"{name}/settings" in self._reader.names:
            solver, guidance = self._stated_settings(name)
            candidates = [solver]
        else:
            candidates, guidance = self._named_settings(name, len(times))
        for settings in candidates:
            if settings.steps > len(times):
                continue
            try:
                table = solver_table(self._spec, settings)
            except InputError:
                continue
            if np.array_equal(table.timesteps, times):
                return table, guidance
        raise self._wrong(
            f"{name}/timesteps", "they are not those of any spacing of the solver"
        )

    def _stated_settings(self, name: str) -> tuple[SolverSettings, GuidanceSettings]:
        member = f"{name}/settings"
        try:
            stated = json.loads(self._text(member))
            if not isinstance(stated, dict) or set(stated) != {"solver", "guidance"}:
                raise self._wrong(member, "it does not hold solver and guidance")
            where = f"{self._path}, {member}"
            return (
                dataclass_from_mapping(SolverSettings, stated["solver"], where),
                dataclass_from_mapping(GuidanceSettings, stated["guidance"], where),
            )
        except (ValueError, RecursionError, TypeError) as error:
            raise self._wrong(member, "it is not JSON of this form") from error
        except RecipeError as error:
            raise GoldenError(error.what, why=error.why, fix=_FIX) from error
        except InputError as error:
            raise self._wrong(member, error.what) from error

    def _named_settings(
        self, name: str, rows: int
    ) -> tuple[list[SolverSettings], GuidanceSettings]:
        found = _KNOWN.fullmatch(name)
        if found is None or int(found[2]) != rows:
            raise self._wrong(
                name,
                f"without settings, a trajectory of {rows} rows is called "
                f"ancestral{rows} or ddim{rows}, with _guidedS behind it",
            )
        variance = "learned" if self._spec.model.learned_variance else "fixed_large"
        own: dict[str, Any] = {"solver": "ddim"}
        if found[1] == "ancestral":
            own = {"solver": "ddpm", "variance": variance}
        scale = float(found[3] or 1.0)
        guided = scale != 1.0 and self._spec.model.learned_variance
        return (
            [
                SolverSettings(**own, steps=rows, spacing=spacing, lambda_min=-100.0)  # type: ignore[arg-type]
                for spacing in SPACINGS
            ],
            GuidanceSettings(scale=scale, guide_variance=guided),
        )

    def _text(self, name: str) -> str:
        header = self._reader.header(name)
        if header.dtype.kind != "U" or header.shape or header.bytes > _MAX_TEXT * 4:
            raise self._wrong(name, f"it is no text of at most {_MAX_TEXT} characters")
        try:
            return str(self._reader.read(name))
        except ValueError as error:  # code points beyond Unicode
            raise self._wrong(name, "its text is not Unicode") from error

    def _float32(self, name: str, shape: tuple[int, ...]) -> Float32:
        found: Float32 = self._array(name, shape, "f", "float32")
        if found.dtype != np.float32:
            raise self._wrong(name, f"it is {found.dtype}, not float32")
        return found

    def _numbers(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        found = self._array(name, shape, "iuf", "numbers")
        return np.asarray(found, dtype=np.float64)

    def _array(self, name: str, shape: tuple[int, ...], kinds: str, what: str) -> Any:
        header = self._reader.header(name)
        if header.shape != shape or header.dtype.kind not in kinds:
            raise self._wrong(
                name,
                f"it is {header.dtype} of shape {list(header.shape)}; the model and "
                f"the other arrays ask for {what} of shape {list(shape)}",
            )
        found = self._reader.read(name)
        if not np.isfinite(found).all():
            raise self._wrong(name, "it holds NaN or infinity")
        return found

    def _check_times(self, name: str, times: npt.NDArray[np.float64]) -> None:
        last = self._spec.schedule.timesteps - 1
        if times.min() < 0 or times.max() > last:
            raise self._wrong(name, f"timesteps run from 0 to {last}")

    def _wrong(self, name: str, why: str) -> GoldenError:
        return _refused(self._path, f"{name}: {why}")
