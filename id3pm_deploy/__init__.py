"""Identity-conditioned diffusion models, from checkpoint to engine to picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

    from .api import Sampler

__version__ = "0.1.0"


def load(
    path: str | PathLike[str],
    backend: str = "auto",
    *,
    super_resolution: str | PathLike[str] | None = None,
    places: int = 8,
    waiting: int = 64,
    **engine: Any,
) -> Sampler:
    """A sampler for a BUNDLE or a CHECKPOINT; enter it to load the engine.

        with id3pm_deploy.load("BUNDLE") as sampler:
            for batch in sampler.sample("identity.npz", count=4, seed=0):
                batch.save("pictures")

    Args:
        path: The folder.
        backend: As ``--backend`` of ``id3pm-deploy sample``.
        super_resolution: A second stage, which enlarges what the first one makes; a
            BUNDLE may hold its own.
        places: Of ``Sampler.submit``: samples that share a batch.
        waiting: Of ``Sampler.submit``: requests that may wait for a place.
        engine: Further options of ``models.open_engine``: ``precision``, ``threads``,
            ``device``, ``trust`` and so on.

    Raises:
        InputError: It is neither, or an option is out of range.
        CheckpointError, BundleError: It is damaged.
    """
    from .api import load as load_sampler

    return load_sampler(
        path,
        backend,
        super_resolution=super_resolution,
        places=places,
        waiting=waiting,
        **engine,
    )
