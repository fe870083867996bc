"""The one exception tree: every error says what happened, why, and what to do.

A command turns any :class:`Id3pmError` into one message on standard error and the
error's ``exit_status``; a traceback is therefore always a bug of ours.
"""

from __future__ import annotations

from collections.abc import Sequence


class Id3pmError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        what: What went wrong, in one sentence.
        why: The cause or the value that was found, if known.
        fix: What the reader can do about it.
    """

    exit_status = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of what another library's error says, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:most]


def some_of(names: Sequence[str], most: int = 4) -> str:
    """The first names of a list, and how many more there are; empty for none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class InputError(Id3pmError):
    """A value the user gave is out of range, malformed or contradictory."""

    exit_status = 2


class MissingPackageError(Id3pmError):
    """A package of another installation tier is needed and not installed."""


class OutputError(Id3pmError):
    """A file or folder cannot be written where it was asked for."""


class CheckpointError(Id3pmError):
    """A checkpoint folder is missing, damaged or not what its config says."""


class BundleError(Id3pmError):
    """A bundle is missing, damaged, tampered with or of another format."""


class TrustError(BundleError):
    """A plan would be loaded that nobody the user trusts answers for."""


class RecipeError(InputError):
    """A recipe file has an unknown key, a wrong type or a value out of range."""


class IdentityError(Id3pmError):
    """Identity vectors are missing, malformed or of another FR model."""


class FaceError(Id3pmError):
    """No usable face in a picture: none, several, or too small."""


class EngineError(Id3pmError):
    """An engine cannot be loaded or fails while it runs."""


class DeviceMemoryError(EngineError):
    """A GPU's memory is not enough; with less at once it may be."""


class HandOverError(EngineError):
    """One engine's pictures cannot be given to another on their device."""


class NonFiniteError(EngineError):
    """The network produced NaN or infinity; the samples concerned are not written."""


class CancelledError(Id3pmError):
    """A run was stopped before its end because somebody asked for that."""


class DeadlineError(Id3pmError):
    """A run was stopped because it is, or would be, too late."""


class BuildError(Id3pmError):
    """A graph cannot be exported or a plan cannot be built."""


class ParityError(Id3pmError):
    """Two computations of the same thing differ by more than the tolerance."""


class GoldenError(Id3pmError):
    """Recorded golden data is missing, damaged or does not fit the model."""


class TrainingError(Id3pmError):
    """Training cannot start or continue."""


class BenchmarkError(Id3pmError):
    """A benchmark could time nothing, or found what it was to watch for."""
