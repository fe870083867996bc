"""What ships inside the package: a small trained checkpoint, synthetic identities."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "assets"


def shipped_checkpoint() -> Path:
    """The CHECKPOINT folder that `id3pm-deploy demo` uses."""
    return _FOLDER / "faces32"


def shipped_identities() -> Path:
    """Identity vectors of a few people who do not exist."""
    return _FOLDER / "synthetic-identities.npz"
