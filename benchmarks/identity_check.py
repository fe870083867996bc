"""Do a model's pictures look like the people they were made from, to another FR model?

    python benchmarks/identity_check.py MODEL FACES --judge SPEC --json FILE

FACES is a folder with one photo a person. Every photo is embedded with the model's own
FR model, pictures are sampled with fixed seeds (none is picked or left out), and a
second FR model compares each picture with every photo. Beside the figures stand chance
and the ceiling: the photos themselves, reduced to the model's resolution.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from id3pm_deploy import __version__
from id3pm_deploy.defaults import GUIDANCE, SOLVER, STEPS
from id3pm_deploy.errors import FaceError
from id3pm_deploy.files import write_json
from id3pm_deploy.generate import SampleSettings, conditions, make_pictures
from id3pm_deploy.guidance import GuidanceSettings
from id3pm_deploy.identity.alignment import FaceDetector, align
from id3pm_deploy.identity.embed import embed_images, read_photo
from id3pm_deploy.identity.embedders import Embedder, load_embedder
from id3pm_deploy.identity.vectors import identity_file
from id3pm_deploy.models import open_engine, open_model
from id3pm_deploy.progress import progress
from id3pm_deploy.solvers import SolverSettings, solver_table
from id3pm_deploy.training.pictures import picture_paths

Array = np.ndarray[Any, np.dtype[Any]]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Figures:
    """What a second FR model says of n pictures against m people.

    Attributes:
        same: Mean cosine of a picture with its own person's photo.
        others: Mean cosine with the other people's photos.
        auc: Chance that a picture is closer to its own person than to another.
        rank1: Share of pictures whose closest photo is their own person's.
        detected: Share of pictures in which a face was found; the others count as
            cosine -1 in ``auc`` and as misses in ``rank1``.
    """

    same: float
    others: float
    auc: float
    rank1: float
    detected: float

    @classmethod
    def of(cls, cosines: Array, own: Array) -> Figures:
        """From cosines [n, m] (NaN where no face was found) and own person [n]."""
        found = ~np.isnan(cosines[:, 0])
        filled = np.where(np.isnan(cosines), -1.0, cosines)
        mine = np.zeros(cosines.shape, bool)
        mine[np.arange(len(own)), own] = True
        positive, negative = filled[mine], np.sort(filled[~mine])
        below = np.searchsorted(negative, positive, "left")
        ties = np.searchsorted(negative, positive, "right") - below
        auc = float(((below + 0.5 * ties) / len(negative)).mean())
        hits = (filled.argmax(1) == own) & found
        return cls(
            same=float(cosines[mine & found[:, None]].mean()),
            others=float(cosines[~mine & found[:, None]].mean()),
            auc=auc,
            rank1=float(hits.mean()),
            detected=float(found.mean()),
        )


def with_intervals(cosines: Array, own: Array, people: int) -> dict[str, Any]:
    """Figures with 95 % bootstrap intervals over people."""
    centre = Figures.of(cosines, own)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(0, people, people)
        rows = np.concatenate([np.flatnonzero(own == person) for person in chosen])
        draws.append(list(vars(Figures.of(cosines[rows], own[rows])).values()))
    low, high = np.percentile(np.array(draws), [2.5, 97.5], axis=0)
    return {
        name: {"value": round(value, 4), "low": round(a, 4), "high": round(b, 4)}
        for (name, value), a, b in zip(
            vars(centre).items(), low.tolist(), high.tolist(), strict=True
        )
    }


def embed_or_nan(
    pictures: list[Array], embedder: Embedder, detector: FaceDetector
) -> Array:
    """Unit vectors [n, D]; NaN where no face is found."""
    rows = []
    for picture in pictures:
        try:
            row = embed_images([picture], embedder, detector, largest=True)[0]
            rows.append(row / np.linalg.norm(row))
        except FaceError:
            rows.append(np.full(embedder.dim, np.nan, np.float32))
    return np.stack(rows)


def reduced(rgb: Array, size: int, margin: float, detector: FaceDetector) -> Array:
    """A photo as the model could show it at best: aligned, at its resolution."""
    return align(rgb, detector.find_face(rgb, largest=True).points, size, margin)


def machine_facts() -> dict[str, Any]:
    """Processor, cores and versions of what took part."""
    names = ("numpy", "onnxruntime", "opencv-python-headless", "torch", "diffusers")
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = [x.split(":", 1)[1].strip() for x in lines if "model name" in x]
        processor = found[0] if found else processor
    facts: dict[str, Any] = {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("faces", type=click.Path(path_type=Path))
@click.option("--embedder", default="sface", help="The model's own FR model.")
@click.option("--judge", required=True, help="The second FR model.")
@click.option("--count", default=4, help="Pictures a person.")
@click.option("--limit", default=0, help="Use that many people, evenly spread.")
@click.option("--solver", default=SOLVER)
@click.option("--steps", default=STEPS)
@click.option("--guidance", default=GUIDANCE)
@click.option("--seed", default=0)
@click.option("--margin", default=1.15, help="The training's crop margin.")
@click.option("--threads", default=0)
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(
    model: Path,
    faces: Path,
    embedder: str,
    judge: str,
    count: int,
    limit: int,
    solver: str,
    steps: int,
    guidance: float,
    seed: int,
    margin: float,
    threads: int,
    target: Path | None,
) -> None:
    """Judge the pictures of MODEL for the people in FACES."""
    paths = picture_paths(faces)
    if limit:
        paths = [paths[i] for i in np.linspace(0, len(paths) - 1, limit).astype(int)]
    detector, own_fr, second = (
        FaceDetector(),
        load_embedder(embedder),
        load_embedder(judge),
    )
    photos = [read_photo(path) for path in paths]
    file = identity_file(
        embed_images(photos, own_fr, detector, largest=True), own_fr.name, own_fr.sha256
    )
    opened = open_model(model)
    settings = SampleSettings(
        solver=SolverSettings(solver=solver, steps=steps),
        guidance=GuidanceSettings(scale=guidance),
        seed=seed,
        count=count,
        batch_size=32,
    )
    wanted = conditions(opened.spec, file, count)
    batches = -(-len(wanted.ids) // settings.batch_size)
    rows = batches * len(solver_table(opened.spec, settings.solver))
    with (
        open_engine(opened, threads=threads) as engine,
        progress(rows, "pictures") as tick,
    ):
        made = make_pictures(engine, opened, settings, wanted, lambda _: tick())
        info = engine.info
    reference = embed_or_nan(photos, second, detector)
    size = opened.spec.model.image_size
    small = [reduced(photo, size, margin, detector) for photo in photos]
    people = np.arange(len(photos))
    own = np.repeat(people, count)
    found = {
        "model": with_intervals(
            embed_or_nan(list(made.pixels), second, detector) @ reference.T,
            own,
            len(people),
        ),
        "ceiling": with_intervals(
            embed_or_nan(small, second, detector) @ reference.T, people, len(people)
        ),
    }
    result = {
        "tool_version": __version__,
        "checkpoint_sha256": opened.weights_sha256,
        "people": len(photos),
        "pictures": len(own),
        "solver": solver,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "judge": second.name,
        "judge_sha256": second.sha256,
        "engine": f"{info.backend} {info.version} {info.precision}",
        "count": count,
        "margin": margin,
        "machine": machine_facts(),
        "chance": {"auc": 0.5, "rank1": round(1 / len(photos), 4)},
        **found,
    }
    for name, values in found.items():
        text = "  ".join(
            f"{key} {v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"
            for key, v in values.items()
        )
        click.echo(f"{name:<8} {text}")
    click.echo(json.dumps(result))
    if target is not None:
        write_json(target, result)


if __name__ == "__main__":
    main()
